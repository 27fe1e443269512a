"""Recipe groups of person search; defaults are those of DDPS's public code (card "DDPS", section 3)."""

from dataclasses import dataclass, field
from typing import Annotated

from models.person_search import PersonSearchConfig
from models.regions import Sampling
from orchestrator.method import Metric, Progress
from orchestrator.recipe import (
    Count,
    Network,
    Pixels,
    Probability,
    Range,
    Recipe,
    Teacher,
    Train,
    Weight,
    Whole,
)

METRICS = (
    Metric("val/map", "mAP"),
    Metric("val/top1", "top-1"),
    Metric("detection/ap", "AP"),
    Metric("detection/recall", "recall"),
    Metric("bound/map", "mAP, true boxes"),
    Metric("bound/top1", "top-1, true boxes"),
)
Anchors = Annotated[tuple[int, int, int, int, int], Range(1)]


@dataclass(frozen=True, kw_only=True)
class SearchNetwork(Network):
    """A network that finds and recognises people."""

    name: str = "resnet18.tv_in1k"
    size: Pixels = (900, 1500)  # shorter side of the resized image, and what the longer may have at most
    levels: Count = 256  # channels of every level of the pyramid
    head: Count = 1024  # width of the two layers of each head
    freeze_stem: bool = True  # a ResNet's first convolution and norm; wants pretrained weights
    freeze_norms: bool = False  # of the backbone


@dataclass(frozen=True, kw_only=True)
class Detector:
    """What student and teacher have in common."""

    dim: Count = 256  # of the embedding
    anchors: Anchors = (32, 64, 128, 256, 512)  # pixels, one for each level
    proposals: Count = 1000  # of an image, when it is searched
    train_candidates: Count = 2000  # of a level in training, before NMS
    train_proposals: Count = 2000  # of an image in training, after NMS
    proposal_score: Probability = 0.0  # probability below which there is no proposal
    sampled_anchors: Count = 256  # of an image, half of them on people at most
    sampled_boxes: Count = 512  # of an image, a quarter of them on people at most
    score: Probability = 0.05  # below there is no detection
    overlap: Probability = 0.5  # of two detections
    detections: Count = 100  # of an image at most

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            self.train_candidates, self.train_proposals, self.sampled_anchors, 0.5, self.sampled_boxes, 0.25
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """OIM's table and queue."""

    queue: Whole = 5000  # people without identity
    momentum: Annotated[float, Range(0, 0.999)] = 0.5
    scale: Annotated[float, Range(0, above=True)] = 30.0


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches of scenes."""

    scenes: Count = 5
    by_aspect: bool = True  # scenes of similar shape together, so that little is padded
    flip: Probability = 0.5


@dataclass(frozen=True, kw_only=True)
class Search:
    """How people are searched."""

    least_score: Probability = 0.5  # of a detection that is searched
    weigh: bool = True  # embeddings of a gallery by their score
    context: bool = False  # also match the people around the query (CBGM)
    context_detections: Count = 10  # k1
    context_people: Count = 3  # k2, of the query's frame


@dataclass(frozen=True, kw_only=True)
class StepTrain(Train):
    """The rate rises in the first epoch and falls once; weight decay is on everything."""

    rate: Annotated[float, Range(0, above=True)] = 0.003
    epochs: Count = 20
    warmup_epochs: Whole = 1  # linear, from a thousandth
    fall_epoch: Whole = 16  # after it the rate is a tenth
    clip_norm: Weight = 10.0
    evaluate_every: Count = 1
    seed: Whole = 1


@dataclass(frozen=True, kw_only=True)
class SearchTeacher(Teacher):
    """A teacher, trained as a student alone is."""

    network: SearchNetwork = field(default_factory=lambda: SearchNetwork(name="resnet50.tv_in1k"))
    scenes: Count = 4  # of a batch of its training


@dataclass(frozen=True, kw_only=True)
class SearchRecipe(Recipe):
    """What every training job of a person search has, whatever the method."""

    student: SearchNetwork = field(default_factory=SearchNetwork)
    detector: Detector = field(default_factory=Detector)
    memory: Memory = field(default_factory=Memory)
    batch: Batches = field(default_factory=Batches)
    search: Search = field(default_factory=Search)
    train: StepTrain = field(default_factory=StepTrain)


def network_config(recipe: SearchRecipe, network: SearchNetwork) -> PersonSearchConfig:
    own = recipe.detector
    return PersonSearchConfig(
        network.name, network.width, network.size, network.levels, network.head, own.dim, own.anchors, own.proposals,
        own.proposal_score, own.score, own.overlap, own.detections,
    )  # fmt: skip


def learning_rate(train: StepTrain, progress: Progress, steps: int) -> float:
    """Rate of a step: linear from a thousandth over the first ``warmup_epochs`` · ``steps`` - 1 steps; then constant,
    a tenth after ``fall_epoch``.

    >>> train = StepTrain()
    >>> [round(learning_rate(train, Progress(e, s, 0.0), 10), 7) for e, s in ((1, 0), (1, 9), (16, 150), (17, 160))]
    [3e-06, 0.003, 0.003, 0.0003]
    """
    warmup = train.warmup_epochs * steps - 1
    rising = 1.0 if progress.step >= warmup else 0.001 + 0.999 * progress.step / warmup
    falling = 0.1 if train.fall_epoch and progress.epoch > train.fall_epoch else 1.0
    return train.rate * rising * falling
