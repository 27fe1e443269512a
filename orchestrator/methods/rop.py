"""ROP: the student keeps the order of the teacher's neighbours (Wu et al., ICLR 2023).

    L = weight · 1/k Σ_rc w_r (I^g_rc − I^q_rc)²        I: soft "c is nearer than r", the student against the teacher

    python -m orchestrator.train rop --on demo
    python -m orchestrator.sweep rop_weight

The neighbours come from the batch (``neighbours=batch``, the D3still authors' code) or from the whole training set
(``neighbours=train``, the original): a table that is made once, and all the loss then sees of the teacher, whatever
``views`` says. The loss of a perfect student is not 0. In the paper's
tables, without supervised losses, it falls far behind aligning the embeddings; with them it keeps up.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from losses.rop import rank_order
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import SMALL, AsymmetricRecipe, Pairs
from orchestrator.recipe import Positive, Range, Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one ROP training."""

    weight: Weight = 1.0
    top_k: Annotated[int, Range(2)] = 96  # neighbours, the image itself counted
    temperature: Positive = 0.1  # τ
    rank_weight: Weight = 0.2  # ρ; a small one weighs all ranks nearly alike
    neighbours: Literal["batch", "train"] = "batch"


def weights(recipe: Recipe) -> dict[str, float]:
    return {"order": recipe.weight}


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    return {"order": rank_order(*pairs.nearest(recipe.top_k), recipe.temperature, recipe.rank_weight)}


METHOD = asymmetric.method(
    paper="A General Rank Preserving Framework for Asymmetric Image Retrieval, Wu et al., ICLR 2023",
    recipes=asymmetric.recipes(
        Recipe,
        {
            "*_repo*": {"weight": 1.0, "top_k": 256, "double_losses": True},
            "*_repo_mobilenet": {"weight": 2.0},
            "msmt17_repo*": {"weight": 0.5},
            "msmt17_repo_mobilenet": {"weight": 1.0},
            SMALL: {"weight": 10.0},
        },
    ),
    distillation=asymmetric.over_neighbours(weights, terms),
)
