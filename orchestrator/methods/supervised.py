"""Supervised embedder: label-smoothed cross-entropy + batch-hard triplet, without any teacher.

How the teachers of D3still are trained (authors' code: the trainer without a distiller), and the "student
alone" that a distilled student must beat.

    python -m orchestrator.train supervised --on demo
    python -m orchestrator.teacher d3still --on demo          # the same, at the teacher's net and resolution

Seconds on the demo; about a GPU-day for ResNet101 on SOP.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.embedder import Embedder
from orchestrator import published, tables
from orchestrator.datasets.images import RetrievalData, fetch
from orchestrator.families.retrieval import data, recipe, search, supervised
from orchestrator.families.retrieval.data import Source
from orchestrator.method import Batch, Evaluation, Experiment, Losses, Method, Task, Where
from orchestrator.needs import Need, Place, Prepared, Ready, Report
from orchestrator.pictures import Picture
from orchestrator.recipe import changed


@dataclass(frozen=True, kw_only=True)
class Recipe(recipe.EmbedderRecipe):
    """The network of the recipe is named ``student``, whoever it will teach."""


class Supervised(Task):
    """Student and two supervised losses."""

    def __init__(self, recipe: Recipe, student: Embedder):
        super().__init__(student)
        self.recipe, self.augment = recipe, data.augmentation(recipe, student.pixels)

    def forward(self, batch: Batch) -> Losses:
        images_BCHW = self.augment(batch["frames"], batch["draws"], self.recipe.student.pad)
        return supervised.supervised_losses(self.recipe.labelled, self.student, images_BCHW, batch["label"])


class SupervisedMethod(Method):
    """One network on both sides of the search."""

    family = "retrieval"
    paper = "D3still, Xie et al., CVPR 2024: the teacher recipe of the authors' code"
    metrics = recipe.METRICS

    def __init__(self, recipes: Mapping[str, Recipe]):
        self.recipes = recipes

    def check(self, own: Recipe, workers: int = 1) -> None:
        """Raises ValueError for values that are allowed alone but not together."""
        recipe.check(own, workers)
        if not own.labelled.cross_entropy:
            raise ValueError(
                "cross_entropy must be above 0: the triplet loss alone never reaches the neck, and so the embedding"
            )

    def needs(self, own: Recipe, place: Place, purpose: Literal["train", "score"] = "train") -> dict[str, Need]:
        sides = data.index_needs(own.data, place)
        if purpose == "score":
            sides.pop("train")
        found = dict(sides)
        for side, index in sides.items():
            for need in data.pixel_need(own.run, index, own.student.size).values():
                found[f"{side} pixels"] = need
        if purpose == "score":
            return found
        known = sides["train"].how["identities"]
        data.check_identities("identities_per_batch", own.labelled.identities_per_batch, known)
        searched = {side: index for side, index in sides.items() if side != "train"}
        found["references"] = Need("references", {"ap": own.ap}, searched, title="chance")
        return found

    def make(self, need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
        if need.kind == "references":
            found = data.open_data(Prepared(where.place, after))
            query_QD, gallery_GD = search.chance_sides(found, where.device)
            return search.references(need, found, query_QD, gallery_GD, None, {})
        return data.make(need, after, where, progress)

    def experiment(self, own: Recipe, prepared: Prepared, where: Where) -> Experiment:
        found = data.open_data(prepared)
        train, sides = found.train, data.open_sides(prepared, found, own.student.size)
        student = recipe.build_embedder(own.student, own.embedding_dim, train.num_identities, own.train.seed)
        pixels = data.open_frames(prepared, "train pixels", train, own.student.size)
        (pixels,) = tables.placed(own.run.pixel_cache, where, pixels, label=train.labels)
        load = data.LoadLabelled(pixels, train)
        height, width = own.student.size
        requests = data.LabelledRequests(
            train.identity, own.labelled, data.augmentation(own), width / height, own.train.seed, own.augment.draw_steps
        )
        workers = own.run.loader_workers if data.decodes(pixels) else 0

        def batches(epoch: int) -> Iterator[Batch]:
            return fetch(load, requests(epoch, where.rank, where.world), workers)

        return supervised.experiment(
            own,
            Supervised(own, student).to(where.device),
            where,
            batches,
            evaluate=lambda task: _score(own, found, sides, task.student, where.device),
            items_per_step=own.labelled.images,
        )

    def score(self, student: Embedder, own: Recipe, prepared: Prepared, where: Where) -> Evaluation:
        """Symmetric retrieval: the same network embeds queries and gallery."""
        found = data.open_data(prepared)
        return _score(own, found, data.open_sides(prepared, found, own.student.size), student, where.device)

    def pictures(
        self, student: Embedder, own: Recipe, prepared: Prepared, evaluation: Evaluation, where: Where
    ) -> dict[str, Picture]:
        """A few queries with what the network finds for them."""
        found = data.open_data(prepared)
        sides = data.open_sides(prepared, found, own.student.size)
        return {"retrieval": search.panel(found, evaluation.found, sides["query"], sides["gallery"])}

    def networks(self, own: Recipe) -> tuple[str, str]:
        return published.network(own.student.name, own.student.size), published.NO_TEACHER

    def after_training(self, own: Recipe) -> frozenset[str]:
        return frozenset({"ap"})


def _score(
    own: Recipe, found: RetrievalData, sides: Mapping[str, Source], student: Embedder, device: torch.device
) -> Evaluation:
    def embedded(side: str) -> Tensor:
        count, workers = len(getattr(found, side)), own.run.loader_workers
        return search.embed(student, sides[side], count, device, workers=workers)

    return search.symmetric(own.ap, found, embedded)


_SMALL = {
    "student.name": "resnet18",
    "student.width": 0.25,
    "student.size": (32, 32),
    "student.pretrained": False,
    "embedding_dim": 64,
    "erase": 0.2,
    "train.optimizer": "adamw",
    "train.rate": 0.002,
    "train.epochs": 16,
    "warmup_epochs": 2,
    "constant_epochs": 4,
    "evaluate_every": 4,
    "loader_workers": 0,
}
_PLAIN = {"erase": 0.0, "flip": 0.0}
_BIRDS = {"student.size": (128, 128), "student.pad": 4, "erase": 0.0}
_BENCHMARKS = {
    "demo": _SMALL,
    "omniglot": {**_SMALL, **_PLAIN, "student.size": (28, 28), "train.epochs": 8},
    "emoji": {**_SMALL, **_PLAIN},
    **{name: {} for name in ("folder", "inshop", "sop", "msmt17", "msmt17_v2")},
    "market1501": {"student.size": (160, 80), "student.pad": 4},
    "cub200": _BIRDS,
    "cub200_metric": _BIRDS,
}

METHOD = SupervisedMethod(
    {name: changed(Recipe(), {"data.name": name, **settings}) for name, settings in _BENCHMARKS.items()}
)
