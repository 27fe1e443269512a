"""Asymmetric image retrieval, the task of D3still and of the methods it is compared with.

A small student embeds queries, a large frozen teacher the gallery, so the student must live in the teacher's
space. A method of this family is one function from the whole batch's raw embeddings to loss terms.

Two published modes: ``paper`` (the distillation loss alone on one shuffled batch) and ``repo`` (the authors'
later code: additionally cross-entropy and triplet on a second, P × K batch; the student runs twice a step).

The teacher's embedding of a training image can come from three places, which are three objectives:

    online     the teacher runs in the loop on its own augmented view (what the authors do)
    recorded   V augmented views per image, embedded once, their draws stored; a view is replayed at random
    clean      the embedding of the plain image, as in the gallery at test time
"""

# Shape legend: B = images of one rank's batch, D = embedding width, Q/G = queries and gallery.

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from losses.similarity import at_least_float32
from models.embedder import Embedder, EmbedderConfig, check_backbone
from orchestrator import cache, checkpoint, distributed, find
from orchestrator.cache import Progress, Rows, silent
from orchestrator.datasets.augmentation import normalised
from orchestrator.datasets.images import Frames, ImageSet, RetrievalData, digest, fetch
from orchestrator.datasets.sampling import own_part, shuffled_batches
from orchestrator.evaluation.retrieval import nearest
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
    Task,
    recipe_dict,
)
from orchestrator.methods import embedding, supervised
from orchestrator.methods.embedding import EmbeddingRecipe, Pixels, Whole


@dataclass(frozen=True, kw_only=True)
class AsymmetricRecipe(EmbeddingRecipe):
    """Numbers of one asymmetric distillation; a method adds the weights of its own loss."""

    mode: Literal["paper", "repo"] = "paper"  # repo adds the supervised losses on a second batch
    batch_size: Count = 512  # images of the distillation batch, over all workers
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


# recipe -> weight of every term, 0 = off
Weights = Callable[[Any], dict[str, float]]
# recipe, raw student and raw teacher embeddings (B, D) -> the terms that are on, unweighted
Terms = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]


class AsymmetricDistillation(Task):
    """Student, frozen teacher (None when its embeddings come from the cache) and the distillation loss."""

    def __init__(
        self, recipe: AsymmetricRecipe, student: Embedder, teacher: Embedder | None, weights: Weights, terms: Terms
    ):
        super().__init__(student, teacher)
        self.recipe, self.weights, self.terms = recipe, weights(recipe), terms
        self.augment = embedding.augmentation(recipe)

    def forward(self, batch: Batch) -> Losses:
        recipe, losses = self.recipe, Losses({}, {})
        if "distill" in batch:
            part = batch["distill"]
            student_BD = self.student(self.augment(part["frames"], part["draws"], recipe.student_pad))
            terms = self.terms(recipe, distributed.gather(at_least_float32(student_BD)), self._teacher(part))
            losses = Losses(terms, {name: self.weights[name] for name in terms})
        if "labelled" in batch:
            part = batch["labelled"]
            images_BCHW = self.augment(part["frames"], part["draws"], recipe.student_pad)
            supervised_losses = embedding.supervised_losses(recipe, self.student, images_BCHW, part["label"])
            losses = Losses(losses.terms | supervised_losses.terms, losses.weights | supervised_losses.weights)
        return losses

    @torch.no_grad()
    def _teacher(self, part: Batch) -> Tensor:
        """Raw teacher embeddings of the whole batch of all ranks."""
        if self.teacher is None:
            return distributed.gather_without_gradient(part["teacher"])
        images_BCHW = self.augment(part["teacher_frames"], part["teacher_draws"], self.recipe.teacher_pad)
        return distributed.gather_without_gradient(at_least_float32(self.teacher(images_BCHW)))


@dataclass
class Prepared:
    """What all trials of one teacher and data set share, opened by every worker."""

    data: RetrievalData
    train: Rows | Frames  # student frames
    query: Rows | Frames
    teacher: Embedder
    teacher_train: Rows | Frames | None  # teacher frames (online)
    targets: Rows | None  # teacher embeddings of the training images (clean, recorded)
    gallery: Rows  # teacher embeddings of the gallery
    teacher_fingerprint: str

    def gallery_embeddings(self, device: torch.device) -> Tensor:
        """All of the teacher's gallery, raw: (G, D)."""
        return torch.from_numpy(self.gallery(np.arange(len(self.gallery)))).to(device)


def check(recipe: AsymmetricRecipe, weights: dict[str, float], workers: int = 1) -> None:
    """Raises ValueError for values that are allowed alone but not together."""
    if not any(weights.values()) and not _supervised(recipe):
        raise ValueError("nothing to train on: every loss weight is 0")
    check_backbone(recipe.teacher)
    embedding.check(recipe, workers if recipe.mode == "repo" else 1)
    if recipe.batch_size % workers:
        raise ValueError(f"a batch of {recipe.batch_size} images cannot be shared evenly by {workers} workers")
    if recipe.coupled and recipe.views == "clean":
        raise ValueError("coupled=true needs views=online or views=recorded: clean teacher views are not augmented")


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


def prepare(recipe: AsymmetricRecipe, place: Place, progress: Progress = silent) -> dict[str, Any]:
    """Index, pixel caches, teacher embeddings; returns what the record says about them."""
    device = embedding.default_device()
    prepared = _open(recipe, place, progress, verify=True)
    facts = embedding.plain_facts(prepared.data) | {
        "teacher_fingerprint": prepared.teacher_fingerprint,
        "gallery_cache": prepared.gallery.folder.name,
        "views": recipe.views + (f" ({recipe.num_views})" if recipe.views == "recorded" else ""),
    }
    if prepared.targets is not None:
        facts["target_cache"] = prepared.targets.folder.name
    gallery_GD = prepared.gallery_embeddings(device)
    if prepared.data.leave_one_out:
        query_QD = gallery_GD
    else:
        source = embedding.frames(recipe, prepared.data.query, recipe.teacher_size, place, progress)
        query_QD = embedding.embed(prepared.teacher.to(device), source, len(prepared.data.query), device)
    facts["teacher_metrics"] = embedding.score(prepared.data, query_QD, gallery_GD).log("teacher")
    return facts


def experiment(
    weights: Weights, terms: Terms, recipe: AsymmetricRecipe, place: Place, rank: int, world: int, device: torch.device
) -> Experiment:
    """One training job of a method of this family."""
    prepared = _open(recipe, place)
    train = prepared.data.train
    repo, distilling = _supervised(recipe), any(weights(recipe).values())
    student = embedding.build_student(recipe, train.num_identities if repo else 0)
    teacher = prepared.teacher if distilling and recipe.views == "online" else None
    task = AsymmetricDistillation(recipe, student, teacher, weights, terms).to(device)
    load_labelled = embedding.labelled_loader(prepared.train, train)

    def load_distill(request) -> Batch:
        indices, draws, teacher_draws, view = request
        batch = {"frames": torch.as_tensor(prepared.train(indices)), "draws": torch.from_numpy(draws),
                 "names": embedding.names_of(train, indices)}  # fmt: skip
        if recipe.views == "online":
            batch["teacher_frames"] = torch.as_tensor(prepared.teacher_train(indices))
            batch["teacher_draws"] = torch.from_numpy(teacher_draws)
        else:
            rows = indices * (recipe.num_views if recipe.views == "recorded" else 1) + view
            batch["teacher"] = torch.from_numpy(prepared.targets(rows))
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


def evaluate_student(student: Embedder, recipe: AsymmetricRecipe, place: Place) -> dict[str, float]:
    """Metrics of a stored student, recomputed from images and the teacher's gallery."""
    prepared, device = _open(recipe, place), embedding.default_device()
    gallery_GD = prepared.gallery_embeddings(device)
    return _evaluate(recipe, prepared, place, gallery_GD, Task(student.to(device)), device)


def panel(student: Embedder, recipe: AsymmetricRecipe, place: Place, queries: int = 6, results: int = 10) -> Panel:
    """A few queries, spread over the set, with their first results."""
    prepared, device = _open(recipe, place), embedding.default_device()
    data = prepared.data
    chosen = np.unique(np.linspace(0, len(data.query) - 1, queries).astype(int))
    query_QD = student.to(device)(normalised(torch.as_tensor(prepared.query(chosen)).to(device))).detach()
    gallery_GD = prepared.gallery_embeddings(device)
    removed_QG = np.zeros((len(chosen), len(data.gallery)), bool)
    if data.leave_one_out:
        removed_QG[np.arange(len(chosen)), chosen] = True
    if data.camera_filter:
        removed_QG |= (data.query.identity[chosen, None] == data.gallery.identity[None]) & (
            data.query.camera[chosen, None] == data.gallery.camera[None]
        )
    found_QR = nearest(query_QD, gallery_GD, min(results, len(data.gallery) - int(removed_QG.sum(1).max())), removed_QG)
    shown = Frames(data.gallery, recipe.teacher_size if max(recipe.teacher_size) <= 96 else (96, 96))
    return Panel(
        title="Queries and their first results, right framed green, wrong framed red",
        query=Frames(data.query, shown.size)(chosen).permute(0, 2, 3, 1).numpy(),
        results=np.stack([shown(row).permute(0, 2, 3, 1).numpy() for row in found_QR]),
        correct=data.query.identity[chosen, None] == data.gallery.identity[found_QR],
    )


def method(
    paper: str, recipes: dict[str, Any], weights: Weights, terms: Terms, check: Callable[[Any, int], None]
) -> Method:
    """``METHOD`` of a method of this family."""
    names = {f.name for f in fields(AsymmetricRecipe)}
    prepared = {n for n in names if n.startswith("teacher")} | {
        "dataset", "evaluate_on", "evaluate_symmetric", "student_size", "embedding_dim", "pixel_cache",
        "skip_unreadable", "views", "num_views", "flip", "erase", "erase_fill",
    }  # fmt: skip
    return Method(
        paper=paper,
        recipes=recipes,
        check=check,
        prepare=prepare,
        experiment=partial(experiment, weights, terms),
        prepared_by=frozenset(prepared),
        has_teacher=True,
        teacher=teacher_recipe,
        teacher_folder=teacher_folder,
        evaluate=evaluate_student,
        panel=panel,
    )


def _supervised(recipe: AsymmetricRecipe) -> bool:
    return recipe.mode == "repo" and (recipe.cross_entropy > 0 or recipe.triplet > 0)


def _open(recipe: AsymmetricRecipe, place: Place, progress: Progress = silent, verify: bool = False) -> Prepared:
    """Opens what is prepared, building what is missing."""
    data = embedding.load_data(recipe, place, progress)
    root = place.folder("cache")
    teacher, fingerprint = _load_teacher(recipe, place)
    network = asdict(_teacher_config(recipe)) | {"precision": "float32"}
    clean = {"network": network, "augmentation": "none"}
    gallery_frames = embedding.frames(recipe, data.gallery, recipe.teacher_size, place, progress, verify)
    gallery = cache.embeddings(
        data.gallery, fingerprint, clean, lambda rows: _embed_clean(teacher, gallery_frames, rows), root,
        progress=progress, verify=verify,
    )  # fmt: skip
    teacher_train = embedding.frames(recipe, data.train, recipe.teacher_size, place, progress, verify)
    targets = None
    if recipe.views == "clean":
        targets = cache.embeddings(
            data.train, fingerprint, clean, lambda rows: _embed_clean(teacher, teacher_train, rows), root,
            progress=progress, verify=verify,
        )  # fmt: skip
    elif recipe.views == "recorded":
        recorded = {
            "network": network, "pad": recipe.teacher_pad, "flip": recipe.flip, "erase": recipe.erase,
            "erase_fill": recipe.erase_fill, "seed": recipe.teacher_seed,
        }  # fmt: skip
        targets = cache.embeddings(
            data.train, fingerprint, recorded, lambda rows: _embed_recorded(recipe, teacher, teacher_train, rows),
            root, views=recipe.num_views, progress=progress, verify=verify,
        )  # fmt: skip
    if recipe.evaluate_symmetric:
        embedding.frames(recipe, data.gallery, recipe.student_size, place, progress, verify)
    return Prepared(
        data=data,
        train=embedding.frames(recipe, data.train, recipe.student_size, place, progress, verify),
        query=embedding.frames(recipe, data.query, recipe.student_size, place, progress, verify),
        teacher=teacher,
        teacher_train=teacher_train if recipe.views == "online" else None,
        targets=targets,
        gallery=gallery,
        teacher_fingerprint=fingerprint,
    )


def _distill_requests(recipe: AsymmetricRecipe, train: ImageSet, epoch: int, rank: int, world: int) -> Iterator[tuple]:
    """(image numbers, student draws, teacher draws, recorded view) of this rank's shuffled batches."""
    batches = shuffled_batches(len(train), recipe.batch_size, (recipe.seed, epoch, 3))
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
    metrics = embedding.score(data, query_QD, gallery_GD).log("val")
    if recipe.evaluate_symmetric:
        own_GD = query_QD
        if not data.leave_one_out:
            frames = embedding.frames(recipe, data.gallery, recipe.student_size, place)
            own_GD = embedding.embed(task.student, frames, len(data.gallery), device)
        metrics |= embedding.score(data, query_QD, own_GD).log("symmetric")
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
    # A teacher is its training recipe and its training images; where and how fast it was computed is not part.
    values = recipe_dict(_teacher_training(recipe))
    for name in ("pixel_cache", "loader_workers", "compile", "evaluate_every", "evaluate_on", "skip_unreadable"):
        values.pop(name)
    data = find.dataset(recipe.dataset)(place.data_root, recipe.evaluate_on)
    train = cache.indexed(data.train, place.folder("cache"), recipe.skip_unreadable, progress)
    return Path(place.folder("teachers", digest([values, train.fingerprint])[:32]))


def _load_teacher(recipe: AsymmetricRecipe, place: Place) -> tuple[Embedder, str]:
    path = (
        Path(recipe.teacher_weights)
        if recipe.teacher_weights
        else _teacher_folder(recipe, place) / "teacher.safetensors"
    )
    teacher, _ = checkpoint.load_model(path, _teacher_config(recipe))
    return teacher, cache.weights_hash(teacher)


@torch.inference_mode()
def _embed_clean(teacher: Embedder, source: Rows | Frames, rows: np.ndarray) -> Iterator[tuple[Tensor, None]]:
    device = embedding.default_device()
    teacher = teacher.to(device)
    for start in range(0, len(rows), 256):
        yield teacher(normalised(torch.as_tensor(source(rows[start : start + 256])).to(device))), None


@torch.inference_mode()
def _embed_recorded(
    recipe: AsymmetricRecipe, teacher: Embedder, source: Rows | Frames, rows: np.ndarray
) -> Iterator[tuple[Tensor, np.ndarray]]:
    device, augment = embedding.default_device(), embedding.augmentation(recipe)
    teacher = teacher.to(device)
    height, width = recipe.teacher_size
    draws = augment.draw(len(rows), width / height, (recipe.teacher_seed, 7))
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        frames = torch.as_tensor(source(rows[part] // recipe.num_views)).to(device)
        yield teacher(augment(frames, torch.from_numpy(draws[part]), recipe.teacher_pad)), draws[part]
