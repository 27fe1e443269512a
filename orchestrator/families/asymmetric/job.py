"""What must be ready for an asymmetric distillation, how it is trained, scored and shown."""

# Shape legend: Q and G = queries and gallery, D = embedding width.

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.embedder import Embedder, EmbedderConfig
from models.network import identity
from orchestrator import cache, checkpoint, find, published
from orchestrator.cache import Rows
from orchestrator.datasets.augmentation import Augmentation
from orchestrator.datasets.images import ImageSet, fetch
from orchestrator.datasets.sampling import identity_batches, own_part, shuffled_batches
from orchestrator.families.asymmetric.pairs import AsymmetricDistillation, Neighbours
from orchestrator.families.asymmetric.recipe import AsymmetricRecipe, Distillation, check, is_supervised, used_views
from orchestrator.families.retrieval import data, search, supervised
from orchestrator.families.retrieval import recipe as retrieval
from orchestrator.families.retrieval.data import Source
from orchestrator.families.retrieval.teacher import ready_file, teacher_need
from orchestrator.method import Batch, Evaluation, Experiment, Method, Metric, Where
from orchestrator.needs import Need, Place, Prepared, Ready, Report
from orchestrator.pictures import Picture
from orchestrator.recipe import flat, recipe_from

_BLOCK = 256  # images of one forward pass of the teacher


class AsymmetricMethod(Method):
    """A method of this family: a paper, its recipes, and its loss."""

    family = "asymmetric"
    metrics = (
        *retrieval.METRICS,
        Metric("symmetric/map", "mAP, student on both sides"),
        Metric("symmetric/rank1", "R1, student on both sides"),
    )

    def __init__(self, paper: str, recipes: Mapping[str, AsymmetricRecipe], distillation: Distillation):
        self.paper, self.recipes, self.distillation = paper, recipes, distillation

    def check(self, recipe: AsymmetricRecipe, workers: int = 1) -> None:
        check(self.distillation, recipe, workers)

    def needs(self, recipe: AsymmetricRecipe, place: Place, purpose: Literal["train", "score"] = "train") -> dict:
        recipe = used_views(self.distillation, recipe)
        sides = data.index_needs(recipe.data, place)
        gallery = sides.get("gallery", sides["query"])
        found = self._teacher_needs(recipe, sides["train"])
        student, teacher = recipe.student.size, recipe.teacher.network.size
        pixels = partial(data.pixel_need, recipe.run)
        found |= _named("gallery teacher pixels", pixels(gallery, teacher))
        found |= _named("query pixels", pixels(sides["query"], student))
        if recipe.evaluate_symmetric and "gallery" in sides:
            found |= _named("gallery pixels", pixels(gallery, student))
        found["gallery embeddings"] = self._embeddings(recipe, found, gallery, "clean", plain=True)
        found |= {side: need for side, need in sides.items() if side != "train"}
        if purpose == "score":
            return {role: need for role, need in found.items() if role not in ("teacher", "classifier")}
        searched = {"query": sides["query"], "gallery": gallery, "teacher": found["teacher"]}
        searched["embeddings"] = found["gallery embeddings"]
        if "gallery" in sides:
            searched |= pixels(sides["query"], teacher)
        made_from = {"ap": recipe.ap, "network": self.networks(recipe)[1]}
        found["references"] = Need(
            "references", made_from, searched, self._how(recipe), "the teacher's own score", network=True
        )
        found["train"] = sides["train"]
        found |= _named("train pixels", pixels(sides["train"], student))
        return found | self._target_needs(recipe, found, sides["train"])

    def _teacher_needs(self, recipe: AsymmetricRecipe, train: Need) -> dict[str, Need]:
        config = _teacher_config(recipe)
        teacher = teacher_need(recipe.teacher, "supervised", *_teacher_training(recipe), config, train)
        found = {"teacher": teacher}
        if self.distillation.teacher_classifier:
            made_from = {"width": recipe.embedding_dim}
            found["classifier"] = Need("classifier", made_from, {"teacher": teacher, "train": train})
        return found

    def _target_needs(self, recipe: AsymmetricRecipe, found: dict[str, Need], train: Need) -> dict[str, Need]:
        """The teacher's outputs of the training images, and its neighbours where the loss reads them."""
        if recipe.views == "online":
            return _named("teacher train pixels", data.pixel_need(recipe.run, train, recipe.teacher.network.size))
        made = {"targets": self._embeddings(recipe, found, train, recipe.views)}
        count = self.distillation.neighbours(recipe)
        if count:
            # Their views are clean ones: the same table, unless the targets hold more than the embedding.
            made["clean targets"] = self._embeddings(recipe, found, train, "clean", plain=True)
            images = train.how["images"]
            if count > images:
                raise ValueError(f"top_k ({count}) is more than the {images} training images")
            made["neighbours"] = Need(
                "neighbours", {"count": cache.neighbour_count(count, images)}, {"embeddings": made["clean targets"]},
                title="nearest training images", network=True,
            )  # fmt: skip
        return made

    def _embeddings(
        self, recipe: AsymmetricRecipe, found: dict[str, Need], images: Need, views: str, plain: bool = False
    ) -> Need:
        """A table of the teacher's outputs; ``plain`` = the embedding alone, whatever the method needs of training."""
        network = identity(_teacher_config(recipe)) | {"precision": "float32"}
        outputs = {} if plain or not self.distillation.outputs else self._outputs(recipe)
        transform: dict[str, Any] = {"network": network, "augmentation": "none"}
        if views == "recorded":
            transform = {
                "network": network, "pad": recipe.teacher.network.pad, "flip": recipe.augment.flip,
                "erase": recipe.augment.erase, "erase_fill": recipe.augment.erase_fill,
                "seed": recipe.teacher.train.seed,
            }  # fmt: skip
        after = {"images": images, "teacher": found["teacher"]}
        after |= data.pixel_need(recipe.run, images, recipe.teacher.network.size)
        if outputs and "classifier" in found:
            after["classifier"] = found["classifier"]
        count = recipe.num_views if views == "recorded" else 1
        side = images.made_from["side"]
        return data.shards(
            Need(
                "embeddings", {"transform": transform | outputs, "views": count}, after, self._how(recipe),
                f"teacher embeddings of {side}" + (f", {count} views" if count > 1 else ""), network=True,
            )
        )  # fmt: skip

    def _outputs(self, recipe: AsymmetricRecipe) -> dict[str, Any]:
        return {"outputs": {self.distillation.outputs: self.distillation.outputs_by(recipe)}}

    def _how(self, recipe: AsymmetricRecipe) -> dict[str, Any]:
        return {"recipe": flat(recipe)}

    def make(self, need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
        if need.kind in ("index", "pixels"):
            return data.make(need, after, where, progress)
        place = where.place
        if need.kind == "neighbours":
            rows = cache.open_rows(place.folder(after["embeddings"].path))
            table = cache.neighbours(rows, need.made_from["count"], place.folder("cache"), progress, verify=True)
            return data.ready_rows(need, table, place)
        if need.kind == "classifier":
            return _check_classifier(need, after, place)
        if need.kind == "teacher file":
            return ready_file(need, place)
        recipe = recipe_from(self.recipes["demo"], need.how["recipe"])
        if need.kind == "references":
            return _references(need, after, recipe, where)
        return self._make_embeddings(need, after, recipe, where, progress)

    def _make_embeddings(
        self, need: Need, after: Mapping[str, Ready], recipe: AsymmetricRecipe, where: Where, progress: Report
    ) -> Ready:
        place, root = where.place, where.place.folder("cache")
        transform, views = dict(need.made_from["transform"]), need.made_from["views"]
        if "outputs" in transform:
            transform["classifier"] = after["classifier"].fingerprint if "classifier" in after else ""
        made_from = cache.embeddings_made_from(
            after["images"].fingerprint, after["teacher"].fingerprint, transform, views
        )
        whole = cache.there(root, "embeddings", made_from)
        if whole is not None and need.kind == "embedding shard":
            return data.ready_rows(need, whole, place)
        parts = [after[role] for role in after if role.startswith("shard ")]
        if parts:
            if whole is None:
                whole = cache.joined(
                    root, "embeddings", made_from, [cache.open_rows(place.folder(p.path)) for p in parts]
                )
            return data.ready_rows(need, whole, place)
        teacher = _load_teacher(place, after).to(where.device)
        source = data.open_after(place, after, recipe.teacher.network.size)
        images = data.open_images(place, after["images"])
        outputs = self.distillation.teacher_outputs if "outputs" in transform else Distillation.teacher_outputs
        embed = _EmbedViews(
            partial(outputs, recipe), teacher, source, where.device, len(images) * views,
            recipe if "augmentation" not in transform else None,
        )  # fmt: skip
        rows = data.shard_rows(need, len(images) * views)
        if "shard" in need.made_from:
            made_from |= {"shard": need.made_from["shard"]}
        title = images.name + (f", {views} views" if views > 1 else "")
        table = cache.embeddings(made_from, embed, rows, root, title, progress, verify=True)
        return data.ready_rows(need, table, place)

    def experiment(self, recipe: AsymmetricRecipe, prepared: Prepared, where: Where) -> Experiment:
        method, recipe = self.distillation, used_views(self.distillation, recipe)
        train, device = data.open_images(prepared.place, prepared["train"]), where.device
        distilling = any(method.weights(recipe).values())
        classes = (is_supervised(recipe) and recipe.labelled.cross_entropy > 0) or (
            distilling and method.student_classifier
        )
        # Before the student, whose seed decides its weights and those of the method's heads after it.
        teacher = _load_teacher(prepared.place, prepared) if distilling and recipe.views == "online" else None
        classifier = _open_classifier(prepared) if distilling else None
        student = retrieval.build_embedder(
            recipe.student, recipe.embedding_dim, train.num_identities if classes else 0, recipe.train.seed
        )
        neighbours = _open_neighbours(prepared, device) if distilling else None
        task = AsymmetricDistillation(recipe, method, student, teacher, classifier, neighbours).to(device)
        frames = data.open_frames(prepared, "train pixels", train, recipe.student.size)
        teacher_frames = None
        if recipe.views == "online" and distilling:
            teacher_frames = data.open_frames(prepared, "teacher train pixels", train, recipe.teacher.network.size)
        targets = cache.open_rows(prepared.path("targets")) if distilling and "targets" in prepared else None
        load = LoadPairs(recipe, data.LoadLabelled(frames, train), teacher_frames, targets)
        requests = PairRequests(recipe, train, is_supervised(recipe), distilling)
        workers = recipe.run.loader_workers if data.decodes(frames, teacher_frames) else 0

        def batches(epoch: int) -> Iterator[Batch]:
            return fetch(load, requests(epoch, where.rank, where.world), workers)

        return supervised.experiment(
            recipe,
            task,
            where,
            batches,
            evaluate=lambda task: self.score(task.student, recipe, prepared, where),
            items_per_step=requests.images_per_step,
        )

    def score(self, student: Embedder, recipe: AsymmetricRecipe, prepared: Prepared, where: Where) -> Evaluation:
        """Queries by the student, gallery by the teacher; optionally the student on both sides."""
        found, device = data.open_data(prepared), where.device
        frames = data.open_frames(prepared, "query pixels", found.query, recipe.student.size)
        workers = recipe.run.loader_workers
        query_QD = search.embed(student, frames, len(found.query), device, workers=workers)
        gallery_GD = search.whole(cache.open_rows(prepared.path("gallery embeddings")), device)
        metrics = search.score(recipe.ap, found, query_QD, gallery_GD).log("val")
        if recipe.evaluate_symmetric:
            own_GD = query_QD
            if not found.leave_one_out:
                frames = data.open_frames(prepared, "gallery pixels", found.gallery, recipe.student.size)
                own_GD = search.embed(student, frames, len(found.gallery), device, workers=workers)
            metrics |= search.score(recipe.ap, found, query_QD, own_GD).log("symmetric")
        return Evaluation(metrics, search.Found(query_QD, gallery_GD))

    def pictures(
        self, student: Embedder, recipe: AsymmetricRecipe, prepared: Prepared, evaluation: Evaluation, where: Where
    ) -> dict[str, Picture]:
        """A few queries with what the student finds for them in the teacher's gallery."""
        found = data.open_data(prepared)
        query = data.open_frames(prepared, "query pixels", found.query, recipe.student.size)
        gallery = data.open_frames(prepared, "gallery teacher pixels", found.gallery, recipe.teacher.network.size)
        return {"retrieval": search.panel(found, evaluation.found, query, gallery)}

    def networks(self, recipe: AsymmetricRecipe) -> tuple[str, str]:
        student, teacher = recipe.student, recipe.teacher.network
        return published.network(student.name, student.size), published.network(teacher.name, teacher.size)

    def after_training(self, recipe: AsymmetricRecipe) -> frozenset[str]:
        return frozenset({"ap"})


def method(paper: str, recipes: Mapping[str, AsymmetricRecipe], distillation: Distillation) -> AsymmetricMethod:
    """``METHOD`` of a method of this family."""
    return AsymmetricMethod(paper, recipes, distillation)


@dataclass(frozen=True)
class PairRequests:
    """An epoch's requests of one rank: (labelled part, distillation part), either of which may be None."""

    recipe: AsymmetricRecipe
    train: ImageSet
    labelled: bool
    distilling: bool

    @property
    def images_per_step(self) -> int:
        labelled = self.recipe.labelled.images if self.labelled else 0
        return labelled + (self.recipe.batch_size if self.distilling else 0)

    def __call__(self, epoch: int, rank: int, world: int) -> Iterator[tuple[Any, Any]]:
        labelled = self._labelled(epoch, rank, world) if self.labelled else None
        distill = self._distill(epoch, rank, world) if self.distilling else None
        if labelled and distill:
            yield from zip(labelled, distill, strict=False)  # the shorter ends the epoch, as in the authors' code
        elif labelled:
            yield from ((request, None) for request in labelled)
        else:
            yield from ((None, request) for request in distill)

    def _labelled(self, epoch: int, rank: int, world: int) -> Iterator[Any]:
        recipe, (height, width) = self.recipe, self.recipe.student.size
        requests = data.LabelledRequests(
            self.train.identity, recipe.labelled, data.augmentation(recipe), width / height, recipe.train.seed,
            recipe.augment.draw_steps,
        )  # fmt: skip
        return iter(requests(epoch, rank, world))

    def _distill(self, epoch: int, rank: int, world: int) -> Iterator[tuple]:
        """(image numbers, student draws, teacher draws, recorded view) of shuffled batches."""
        recipe, seed = self.recipe, self.recipe.train.seed
        if recipe.together == 1:
            batches = shuffled_batches(len(self.train), recipe.batch_size, (seed, epoch, 3))
        else:
            identities = recipe.batch_size // recipe.together
            batches = identity_batches(self.train.identity, identities, recipe.together, (seed, epoch, 3))
        augment, steps = data.augmentation(recipe), recipe.augment.draw_steps

        def drawn(size: tuple[int, int], stream: int) -> data.Drawn:
            return data.Drawn(batches, augment, size[1] / size[0], (seed, epoch, stream), steps, rank, world)

        own = drawn(recipe.student.size, 4)
        teacher = None if recipe.coupled else drawn(recipe.teacher.network.size, 5)
        views = np.zeros((1, batches.shape[1]), np.int64)
        if recipe.views == "recorded":
            rng = np.random.default_rng(np.random.SeedSequence((seed, epoch, 6)))
            views = rng.integers(0, recipe.num_views, batches.shape)
        slots = own_part(np.arange(recipe.batch_size), rank, world)
        for step, (indices, draws) in enumerate(own):
            if step == 0:
                others = iter(teacher) if teacher is not None else None
            teacher_draws = draws if others is None else next(others)[1]
            yield indices, draws, teacher_draws, views[step % len(views), slots]


@dataclass(frozen=True)
class LoadPairs:
    """Turns a request into what the task is given; picklable for loader processes."""

    recipe: AsymmetricRecipe
    labelled: data.LoadLabelled
    teacher_frames: Source | None
    targets: Rows | None

    def __call__(self, request: tuple[Any, Any]) -> Batch:
        labelled, distill = request
        parts = {"labelled": self.labelled(labelled)} if labelled is not None else {}
        return parts | ({"distill": self._distill(*distill)} if distill is not None else {})

    def _distill(self, indices: np.ndarray, draws: np.ndarray, teacher_draws: np.ndarray, view: np.ndarray) -> Batch:
        recipe, batch = self.recipe, self.labelled((indices, draws))
        batch["image"] = torch.from_numpy(indices)
        if self.targets is None:
            batch["teacher_frames"] = torch.as_tensor(self.teacher_frames(indices))
            batch["teacher_draws"] = torch.from_numpy(teacher_draws)
            return batch
        rows = indices * (recipe.num_views if recipe.views == "recorded" else 1) + view
        batch["teacher"] = {
            "embedding" if column == "value" else column: torch.from_numpy(self.targets(rows, column))
            for column in self.targets.manifest["columns"]
            if column != "draws"
        }
        if recipe.coupled:
            batch["draws"] = torch.from_numpy(self.targets(rows, "draws"))
        return batch


@dataclass(frozen=True)
class _EmbedViews:
    """Row numbers -> columns of the teacher's outputs, a block at a time."""

    outputs: Callable[[Embedder, Tensor], dict[str, Tensor]]
    teacher: Embedder
    source: Source
    device: torch.device
    total: int
    recorded: AsymmetricRecipe | None  # whose augmentation is recorded; None = plain images

    @torch.inference_mode()
    def __call__(self, rows: np.ndarray) -> Iterator[dict[str, Tensor | np.ndarray]]:
        recorded = None if self.recorded is None else _Recorded(self.recorded, self.total, self.teacher.pixels)
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            if recorded is None:
                images_BCHW = search.model_input(self.teacher, self.source(block), self.device)
                yield _columns(self.outputs(self.teacher, images_BCHW))
                continue
            frames = torch.as_tensor(self.source(block // recorded.views)).to(self.device)
            draws = recorded.draws[block]
            images_BCHW = recorded.augment(frames, torch.from_numpy(draws), recorded.pad)
            yield _columns(self.outputs(self.teacher, images_BCHW), draws=draws)


class _Recorded:
    """The augmentation of recorded views, and the random numbers of all of them."""

    def __init__(self, recipe: AsymmetricRecipe, total: int, pixels: Any):
        height, width = recipe.teacher.network.size
        self.augment: Augmentation = data.augmentation(recipe, pixels)
        self.draws = self.augment.draw(total, width / height, (recipe.teacher.train.seed, 7))
        self.pad, self.views = recipe.teacher.network.pad, recipe.num_views


def _columns(outputs: dict[str, Tensor], **more: np.ndarray) -> dict[str, Tensor | np.ndarray]:
    """Teacher outputs as cache columns: the embedding is the value, everything is float32 or whole numbers."""
    outputs = {name: x.float() if x.is_floating_point() else x for name, x in outputs.items()}
    return {"value": outputs.pop("embedding"), **outputs, **more}


def _named(role: str, needs: Mapping[str, Need]) -> dict[str, Need]:
    return dict.fromkeys([role], *needs.values()) if needs else {}


def _teacher_config(recipe: AsymmetricRecipe) -> EmbedderConfig:
    return retrieval.embedder_config(recipe.teacher.network, recipe.embedding_dim)


def _teacher_training(recipe: AsymmetricRecipe) -> tuple[str, Any]:
    """Benchmark and supervised recipe of the teacher: the data set's, at the teacher's net and resolution.

    No field of the student enters; where and how fast it runs, and at which precision, is as the student's.
    """
    base, own = find.recipe("supervised", recipe.data.name), recipe.teacher
    training = replace(
        base,
        data=recipe.data,
        ap=recipe.ap,
        student=own.network,
        embedding_dim=recipe.embedding_dim,
        labelled=replace(
            base.labelled,
            identities_per_batch=own.identities_per_batch,
            images_per_identity=own.images_per_identity,
        ),
        train=replace(
            retrieval.scaled_schedule(base.train, own.train.epochs),
            optimizer=own.train.optimizer,
            rate=own.train.rate,
            seed=own.train.seed,
            precision=recipe.train.precision,
        ),
        run=recipe.run,
    )
    return recipe.data.name, training


def _load_teacher(place: Place, after: Mapping[str, Ready]) -> Embedder:
    teacher, _ = checkpoint.load_model(place.folder(after["teacher"].path))
    if "classifier" in after:
        teacher.classifier = checkpoint.load_classifier(place.folder(after["classifier"].path))
    return teacher


def _open_classifier(prepared: Prepared) -> torch.nn.Module | None:
    return checkpoint.load_classifier(prepared.path("classifier")) if "classifier" in prepared else None


def _open_neighbours(prepared: Prepared, device: torch.device) -> Neighbours | None:
    """The tables of the whole training set, on the device."""
    if "neighbours" not in prepared:
        return None
    nearest, clean = (cache.open_rows(prepared.path(role)) for role in ("neighbours", "clean targets"))
    rows = np.arange(len(nearest))
    tables = clean(rows), nearest(rows, "index").astype(np.int64), nearest(rows, "cosine")
    return Neighbours(*(torch.from_numpy(table).to(device) for table in tables))


def _check_classifier(need: Need, after: Mapping[str, Ready], place: Place) -> Ready:
    """Raises ValueError when the teacher's classifier is not known, or not of these classes."""
    path = Path(place.folder(after["teacher"].path))
    classifier = checkpoint.load_classifier(path)
    shape = (data.open_images(place, after["train"]).num_identities, need.made_from["width"])
    if classifier is None:
        remedy = f"remove {path.parent} to train it again, or store" if after["teacher"].kind == "teacher" else "store"
        raise ValueError(
            f"this method needs the teacher's classifier, and {path.with_suffix('.classifier.safetensors')} does not "
            f"exist; {remedy} a matrix 'weight' {shape} there, classes in order of identity"
        )
    if tuple(classifier.weight.shape) != shape:
        raise ValueError(
            f"the classifier beside {path} is {tuple(classifier.weight.shape)}, this data set needs {shape}"
        )
    fingerprint = cache.weights_hash(classifier)
    return Ready(need.key, need.kind, after["teacher"].path, fingerprint, {"classifier_fingerprint": fingerprint})


def _references(need: Need, after: Mapping[str, Ready], recipe: AsymmetricRecipe, where: Where) -> Ready:
    place, device = where.place, where.device
    found = data.open_data(Prepared(place, {role: after[role] for role in ("query", "gallery")}))
    gallery_GD = search.whole(cache.open_rows(place.folder(after["embeddings"].path)), device)
    query_QD = gallery_GD
    if not found.leave_one_out:
        teacher = _load_teacher(place, after).to(device)
        images = {"images": after["query"], **({"pixels": after["pixels"]} if "pixels" in after else {})}
        source = data.open_after(place, images, recipe.teacher.network.size)
        query_QD = search.embed(teacher, source, len(found.query), device, workers=recipe.run.loader_workers)
    chance_QD = search.random_rows(tuple(query_QD.shape), device)
    told = {
        "teacher": need.made_from["network"],
        "teacher_fingerprint": after["teacher"].fingerprint,
        "views": recipe.views + (f" ({recipe.num_views})" if recipe.views == "recorded" else ""),
    }
    return search.references(need, found, chance_QD, gallery_GD, query_QD, told)
