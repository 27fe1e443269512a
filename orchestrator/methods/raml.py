"""RAML: absolute and relational alignment with the teacher (Suma and Tolias, WACV 2023).

    L = weight · (L_abs + λ1 L_ts + λ2 L_ss)

    python -m orchestrator.train raml --on demo
    python -m orchestrator.sweep raml_weight

λ1 and λ2 are the original's optimum on SOP, which the D3still authors use everywhere. Their training entry assigns
λ2 := λ1, so that all their published numbers are of λ2 = 0.7482 whatever the configuration says; ``lambda2_slip``
reproduces that and is on in ``*_repo*``.
"""

from dataclasses import dataclass

from torch import Tensor

from losses.raml import absolute_term, cross_term, student_term
from orchestrator.families import asymmetric
from orchestrator.families.asymmetric import SMALL, AsymmetricRecipe, Distillation, Pairs
from orchestrator.recipe import Weight


@dataclass(frozen=True, kw_only=True)
class Recipe(AsymmetricRecipe):
    """Numbers of one RAML training."""

    weight: Weight = 1.0
    lambda1: Weight = 0.7482  # of the student–teacher relations
    lambda2: Weight = 0.6778  # of the student–student relations
    lambda2_slip: bool = False  # use lambda1 in its place, as the authors' code does


def weights(recipe: Recipe) -> dict[str, float]:
    lambda2 = recipe.lambda1 if recipe.lambda2_slip else recipe.lambda2
    return {
        "absolute": recipe.weight,
        "cross": recipe.weight * recipe.lambda1,
        "student": recipe.weight * lambda2,
    }


def terms(recipe: Recipe, pairs: Pairs) -> dict[str, Tensor]:
    losses = {"absolute": absolute_term, "cross": cross_term, "student": student_term}
    on = {name for name, weight in weights(recipe).items() if weight}
    return {name: loss(pairs.student_BD, pairs.teacher_BD) for name, loss in losses.items() if name in on}


METHOD = asymmetric.method(
    paper="Large-to-Small Image Resolution Asymmetry in Deep Metric Learning, Suma and Tolias, WACV 2023",
    recipes=asymmetric.recipes(
        Recipe,
        {
            "*_repo*": {"weight": 10.0, "lambda2_slip": True},
            "*_repo_mobilenet": {"weight": 20.0},
            "msmt17_repo*": {"weight": 5.0},
            "msmt17_repo_mobilenet": {"weight": 10.0},
            SMALL: {"weight": 10.0},
        },
    ),
    distillation=Distillation(weights=weights, terms=terms),
)
