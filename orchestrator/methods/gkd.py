"""Grouped distillation (Zhao et al., AAAI 2023): of the class scores only what is sure is distilled.

Classes are parted in a primary group and the rest: the mass of both is matched, and how it is spread inside the
primary group; how it is spread in the rest is left alone.

    python -m orchestrator.train gkd --on demo

The defaults are the released adaptive file's, but for its stride: as released CosFace m = 0.4, s = 64 is on both
networks' class scores. Its other file has a primary weight of 8 and a fixed group of 10,000 classes
(``primary=8 group=10000``).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from losses.face_kd import ramp
from losses.gkd import grouped_kd
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import DistillationRecipe
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Sizes, Terms, check_margin_logits
from orchestrator.recipe import Count, Positive, Share, Weight, Whole


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training."""

    binary: Weight = 1.0  # of the divergence between the two bins
    primary: Weight = 4.0  # of that inside the primary group
    temperature: Positive = 4.0  # T
    mass: Share = 0.93  # τ of the summed probabilities that the primary group has
    stride: Count = 100  # places between which the group's end is looked for
    group: Whole = 0  # classes of the primary group; 0 = by the mass
    margin_logits: bool = True  # whether class scores have the head's margin
    grow_epochs: Whole = 10  # until both weights are reached


def terms(recipe: Recipe, task: FaceTask, faces: Faces) -> Terms:
    if not (recipe.binary or recipe.primary):
        return Terms({})
    label_B = faces.label_B[: faces.shuffled]
    found = grouped_kd(
        *task.logits(faces, recipe.margin_logits), label_B, recipe.temperature, recipe.mass, recipe.stride, recipe.group
    )
    return Terms({name: value for name, value in found._asdict().items() if getattr(recipe, name)})


def ramps(recipe: Recipe, sizes: Sizes, step: Tensor) -> dict[str, Tensor]:
    grown = ramp(step, recipe.grow_epochs * sizes.steps // recipe.train.epochs)
    return dict.fromkeys(("binary", "primary"), grown)


_COSFACE = {"head.kind": "cosface", "head.margin": 0.4}
_SMALL: dict[str, Any] = {"stride": 1, "head.margin": 0.2, "grow_epochs": 2}

METHOD = FaceMethod(
    paper="Grouped knowledge distillation, Zhao et al., AAAI 2023, as released",
    recipes=recipes(
        Recipe,
        {"*": _COSFACE, "demo": _SMALL, "orl": _SMALL},
    ),
    distillation=Distillation(
        weights=lambda recipe: {"binary": recipe.binary, "primary": recipe.primary},
        terms=terms,
        ramps=ramps,
        check=check_margin_logits,
        logits=lambda recipe: recipe.binary > 0 or recipe.primary > 0,
    ),
)
