"""Distillation of single face embeddings: raw L2, and feature consistency in the three forms of public codes.

The student's embedding shall be the teacher's of the same image. ``form`` chooses: "l2_sum" and "l2_mean" of raw
embeddings, "cos", "l2n" and "half" of unit ones.

    python -m orchestrator.train feature_consistency --on demo --set form=l2_mean
"""

from dataclasses import dataclass
from typing import Literal

from losses.feature_consistency import feature_consistency, raw_l2
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import DistillationRecipe
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Terms, projected, to_teacher_s_width
from orchestrator.recipe import Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training."""

    form: Literal["cos", "l2n", "half", "l2_sum", "l2_mean"] = "cos"
    weight: Weight = 10.0  # ours; public codes have 1 to 100, by form


def terms(recipe: Recipe, task: FaceTask, faces: Faces) -> Terms:
    student_BD = projected(task.memory, faces.student_BD)
    if not recipe.weight:
        return Terms({})
    if recipe.form.startswith("l2_"):
        return Terms({"features": raw_l2(student_BD, faces.teacher_BD, recipe.form.removeprefix("l2_"))})
    return Terms({"features": feature_consistency(student_BD, faces.teacher_BD, recipe.form)})


METHOD = FaceMethod(
    paper="Raw L2 and feature consistency, the usual baselines of face distillation",
    recipes=recipes(Recipe),
    distillation=Distillation(
        weights=lambda recipe: {"features": recipe.weight}, terms=terms, remembers=to_teacher_s_width
    ),
)
