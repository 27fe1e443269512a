"""ShrinkTeaNet (Duong et al., 2019): the angle between student and teacher, squared, on the embedding.

    python -m orchestrator.train shrinkteanet --on demo

Departs from the paper, which has the loss on maps of several depths too: this is its last term, as compared with by
others. VarGFaceNet replaced it by the squared distance of unit embeddings, weight 7 (``l2n`` of feature_consistency).
"""

from dataclasses import dataclass

from losses.feature_consistency import angular
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import DistillationRecipe
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Terms, projected, to_teacher_s_width
from orchestrator.recipe import Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training."""

    weight: Weight = 10.0  # ours


def terms(recipe: Recipe, task: FaceTask, faces: Faces) -> Terms:
    if not recipe.weight:
        return Terms({})
    return Terms({"angular": angular(projected(task.memory, faces.student_BD), faces.teacher_BD)})


METHOD = FaceMethod(
    paper="ShrinkTeaNet, Duong et al., 2019: its loss on the embedding",
    recipes=recipes(Recipe),
    distillation=Distillation(
        weights=lambda recipe: {"angular": recipe.weight}, terms=terms, remembers=to_teacher_s_width
    ),
)
