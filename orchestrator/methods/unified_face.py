"""Unified distillation for face recognition (Mishra and Uikey, IJCB 2025): ILED and RPSD, our reading.

ILED aligns single embeddings and looks harder at those that are far from the teacher's. RPSD matches the similarities
of each face to others, mined from the batch and from a memory bank of both networks' embeddings.

    python -m orchestrator.train unified_face --on demo
    python -m orchestrator.sweep face_ablation

The paper's formulas, constants and numbers are not public to us: what is here is our reading of its abstract, and no
result is one of the paper's. With ``iled_miner=none`` and ``rpsd=0`` it is feature consistency. A minute on the demo,
with its teacher two; about a GPU-day on MS1MV2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from losses.face_kd import ILED, RPSD, ramp
from orchestrator.families.face.benchmarks import recipes
from orchestrator.families.face.job import FaceMethod
from orchestrator.families.face.recipe import DistillationRecipe, teacher_dim
from orchestrator.families.face.training import Distillation, Faces, FaceTask, Sizes, Terms, projected, projector
from orchestrator.recipe import Count, Positive, Probability, Range, Share, Weight, Whole


@dataclass(frozen=True, kw_only=True)
class Recipe(DistillationRecipe):
    """Numbers of one training with ILED and RPSD; all are ours."""

    iled: Weight = 10.0  # λ_I
    iled_miner: Literal["adaptive", "topk", "soft", "none"] = "adaptive"
    iled_momentum: Probability = 0.9  # of the running mean and deviation that "adaptive" compares with
    iled_kappa: float = 0.0  # deviations above the mean from which a face is hard
    easy_weight: Probability = 0.5  # e: weight of faces that are not hard; 1 = feature consistency, 0 = hard ones alone
    ratio_start: Share = 1.0  # ρ0 and ρ1 of "topk"
    ratio_end: Share = 0.3
    gamma: Weight = 1.0  # of "soft"
    rpsd: Weight = 50.0  # λ_R
    rpsd_ramp: Whole = 1000  # steps until λ_R is reached
    rpsd_miner: Literal["hard_negative", "teacher_similar", "discrepancy", "all", "random"] = "hard_negative"
    top_k: Count = 64  # K mined references
    reference: Literal["self", "cross"] = "self"  # whose stored vectors the student is compared with
    phi: Literal["square", "huber"] = "square"
    delta: Positive = 0.1  # of Huber
    bank: Annotated[int, Range(0)] = 4096  # M slots; 0 = references of the batch alone
    bank_from: Whole = 1000  # step from which the bank is used
    bank_half: bool = False  # stored in float16


def weights(recipe: Recipe) -> dict[str, float]:
    return {"iled": recipe.iled, "rpsd": recipe.rpsd}


def remembers(recipe: Recipe, sizes: Sizes) -> nn.Module:
    """The terms that are on, with their running values and their bank."""
    parts: dict[str, nn.Module] = {}
    if recipe.iled:
        parts["iled"] = ILED(
            recipe.iled_miner, recipe.iled_momentum, recipe.iled_kappa, recipe.easy_weight, recipe.ratio_start,
            recipe.ratio_end, max(sizes.steps, 1), recipe.gamma,
        )  # fmt: skip
        parts |= projector(recipe.embedding_dim, teacher_dim(recipe))
    if recipe.rpsd:
        parts["rpsd"] = RPSD(
            recipe.embedding_dim, teacher_dim(recipe), recipe.bank, recipe.top_k, recipe.rpsd_miner, recipe.reference,
            phi=recipe.phi, delta=recipe.delta, half=recipe.bank_half,
        )  # fmt: skip
    return nn.ModuleDict(parts)


def terms(recipe: Recipe, task: FaceTask, faces: Faces) -> Terms:
    memory, found, observed = task.memory, {}, {}
    if recipe.iled:
        found["iled"] = memory["iled"](projected(memory, faces.student_BD), faces.teacher_BD)
    if recipe.rpsd:
        rpsd = memory["rpsd"]
        use_bank = task.steps + 1 >= recipe.bank_from
        pairs = rpsd.pairs(faces.student_BD, faces.teacher_BD, faces.label_B, faces.image_B, use_bank)
        found["rpsd"] = rpsd.loss(pairs)
        observed = {f"mined_square_{part}": value for part, value in rpsd.staleness(pairs).items()}
    return Terms(found, observed)


def after(recipe: Recipe, memory: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """The bank takes the step's vectors once the step is done."""
    if recipe.rpsd:
        memory["rpsd"].enqueue(rows["student"], rows["teacher"], rows["label"], rows["image"])


def check(recipe: Recipe) -> None:
    if recipe.rpsd and recipe.rpsd_miner == "random" and recipe.head.sample < 1:
        raise ValueError(
            "rpsd_miner=random with head.sample below 1: workers that own different numbers of classes would draw "
            "different pairs; take another miner, or head.sample=1"
        )
    if recipe.rpsd and recipe.reference == "cross" and teacher_dim(recipe) != recipe.embedding_dim:
        raise ValueError(
            f"reference=cross compares student and teacher vectors, of widths {recipe.embedding_dim} and "
            f"{teacher_dim(recipe)}; take reference=self, or equal widths"
        )


def distils(recipe: Recipe) -> bool:
    """Whether the teacher is looked at."""
    return recipe.iled > 0 or recipe.rpsd > 0 or recipe.centres == "teacher"


_DEMO: dict[str, Any] = {"bank": 512, "bank_from": 40, "rpsd_ramp": 40, "top_k": 16}

METHOD = FaceMethod(
    paper="Unified face distillation (ILED + RPSD), Mishra and Uikey, IJCB 2025: our reading of its abstract",
    recipes=recipes(Recipe, {"webface42m": {"head.sample": 0.2}, "demo": _DEMO, "orl": _DEMO}),
    distillation=Distillation(
        weights=weights,
        terms=terms,
        check=check,
        remembers=remembers,
        ramps=lambda recipe, sizes, step: {"rpsd": ramp(step, recipe.rpsd_ramp)},
        after=after,
    ),
    distils=distils,
)
