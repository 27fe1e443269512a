"""Similarity-preserving distillation (Tung and Mori, ICCV 2019) for faces: who of the batch is like whom.

    python -m orchestrator.train face_sp --on demo

``gram=raw`` is the original, of raw embeddings with unit rows; ``gram=cosine`` is the variant of face recognition code.
"""

from dataclasses import dataclass
from typing import Literal

from losses.similarity import unit_rows
from losses.spkd import similarity_preserving
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import DistillationRecipe
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Terms
from orchestrator.recipe import Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training."""

    weight: Weight = 3000.0  # as in classification
    gram: Literal["raw", "cosine"] = "raw"


def terms(recipe: Recipe, task: FaceTask, faces: Faces) -> Terms:
    if not recipe.weight:
        return Terms({})
    both = faces.student_BD, faces.teacher_BD
    if recipe.gram == "cosine":
        both = tuple(map(unit_rows, both))
    return Terms({"sp": similarity_preserving(*both)})


METHOD = FaceMethod(
    paper="SP, Tung and Mori, ICCV 2019, as compared with in face recognition",
    recipes=recipes(Recipe),
    distillation=Distillation(weights=lambda recipe: {"sp": recipe.weight}, terms=terms),
)
