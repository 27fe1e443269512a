"""D3still: decoupled differential distillation for asymmetric image retrieval (Xie et al., CVPR 2024).

The student should *order* gallery images as the teacher does. Differences between pairwise similarities, on
the teacher's top-k, are split into those the student ranks against the teacher (inconsistent) and with it
(consistent), weighed apart, and decoupled from the alignment of each image's own two embeddings:

    L = α L_f + β L_irpd + γ L_crpd                                                     (eq. 18)

    python -m orchestrator.train d3still --on demo
    python -m orchestrator.sweep d3still_beta_gamma

Cost: seconds on the demo. At the paper's settings a 24 GB GPU and about half a day per data set (online views);
expected in the paper on In-Shop: mAP 64.31, R1 79.60.

The recipes ``inshop``, ``sop`` and ``msmt17`` are the paper's; ``*_repo*`` are those of the authors' later code, with
supervised losses, other sizes and other weights: their published numbers are not comparable.

Departs from the authors' code: networks run in bfloat16 on a GPU, theirs in float16 with loss scaling.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from losses.d3still import differential_term, feature_term, pairwise_term, relation_terms
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import AsymmetricRecipe, Distillation, Pairs
from orchestrator.recipe import Positive, Range, Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one D3still training; defaults are the paper's."""

    alpha: Weight = 100.0  # of the feature term (eq. 15)
    beta: Weight = 0.2  # of the inconsistent relation term (eq. 17)
    gamma: Weight = 0.1  # of the consistent relation term (eq. 17)
    top_k: Annotated[int, Range(2)] = 10  # neighbours with the image itself; 2 leaves no pair
    margin: Positive = 0.1  # m of eq. 17, not below about 0.01 in float32
    reading: Literal["A", "B"] = "B"  # of eq. 15: A = mean |v|, B = ‖v‖₂ / n (the authors' code)
    ties: Literal["drop", "reference"] = "drop"  # teacher ties: ignored, or as the authors' code treats them
    # Terms of the paper's ablations, off by default.
    pairwise: Weight = 0.0  # of L_pair (eq. 3); the paper does not give its weight
    differential: Weight = 0.0  # of L_pd (eq. 6)


def weights(recipe: Recipe) -> dict[str, float]:
    return {
        "feature": recipe.alpha,
        "inconsistent": recipe.beta,
        "consistent": recipe.gamma,
        "pairwise": recipe.pairwise,
        "differential": recipe.differential,
    }


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    """The paper's section 3.5 on one batch of raw embeddings; only terms whose weight is not 0."""
    student_BD, teacher_BD, found = pairs.student_BD, pairs.teacher_BD, {}
    if recipe.alpha:
        found["feature"] = feature_term(student_BD, teacher_BD, recipe.reading)
    if recipe.beta or recipe.gamma:
        inconsistent, consistent = relation_terms(student_BD, teacher_BD, recipe.top_k, recipe.margin, recipe.ties)
        found |= {"inconsistent": inconsistent} if recipe.beta else {}
        found |= {"consistent": consistent} if recipe.gamma else {}
    if recipe.pairwise:
        found["pairwise"] = pairwise_term(student_BD, teacher_BD)
    if recipe.differential:
        found["differential"] = differential_term(student_BD, teacher_BD, recipe.margin)
    return found


def _repo(alpha: float, beta: float, gamma: float, top_k: int = 10) -> dict[str, Any]:
    """The authors' code divides both relation terms by k - 1, which the paper does not, and has its own ties."""
    return {"alpha": alpha, "beta": beta / (top_k - 1), "gamma": gamma / (top_k - 1), "top_k": top_k,
            "ties": "reference", "double_losses": True}  # fmt: skip


METHOD = asymmetric.method(
    paper="D3still: Decoupled Differential Distillation for Asymmetric Image Retrieval, Xie et al., CVPR 2024",
    recipes=asymmetric.recipes(
        Recipe,
        {
            "*_repo*": _repo(100, 5, 1),
            "*_repo_mobilenet": _repo(200, 10, 2),
            "msmt17_repo*": _repo(50, 2, 1),
            "msmt17_repo_mobilenet": _repo(100, 4, 2),
        },
    ),
    distillation=Distillation(weights=weights, terms=terms, check=asymmetric.check_top_k),
)
