"""D3still: decoupled differential distillation for asymmetric image retrieval (Xie et al., CVPR 2024).

The student should *order* gallery images as the teacher does. Differences between pairwise similarities, on
the teacher's top-k, are split into those the student ranks against the teacher (inconsistent) and with it
(consistent), weighed apart, and decoupled from the alignment of each image's own two embeddings:

    L = α L_f + β L_irpd + γ L_crpd                                                     (eq. 18)

    python -m orchestrator.train d3still --on demo
    python -m orchestrator.sweep d3still_beta_gamma

Cost: seconds on the demo. At the paper's settings a 24 GB GPU and about half a day per data set (online views);
expected in the paper on In-Shop: mAP 64.31, R1 79.60.

The recipes ``inshop``, ``sop`` and ``msmt17`` are the paper's; ``*_repo`` and ``cub200`` are those of the authors'
later code, with supervised losses, other sizes and other weights: their published numbers are not comparable.

Departs from the authors' code: networks run in bfloat16 on a GPU, theirs in float16 with loss scaling.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from torch import Tensor

from losses.d3still import differential_term, feature_term, pairwise_term, relation_terms
from orchestrator.method import Positive, Range, Weight
from orchestrator.methods import asymmetric
from orchestrator.methods.asymmetric import AsymmetricRecipe


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
    double_similarities: bool = False  # float64 similarities, as the authors' code; slow on consumer GPUs


def weights(recipe: Recipe) -> dict[str, float]:
    return {
        "feature": recipe.alpha,
        "inconsistent": recipe.beta,
        "consistent": recipe.gamma,
        "pairwise": recipe.pairwise,
        "differential": recipe.differential,
    }


def terms(recipe: Recipe, student_BD: Tensor, teacher_BD: Tensor) -> dict[str, Tensor]:
    """The paper's section 3.5 on one batch of raw embeddings; only terms whose weight is not 0."""
    if recipe.double_similarities:
        student_BD, teacher_BD = student_BD.double(), teacher_BD.double()
    found = {}
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


def check(recipe: Recipe, workers: int = 1) -> None:
    """Raises ValueError for values that are allowed alone but not together."""
    asymmetric.check(recipe, weights(recipe), workers)
    if recipe.top_k > recipe.batch_size:
        raise ValueError(
            f"top_k ({recipe.top_k}) must be at most batch_size ({recipe.batch_size}), where neighbours are taken"
        )


_PAPER = Recipe(dataset="inshop")
_SMALL = Recipe(
    dataset="demo",
    student="resnet18",
    student_width=0.25,
    student_size=(32, 32),
    teacher="resnet18",
    teacher_width=0.5,
    teacher_size=(64, 64),
    teacher_pad=4,
    teacher_epochs=16,
    teacher_optimizer="adamw",
    teacher_learning_rate=0.002,
    embedding_dim=128,
    pretrained=False,
    teacher_pretrained=False,
    batch_size=120,
    views="recorded",
    num_views=4,
    erase=0.2,
    learning_rate=0.1,
    epochs=24,
    warmup_epochs=2,
    constant_epochs=8,
    evaluate_every=2,
    evaluate_symmetric=False,
    identities_per_batch=15,
    images_per_identity=4,
    loader_workers=0,
)


def _repo(paper: Recipe, alpha: float, beta: float, gamma: float, **values) -> Recipe:
    """The authors' code: it divides both relation terms by k - 1, which the paper does not, and has its own ties."""
    own = {"mode": "repo", "batch_size": 256, "ties": "reference", "double_similarities": True}
    scaled = {"alpha": alpha, "beta": beta / (paper.top_k - 1), "gamma": gamma / (paper.top_k - 1)}
    return replace(paper, **own | scaled | values)


METHOD = asymmetric.method(
    paper="D3still: Decoupled Differential Distillation for Asymmetric Image Retrieval, Xie et al., CVPR 2024",
    recipes={
        "demo": _SMALL,
        "omniglot": replace(
            _SMALL,
            dataset="omniglot",
            student_size=(28, 28),
            teacher_size=(56, 56),
            flip=0.0,
            erase=0.0,
            batch_size=128,
            views="clean",
            epochs=8,
            constant_epochs=3,
            teacher_epochs=8,
            evaluate_every=4,
            evaluate_symmetric=True,
        ),
        "folder": replace(_PAPER, dataset="folder"),
        "inshop": _PAPER,
        "sop": replace(_PAPER, dataset="sop"),
        "msmt17": replace(_PAPER, dataset="msmt17"),
        "inshop_repo": _repo(_PAPER, 100, 5, 1),
        "sop_repo": _repo(replace(_PAPER, dataset="sop"), 100, 5, 1),
        "msmt17_repo": _repo(
            replace(_PAPER, dataset="msmt17"), 50, 2, 1, student_size=(160, 80), student_pad=4, teacher_size=(320, 160)
        ),
        "cub200": _repo(
            replace(_PAPER, dataset="cub200"), 100, 5, 1, student_size=(128, 128), student_pad=4, erase=0.0
        ),
    },
    weights=weights,
    terms=terms,
    check=check,
)
