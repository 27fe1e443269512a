"""MarginDistillation (Svitov and Alyamkin, 2020): the surer the teacher, the larger the student's margin.

An ArcFace of the student on the teacher's frozen class centres; each image's margin follows the cosine between the
teacher's embedding and its class centre.

    python -m orchestrator.train margin_distillation --on demo
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from losses.margin_distillation import teacher_margins
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import DistillationRecipe, Margin
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Terms


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training."""

    centres: Literal["own", "teacher"] = "teacher"
    largest_margin: Margin = 0.5  # M_max
    least_margin: Margin = 0.2  # M_min


def margins(recipe: Recipe, task: FaceTask, faces: Faces) -> Tensor:
    rows = slice(0, faces.shuffled)
    weight_CD = task.teacher_centres.weight
    return teacher_margins(
        faces.teacher_BD[rows], weight_CD, faces.label_B[rows], recipe.largest_margin, recipe.least_margin
    )


def check(recipe: Recipe) -> None:
    if recipe.centres != "teacher" or not recipe.cls or recipe.head.kind != "arcface":
        raise ValueError(
            f"the margins are of an ArcFace on the teacher's class centres: take centres=teacher, cls=1 and "
            f"head.kind=arcface, got {recipe.centres}, {recipe.cls:g} and {recipe.head.kind}"
        )
    if recipe.least_margin > recipe.largest_margin:
        raise ValueError(f"least_margin {recipe.least_margin} must not be above largest_margin {recipe.largest_margin}")


_SMALL = {"largest_margin": 0.4, "least_margin": 0.1}

METHOD = FaceMethod(
    paper="MarginDistillation, Svitov and Alyamkin, 2020",
    recipes=recipes(Recipe, {"*": {"head.kind": "arcface", "head.margin": 0.5}, "demo": _SMALL, "orl": _SMALL}),
    distillation=Distillation(
        weights=lambda recipe: {}, terms=lambda recipe, task, faces: Terms({}), check=check, margins=margins
    ),
)
