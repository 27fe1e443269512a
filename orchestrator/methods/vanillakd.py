"""VanillaKD: the student reproduces the teacher's class predictions (Hinton et al., 2015).

    L = weight · T² · KL(softmax(z_t / T) ‖ softmax(z_s / T))

    python -m orchestrator.train vanillakd --on demo
    python -m orchestrator.sweep vanillakd_weight

The embedding spaces are not aligned, so asymmetric retrieval stays at chance, in all published tables too; look at
the student on both sides (``evaluate_symmetric``). Needs the teacher's classifier. In the D3still authors' code only.
"""

from dataclasses import dataclass

from torch import Tensor

from losses.logit_kd import logit_kd
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import AsymmetricRecipe, Distillation, Pairs
from orchestrator.recipe import Positive, Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one VanillaKD training."""

    weight: Weight = 1.0
    temperature: Positive = 2.0  # T


def weights(recipe: Recipe) -> dict[str, float]:
    return {"prediction": recipe.weight}


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    return {"prediction": logit_kd(*pairs.logits(), recipe.temperature)}


METHOD = asymmetric.method(
    paper="Distilling the Knowledge in a Neural Network, Hinton et al., 2015",
    recipes=asymmetric.recipes(Recipe),
    distillation=Distillation(weights=weights, terms=terms, teacher_classifier=True, student_classifier=True),
)
