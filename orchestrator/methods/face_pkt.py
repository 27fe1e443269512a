"""Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018) for faces: who of the batch is whose neighbour.

python -m orchestrator.train face_pkt --on demo
"""

from dataclasses import dataclass

from losses.pkt import pkt
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import DistillationRecipe
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Terms
from orchestrator.recipe import Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training."""

    weight: Weight = 30_000.0  # as in classification: the loss is tiny


def terms(recipe: Recipe, task: FaceTask, faces: Faces) -> Terms:
    return Terms({"pkt": pkt(faces.student_BD, faces.teacher_BD)} if recipe.weight else {})


METHOD = FaceMethod(
    paper="PKT, Passalis and Tefas, ECCV 2018, as compared with in face recognition",
    recipes=recipes(Recipe),
    distillation=Distillation(weights=lambda recipe: {"pkt": recipe.weight}, terms=terms),
)
