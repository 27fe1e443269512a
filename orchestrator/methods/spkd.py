"""SP-KD: the student keeps the teacher's similarities between images (Tung and Mori, ICCV 2019).

    L = weight · ‖Ĝ_s − Ĝ_t‖²_F / B²        Ĝ: rows of x xᵀ, normalised

    python -m orchestrator.train spkd --on demo
    python -m orchestrator.sweep spkd_weight

Relations inside each space only, so asymmetric retrieval stays at chance; look at the student on both sides
(``evaluate_symmetric``). Related work of D3still, in none of its tables.
"""

from dataclasses import dataclass

from torch import Tensor

from losses.spkd import similarity_preserving
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import AsymmetricRecipe, Distillation, Pairs
from orchestrator.recipe import Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one SP-KD training."""

    weight: Weight = 3_000.0


def weights(recipe: Recipe) -> dict[str, float]:
    return {"similarity": recipe.weight}


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    return {"similarity": similarity_preserving(pairs.student_BD, pairs.teacher_BD)}


METHOD = asymmetric.method(
    paper="Similarity-Preserving Knowledge Distillation, Tung and Mori, ICCV 2019",
    recipes=asymmetric.recipes(Recipe),
    distillation=Distillation(weights=weights, terms=terms),
)
