"""Knowledge distillation (Hinton et al., 2015) of class predictions, for faces.

KL divergence of both networks' softened class scores, which are scaled cosines to each one's class centres.

    python -m orchestrator.train face_kd --on demo

The teacher's class centres are needed: they are stored beside it.
"""

from dataclasses import dataclass

from losses.logit_kd import logit_kd
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import DistillationRecipe
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Terms, check_margin_logits
from orchestrator.recipe import Positive, Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training."""

    weight: Weight = 1.0
    temperature: Positive = 4.0  # T
    margin_logits: bool = False  # whether class scores have the head's margin


def terms(recipe: Recipe, task: FaceTask, faces: Faces) -> Terms:
    if not recipe.weight:
        return Terms({})
    return Terms({"kd": logit_kd(*task.logits(faces, recipe.margin_logits), recipe.temperature)})


METHOD = FaceMethod(
    paper="Knowledge distillation, Hinton et al., 2015, as compared with in face recognition",
    recipes=recipes(Recipe),
    distillation=Distillation(
        weights=lambda recipe: {"kd": recipe.weight},
        terms=terms,
        check=check_margin_logits,
        logits=lambda recipe: recipe.weight > 0,
    ),
)
