"""CSD: the student keeps the teacher's similarities to the teacher's neighbours (Wu et al., CVPR 2022).

    L = weight · KL(softmax(S^g / τ_g) ‖ softmax(S^q / τ_q)) over the teacher's top-k

    python -m orchestrator.train csd --on demo
    python -m orchestrator.sweep csd_weight

The neighbours come from the batch (``neighbours=batch``, the D3still authors' code) or from the whole training set
(``neighbours=train``, the original): a table that is made once, and all the loss then sees of the teacher, whatever
``views`` says. In the paper's
tables, without supervised losses, it falls far behind aligning the embeddings; with them it keeps up.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from losses.csd import contextual_divergence
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import SMALL, AsymmetricRecipe, Pairs
from orchestrator.recipe import Positive, Range, Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one CSD training."""

    weight: Weight = 1.0
    top_k: Annotated[int, Range(2)] = 96  # neighbours, the image itself counted
    query_temperature: Positive = 1.0  # τ_q
    gallery_temperature: Positive = 0.01  # τ_g; as it is not τ_q, the loss of a perfect student is not 0
    neighbours: Literal["batch", "train"] = "batch"


def weights(recipe: Recipe) -> dict[str, float]:
    return {"context": recipe.weight}


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    query_BK, gallery_BK = pairs.nearest(recipe.top_k)
    divergence = contextual_divergence(query_BK, gallery_BK, recipe.query_temperature, recipe.gallery_temperature)
    return {"context": divergence}


METHOD = asymmetric.method(
    paper="Contextual Similarity Distillation for Asymmetric Image Retrieval, Wu et al., CVPR 2022",
    recipes=asymmetric.recipes(
        Recipe,
        {
            "*_repo*": {"weight": 10.0, "top_k": 256, "double_losses": True},
            "*_repo_mobilenet": {"weight": 20.0},
            "msmt17_repo*": {"weight": 5.0},
            "msmt17_repo_mobilenet": {"weight": 10.0},
            SMALL: {"weight": 30.0},
        },
    ),
    distillation=asymmetric.over_neighbours(weights, terms),
)
