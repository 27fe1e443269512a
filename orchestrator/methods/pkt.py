"""PKT: the student keeps the teacher's probabilities of being neighbours (Passalis and Tefas, ECCV 2018).

    L = weight · mean P_t log(P_t / P_s)

    python -m orchestrator.train pkt --on demo
    python -m orchestrator.sweep pkt_weight

Relations inside each space only: asymmetric retrieval stays at chance, in all published tables too; look at the
student on both sides (``evaluate_symmetric``).
"""

from dataclasses import dataclass

from torch import Tensor

from losses.pkt import pkt
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import AsymmetricRecipe, Distillation, Pairs
from orchestrator.recipe import Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one PKT training."""

    weight: Weight = 30_000.0  # the loss is a mean over B² tiny numbers


def weights(recipe: Recipe) -> dict[str, float]:
    return {"probability": recipe.weight}


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    return {"probability": pkt(pairs.student_BD, pairs.teacher_BD)}


METHOD = asymmetric.method(
    paper="Learning Deep Representations with Probabilistic Knowledge Transfer, Passalis and Tefas, ECCV 2018",
    recipes=asymmetric.recipes(Recipe),
    distillation=Distillation(weights=weights, terms=terms),
)
