"""Supervised embedder: label-smoothed cross-entropy + batch-hard triplet, without any teacher.

How the teachers of D3still are trained (authors' code: the trainer without a distiller), and the "student
alone" that a distilled student must beat.

    python -m orchestrator.train supervised --on demo
    python -m orchestrator.teacher d3still --on demo          # the same, at the teacher's net and resolution

Seconds on the demo; about a GPU-day for ResNet101 on SOP.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.embedder import Embedder
from orchestrator import published
from orchestrator.cache import Progress, silent
from orchestrator.datasets.images import Frames, RetrievalData, fetch
from orchestrator.method import Batch, Experiment, Losses, Method, Place, Task
from orchestrator.methods import embedding
from orchestrator.methods.embedding import EmbeddingRecipe


@dataclass(frozen=True, kw_only=True)
class Recipe(EmbeddingRecipe):
    """The network of the recipe is named ``student``, whoever it will teach."""


class Supervised(Task):
    """Student and two supervised losses."""

    def __init__(self, recipe: Recipe, student: Embedder):
        super().__init__(student)
        self.recipe, self.augment = recipe, embedding.augmentation(recipe)

    def forward(self, batch: dict[str, Tensor]) -> Losses:
        images_BCHW = self.augment(batch["frames"], batch["draws"], self.recipe.student_pad)
        return embedding.supervised_losses(self.recipe, self.student, images_BCHW, batch["label"])


def prepare(recipe: Recipe, place: Place, progress: Progress = silent) -> dict:
    data = embedding.load_data(recipe, place, progress)
    for images in data.sets().values():
        embedding.frames(recipe, images, recipe.student_size, place, progress, verify=True)
    return embedding.plain_facts(recipe, data)


def experiment(recipe: Recipe, place: Place, rank: int, world: int, device: torch.device) -> Experiment:
    data = embedding.load_data(recipe, place)
    task = Supervised(recipe, embedding.build_student(recipe, data.train.num_identities)).to(device)
    pixels = embedding.frames(recipe, data.train, recipe.student_size, place)
    load = embedding.labelled_loader(pixels, data.train)

    def batches(epoch: int) -> Iterator[Batch]:
        requests = embedding.labelled_requests(recipe, data.train, epoch, rank, world)
        return fetch(load, requests, recipe.loader_workers if isinstance(pixels, Frames) else 0)

    return embedding.experiment(
        recipe,
        task,
        device,
        batches,
        evaluate=lambda task: evaluate(recipe, data, place, task, device),
        images_per_step=recipe.identities_per_batch * recipe.images_per_identity,
    )


def evaluate(recipe: Recipe, data: RetrievalData, place: Place, task: Task, device: torch.device) -> dict[str, float]:
    """Symmetric retrieval: the same network embeds queries and gallery."""
    sides = {
        side: embedding.embed(
            task.student, embedding.frames(recipe, images, recipe.student_size, place), len(images), device
        )
        for side, images in data.sets().items()
    }
    return embedding.score(recipe, data, sides["query"], sides.get("gallery", sides["query"])).log("val")


def check(recipe: Recipe, workers: int = 1) -> None:
    """Raises ValueError for values that are allowed alone but not together."""
    embedding.check(recipe, workers)
    if not recipe.cross_entropy:
        raise ValueError(
            "cross_entropy must be above 0: the triplet loss alone never reaches the neck, and so the embedding"
        )


def evaluate_student(student: Embedder, recipe: Recipe, place: Place) -> dict[str, float]:
    """Metrics of a stored network, recomputed from images."""
    device = embedding.default_device()
    data = embedding.load_data(recipe, place)
    return evaluate(recipe, data, place, Task(student.to(device)), device)


_SMALL = {
    "student": "resnet18",
    "student_width": 0.25,
    "student_size": (32, 32),
    "embedding_dim": 64,
    "pretrained": False,
    "erase": 0.2,
    "optimizer": "adamw",
    "learning_rate": 0.002,
    "epochs": 16,
    "warmup_epochs": 2,
    "constant_epochs": 4,
    "evaluate_every": 4,
    "loader_workers": 0,
}

METHOD = Method(
    paper="D3still, Xie et al., CVPR 2024: the teacher recipe of the authors' code",
    recipes={
        "demo": Recipe(dataset="demo", **_SMALL),
        "omniglot": Recipe(
            dataset="omniglot", **{**_SMALL, "student_size": (28, 28), "erase": 0.0, "flip": 0.0, "epochs": 8}
        ),
        "emoji": Recipe(dataset="emoji", **{**_SMALL, "erase": 0.0, "flip": 0.0}),
        **{name: Recipe(dataset=name) for name in ("folder", "inshop", "sop", "msmt17", "msmt17_v2")},
        "market1501": Recipe(dataset="market1501", student_size=(160, 80), student_pad=4),
        **{
            name: Recipe(dataset=name, student_size=(128, 128), student_pad=4, erase=0.0)
            for name in ("cub200", "cub200_metric")
        },
    },
    metrics=embedding.METRICS,
    check=check,
    prepare=prepare,
    experiment=experiment,
    evaluate=evaluate_student,
    after_training=embedding.after_training,
    networks=lambda recipe: (published.network(recipe.student, recipe.student_size), published.NO_TEACHER),
    prepared_by=frozenset({"dataset", "evaluate_on", "ap", "student_size", "pixel_cache", "skip_unreadable"}),
)
