"""Numbers of an asymmetric distillation, and what a method of the family is beside them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Annotated, Any, Literal

from torch import Tensor, nn

from models.embedder import Embedder
from orchestrator.families.asymmetric.benchmarks import BENCHMARKS
from orchestrator.families.retrieval import recipe as retrieval
from orchestrator.families.retrieval.recipe import EmbedderRecipe, RetrievalNetwork, RetrievalTeacher
from orchestrator.recipe import Count, Range, changed

if TYPE_CHECKING:
    from orchestrator.families.asymmetric.pairs import Pairs


def _teacher() -> RetrievalTeacher:
    return RetrievalTeacher(network=RetrievalNetwork(name="resnet101.tv_in1k", size=(256, 256), pad=8))


@dataclass(frozen=True, kw_only=True)
class AsymmetricRecipe(EmbedderRecipe):
    """Numbers of one asymmetric distillation; a method adds the weights of its own loss."""

    teacher: RetrievalTeacher = field(default_factory=_teacher)  # embeds the gallery
    mode: Literal["paper", "repo"] = "paper"  # repo adds the supervised losses on a second batch
    batch_size: Annotated[int, Range(2)] = 512  # images of the distillation batch, over all workers
    together: Count = 1  # images of one identity in the distillation batch; 1 = shuffled without regard to identity
    double_losses: bool = False  # distillation losses in float64, as the authors' D3still, CSD and ROP; slow on GPUs
    views: Literal["online", "recorded", "clean"] = "online"  # where the teacher's embeddings come from
    num_views: Count = 8  # V of recorded views
    coupled: bool = False  # student and teacher see the same flip, crop and erasing
    evaluate_symmetric: bool = False  # also score the student on both sides


Weights = Callable[[Any], dict[str, float]]  # recipe -> weight of every term, 0 = off
Terms = Callable[[Any, "Pairs"], dict[str, Tensor]]  # the terms that are on, unweighted


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a method of this family is beside its recipe: its terms and their weights, and rarely more."""

    weights: Weights
    terms: Terms
    check: Callable[[Any], None] = lambda recipe: None  # raises ValueError
    teacher_classifier: bool = False  # the teacher's class scores are needed
    student_classifier: bool = False  # the student's too; one that no loss trains would stop data parallelism
    # How many whole-training-set neighbours the loss reads; 0 = none.
    neighbours: Callable[[Any], int] = lambda recipe: 0
    # Networks that train with the student but are not part of it: recipe, student -> module.
    heads: Callable[[Any, Embedder], nn.Module | None] = lambda recipe, student: None
    # What is computed of a batch of views; both hold at least "embedding".
    student_outputs: Callable[[Any, Embedder, nn.Module | None, Tensor], dict[str, Tensor]] = (
        lambda recipe, student, heads, images_BCHW: {"embedding": student(images_BCHW)}
    )
    teacher_outputs: Callable[[Any, Embedder, Tensor], dict[str, Tensor]] = lambda recipe, teacher, images_BCHW: {
        "embedding": teacher(images_BCHW)
    }
    outputs: str = ""  # name of these outputs in caches; empty = the embedding alone
    # What of a recipe decides the teacher's outputs, as it is named in caches.
    outputs_by: Callable[[Any], dict[str, Any]] = lambda recipe: {}


def check(method: Distillation, recipe: AsymmetricRecipe, workers: int = 1) -> None:
    """Raises ValueError for values that are allowed alone but not together."""
    if not any(method.weights(recipe).values()) and not (recipe.mode == "repo" and recipe.labelled.cross_entropy):
        raise ValueError(
            "nothing to train on: every loss weight is 0, or only the triplet, which never reaches the neck"
        )
    retrieval.check_network("teacher.network", recipe.teacher.network, recipe.embedding_dim)
    retrieval.check(recipe, workers if recipe.mode == "repo" else 1)
    if recipe.batch_size % workers:
        raise ValueError(f"a batch of {recipe.batch_size} images cannot be shared evenly by {workers} workers")
    if recipe.batch_size < 2 * workers:
        raise ValueError(
            f"a batch of {recipe.batch_size} images leaves {workers} workers fewer than 2 each, and a batch norm "
            f"in training needs 2; enlarge batch_size"
        )
    if recipe.batch_size % recipe.together or recipe.together == recipe.batch_size:
        raise ValueError(
            f"batch_size ({recipe.batch_size}) must hold several identities of together ({recipe.together}) images"
        )
    if recipe.coupled and recipe.views == "clean":
        raise ValueError("coupled=true needs views=online or views=recorded: clean teacher views are not augmented")
    method.check(recipe)


def check_top_k(recipe: Any) -> None:
    """Raises ValueError where neighbours are taken from a batch that has too few."""
    if recipe.top_k > recipe.batch_size and getattr(recipe, "neighbours", "batch") == "batch":
        raise ValueError(
            f"top_k ({recipe.top_k}) must be at most batch_size ({recipe.batch_size}), where neighbours are taken"
        )


def over_neighbours(weights: Weights, terms: Terms) -> Distillation:
    """A loss over the teacher's nearest images, of the batch or (``neighbours=train``) of the training set."""
    return Distillation(
        weights=weights,
        terms=terms,
        check=check_top_k,
        neighbours=lambda recipe: recipe.top_k if recipe.neighbours == "train" else 0,
    )


def recipes(recipe: type, own: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A recipe for every benchmark of the family.

    Args:
        recipe: the method's recipe class; its defaults and the benchmark's settings are where everything starts.
        own: the method's numbers by benchmark, as patterns such as ``"*_repo*"`` or ``"inshop|sop"``; later ones win.
    """
    found = {}
    for benchmark, settings in BENCHMARKS.items():
        numbers: dict[str, Any] = {}
        for pattern, values in (own or {}).items():
            numbers |= values if any(fnmatch(benchmark, one) for one in pattern.split("|")) else {}
        found[benchmark] = changed(recipe(), {**settings, **numbers})
    return found


def used_views(method: Distillation, recipe: AsymmetricRecipe) -> AsymmetricRecipe:
    """The recipe with the teacher's views as the loss sees them: whole-set neighbours are those of plain images."""
    return replace(recipe, views="clean", coupled=False) if method.neighbours(recipe) else recipe


def is_supervised(recipe: AsymmetricRecipe) -> bool:
    """Whether the supervised losses are trained on a second batch."""
    return recipe.mode == "repo" and (recipe.labelled.cross_entropy > 0 or recipe.labelled.triplet > 0)
