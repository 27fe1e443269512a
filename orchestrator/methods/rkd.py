"""RKD: the student keeps the teacher's distances and angles between images (Park et al., CVPR 2019).

    L = distance · L_d + angle · L_a

    python -m orchestrator.train rkd --on demo
    python -m orchestrator.sweep rkd_weight

Relations inside each space only: asymmetric retrieval stays at chance, in all published tables too; look at the
student on both sides (``evaluate_symmetric``). Weights 25 and 50 are the D3still authors'; the original's metric
learning setting is 1 and 2, and its author advises 25 to 100 elsewhere.
"""

from dataclasses import dataclass

from torch import Tensor

from losses.rkd import angle_term, distance_term
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import AsymmetricRecipe, Distillation, Pairs
from orchestrator.recipe import Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one RKD training."""

    distance: Weight = 25.0
    angle: Weight = 50.0  # cost and memory of this term grow with the cube of the batch


def weights(recipe: Recipe) -> dict[str, float]:
    return {"distance": recipe.distance, "angle": recipe.angle}


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    found = {}
    if recipe.distance:
        found["distance"] = distance_term(pairs.student_BD, pairs.teacher_BD)
    if recipe.angle:
        found["angle"] = angle_term(pairs.student_BD, pairs.teacher_BD)
    return found


METHOD = asymmetric.method(
    paper="Relational Knowledge Distillation, Park et al., CVPR 2019",
    recipes=asymmetric.recipes(Recipe),
    distillation=Distillation(weights=weights, terms=terms),
)
