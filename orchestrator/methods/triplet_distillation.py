"""TripletDistillation (Feng et al., 2020): the farther apart the teacher holds two people, the larger the margin.

A triplet loss whose margins follow the teacher's gap between a positive and a negative. The paper fine-tunes a student
that was trained with ArcFace, at a rate of 1e-3, on batches of several images of one person; without weights to start
from, the recipes train from scratch beside an ArcFace, at the rate of the other methods.

    python -m orchestrator.train triplet_distillation --on demo
    python -m orchestrator.train triplet_distillation --on ms1mv2 --data-root DIR --set student.weights=FILE \
        --set train.rate=1e-3

Departs from the paper, which draws triplets from bags of 7,200 images: every balanced image of the batch is an anchor,
with its farthest positive and its nearest negative by the student.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from losses.margin_distillation import hardest_triplets, triplet_distillation
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import Balanced, DistillationRecipe
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Terms
from orchestrator.recipe import Count, Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training: 10 identities × 18 images, beside as many shuffled images that are classified."""

    batch_size: Count = 180
    balanced: Balanced = field(default_factory=lambda: Balanced(identities=10, images=18))
    weight: Weight = 1.0
    largest_margin: Weight = 0.5  # M_max, of the squared distance of unit vectors, or radians
    least_margin: Weight = 0.2  # M_min
    distance: Literal["l2", "angle"] = "l2"


def terms(recipe: Recipe, task: FaceTask, faces: Faces) -> Terms:
    if not recipe.weight:
        return Terms({})
    # Of the balanced images: a shuffled one has hardly ever another of its person beside it.
    own = slice(faces.shuffled if recipe.balanced.count else 0, None)
    triplets = hardest_triplets(faces.student_BD[own], faces.label_B[own])
    found = triplet_distillation(
        *(tuple(rows_BD[own][rows] for rows in triplets) for rows_BD in (faces.student_BD, faces.teacher_BD)),
        recipe.largest_margin, recipe.least_margin, recipe.distance,
    )  # fmt: skip
    return Terms({"triplet": found.loss}, {"mean_margin": found.margin_N.mean()})


def check(recipe: Recipe) -> None:
    if recipe.least_margin > recipe.largest_margin:
        raise ValueError(f"least_margin {recipe.least_margin} must not be above largest_margin {recipe.largest_margin}")


# As many images in all as other methods see: half of every batch is not shuffled, so an epoch has twice the steps.
_SMALL: dict[str, Any] = {
    "batch_size": 32, "balanced.identities": 8, "balanced.images": 4, "train.epochs": 8, "train.evaluate_every": 2,
}  # fmt: skip

METHOD = FaceMethod(
    paper="TripletDistillation, Feng et al., 2020",
    recipes=recipes(Recipe, {"demo": _SMALL, "orl": {**_SMALL, "train.epochs": 30, "train.evaluate_every": 10}}),
    distillation=Distillation(weights=lambda recipe: {"triplet": recipe.weight}, terms=terms, check=check),
)
