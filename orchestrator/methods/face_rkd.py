"""Relational distillation (Park et al., CVPR 2019) for faces: distances and angles between images of the batch.

    python -m orchestrator.train face_rkd --on demo

Weights are those of face recognition code; the metric-learning scripts of the authors have 1 and 2. The angles of 512
images are 134 million numbers for each network: they are made in parts.
"""

from dataclasses import dataclass

from losses.rkd import angle_term, distance_term
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import DistillationRecipe
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Terms
from orchestrator.recipe import Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training."""

    distance: Weight = 25.0
    angle: Weight = 50.0


def terms(recipe: Recipe, task: FaceTask, faces: Faces) -> Terms:
    found = {}
    if recipe.distance:
        found["distance"] = distance_term(faces.student_BD, faces.teacher_BD)
    if recipe.angle:
        found["angle"] = angle_term(faces.student_BD, faces.teacher_BD)
    return Terms(found)


METHOD = FaceMethod(
    paper="RKD, Park et al., CVPR 2019, as compared with in face recognition",
    recipes=recipes(Recipe),
    distillation=Distillation(weights=lambda recipe: {"distance": recipe.distance, "angle": recipe.angle}, terms=terms),
)
