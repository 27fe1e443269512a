"""Asymmetric image retrieval, the task of D3still and of the methods it is compared with.

A small student embeds queries, a large frozen teacher the gallery, so the student must live in the teacher's
space. A method of this family is its recipe and one function from a :class:`Pairs` to loss terms.

Two published modes: ``paper`` (the distillation loss alone on one shuffled batch) and ``repo`` (the authors'
later code: additionally cross-entropy and triplet on a second, P × K batch; the student runs twice a step).

The teacher's embedding of a training image can come from three places, which are three objectives:

    online     the teacher runs in the loop on its own augmented view (what the authors do)
    recorded   V augmented views per image, embedded once, their draws stored; a view is replayed at random
    clean      the embedding of the plain image, as in the gallery at test time
"""

# Shape legend: B = images of the distillation batch (of one rank before, of all ranks after gathering),
# D = embedding width, C = classes, N = training images, K = neighbours, Q/G = queries and gallery.

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.similarity import at_least_float32, full_precision, in_chunks, nearest_similarities, unit_rows
from models.embedder import Embedder, EmbedderConfig, check_buildable
from models.network import identity
from orchestrator import cache, checkpoint, distributed, published
from orchestrator.cache import Progress, Rows, silent
from orchestrator.datasets.images import Frames, ImageSet, RetrievalData, fetch
from orchestrator.datasets.sampling import identity_batches, own_part, shuffled_batches
from orchestrator.method import (
    Batch,
    Count,
    Experiment,
    FilePath,
    Losses,
    Method,
    Panel,
    Place,
    Positive,
    Range,
    Task,
    recipe_dict,
)
from orchestrator.methods import embedding, supervised
from orchestrator.methods.asymmetric_benchmarks import BENCHMARKS
from orchestrator.methods.embedding import EmbeddingRecipe, Pixels, Whole


@dataclass(frozen=True, kw_only=True)
class AsymmetricRecipe(EmbeddingRecipe):
    """Numbers of one asymmetric distillation; a method adds the weights of its own loss."""

    mode: Literal["paper", "repo"] = "paper"  # repo adds the supervised losses on a second batch
    batch_size: Annotated[int, Range(2)] = 512  # images of the distillation batch, over all workers
    together: Count = 1  # images of one identity in the distillation batch; 1 = shuffled without regard to identity
    double_losses: bool = False  # distillation losses in float64, as the authors' D3still, CSD and ROP; slow on GPUs
    # The frozen network that embeds the gallery.
    teacher: str = "resnet101.tv_in1k"
    teacher_width: Positive = 1.0
    teacher_size: Pixels = (256, 256)
    teacher_pad: Whole = 8
    teacher_weights: FilePath = ""  # a .safetensors file; empty = found by fingerprint, or trained now
    teacher_epochs: Count = 120
    teacher_learning_rate: Positive = 0.01
    teacher_optimizer: Literal["sgd", "adamw"] = "sgd"
    teacher_seed: Whole = 0
    teacher_pretrained: bool = True  # its training starts from timm's ImageNet weights
    views: Literal["online", "recorded", "clean"] = "online"  # where the teacher's embeddings come from
    num_views: Count = 8  # V of recorded views
    coupled: bool = False  # student and teacher see the same flip, crop and erasing
    evaluate_symmetric: bool = False  # also score the student on both sides


@dataclass(frozen=True)
class Neighbours:
    """The whole training set as the teacher sees it: what CSD and ROP originally compare a query with."""

    gallery_ND: Tensor  # raw clean embeddings
    index_NK: Tensor  # each image's nearest, itself included, by the teacher
    cosine_NK: Tensor

    def similarities(self, student_BD: Tensor, image_B: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """S^q and S^g of :func:`losses.similarity.nearest_similarities`, over the training set: (B, K) each."""
        index_BK, cosine_BK = self.index_NK[image_B, :top_k], self.cosine_NK[image_B, :top_k]

        def cosines(student_RD: Tensor, index_RK: Tensor) -> Tensor:
            gallery_RKD = unit_rows(self.gallery_ND[index_RK].flatten(0, 1)).view(*index_RK.shape, -1)
            with full_precision(student_RD):
                return (gallery_RKD.to(student_RD.dtype) @ student_RD[:, :, None])[:, :, 0]

        rows = 2**26 // (top_k * student_BD.shape[1])  # 256 MiB of neighbours at once
        return in_chunks(rows, cosines, unit_rows(student_BD), index_BK), cosine_BK.to(student_BD.dtype)


@dataclass(frozen=True)
class Pairs:
    """A distillation batch as losses see it: rows of all ranks, raw; the teacher's side has no gradient."""

    student: dict[str, Tensor]  # "embedding" (B, D), and what the method's student_outputs adds
    teacher: dict[str, Tensor]  # likewise
    label_B: Tensor  # class index, the same on both sides
    image_B: Tensor  # which training image
    student_classifier: nn.Module | None = None
    teacher_classifier: nn.Module | None = None
    neighbours: Neighbours | None = None

    @property
    def student_BD(self) -> Tensor:
        return self.student["embedding"]

    @property
    def teacher_BD(self) -> Tensor:
        return self.teacher["embedding"]

    def logits(self) -> tuple[Tensor, Tensor]:
        """Class scores of student and teacher, (B, C) each."""
        with full_precision(self.student_BD):
            student_BC = F.linear(self.student_BD, self.student_classifier.weight.to(self.student_BD.dtype))
            return student_BC, F.linear(self.teacher_BD, self.teacher_classifier.weight.to(self.teacher_BD.dtype))

    def nearest(self, top_k: int) -> tuple[Tensor, Tensor]:
        """Similarities to the teacher's nearest images, of the training set where the method asks for it."""
        if self.neighbours is not None:
            return self.neighbours.similarities(self.student_BD, self.image_B, top_k)
        return nearest_similarities(self.student_BD, self.teacher_BD, top_k)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a method of this family is beside its recipe: its terms and their weights, and rarely more."""

    weights: Callable[[Any], dict[str, float]]  # recipe -> weight of every term, 0 = off
    terms: Callable[[Any, Pairs], dict[str, Tensor]]  # the terms that are on, unweighted
    check: Callable[[Any], None] = lambda recipe: None  # raises ValueError
    teacher_classifier: bool = False  # the teacher's class scores are needed
    student_classifier: bool = False  # the student's too; one that no loss trains would stop data parallelism
    # How many whole-training-set neighbours the loss reads; 0 = none.
    neighbours: Callable[[Any], int] = lambda recipe: 0
    # Networks that train with the student but are not part of it: recipe, student -> module.
    heads: Callable[[Any, Embedder], nn.Module | None] = lambda recipe, student: None
    # What is computed of a batch of views; both hold at least "embedding".
    student_outputs: Callable[[Any, Embedder, nn.Module | None, Tensor], dict[str, Tensor]] = (
        lambda recipe, student, heads, images_BCHW: {"embedding": student(images_BCHW)}
    )
    teacher_outputs: Callable[[Any, Embedder, Tensor], dict[str, Tensor]] = lambda recipe, teacher, images_BCHW: {
        "embedding": teacher(images_BCHW)
    }
    outputs: str = ""  # name of these outputs in caches; empty = the embedding alone
    outputs_by: tuple[str, ...] = ()  # recipe fields that change the teacher's outputs
    prepared_by: tuple[str, ...] = ()  # the method's own recipe fields that change what is prepared


class AsymmetricDistillation(Task):
    """Student, frozen teacher (None when its outputs come from the cache) and the distillation loss."""

    def __init__(
        self,
        recipe: AsymmetricRecipe,
        method: Distillation,
        student: Embedder,
        teacher: Embedder | None = None,
        teacher_classifier: nn.Module | None = None,
        neighbours: Neighbours | None = None,
    ):
        super().__init__(student, teacher)
        self.recipe, self.method, self.weights = recipe, method, method.weights(recipe)
        self.heads = method.heads(recipe, student)
        self.teacher_classifier = None if teacher_classifier is None else teacher_classifier.requires_grad_(False)
        self.neighbours = neighbours
        self.augment = embedding.augmentation(recipe)

    def forward(self, batch: Batch) -> Losses:
        recipe, losses = self.recipe, Losses({}, {})
        if "distill" in batch:
            terms = self.method.terms(recipe, self.pairs(batch["distill"]))
            losses = Losses(terms, {name: self.weights[name] for name in terms})
        if "labelled" in batch:
            part = batch["labelled"]
            images_BCHW = self.augment(part["frames"], part["draws"], recipe.student_pad)
            supervised_losses = embedding.supervised_losses(recipe, self.student, images_BCHW, part["label"])
            losses = Losses(losses.terms | supervised_losses.terms, losses.weights | supervised_losses.weights)
        return losses

    def pairs(self, part: Batch) -> Pairs:
        """Both networks' outputs of a distillation batch, gathered from all ranks."""
        images_BCHW = self.augment(part["frames"], part["draws"], self.recipe.student_pad)
        student = self.method.student_outputs(self.recipe, self.student, self.heads, images_BCHW)
        return Pairs(
            student={name: distributed.gather(self._loss_type(x)) for name, x in student.items()},
            teacher={name: distributed.gather_without_gradient(x) for name, x in self._teacher(part).items()},
            label_B=distributed.gather_without_gradient(part["label"]),
            image_B=distributed.gather_without_gradient(part["image"]),
            student_classifier=self.student.classifier,
            teacher_classifier=self.teacher_classifier,
            neighbours=self.neighbours,
        )

    @torch.no_grad()
    def _teacher(self, part: Batch) -> dict[str, Tensor]:
        outputs = part.get("teacher")
        if outputs is None:
            images_BCHW = self.augment(part["teacher_frames"], part["teacher_draws"], self.recipe.teacher_pad)
            outputs = self.method.teacher_outputs(self.recipe, self.teacher, images_BCHW)
        return {name: self._loss_type(x) for name, x in outputs.items()}

    def _loss_type(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x.double() if self.recipe.double_losses else at_least_float32(x)


@dataclass
class Prepared:
    """What all trials of one teacher and data set share, opened by every worker."""

    data: RetrievalData
    train: Rows | Frames  # student frames
    query: Rows | Frames
    teacher: Embedder
    teacher_train: Rows | Frames | None  # teacher frames (online)
    targets: Rows | None  # teacher outputs of the training images (clean, recorded)
    clean: Rows | None  # teacher embeddings of the plain training images, where neighbours are taken from them
    nearest: Rows | None  # each training image's neighbours
    gallery: Rows  # teacher embeddings of the gallery
    teacher_fingerprint: str

    def gallery_embeddings(self, device: torch.device) -> Tensor:
        """All of the teacher's gallery, raw: (G, D)."""
        return torch.from_numpy(self.gallery(np.arange(len(self.gallery)))).to(device)

    def neighbours(self, device: torch.device) -> Neighbours | None:
        """The tables of the whole training set, on the device."""
        if self.nearest is None:
            return None
        rows = np.arange(len(self.nearest))
        tables = self.clean(rows), self.nearest(rows, "index").astype(np.int64), self.nearest(rows, "cosine")
        return Neighbours(*(torch.from_numpy(table).to(device) for table in tables))


def check(method: Distillation, recipe: AsymmetricRecipe, workers: int = 1) -> None:
    """Raises ValueError for values that are allowed alone but not together."""
    if not any(method.weights(recipe).values()) and not (recipe.mode == "repo" and recipe.cross_entropy):
        raise ValueError(
            "nothing to train on: every loss weight is 0, or only the triplet, which never reaches the neck"
        )
    check_buildable(_teacher_config(recipe), recipe.teacher_pretrained and not recipe.teacher_weights)
    embedding.check(recipe, workers if recipe.mode == "repo" else 1)
    if recipe.batch_size % workers:
        raise ValueError(f"a batch of {recipe.batch_size} images cannot be shared evenly by {workers} workers")
    if recipe.batch_size < 2 * workers:
        raise ValueError(
            f"a batch of {recipe.batch_size} images leaves {workers} workers fewer than 2 each, and a batch norm "
            f"in training needs 2; enlarge batch_size"
        )
    if recipe.batch_size % recipe.together or recipe.together == recipe.batch_size:
        raise ValueError(
            f"batch_size ({recipe.batch_size}) must hold several identities of together ({recipe.together}) images"
        )
    if recipe.coupled and recipe.views == "clean":
        raise ValueError("coupled=true needs views=online or views=recorded: clean teacher views are not augmented")
    method.check(recipe)


def check_top_k(recipe: Any) -> None:
    """Raises ValueError where neighbours are taken from a batch that has too few."""
    if recipe.top_k > recipe.batch_size and getattr(recipe, "neighbours", "batch") == "batch":
        raise ValueError(
            f"top_k ({recipe.top_k}) must be at most batch_size ({recipe.batch_size}), where neighbours are taken"
        )


def over_neighbours(
    weights: Callable[[Any], dict[str, float]], terms: Callable[[Any, Pairs], dict[str, Tensor]]
) -> Distillation:
    """A loss over the teacher's nearest images, of the batch or (``neighbours=train``) of the training set."""
    return Distillation(
        weights=weights,
        terms=terms,
        check=check_top_k,
        neighbours=lambda recipe: recipe.top_k if recipe.neighbours == "train" else 0,
        prepared_by=("neighbours",),
    )


def teacher_recipe(recipe: AsymmetricRecipe, place: Place) -> tuple[str, Any] | None:
    """How this recipe's teacher is trained, or None when its weights are given or already there."""
    if recipe.teacher_weights or (_teacher_folder(recipe, place) / "teacher.json").exists():
        return None
    return "supervised", _teacher_training(recipe)


def teacher_folder(recipe: AsymmetricRecipe, place: Place, progress: Progress = silent) -> str:
    """Where the trained teacher of this recipe is or will be; empty when its weights are given."""
    if recipe.teacher_weights:
        return ""
    return str(_teacher_folder(recipe, place, progress))


def prepare(
    method: Distillation, recipe: AsymmetricRecipe, place: Place, progress: Progress = silent
) -> dict[str, Any]:
    """Index, pixel caches, teacher outputs; returns what the record says about them."""
    device = embedding.default_device()
    recipe = _with_used_views(method, recipe)
    prepared = _open(method, recipe, place, progress, verify=True)
    facts = embedding.plain_facts(recipe, prepared.data) | {
        "teacher": networks(recipe)[1],
        "teacher_fingerprint": prepared.teacher_fingerprint,
        "gallery_cache": prepared.gallery.folder.name,
        "views": recipe.views + (f" ({recipe.num_views})" if recipe.views == "recorded" else ""),
    }
    if prepared.targets is not None:
        facts["target_cache"] = prepared.targets.folder.name
    if method.teacher_classifier:
        facts["classifier_fingerprint"] = cache.weights_hash(prepared.teacher.classifier)
    if prepared.nearest is not None:
        facts["neighbours_cache"] = prepared.nearest.folder.name
    gallery_GD = prepared.gallery_embeddings(device)
    if prepared.data.leave_one_out:
        query_QD = gallery_GD
    else:
        source = embedding.frames(recipe, prepared.data.query, recipe.teacher_size, place, progress)
        query_QD = embedding.embed(prepared.teacher.to(device), source, len(prepared.data.query), device)
    facts["teacher_metrics"] = embedding.score(recipe, prepared.data, query_QD, gallery_GD).log("teacher")
    random_QD = torch.randn(query_QD.shape, generator=torch.Generator().manual_seed(0)).to(device)
    chance = embedding.score(recipe, prepared.data, random_QD, gallery_GD)
    return facts | {"chance_metrics": chance.log("chance"), "valid_queries": chance.valid_queries}


def experiment(
    method: Distillation, recipe: AsymmetricRecipe, place: Place, rank: int, world: int, device: torch.device
) -> Experiment:
    """One training job of a method of this family."""
    recipe = _with_used_views(method, recipe)
    prepared = _open(method, recipe, place)
    train = prepared.data.train
    repo, distilling = _supervised(recipe), any(method.weights(recipe).values())
    classes = (repo and recipe.cross_entropy > 0) or (distilling and method.student_classifier)
    student = embedding.build_student(recipe, train.num_identities if classes else 0)
    task = AsymmetricDistillation(
        recipe,
        method,
        student,
        teacher=prepared.teacher if distilling and recipe.views == "online" else None,
        teacher_classifier=prepared.teacher.classifier if distilling else None,
        neighbours=prepared.neighbours(device) if distilling else None,
    ).to(device)
    load_labelled = embedding.labelled_loader(prepared.train, train)
    labels = torch.from_numpy(train.labels)

    def load_distill(request) -> Batch:
        indices, draws, teacher_draws, view = request
        batch = {"frames": torch.as_tensor(prepared.train(indices)), "draws": torch.from_numpy(draws),
                 "label": labels[indices], "image": torch.from_numpy(indices),
                 "names": embedding.names_of(train, indices)}  # fmt: skip
        if recipe.views == "online":
            batch["teacher_frames"] = torch.as_tensor(prepared.teacher_train(indices))
            batch["teacher_draws"] = torch.from_numpy(teacher_draws)
        else:
            rows = indices * (recipe.num_views if recipe.views == "recorded" else 1) + view
            batch["teacher"] = {
                "embedding" if column == "value" else column: torch.from_numpy(prepared.targets(rows, column))
                for column in prepared.targets.manifest["columns"]
                if column != "draws"
            }
            if recipe.coupled:
                batch["draws"] = torch.from_numpy(prepared.targets(rows, "draws"))
        return batch

    def load(request) -> Batch:
        labelled, distill = request
        return ({"labelled": load_labelled(labelled)} if labelled else {}) | (
            {"distill": load_distill(distill)} if distill else {}
        )

    decodes = any(isinstance(s, Frames) for s in (prepared.train, prepared.teacher_train))

    def batches(epoch: int) -> Iterator[Batch]:
        labelled = embedding.labelled_requests(recipe, train, epoch, rank, world) if repo else None
        distill = _distill_requests(recipe, train, epoch, rank, world) if distilling else None
        if labelled and distill:
            requests = zip(labelled, distill, strict=False)  # the shorter one ends the epoch, as in the authors' code
        elif labelled:
            requests = ((request, None) for request in labelled)
        else:
            requests = ((None, request) for request in distill)
        return fetch(load, requests, recipe.loader_workers if decodes else 0)

    gallery_GD = prepared.gallery_embeddings(device)
    labelled_images = recipe.identities_per_batch * recipe.images_per_identity if repo else 0
    return embedding.experiment(
        recipe,
        task,
        device,
        batches,
        evaluate=lambda task: _evaluate(recipe, prepared, place, gallery_GD, task, device),
        images_per_step=labelled_images + (recipe.batch_size if distilling else 0),
    )


def evaluate_student(
    method: Distillation, student: Embedder, recipe: AsymmetricRecipe, place: Place
) -> dict[str, float]:
    """Metrics of a stored student, recomputed from images and the teacher's gallery."""
    prepared, device = _open(method, recipe, place), embedding.default_device()
    gallery_GD = prepared.gallery_embeddings(device)
    return _evaluate(recipe, prepared, place, gallery_GD, Task(student.to(device)), device)


def pictures(method: Distillation, student: Embedder, recipe: AsymmetricRecipe, place: Place) -> dict[str, Panel]:
    """A few queries with what the student finds for them in the teacher's gallery."""
    prepared, device = _open(method, recipe, place), embedding.default_device()
    student = student.to(device)

    @torch.no_grad()
    def embed_queries(chosen: np.ndarray) -> Tensor:
        return student(embedding.model_input(student, prepared.query(chosen), device))

    gallery_GD = prepared.gallery_embeddings(device)
    return {"retrieval": embedding.panel(prepared.data, embed_queries, gallery_GD, recipe.teacher_size)}


def recipes(recipe: type, own: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A recipe for every benchmark of the family.

    Args:
        recipe: the method's recipe class; its defaults and the benchmark's settings are where everything starts.
        own: the method's numbers by benchmark, as patterns such as ``"*_repo*"`` or ``"inshop|sop"``; later ones win.
    """
    found = {}
    for benchmark, settings in BENCHMARKS.items():
        numbers: dict[str, Any] = {}
        for pattern, values in (own or {}).items():
            numbers |= values if any(fnmatch(benchmark, one) for one in pattern.split("|")) else {}
        found[benchmark] = recipe(**{**settings, **numbers})
    return found


def method(paper: str, recipes: dict[str, Any], distillation: Distillation) -> Method:
    """``METHOD`` of a method of this family."""
    names = {f.name for f in fields(AsymmetricRecipe)}
    prepared = {n for n in names if n.startswith("teacher")} | {
        "dataset", "evaluate_on", "ap", "evaluate_symmetric", "student_size", "embedding_dim", "pixel_cache",
        "skip_unreadable", "views", "num_views", "flip", "erase", "erase_fill", *distillation.outputs_by,
        *distillation.prepared_by,
    }  # fmt: skip
    return Method(
        paper=paper,
        recipes=recipes,
        check=partial(check, distillation),
        prepare=partial(prepare, distillation),
        experiment=partial(experiment, distillation),
        prepared_by=frozenset(prepared),
        preparation=f"asymmetric {distillation.outputs}"
        + (" with classifier" if distillation.teacher_classifier else ""),
        has_teacher=True,
        teacher=teacher_recipe,
        teacher_folder=teacher_folder,
        evaluate=partial(evaluate_student, distillation),
        after_training=embedding.after_training,
        networks=networks,
        pictures=partial(pictures, distillation),
    )


def networks(recipe: AsymmetricRecipe) -> tuple[str, str]:
    """Student and teacher as published tables name them."""
    return (
        published.network(recipe.student, recipe.student_size),
        published.network(recipe.teacher, recipe.teacher_size),
    )


def _with_used_views(method: Distillation, recipe: AsymmetricRecipe) -> AsymmetricRecipe:
    """The recipe with the teacher's views as the loss sees them: whole-set neighbours are those of plain images."""
    return replace(recipe, views="clean", coupled=False) if method.neighbours(recipe) else recipe


def _supervised(recipe: AsymmetricRecipe) -> bool:
    return recipe.mode == "repo" and (recipe.cross_entropy > 0 or recipe.triplet > 0)


def _open(
    method: Distillation, recipe: AsymmetricRecipe, place: Place, progress: Progress = silent, verify: bool = False
) -> Prepared:
    """Opens what is prepared, building what is missing."""
    recipe = _with_used_views(method, recipe)
    data = embedding.load_data(recipe, place, progress)
    root = place.folder("cache")
    teacher, fingerprint = _load_teacher(recipe, place)
    if method.teacher_classifier:
        _add_classifier(teacher, recipe, place, data.train.num_identities)
    network = identity(_teacher_config(recipe)) | {"precision": "float32"}
    clean = {"network": network, "augmentation": "none"}
    outputs = {}
    if method.outputs:
        outputs["outputs"] = {method.outputs: {name: recipe_dict(recipe)[name] for name in method.outputs_by}}
        outputs["classifier"] = cache.weights_hash(teacher.classifier) if method.teacher_classifier else ""

    def embeddings(images: ImageSet, source: Rows | Frames, transform: dict, embed: Callable, views: int = 1) -> Rows:
        return cache.embeddings(
            images, fingerprint, transform, lambda rows: embed(recipe, teacher, source, rows), root, views, progress,
            verify,
        )  # fmt: skip

    embedding_alone = partial(_embed_clean, partial(Distillation.teacher_outputs, recipe))
    teacher_outputs = partial(method.teacher_outputs, recipe)
    gallery_frames = embedding.frames(recipe, data.gallery, recipe.teacher_size, place, progress, verify)
    gallery = embeddings(data.gallery, gallery_frames, clean, embedding_alone)
    teacher_train = embedding.frames(recipe, data.train, recipe.teacher_size, place, progress, verify)
    targets = whole_set = nearest_images = None
    if recipe.views == "clean":
        targets = embeddings(data.train, teacher_train, clean | outputs, partial(_embed_clean, teacher_outputs))
    elif recipe.views == "recorded":
        recorded = {
            "network": network, "pad": recipe.teacher_pad, "flip": recipe.flip, "erase": recipe.erase,
            "erase_fill": recipe.erase_fill, "seed": recipe.teacher_seed, **outputs,
        }  # fmt: skip
        embed = partial(_embed_recorded, teacher_outputs)
        targets = embeddings(data.train, teacher_train, recorded, embed, recipe.num_views)
    if method.neighbours(recipe):
        if method.neighbours(recipe) > len(data.train):
            raise ValueError(f"top_k ({method.neighbours(recipe)}) is more than the {len(data.train)} training images")
        # Their views are clean ones: the same cache, unless the targets hold more than the embedding.
        whole_set = embeddings(data.train, teacher_train, clean, embedding_alone) if outputs else targets
        nearest_images = cache.neighbours(whole_set, method.neighbours(recipe), root, progress, verify)
    if recipe.evaluate_symmetric:
        embedding.frames(recipe, data.gallery, recipe.student_size, place, progress, verify)
    return Prepared(
        data=data,
        train=embedding.frames(recipe, data.train, recipe.student_size, place, progress, verify),
        query=embedding.frames(recipe, data.query, recipe.student_size, place, progress, verify),
        teacher=teacher,
        teacher_train=teacher_train if recipe.views == "online" else None,
        targets=targets,
        clean=whole_set,
        nearest=nearest_images,
        gallery=gallery,
        teacher_fingerprint=fingerprint,
    )


def _distill_requests(recipe: AsymmetricRecipe, train: ImageSet, epoch: int, rank: int, world: int) -> Iterator[tuple]:
    """(image numbers, student draws, teacher draws, recorded view) of this rank's shuffled batches."""
    if recipe.together == 1:
        batches = shuffled_batches(len(train), recipe.batch_size, (recipe.seed, epoch, 3))
    else:
        identities = recipe.batch_size // recipe.together
        batches = identity_batches(train.identity, identities, recipe.together, (recipe.seed, epoch, 3))
    augment, (height, width) = embedding.augmentation(recipe), recipe.student_size
    teacher_height, teacher_width = recipe.teacher_size
    draws = augment.draw(batches.size, width / height, (recipe.seed, epoch, 4)).reshape(*batches.shape, -1)
    teacher_draws = draws
    if not recipe.coupled:
        teacher_draws = augment.draw(batches.size, teacher_width / teacher_height, (recipe.seed, epoch, 5))
        teacher_draws = teacher_draws.reshape(*batches.shape, -1)
    views = np.zeros(batches.shape, np.int64)
    if recipe.views == "recorded":
        rng = np.random.default_rng(np.random.SeedSequence((recipe.seed, epoch, 6)))
        views = rng.integers(0, recipe.num_views, batches.shape)
    slots = own_part(np.arange(recipe.batch_size), rank, world)
    for step in range(len(batches)):
        yield batches[step, slots], draws[step, slots], teacher_draws[step, slots], views[step, slots]


def _evaluate(
    recipe: AsymmetricRecipe, prepared: Prepared, place: Place, gallery_GD: Tensor, task: Task, device: torch.device
) -> dict[str, float]:
    """Queries by the student, gallery by the teacher; optionally the student on both sides."""
    data = prepared.data
    query_QD = embedding.embed(task.student, prepared.query, len(data.query), device)
    metrics = embedding.score(recipe, data, query_QD, gallery_GD).log("val")
    if recipe.evaluate_symmetric:
        own_GD = query_QD
        if not data.leave_one_out:
            frames = embedding.frames(recipe, data.gallery, recipe.student_size, place)
            own_GD = embedding.embed(task.student, frames, len(data.gallery), device)
        metrics |= embedding.score(recipe, data, query_QD, own_GD).log("symmetric")
    return metrics


def _teacher_config(recipe: AsymmetricRecipe) -> EmbedderConfig:
    return EmbedderConfig(
        backbone=recipe.teacher, embedding_dim=recipe.embedding_dim, image_size=recipe.teacher_size,
        width=recipe.teacher_width,
    )  # fmt: skip


def _teacher_training(recipe: AsymmetricRecipe) -> supervised.Recipe:
    """The supervised recipe of the data set at the teacher's net and resolution; no field of the student enters."""
    base = supervised.METHOD.recipes[recipe.dataset]
    scale = recipe.teacher_epochs / base.epochs  # the schedule keeps its shape
    return replace(
        base,
        evaluate_on=recipe.evaluate_on,
        ap=recipe.ap,
        student=recipe.teacher,
        student_width=recipe.teacher_width,
        student_size=recipe.teacher_size,
        student_pad=recipe.teacher_pad,
        embedding_dim=recipe.embedding_dim,
        pretrained=recipe.teacher_pretrained,
        optimizer=recipe.teacher_optimizer,
        learning_rate=recipe.teacher_learning_rate,
        epochs=recipe.teacher_epochs,
        warmup_epochs=round(base.warmup_epochs * scale),
        constant_epochs=round(base.constant_epochs * scale),
        seed=recipe.teacher_seed,
        skip_unreadable=recipe.skip_unreadable,
    )


def _teacher_folder(recipe: AsymmetricRecipe, place: Place, progress: Progress = silent) -> Path:
    return embedding.teacher_folder(_teacher_training(recipe), place, progress)


def _load_teacher(recipe: AsymmetricRecipe, place: Place) -> tuple[Embedder, str]:
    teacher, _ = checkpoint.load_model(_teacher_path(recipe, place), _teacher_config(recipe))
    return teacher, cache.weights_hash(teacher)


def _add_classifier(teacher: Embedder, recipe: AsymmetricRecipe, place: Place, classes: int) -> None:
    """Raises ValueError when the teacher's classifier is not known, or not of these classes."""
    path = _teacher_path(recipe, place)
    teacher.classifier = checkpoint.load_classifier(path)
    shape = (classes, recipe.embedding_dim)
    if teacher.classifier is None:
        raise ValueError(
            f"this method needs the teacher's classifier, and {path.with_suffix('.classifier.safetensors')} does not "
            f"exist; {'store' if recipe.teacher_weights else f'remove {path.parent} to train it again, or store'} "
            f"a matrix 'weight' {shape} there, classes in order of identity"
        )
    if tuple(teacher.classifier.weight.shape) != shape:
        raise ValueError(
            f"the classifier beside {path} is {tuple(teacher.classifier.weight.shape)}, this data set needs {shape}"
        )


def _teacher_path(recipe: AsymmetricRecipe, place: Place) -> Path:
    return (
        Path(recipe.teacher_weights)
        if recipe.teacher_weights
        else _teacher_folder(recipe, place) / "teacher.safetensors"
    )


def _columns(outputs: dict[str, Tensor], **more: np.ndarray) -> dict[str, Tensor | np.ndarray]:
    """Teacher outputs as cache columns: the embedding is the value, everything is float32 or whole numbers."""
    outputs = {name: x.float() if x.is_floating_point() else x for name, x in outputs.items()}
    return {"value": outputs.pop("embedding"), **outputs, **more}


@torch.inference_mode()
def _embed_clean(
    outputs: Callable[[Embedder, Tensor], dict[str, Tensor]],
    recipe: AsymmetricRecipe,
    teacher: Embedder,
    source: Rows | Frames,
    rows: np.ndarray,
) -> Iterator[dict[str, Tensor | np.ndarray]]:
    device = embedding.default_device()
    teacher = teacher.to(device)
    for start in range(0, len(rows), 256):
        images_BCHW = embedding.model_input(teacher, source(rows[start : start + 256]), device)
        yield _columns(outputs(teacher, images_BCHW))


@torch.inference_mode()
def _embed_recorded(
    outputs: Callable[[Embedder, Tensor], dict[str, Tensor]],
    recipe: AsymmetricRecipe,
    teacher: Embedder,
    source: Rows | Frames,
    rows: np.ndarray,
) -> Iterator[dict[str, Tensor | np.ndarray]]:
    device, augment = embedding.default_device(), embedding.augmentation(recipe)
    teacher = teacher.to(device)
    height, width = recipe.teacher_size
    draws = augment.draw(len(rows), width / height, (recipe.teacher_seed, 7))
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        frames = torch.as_tensor(source(rows[part] // recipe.num_views)).to(device)
        images_BCHW = augment(frames, torch.from_numpy(draws[part]), recipe.teacher_pad)
        yield _columns(outputs(teacher, images_BCHW), draws=draws[part])
