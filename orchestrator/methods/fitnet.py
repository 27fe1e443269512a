"""FitNet on embeddings: the student reproduces the teacher's raw vector (Romero et al., ICLR 2015).

    L = weight · mean (s − t)²

    python -m orchestrator.train fitnet --on demo
    python -m orchestrator.sweep fitnet_weight

Weights of ``*_repo*`` are those of the D3still authors' code; their paper gives none.
"""

from dataclasses import dataclass

from torch import Tensor

from losses.fitnet import feature_mse
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import SMALL, AsymmetricRecipe, Distillation, Pairs
from orchestrator.recipe import Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one FitNet training."""

    weight: Weight = 2.0


def weights(recipe: Recipe) -> dict[str, float]:
    return {"feature": recipe.weight}


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    return {"feature": feature_mse(pairs.student_BD, pairs.teacher_BD)}


METHOD = asymmetric.method(
    paper="FitNets: Hints for Thin Deep Nets, Romero et al., ICLR 2015, on embeddings as in D3still",
    recipes=asymmetric.recipes(Recipe, {"*_repo_mobilenet": {"weight": 5.0}, SMALL: {"weight": 8.0}}),
    distillation=Distillation(weights=weights, terms=terms),
)
