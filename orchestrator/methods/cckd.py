"""CCKD: correlation congruence (Peng et al., ICCV 2019), in two forms of which tables rarely say the one they mean.

    form = neighbour (the D3still authors' code):   L = weight · 1/(B−1) Σ_i ⟨|ŝ_i − t̂_i|, |ŝ_{i+1} − t̂_{i+1}|⟩
    form = kernel (the published one):              L = weight · mean (K_s − K_t)²

    python -m orchestrator.train cckd --on demo --set form=kernel
    python -m orchestrator.sweep cckd_weight

The neighbour form aligns each embedding with the teacher's and can be searched asymmetrically; the kernel form
compares relations inside each space only and cannot, so the published CCKD rows (62.42 on In-Shop, RKD 0.15) point to
the former, which is the default. Weights of ``*_repo*`` are the authors'; those of the kernel form are unverified.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from losses.cckd import kernel_congruence, neighbour_product
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import SMALL, AsymmetricRecipe, Distillation, Pairs
from orchestrator.recipe import Count, Positive, Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one CCKD training."""

    form: Literal["neighbour", "kernel"] = "neighbour"
    weight: Weight = 1.0
    normalize: bool = True  # L2-normalised rows; form = neighbour
    kernel_gamma: Positive = 0.4  # form = kernel
    kernel_order: Count = 2  # form = kernel


def weights(recipe: Recipe) -> dict[str, float]:
    return {"correlation": recipe.weight}


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    if recipe.form == "kernel":
        loss = kernel_congruence(pairs.student_BD, pairs.teacher_BD, recipe.kernel_gamma, recipe.kernel_order)
    else:
        loss = neighbour_product(pairs.student_BD, pairs.teacher_BD, recipe.normalize)
    return {"correlation": loss}


METHOD = asymmetric.method(
    paper="Correlation Congruence for Knowledge Distillation, Peng et al., ICCV 2019",
    recipes=asymmetric.recipes(
        Recipe,
        {
            "*_repo*": {"weight": 5.0},
            "*_repo_mobilenet": {"weight": 10.0},
            "msmt17_repo*": {"weight": 5.0},
            "msmt17_repo_large": {"weight": 2.0},
            SMALL: {"weight": 25.0},
        },
    ),
    distillation=Distillation(weights=weights, terms=terms),
)
