"""Evaluation-oriented distillation (Huang et al., CVPR 2022): ranks of pairs among false positive rates are matched.

Every pair's similarity is ranked against the thresholds of six false positive rates, in both networks; where the
ranks differ, verification would be decided differently, and that is what is distilled.

    python -m orchestrator.train ekd --on demo

As released a batch is half shuffled images, which alone are classified, half 8 identities × 4 images for each GPU.
Twice the step of the student alone.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from losses.ekd import EKD
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import Balanced, DistillationRecipe
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Sizes, Terms
from orchestrator.recipe import Count, Positive, Probability, Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training; batches are those of 8 GPUs."""

    batch_size: Count = 256
    balanced: Balanced = field(default_factory=lambda: Balanced(identities=64, images=4))
    positive: Weight = 0.02  # of genuine pairs
    negative: Weight = 0.01  # of impostor pairs
    pairs: Count = 2000  # impostor pairs, the student's nearest
    temperature: Positive = 0.01  # of the ranks
    momentum: Probability = 0.01  # weight of a batch in the running thresholds


def terms(recipe: Recipe, task: FaceTask, faces: Faces) -> Terms:
    if task.memory is None:
        return Terms({})
    positive, negative = task.memory(faces.student_BD, faces.teacher_BD, faces.label_B)
    found = {"positive": positive, "negative": negative}
    return Terms({name: term for name, term in found.items() if getattr(recipe, name)})


def remembers(recipe: Recipe, sizes: Sizes) -> nn.Module | None:
    if not (recipe.positive or recipe.negative):
        return None
    return EKD(top_k=recipe.pairs, temperature=recipe.temperature, momentum=recipe.momentum)


_FALLS = {"train.falls": (11, 19, 23, 0)}  # after 10, 18 and 22 epochs
# As many images in all as other methods see: half of every batch is not shuffled, so an epoch has twice the steps.
_SMALL: dict[str, Any] = {"batch_size": 32, "balanced.identities": 8, "train.epochs": 8, "train.evaluate_every": 2}

METHOD = FaceMethod(
    paper="EKD, Huang et al., CVPR 2022, as released",
    recipes=recipes(
        Recipe,
        {
            "ms1mv2": _FALLS,
            "ms1mv3": _FALLS,
            "demo": _SMALL,
            "orl": {**_SMALL, "train.epochs": 30, "train.evaluate_every": 10},
        },
    ),
    distillation=Distillation(
        weights=lambda recipe: {"positive": recipe.positive, "negative": recipe.negative},
        terms=terms,
        remembers=remembers,
    ),
)
