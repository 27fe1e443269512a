"""ProxylessKD (Shi et al., 2020), also ArcDistill and CosDistill: the student learns the teacher's class centres.

No further loss: the margin softmax of the student is on the class centres of the teacher, which stay as they are.

    python -m orchestrator.train proxylesskd --on demo
    python -m orchestrator.train proxylesskd --on demo --set head.kind=cosface --set head.margin=0.35   # CosDistill
"""

from dataclasses import dataclass
from typing import Literal

from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import DistillationRecipe
from orchestrator.families.face.training import Distillation, Terms


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training."""

    centres: Literal["own", "teacher"] = "teacher"


def check(recipe: Recipe) -> None:
    if recipe.centres != "teacher":
        raise ValueError("centres=own has nothing of the teacher; train margin_softmax, or take centres=teacher")


METHOD = FaceMethod(
    paper="ProxylessKD, Shi et al., 2020, also known as ArcDistill and CosDistill",
    recipes=recipes(Recipe),
    distillation=Distillation(weights=lambda recipe: {}, terms=lambda recipe, task, faces: Terms({}), check=check),
)
