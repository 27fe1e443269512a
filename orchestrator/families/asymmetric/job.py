"""What must be ready for an asymmetric distillation, how it is trained, scored and shown."""

# Shape legend: Q and G = queries and gallery, D = embedding width.

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.embedder import Embedder, EmbedderConfig
from models.network import identity
from orchestrator import cache, checkpoint, find, published, tables
from orchestrator.cache import Rows
from orchestrator.datasets.images import ImageSet, RetrievalData, fetch
from orchestrator.families.asymmetric.batches import LoadPairs, PairRequests
from orchestrator.families.asymmetric.pairs import AsymmetricDistillation, Neighbours
from orchestrator.families.asymmetric.recipe import AsymmetricRecipe, Distillation, check, is_supervised, used_views
from orchestrator.families.asymmetric.teacher_side import EmbedViews, check_classifier, load_teacher, references
from orchestrator.families.retrieval import data, search, supervised
from orchestrator.families.retrieval import recipe as retrieval
from orchestrator.families.retrieval.data import Source
from orchestrator.families.retrieval.teacher import ready_file, teacher_need
from orchestrator.method import Batch, Evaluation, Experiment, Method, Metric, Where
from orchestrator.needs import Need, Place, Prepared, Ready, Report
from orchestrator.pictures import Picture
from orchestrator.recipe import flat, recipe_from


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
        if is_supervised(recipe):
            asked = recipe.labelled.identities_per_batch
            data.check_identities("labelled.identities_per_batch", asked, sides["train"].how["identities"])
        found["train"] = sides["train"]
        found |= _named("train pixels", pixels(sides["train"], student))
        return found | self._target_needs(recipe, found, sides["train"])

    def _teacher_needs(self, recipe: AsymmetricRecipe, train: Need) -> dict[str, Need]:
        config = _teacher_config(recipe)
        if not recipe.teacher.weights:
            asked = recipe.teacher.identities_per_batch
            data.check_identities("teacher.identities_per_batch", asked, train.how["identities"])
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
                "neighbours", {"count": tables.neighbour_count(count, images)}, {"embeddings": made["clean targets"]},
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
            table = tables.neighbours(rows, need.made_from["count"], place.folder("cache"), progress, verify=True)
            return data.ready_rows(need, table, place)
        if need.kind == "classifier":
            return check_classifier(need, after, place)
        if need.kind == "teacher file":
            return ready_file(need, place)
        recipe = recipe_from(self.recipes["demo"], need.how["recipe"])
        if need.kind == "references":
            return references(need, after, recipe, where)
        return self._make_embeddings(need, after, recipe, where, progress)

    def _make_embeddings(
        self, need: Need, after: Mapping[str, Ready], recipe: AsymmetricRecipe, where: Where, progress: Report
    ) -> Ready:
        transform = dict(need.made_from["transform"])
        if "outputs" in transform:
            transform["classifier"] = after["classifier"].fingerprint if "classifier" in after else ""
        outputs = self.distillation.teacher_outputs if "outputs" in transform else Distillation.teacher_outputs
        recorded = recipe if "augmentation" not in transform else None

        def embedder(images: ImageSet) -> EmbedViews:
            teacher = load_teacher(where.place, after).to(where.device)
            source = data.open_after(where.place, after, recipe.teacher.network.size)
            total = len(images) * need.made_from["views"]
            return EmbedViews(partial(outputs, recipe), teacher, source, where.device, total, recorded)

        return data.make_embeddings(need, after, transform, where.place, embedder, progress)

    def experiment(self, recipe: AsymmetricRecipe, prepared: Prepared, where: Where) -> Experiment:
        method, recipe = self.distillation, used_views(self.distillation, recipe)
        train, device = data.open_images(prepared.place, prepared["train"]), where.device
        distilling = any(method.weights(recipe).values())
        classes = (is_supervised(recipe) and recipe.labelled.cross_entropy > 0) or (
            distilling and method.student_classifier
        )
        # Before the student, whose seed decides its weights and those of the method's heads after it.
        teacher = load_teacher(prepared.place, prepared) if distilling and recipe.views == "online" else None
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
        frames, teacher_frames, targets = tables.placed(
            recipe.run.pixel_cache, where, frames, teacher_frames, targets, label=train.labels
        )
        load = LoadPairs(recipe, data.LoadLabelled(frames, train), teacher_frames, targets)
        searched = _open_searched(recipe, prepared)
        requests = PairRequests(recipe, train, is_supervised(recipe), distilling)
        workers = recipe.run.loader_workers if data.decodes(frames, teacher_frames) else 0

        def batches(epoch: int) -> Iterator[Batch]:
            return fetch(load, requests(epoch, where.rank, where.world), workers)

        return supervised.experiment(
            recipe,
            task,
            where,
            batches,
            evaluate=lambda task: _score(recipe, searched, task.student, device),
            items_per_step=requests.images_per_step,
        )

    def score(self, student: Embedder, recipe: AsymmetricRecipe, prepared: Prepared, where: Where) -> Evaluation:
        """Queries by the student, gallery by the teacher; optionally the student on both sides."""
        return _score(recipe, _open_searched(recipe, prepared), student, where.device)

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


@dataclass(frozen=True)
class _Searched:
    """What every evaluation of a job reads, opened once."""

    data: RetrievalData
    frames: dict[str, Source]  # at the student's resolution, by side
    gallery: Rows  # by the teacher; on the device only while it is searched


def _open_searched(recipe: AsymmetricRecipe, prepared: Prepared) -> _Searched:
    found = data.open_data(prepared)
    frames = data.open_sides(prepared, found, recipe.student.size)
    return _Searched(found, frames, cache.open_rows(prepared.path("gallery embeddings")))


def _score(recipe: AsymmetricRecipe, searched: _Searched, student: Embedder, device: torch.device) -> Evaluation:
    found, workers = searched.data, recipe.run.loader_workers

    def embedded(side: str) -> Tensor:
        return search.embed(student, searched.frames[side], len(getattr(found, side)), device, workers=workers)

    query_QD, gallery_GD = embedded("query"), search.whole(searched.gallery, device)
    scored = {"val": search.score(recipe.ap, found, query_QD, gallery_GD)}
    if recipe.evaluate_symmetric:
        own_GD = query_QD if found.leave_one_out else embedded("gallery")
        scored["symmetric"] = search.score(recipe.ap, found, query_QD, own_GD)
    return search.evaluation(found, search.Found(query_QD, gallery_GD), **scored)


def method(paper: str, recipes: Mapping[str, AsymmetricRecipe], distillation: Distillation) -> AsymmetricMethod:
    """``METHOD`` of a method of this family."""
    return AsymmetricMethod(paper, recipes, distillation)


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
