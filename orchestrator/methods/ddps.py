"""DDPS: disaggregation distillation for person search (Jia et al., IEEE TMM 2025).

A small two-stage network learns from a large frozen one that looks at the small one's own boxes: what it says of each
box (LD), how alike it finds the people (CD), and its feature maps, people and background apart (DFD).

    python -m orchestrator.teacher ddps --on demo
    python -m orchestrator.train ddps --on demo
    python -m orchestrator.sweep ddps_modules --on prw --data-root DIR

Two minutes on the demo. On PRW and CUHK-SYSU a ResNet-50 teacher is trained first; neither was run here.

The paper's text was not available: formulas and numbers are those of the authors' public code. Where it does what the
paper cannot mean, the default is what is meant, and the release's behaviour is another value of the field: "cd_score",
"boxes", and "reviewkd_trained". Its configurations train some students alone with other settings than their distilled
twins; ``cuhk_sysu`` trains both alike, and ``cuhk_sysu_released`` with ``cuhk_sysu_released_alone`` are as released
for ResNet-18;
``cuhk_sysu_released_mobilenet`` and ``cuhk_sysu_released_mobilenet_alone`` for MobileNetV2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from losses.ddps import (
    DisaggregationFeatureDistillation,
    FeatureTerms,
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

Draws = list[torch.Generator]  # of each image, for what is sampled in it


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


class Pairs(NamedTuple):
    """What both networks say of the same boxes."""

    label_R: Tensor  # of the first head's boxes
    own_R2: Tensor
    theirs_R2: Tensor
    own_PD: Tensor  # of one box for every person, then zeros
    theirs_PD: Tensor
    is_person_P: Tensor


class Looked(NamedTuple):
    """All that the losses of a step are made from."""

    seen: Trained
    taught: dict[str, Tensor]  # the teacher's maps; empty without one
    pairs: Pairs | None
    images: Images
    people: list[Tensor]  # boxes of every image
    kept: dict[str, Tensor]


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
        return self.losses(self.look(batch))

    def after_step(self, kept: Mapping[str, Tensor]) -> None:
        remember(self.student.memory, kept)

    # --- what is looked at: how many boxes are sampled decides shapes, so the host waits for the device

    def look(self, batch: Batch) -> Looked:
        """Both networks on a batch."""
        images, draws, sampling = images_of(batch, self.student), generators(batch), self.recipe.detector.sampling
        seen = self.student.trained(images, batch["boxes"], batch["identity"], sampling, draws)
        places = len(draws) * int(sampling.boxes * sampling.box_share)  # people that are sampled at most
        taught, pairs = {}, None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher.pyramid(images.pixels_BCHW)
            if self.recipe.ld or self.recipe.cd:
                looks = self._at_student_s if self.recipe.regions == "student" else self._at_teacher_s
                pairs = looks(seen, taught, images, batch, draws, places)
        return Looked(seen, taught, pairs, images, batch["boxes"], people_rows(seen, places))

    def _at_student_s(
        self, seen: Trained, taught: Mapping[str, Tensor], images: Images, batch: Batch, draws: Draws, places: int
    ) -> Pairs:
        """The student proposes and samples, the teacher pools the same boxes."""
        with torch.no_grad():
            theirs_R2, _ = self.teacher.classify(taught, seen.regions.boxes, images.sizes)
            theirs_PD = self.teacher.embed(taught, seen.people.boxes, images.sizes)
        people = self._people(seen.people, seen.embedding_PD, theirs_PD, places)
        return Pairs(seen.regions.label_N, seen.logit_R2, theirs_R2, *people)

    def _at_teacher_s(
        self, seen: Trained, taught: Mapping[str, Tensor], images: Images, batch: Batch, draws: Draws, places: int
    ) -> Pairs:
        """The teacher proposes, its boxes are matched and sampled as the student's are, the student pools them."""
        own, sizes, people = self.recipe.detector.sampling, images.sizes, (batch["boxes"], batch["identity"])
        with torch.no_grad():
            scored = self.teacher.regions(taught, *images.pixels_BCHW.shape[-2:])
            regions = chosen(self.teacher.proposals(scored, sizes, own), *people, own, draws)
            theirs_R2, delta_R8 = self.teacher.classify(taught, regions.boxes, sizes)
            second = chosen(refined(delta_R8, regions.boxes, sizes), *people, own, draws)
            theirs_PD = self.teacher.embed(taught, second.boxes, sizes)
        own_R2, _ = self.student.classify(seen.maps, regions.boxes, sizes)
        own_PD = self.student.embed(seen.maps, second.boxes, sizes)
        return Pairs(regions.label_N, own_R2, theirs_R2, *self._people(second, own_PD, theirs_PD, places))

    def _people(self, people: HeadInput, own_PD: Tensor, theirs_PD: Tensor, places: int) -> tuple[Tensor, ...]:
        """Both networks' embeddings of one box for every person, then rows of zeros; and which rows are people."""
        label_P = people.label_N
        score_P = (label_P > 0).to(theirs_PD.dtype)  # all alike, as from empty tables
        if self.teacher_memory is not None:
            similarity_PM = self.teacher_memory.similarities(theirs_PD)
            score_P = teacher_confidence(similarity_PM, label_P, self.teacher_memory.num_identities)
        scores = list(score_P.split([len(b) for b in people.boxes]))
        rows = distinct_people(people.boxes, people.labels(), scores, self.recipe.cd_overlap)
        own, theirs = (in_places(at_least_float32(e)[rows], places) for e in (own_PD, theirs_PD))
        return own, theirs, in_places(torch.ones(len(rows), device=rows.device), places)

    # --- the losses: no step waits here

    def losses(self, looked: Looked) -> Losses:
        """The task's, those on boxes, those on maps; over the batch of all ranks."""
        parts = [task_losses(looked.seen, self.student.memory)]
        if looked.pairs is not None:
            parts.append(self._on_boxes(looked.pairs))
        if self.teacher is not None:
            parts.append(self._on_maps(looked))
        terms, weights, observed = ({k: v for part in parts for k, v in part[i].items()} for i in range(3))
        return Losses(terms, weights, observed, looked.kept)

    def _on_boxes(self, pairs: Pairs) -> Losses:
        """LD and CD."""
        recipe, terms = self.recipe, {}
        people = distributed.gather_without_gradient(pairs.is_person_P).sum()
        if recipe.ld:
            is_person_R = (pairs.label_R > 0).long()
            each = logit_distillation(pairs.own_R2, pairs.theirs_R2, is_person_R, recipe.tau)
            terms["ld"] = of_all_ranks(each, len(is_person_R))
        if recipe.cd:
            # A row of zeros is like nobody, for both networks: it adds nothing.
            own_PD, theirs_PD = distributed.gather(pairs.own_PD), distributed.gather_without_gradient(pairs.theirs_PD)
            terms["cd"] = correlation_distillation(own_PD, theirs_PD)
            if recipe.cd_reduction == "mean":
                terms["cd"] = terms["cd"] / people.clamp(min=1).square()
        return Losses(terms, {name: getattr(recipe, name) for name in terms}, {"people": people})

    def _on_maps(self, looked: Looked) -> Losses:
        """DFD, or what it is compared with."""
        recipe, own, taught, terms, weights = self.recipe, looked.seen.maps, looked.taught, {}, {}
        images = looked.images
        count = len(images.sizes)
        if self.features is not None:
            padded = tuple(images.pixels_BCHW.shape[-2:])
            sizes = [padded] * count if recipe.boxes == "padded" else images.sizes
            each = [
                distil(own[level], taught[level], looked.people, sizes)
                for level, distil in zip(LEVELS, self.features, strict=True)
            ]
            for name in FeatureTerms._fields:
                summed = torch.stack([getattr(level, name) for level in each]).sum()
                terms[f"dfd_{name}"] = of_all_ranks(summed, count)
                weights[f"dfd_{name}"] = recipe.dfd * getattr(recipe, f"dfd_{name}")
        # These two are of each rank's own maps, whose statistics differ as those of batch norms do.
        if recipe.pkd:
            levels = torch.stack([pkd(own[level], taught[level]) for level in LEVELS])
            terms["pkd"], weights["pkd"] = of_all_ranks(levels.sum(), count), recipe.pkd
        if self.fusion is not None:
            names = (*LEVELS, COARSEST)
            context = hierarchical_context(self.fusion([own[level] for level in names]), [taught[n] for n in names])
            terms["reviewkd"], weights["reviewkd"] = of_all_ranks(context, count), recipe.reviewkd
        return Losses(terms, weights)


def _check_losses(recipe: Recipe) -> None:
    own, theirs = recipe.student.levels, recipe.teacher.network.levels
    if recipe.pkd and own != theirs:
        raise ValueError(f"PKD compares maps of one width: student.levels {own}, teacher.levels {theirs}; set both")


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
_MOBILE = {
    "student.name": "mobilenetv2_100.ra_in1k",
    "batch.scenes": 2,
    "train.rate": 0.0012,
    "train_proposals": 1000,
    "proposal_score": 0.05,
}
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
    "train_candidates": 200,
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
_EMOJI = {
    "student.size": (120, 160),
    "teacher.network.size": (120, 160),
    "queue": 150,
    "batch.flip": 0.0,
    "train.epochs": 10,
    "fall_epoch": 8,
    "evaluate_every": 5,
    "teacher.epochs": 16,
}
_BENCHMARKS: dict[str, dict[str, Any]] = {
    "demo": {"data.name": "demo_scenes", **_SMALL},
    "emoji_scenes": {"data.name": "emoji_scenes", **_SMALL, **_EMOJI},
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
    "cuhk_sysu_released_mobilenet": {"data.name": "cuhk_sysu", **_PAPER, **_RELEASED, **_MOBILE},
    "cuhk_sysu_released_mobilenet_alone": {
        "data.name": "cuhk_sysu",
        **_PAPER,
        **_RELEASED,
        **_MOBILE,
        **_ALONE,
        "student.pretrained": False,
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
    check_losses=_check_losses,
)
