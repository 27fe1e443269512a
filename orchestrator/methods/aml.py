"""AML: metric learning across two networks (Budnik and Avrithis, CVPR 2021).

    variant = regression             each image with its own teacher embedding
    variant = contrastive            an image of its identity, and five hard negatives
    variant = contrastive+           both
    variant = triplet                positive against negatives, in squared distances

    python -m orchestrator.train aml --on demo --set variant=contrastive
    python -m orchestrator.sweep aml_weight

The anchor is the student's; positives and negatives are the teacher's (``symmetric=false``) or the student's own,
which does not align the spaces. Regression is the strongest asymmetric variant of the paper.

Departs from the authors' code: tuples are formed inside the batch, which then holds ``together`` images of each
identity (theirs: negatives mined in 20,000 cached images), and the recipe's optimiser is the family's. Terms are
summed over the batch as theirs are; the recipes' weight is one over its size (small benchmarks: chosen).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from losses.aml import contrastive, mine, regression, triplet
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import SMALL, AsymmetricRecipe, Distillation, Pairs
from orchestrator.recipe import Count, Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one AML training."""

    variant: Literal["regression", "contrastive", "contrastive+", "triplet"] = "regression"
    symmetric: bool = False  # positives and negatives by the student
    weight: Weight = 1.0
    negatives: Count = 5  # of each anchor
    margin: Weight = 0.7  # contrastive: of distances; triplet: of squared ones, where the authors' class has 0.1


def weights(recipe: Recipe) -> dict[str, float]:
    return {"regression": recipe.weight, "contrastive": recipe.weight, "triplet": recipe.weight}


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    student_BD, found = pairs.student_BD, {}
    if recipe.variant in ("regression", "contrastive+"):
        found["regression"] = regression(student_BD, pairs.teacher_BD)
    if recipe.variant != "regression":
        pool_BD = student_BD if recipe.symmetric else pairs.teacher_BD
        positive_B, negative_BN, counted_B = mine(student_BD, pool_BD, pairs.label_B, recipe.negatives)
        tuples = student_BD, pool_BD[positive_B], pool_BD[negative_BN], recipe.margin, counted_B
        if recipe.variant == "triplet":
            found["triplet"] = triplet(*tuples)
        else:
            found["contrastive"] = contrastive(*tuples)
    return found


def check(recipe: Recipe) -> None:
    """Raises ValueError where a batch holds no tuples, or a setting would not matter."""
    if recipe.variant == "regression" and recipe.symmetric:
        raise ValueError("symmetric=true needs another variant: regression has no positives and negatives to choose")
    if recipe.variant != "regression" and recipe.together < 2:
        raise ValueError(
            f"variant={recipe.variant} needs images of one identity in the batch; set together to 2 or more"
        )
    if recipe.variant != "regression" and recipe.batch_size - recipe.together < recipe.negatives:
        raise ValueError(
            f"a batch of {recipe.batch_size} images, {recipe.together} of each identity, has no {recipe.negatives} "
            f"negatives for each"
        )


METHOD = asymmetric.method(
    paper="Asymmetric Metric Learning for Knowledge Transfer, Budnik and Avrithis, CVPR 2021",
    recipes=asymmetric.recipes(
        Recipe, {"*": {"weight": 1 / 512}, "*_repo*": {"weight": 1 / 256}, SMALL: {"weight": 0.2}}
    ),
    distillation=Distillation(weights=weights, terms=terms, check=check),
)
