"""Recipe groups of face recognition, its schedules and its optimiser; defaults are those of public code (the card)."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from models import iresnet, mobilefacenet
from models.embedder import EmbedderConfig, check_buildable
from models.face_network import FaceConfig
from models.network import PIXELS
from models.weights import stamp_of
from orchestrator.method import Metric, Progress
from orchestrator.recipe import (
    Count,
    Network,
    Pixels,
    Positive,
    Probability,
    Range,
    Recipe,
    Share,
    Teacher,
    Train,
    Weight,
    Whole,
)

# Sets that are verified on, by the first part of their metrics' names -> how they are printed.
SETS = {
    "lfw": "LFW",
    "cfp_fp": "CFP-FP",
    "cfp_ff": "CFP-FF",
    "agedb_30": "AgeDB-30",
    "calfw": "CALFW",
    "cplfw": "CPLFW",
}
METRICS = (
    Metric("val/accuracy", "accuracy"),
    Metric("val/tar_1e-2", "TAR@1e-2"),
    Metric("val/tar_1e-3", "TAR@1e-3"),
    Metric("val/rank1", "R1"),
    *(Metric(f"{name}/accuracy", title) for name, title in SETS.items()),
    *(Metric(f"{name}/tar_{far}", f"{title} TAR@{far}") for name, title in (("ijbc", "IJB-C"), ("ijbb", "IJB-B"))
      for far in ("1e-4", "1e-5")),
    *(Metric(f"orl/{name}", f"ORL {title}") for name, title in (
        ("tar_1e-2", "TAR@1e-2"), ("tar_1e-3", "TAR@1e-3"), ("rank1", "R1"))),
)  # fmt: skip

Falls = Annotated[tuple[int, int, int, int], Range(0)]
Margin = Annotated[float, Range(0, 1.5)]


@dataclass(frozen=True, kw_only=True)
class FaceNetwork(Network):
    """A network that embeds aligned faces."""

    # iresnet18, 34, 50, 100; mobilefacenet, _x2, _large; or as every network: of timm, or package.module:function.
    name: str = "mobilefacenet"
    size: Pixels = (112, 112)
    pretrained: bool = False
    color: Literal["rgb", "bgr"] = "rgb"  # what the first convolution sees; checkpoints are not exchangeable
    shortcut: Literal["conv", "pool"] = "conv"  # of iresnet, where only the stride changes; "pool" as another code base
    inner_norm: bool = True  # of iresnet: between a block's first convolution and PReLU; older files have none
    dropout: Annotated[float, Range(0, 0.9)] = 0.0  # of iresnet before the last layer; 0.4 outside the margin code
    affine: bool = False  # of mobilefacenet: scale and shift of the last norm, as in the margin code


@dataclass(frozen=True, kw_only=True)
class Head:
    """The margin softmax that embeddings are classified with."""

    kind: Literal["arcface", "cosface", "adaface"] = "arcface"
    # m: radians of arcface, a cosine of cosface; -1 = the kind's own: 0.5 of arcface, 0.4 of cosface and adaface.
    margin: Annotated[float, Range(-1, 1.5)] = -1.0
    scale: Positive = 64.0  # s
    grad: Literal["ste", "exact"] = "ste"  # through the margin, as public code, or the true derivative
    monotone: bool = False  # arcface beyond π − m, as older code
    quality: Weight = 0.333  # h of adaface
    sample: Share = 1.0  # of the class centres that a step looks at: Partial FC, for a million classes

    @property
    def m(self) -> float:
        """The margin.

        >>> Head().m, Head(kind="cosface").m, Head(kind="cosface", margin=0.0).m
        (0.5, 0.4, 0.0)
        """
        return self.margin if self.margin >= 0 else {"arcface": 0.5, "cosface": 0.4, "adaface": 0.4}[self.kind]


@dataclass(frozen=True, kw_only=True)
class FaceTrain(Train):
    """A rate that falls at epochs, or by iteration to zero."""

    rate: Positive = 0.1  # at its highest, for batches of 512; public code scales it with the batch
    epochs: Count = 26
    warmup_epochs: Whole = 0
    schedule: Literal["step", "polynomial"] = "step"
    falls: Falls = (8, 14, 20, 25)  # of "step": epochs from 1 that begin a tenth of the rate; 0 = none
    power: Positive = 1.0  # of "polynomial"
    clip_norm: Weight = 5.0
    decay_everything: bool = True  # weight decay also on norms, PReLUs and biases, as most public code
    evaluate_every: Count = 1


@dataclass(frozen=True, kw_only=True)
class FaceTeacher(Teacher):
    """A teacher that embeds faces; its ``weights`` may also be a public checkpoint of the network, a state dict."""

    network: FaceNetwork = field(default_factory=lambda: FaceNetwork(name="iresnet50"))
    embedding_dim: Whole = 0  # 0 = as the student's
    batch_size: Count = 512


@dataclass(frozen=True, kw_only=True)
class Balanced:
    """Images that are added to the shuffled ones of every batch, several of one identity; they are not classified."""

    identities: Whole = 0
    images: Annotated[int, Range(2)] = 4  # of each identity

    @property
    def count(self) -> int:
        return self.identities * self.images


@dataclass(frozen=True, kw_only=True)
class FaceRecipe(Recipe):
    """What every training of a face network has."""

    student: FaceNetwork = field(default_factory=FaceNetwork)
    embedding_dim: Count = 512
    head: Head = field(default_factory=Head)
    train: FaceTrain = field(default_factory=FaceTrain)
    batch_size: Count = 512  # shuffled images, over all workers
    balanced: Balanced = field(default_factory=Balanced)
    flip: Probability = 0.5
    verify: str = ""  # data sets that are verified on too, below the same --data-root, joined by +
    # Whose faces pictures of a run may show: they go to the tracking server, so drawn or consenting people alone. "own"
    # are those of the data set, not of what is verified too.
    show_faces: Literal["none", "own", "all"] = "none"


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe(FaceRecipe):
    """What every distillation of a face network has beside it; a method adds its paper's symbols flat."""

    teacher: FaceTeacher = field(default_factory=FaceTeacher)
    # Where the teacher's embeddings come from: the live network, or a table of both mirror images of every face.
    targets: Literal["online", "cached"] = "online"
    cls: Weight = 1.0  # of the margin softmax
    centres: Literal["own", "teacher"] = "own"  # of the classes: trained, or the teacher's, frozen


def check(recipe: FaceRecipe, workers: int = 1) -> None:
    """Raises ValueError for values that are allowed alone but not together."""
    check_network("student", recipe.student, recipe.embedding_dim)
    balanced = recipe.balanced
    for name, images in (("batch_size", recipe.batch_size), ("balanced.identities × balanced.images", balanced.count)):
        if images % workers:
            raise ValueError(f"{name} = {images} images cannot be shared evenly by {workers} workers")
    if recipe.batch_size + balanced.count < 2 * workers:
        raise ValueError(
            f"a batch of {recipe.batch_size} images leaves {workers} workers fewer than 2 each, and a batch norm in "
            f"training needs 2; enlarge batch_size"
        )
    if balanced.identities == 1:
        raise ValueError("balanced.identities is 1, which has nobody to be told from; take 2 or more, or 0 for none")
    if recipe.head.kind != "arcface" and recipe.head.monotone:
        raise ValueError(f"head.monotone is of arcface, head.kind is {recipe.head.kind}; set it to false")


def check_distillation(recipe: DistillationRecipe, workers: int = 1) -> None:
    """The same of a distillation."""
    check(recipe, workers)
    theirs = recipe.teacher.network
    if theirs.size != recipe.student.size:
        raise ValueError(
            f"teacher.size {theirs.size} is not student.size {recipe.student.size}: the teacher sees the student's "
            f"images; set both"
        )
    check_network("teacher.network", theirs, teacher_dim(recipe), starts=not recipe.teacher.weights)


def teacher_dim(recipe: DistillationRecipe) -> int:
    """Width of the teacher's embeddings."""
    return recipe.teacher.embedding_dim or recipe.embedding_dim


def check_network(whose: str, network: FaceNetwork, dim: int, starts: bool = True) -> None:
    """Raises ValueError, which says whose, when a network cannot be built or not start as asked."""
    try:
        config = network_config(network, dim)
        if isinstance(config, EmbedderConfig):
            check_buildable(config, starts and network.pretrained, network.weights if starts else "")
            return
        if starts and network.pretrained and not network.weights:
            raise ValueError(f"there are no pretrained weights of {network.name} to download; set pretrained to false, "
                             f"or give it weights")  # fmt: skip
        if starts and network.weights:
            stamp_of(network.weights)
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from error


def network_config(own: FaceNetwork, dim: int) -> FaceConfig | EmbedderConfig:
    """The network of a recipe, without classifier.

    >>> type(network_config(FaceNetwork(name="iresnet18"), 512)).__name__
    'IResNetConfig'
    """
    family, _, size = own.name.partition("_")
    settings: dict[str, Any] = {"embedding_dim": dim, "image_size": own.size, "width": own.width, "color": own.color}
    if family == "mobilefacenet":
        sizes = mobilefacenet.SIZES
        if (size or "x1") not in sizes:
            raise ValueError(f"there is no {own.name}; mobilefacenet is there in the sizes {', '.join(sizes)}, such as "
                             f"mobilefacenet_x2")  # fmt: skip
        return mobilefacenet.MobileFaceNetConfig(**settings, affine=own.affine, **sizes[size or "x1"])
    if own.name.startswith("iresnet"):
        depth = own.name.removeprefix("iresnet")
        if not depth.isdecimal() or int(depth) not in iresnet.LAYERS:
            known = ", ".join(f"iresnet{n}" for n in iresnet.LAYERS)
            raise ValueError(f"there is no {own.name}; there are {known}")
        return iresnet.IResNetConfig(
            **settings, layers=iresnet.LAYERS[int(depth)], shortcut=own.shortcut, inner_norm=own.inner_norm,
            dropout=own.dropout,
        )  # fmt: skip
    if own.color == "bgr":
        raise ValueError(f"color=bgr is of iresnet and mobilefacenet; {own.name} sees RGB")
    mean, std = PIXELS["half"]
    return EmbedderConfig(
        backbone=own.name, embedding_dim=dim, image_size=own.size, width=own.width, mean=mean, std=std
    )


def learning_rate(train: FaceTrain, progress: Progress, steps_per_epoch: int) -> float:
    """Rate of a step: linear warm-up from 0, then a tenth at every fall, or (1 − done)^power by iteration.

    >>> train = FaceTrain(rate=1.0)
    >>> [round(learning_rate(train, Progress(e, 0, 0.0), 10), 6) for e in (1, 7, 8, 14, 26)]
    [1.0, 1.0, 0.1, 0.01, 0.0001]
    >>> train = replace(train, schedule="polynomial", epochs=10, warmup_epochs=1)
    >>> [round(learning_rate(train, Progress(1, step, 0.0), 10), 4) for step in (0, 5, 10, 99)]
    [0.0, 0.5, 1.0, 0.0111]
    """
    warm, total = train.warmup_epochs * steps_per_epoch, train.epochs * steps_per_epoch
    if progress.step < warm:
        return train.rate * progress.step / warm
    if train.schedule == "polynomial":
        return train.rate * max(0.0, 1 - (progress.step - warm) / max(total - warm, 1)) ** train.power
    return train.rate * 0.1 ** sum(progress.epoch >= fall for fall in train.falls if fall)


def optimizer(train: FaceTrain, module: nn.Module) -> Optimizer:
    """One rate; weight decay on everything that trains, or on matrices and kernels alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": parameters, "weight_decay": train.weight_decay}]
    if not train.decay_everything:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if train.optimizer == "adamw":
        return AdamW(groups, lr=train.rate)
    return SGD(groups, lr=train.rate, momentum=train.momentum)


def scaled_schedule(train: FaceTrain, epochs: int) -> FaceTrain:
    """The schedule in another number of epochs: it keeps its shape.

    >>> scaled_schedule(FaceTrain(), 13).falls
    (4, 7, 10, 12)
    """
    scale = epochs / train.epochs
    falls = tuple(max(2, round(fall * scale)) if fall else 0 for fall in train.falls)
    return replace(train, epochs=epochs, warmup_epochs=round(train.warmup_epochs * scale), falls=falls)
