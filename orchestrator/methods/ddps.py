"""DDPS: disaggregation distillation for person search (Jia et al., IEEE TMM 2025).

A small two-stage network learns from a large frozen one that looks at the small one's own boxes: what it says of each
box (LD), how alike it finds the people (CD), and its feature maps, people and background apart (DFD).

    python -m orchestrator.teacher ddps --on demo
    python -m orchestrator.train ddps --on demo
    python -m orchestrator.sweep ddps_modules --on prw --data-root DIR

Two minutes on the demo. On PRW and CUHK-SYSU a ResNet-50 teacher is trained first; about half a GPU day each.

The paper's text was not available: formulas and numbers are those of the authors' public code. Where it does what the
paper cannot mean, the default is what is meant, and the release's behaviour is another value of the field: "cd_score",
"boxes", and "reviewkd_trained". Its configurations train some students alone with other settings than their distilled
twins; ``cuhk_sysu`` trains both alike, and ``cuhk_sysu_released`` with ``cuhk_sysu_released_alone`` are as released
(MobileNetV2 alone: also ``--set student.pretrained=false``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from losses.ddps import (
    DisaggregationFeatureDistillation,
    correlation_distillation,
    distinct_people,
    logit_distillation,
    teacher_confidence,
)
from losses.oim import OIM
from losses.pkd import pkd
from losses.reviewkd import ReviewFusion, hierarchical_context
from models.network import at_least_float32
from models.person_search import Images, PersonSearch, Trained, chosen, refined
from models.pyramid import COARSEST, LEVELS
from models.regions import HeadInput
from orchestrator import distributed
from orchestrator.families.person_search.job import PersonSearchMethod
from orchestrator.families.person_search.recipe import SearchRecipe, SearchTeacher
from orchestrator.families.person_search.training import (
    generators,
    images_of,
    in_places,
    of_all_ranks,
    people_rows,
    remember,
    task_losses,
)
from orchestrator.method import Batch, Losses, Task
from orchestrator.recipe import Positive, Share, Weight, changed


@dataclass(frozen=True, kw_only=True)
class Recipe(SearchRecipe):
    """Numbers of one DDPS training; defaults are the released ones for CUHK-SYSU where they are not said to be else."""

    teacher: SearchTeacher = field(default_factory=SearchTeacher)
    ld: Weight = 1.0  # of L_LD
    tau: Positive = 4.0  # temperature of L_LD
    cd: Weight = 0.01  # of L_CD
    cd_overlap: Share = 0.7  # NMS of each identity's boxes before L_CD; 1 = all are kept
    cd_score: Literal["teacher", "constant"] = "teacher"  # what NMS ranks by; as released constant: empty tables
    cd_reduction: Literal["sum", "mean"] = "sum"  # over pairs of people
    dfd: Weight = 1.0  # common factor of the four terms of L_DFD
    dfd_person: Weight = 5e-5  # L_fg
    dfd_background: Weight = 2.5e-5  # L_bg
    dfd_attention: Weight = 5e-5  # L_at
    dfd_context: Weight = 5e-7  # L_gl
    attention_temperature: Positive = 0.5  # T
    boxes: Literal["padded", "unpadded"] = "padded"  # size that boxes on maps are divided by; as released unpadded
    regions: Literal["student", "teacher"] = "student"  # whose boxes both networks look at in L_LD and L_CD
    pkd: Weight = 0.0  # PKD in place of DFD: 6
    reviewkd: Weight = 0.0  # ReviewKD in place of DFD: 1.2
    reviewkd_trained: bool = True  # its fusion blocks; as released they stay as they begin


class DDPS(Task):
    """Student, frozen teacher (or none), the task losses and LD, CD, DFD."""

    frozen = frozenset({"teacher", "teacher_memory"})

    def __init__(
        self, recipe: Recipe, student: PersonSearch, teacher: PersonSearch | None = None, memory: OIM | None = None
    ) -> None:
        super().__init__(student, teacher)
        self.recipe, self.teacher_memory = recipe, memory
        self.features = self.fusion = None
        if teacher is None:
            return
        widths = student.config.levels, teacher.config.levels
        if recipe.dfd:
            self.features = nn.ModuleList(
                DisaggregationFeatureDistillation(*widths, recipe.attention_temperature) for _ in LEVELS
            )
        if recipe.reviewkd:
            levels = len(LEVELS) + 1
            self.fusion = ReviewFusion([widths[0]] * levels, [widths[1]] * levels)
            self.fusion.requires_grad_(recipe.reviewkd_trained)

    def forward(self, batch: Batch) -> Losses:
        images, draws = images_of(batch, self.student), generators(batch)
        seen = self.student.trained(images, batch["boxes"], batch["identity"], self.recipe.detector.sampling, draws)
        losses = task_losses(seen, self.student.memory)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher.pyramid(images.pixels_BCHW)
            for own in (self._regions(seen, taught, images, batch, draws), self._maps(seen, taught, images, batch)):
                losses = Losses(
                    losses.terms | own.terms, losses.weights | own.weights, {**losses.observed, **own.observed}
                )
        kept = people_rows(seen, self._places(batch))
        return Losses(losses.terms, losses.weights, losses.observed, kept)

    def after_step(self, kept: Mapping[str, Tensor]) -> None:
        remember(self.student.memory, kept)

    def _places(self, batch: Batch) -> int:
        """Most people that are sampled in this rank's scenes."""
        sampling = self.recipe.detector.sampling
        return len(batch["draws"]) * int(sampling.boxes * sampling.box_share)

    # --- LD and CD: both networks look at the same boxes

    def _regions(
        self, seen: Trained, taught: Mapping[str, Tensor], images: Images, batch: Batch, draws: list[torch.Generator]
    ) -> Losses:
        recipe, terms, observed = self.recipe, {}, {}
        if not (recipe.ld or recipe.cd):
            return Losses({}, {})
        looked = self._of_student(seen, taught, images)
        if recipe.regions == "teacher":
            looked = self._of_teacher(seen, taught, images, batch, draws)
        regions, own_R2, theirs_R2, people, own_PD, theirs_PD = looked
        if recipe.ld:
            is_person_R = (regions.label_N > 0).long()
            terms["ld"] = of_all_ranks(logit_distillation(own_R2, theirs_R2, is_person_R, recipe.tau), len(is_person_R))
        if recipe.cd:
            rows = self._people(people, theirs_PD)
            places = self._places(batch)
            own, theirs = (in_places(at_least_float32(e)[rows], places) for e in (own_PD, theirs_PD))
            # A row of zeros is like nobody, in both networks: it adds nothing.
            pairs = correlation_distillation(distributed.gather(own), distributed.gather_without_gradient(theirs))
            is_real = in_places(torch.ones(len(rows), device=rows.device), places)
            observed["people"] = distributed.gather_without_gradient(is_real).sum()
            sums = recipe.cd_reduction == "sum"
            terms["cd"] = pairs if sums else pairs / observed["people"].clamp(min=1).square()
        return Losses(terms, {name: getattr(recipe, name) for name in terms}, observed)

    def _of_student(self, seen: Trained, taught: Mapping[str, Tensor], images: Images) -> tuple[Any, ...]:
        """The student proposes and samples, the teacher pools the same boxes."""
        with torch.no_grad():
            theirs_R2, _ = self.teacher.classify(taught, seen.regions.boxes, images.sizes)
            theirs_PD = self.teacher.embed(taught, seen.people.boxes, images.sizes)
        return seen.regions, seen.logit_R2, theirs_R2, seen.people, seen.embedding_PD, theirs_PD

    def _of_teacher(
        self, seen: Trained, taught: Mapping[str, Tensor], images: Images, batch: Batch, draws: list[torch.Generator]
    ) -> tuple[Any, ...]:
        """The teacher proposes, its boxes are matched and sampled as the student's are, the student pools them."""
        sampling, sizes = self.recipe.detector.sampling, images.sizes
        people, identities = batch["boxes"], batch["identity"]
        with torch.no_grad():
            scored = self.teacher.regions(taught, *images.pixels_BCHW.shape[-2:])
            proposed = self.teacher.proposals(scored, sizes, sampling)
            regions = chosen(proposed, people, identities, sampling, draws)
            theirs_R2, delta_R8 = self.teacher.classify(taught, regions.boxes, sizes)
            second = chosen(refined(delta_R8, regions.boxes, sizes), people, identities, sampling, draws)
            theirs_PD = self.teacher.embed(taught, second.boxes, sizes)
        own_R2, _ = self.student.classify(seen.maps, regions.boxes, sizes)
        own_PD = self.student.embed(seen.maps, second.boxes, sizes)
        return regions, own_R2, theirs_R2, second, own_PD, theirs_PD

    @torch.no_grad()
    def _people(self, people: HeadInput, theirs_PD: Tensor) -> Tensor:
        """Rows of one box for every person."""
        label_P = people.label_N
        score_P = (label_P > 0).to(theirs_PD.dtype)
        if self.teacher_memory is not None:
            similarity_PM = self.teacher_memory.similarities(theirs_PD)
            score_P = teacher_confidence(similarity_PM, label_P, self.teacher_memory.num_identities)
        counts = [len(b) for b in people.boxes]
        return distinct_people(people.boxes, people.labels(), list(score_P.split(counts)), self.recipe.cd_overlap)

    # --- DFD, and what it is compared with: feature maps

    def _maps(self, seen: Trained, taught: Mapping[str, Tensor], images: Images, batch: Batch) -> Losses:
        recipe, terms, weights = self.recipe, {}, {}
        if self.features is not None:
            padded = tuple(images.pixels_BCHW.shape[-2:])
            sizes: Sequence[tuple[int, int]] = [padded] * len(images.sizes)
            if recipe.boxes == "unpadded":
                sizes = images.sizes
            each = [
                distil(seen.maps[level], taught[level], batch["boxes"], sizes)
                for level, distil in zip(LEVELS, self.features, strict=True)
            ]
            for name in each[0]._fields:
                summed = torch.stack([getattr(level, name) for level in each]).sum()
                terms[f"dfd_{name}"] = of_all_ranks(summed, len(images.sizes))
                weights[f"dfd_{name}"] = recipe.dfd * getattr(recipe, f"dfd_{name}")
        # These two are of each rank's own maps, which have statistics of their own as batch norms have.
        if recipe.pkd:
            levels = torch.stack([pkd(seen.maps[level], taught[level]) for level in LEVELS])
            terms["pkd"], weights["pkd"] = of_all_ranks(levels.sum(), len(images.sizes)), recipe.pkd
        if self.fusion is not None:
            names = (*LEVELS, COARSEST)
            fused = self.fusion([seen.maps[level] for level in names])
            context = hierarchical_context(fused, [taught[level] for level in names])
            terms["reviewkd"], weights["reviewkd"] = of_all_ranks(context, len(images.sizes)), recipe.reviewkd
        return Losses(terms, weights)


_ALONE = {"ld": 0.0, "cd": 0.0, "dfd": 0.0, "pkd": 0.0, "reviewkd": 0.0}
_PAPER = {"teacher.rate": 0.0024, "teacher.epochs": 20, "teacher.seed": 1, "precision": "float32"}
_PRW = {
    "data.name": "prw",
    **_PAPER,
    "queue": 500,
    "train.rate": 0.01,
    "teacher.rate": 0.01,
    "teacher.scenes": 5,
    "context_detections": 30,
    "context_people": 4,
}
_RELEASED = {"cd_score": "constant", "boxes": "unpadded", "by_aspect": False}
# Small networks from scratch on a CPU.
_NETWORK = {"size": (96, 128), "levels": 32, "head": 64, "pretrained": False, "freeze_stem": False}
_SMALL = {
    **{f"student.{name}": value for name, value in _NETWORK.items()},
    **{f"teacher.network.{name}": value for name, value in _NETWORK.items()},
    "student.name": "resnet10t",
    "student.width": 0.125,
    "teacher.network.name": "resnet18",
    "teacher.network.width": 0.5,
    "teacher.network.head": 128,
    "dim": 32,
    "anchors": (16, 32, 64, 96, 128),
    "detector.proposals": 100,
    "train_proposals": 200,
    "sampled_anchors": 64,
    "sampled_boxes": 32,
    "detections": 20,
    "queue": 60,
    "batch.scenes": 6,
    "teacher.scenes": 6,
    "train.optimizer": "adamw",
    "train.rate": 2e-3,
    "weight_decay": 0.01,
    "train.epochs": 12,
    "fall_epoch": 9,
    "evaluate_every": 4,
    "loader_workers": 0,
    "pixel_cache": "on",
    "teacher.optimizer": "adamw",
    "teacher.rate": 2e-3,
    "teacher.epochs": 20,
    "precision": "float32",
}
_EMOJI = {"student.size": (120, 160), "teacher.network.size": (120, 160), "queue": 200, "batch.flip": 0.0}
_BENCHMARKS: dict[str, dict[str, Any]] = {
    "demo": {"data.name": "demo_scenes", **_SMALL},
    "emoji_scenes": {
        "data.name": "emoji_scenes",
        **_SMALL,
        "student.size": (120, 160),
        "teacher.network.size": (120, 160),
    },
    "cuhk_sysu": {"data.name": "cuhk_sysu", **_PAPER},
    "prw": _PRW,
    "cuhk_sysu_released": {"data.name": "cuhk_sysu", **_PAPER, **_RELEASED},
    "cuhk_sysu_released_alone": {
        "data.name": "cuhk_sysu",
        **_PAPER,
        **_RELEASED,
        **_ALONE,
        "student.freeze_norms": True,
    },
    "prw_released": {**_PRW, **_RELEASED},
    "folder": {"data.name": "folder_scenes", **_PAPER, "queue": 500},
}

METHOD = PersonSearchMethod(
    paper="DDPS, Jia et al., IEEE TMM 2025",
    recipes={name: changed(Recipe(), settings) for name, settings in _BENCHMARKS.items()},
    task=DDPS,
    alone=_ALONE,
    wants_memory=lambda recipe: recipe.cd > 0 and recipe.cd_score == "teacher",
    trainer="ddps",
)
