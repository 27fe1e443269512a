"""Recipe groups of a person search that is trained on boxes alone; defaults are the paper's (card "R-SiamNet")."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from models.regions import Sampling
from models.siamese_search import SiameseSearchConfig
from orchestrator.families.person_search.recipe import Batches, Memory, Search
from orchestrator.method import Progress
from orchestrator.recipe import Count, Network, Pixels, Positive, Probability, Range, Recipe, Train, Weight, Whole

Anchors = Annotated[tuple[int, int, int, int, int], Range(1)]


@dataclass(frozen=True, kw_only=True)
class SiameseNetwork(Network):
    """A detector that embeds people, in their scene and as crops."""

    name: str = "resnet50.tv_in1k"
    size: Pixels = (800, 1333)  # shorter side of the resized scene, and what the longer may have at most
    detector: Literal["fcos", "retinanet", "faster_rcnn"] = "fcos"  # the paper's RepPoints is not in torchvision
    levels: Count = 256  # channels of every level of the pyramid
    group_norm: bool = False  # in the pyramid, as in the public code of the same authors
    dim: Count = 2048  # of the embedding
    crop: Pixels = (192, 64)
    crop_cells: Literal["align", "average", "whole", "align_tall"] = "align"  # how a crop gets a box's cells
    crop_level: Annotated[int, Range(0, 3)] = 0  # of "average"
    search_by: Literal["scene", "crop"] = "scene"  # what detected people are embedded by; crops of the resized scene
    anchors: Anchors = (32, 64, 128, 256, 512)  # pixels, a level each; FCOS has none
    frozen_stages: Annotated[int, Range(0, 4)] = 1  # of a ResNet; the stem goes with the first
    freeze_norms: bool = True  # of the backbone; trained, scenes and crops would share their statistics


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What is a detection."""

    score: Probability = 0.05  # below there is none
    overlap: Probability = 0.5  # of two detections
    detections: Count = 100  # of an image at most
    candidates: Count = 1000  # before NMS, of a level


@dataclass(frozen=True, kw_only=True)
class Unweighted(Search):
    """How people are searched: embeddings are not multiplied by the score."""

    weigh: bool = False


@dataclass(frozen=True, kw_only=True)
class Scenes(Batches):
    """Batches of scenes."""

    scenes: Count = 9
    by_aspect: bool = True


@dataclass(frozen=True, kw_only=True)
class TwiceFallingTrain(Train):
    """The rate rises over a number of steps and falls to a tenth twice."""

    rate: Positive = 1e-3
    epochs: Count = 48
    warmup_epochs: Annotated[int, Range(0, 0)] = 0  # counted in steps here
    warmup_steps: Whole = 500  # linear from a third; the paper is silent, its authors' other code has it
    falls: Annotated[tuple[int, int], Range(0)] = (
        32,
        44,
    )  # epochs after which the rate is a tenth of what it was; 0: never
    clip_norm: Weight = 35.0
    evaluate_every: Count = 4


@dataclass(frozen=True, kw_only=True)
class WeakSearchRecipe(Recipe):
    """What every such training job has, whatever the method."""

    student: SiameseNetwork = field(default_factory=SiameseNetwork)
    detection: Detection = field(default_factory=Detection)
    batch: Scenes = field(default_factory=Scenes)
    search: Unweighted = field(default_factory=Unweighted)
    memory: Memory = field(default_factory=Memory)  # OIM's, where identities are given
    train: TwiceFallingTrain = field(default_factory=TwiceFallingTrain)


SAMPLING = Sampling()  # of Faster R-CNN


def network_config(recipe: WeakSearchRecipe) -> SiameseSearchConfig:
    own, found = recipe.student, recipe.detection
    return SiameseSearchConfig(
        own.name, own.width, own.size, own.detector, own.levels, own.group_norm, own.dim, own.crop, own.crop_cells,
        own.crop_level, own.search_by, own.anchors, found.score, found.overlap, found.detections, found.candidates,
    )  # fmt: skip


def learning_rate(train: TwiceFallingTrain, progress: Progress) -> float:
    """Rate of a step.

    >>> train = TwiceFallingTrain(rate=1.0)
    >>> [round(learning_rate(train, Progress(e, s, 0.0)), 4) for e, s in ((1, 0), (1, 250), (2, 900), (45, 9999))]
    [0.3333, 0.6667, 1.0, 0.01]
    """
    share = min(1.0, progress.step / train.warmup_steps) if train.warmup_steps else 1.0
    fallen = sum(progress.epoch > fall for fall in train.falls if fall)
    return train.rate * (1 + 2 * share) / 3 * 0.1**fallen
