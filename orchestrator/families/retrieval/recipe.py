"""Recipe groups of retrieval networks, the schedule and the optimiser of the D3still authors' code."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from models.embedder import Embedder, EmbedderConfig, check_buildable, statistics
from orchestrator import find
from orchestrator.evaluation.retrieval import PrecisionRule
from orchestrator.method import Metric, Progress
from orchestrator.recipe import Count, Network, Probability, Range, Recipe, Teacher, Train, Weight, Whole

METRICS = (
    Metric("val/map", "mAP"),
    Metric("val/rank1", "R1"),
    Metric("val/rank3", "R3"),
    Metric("val/rank5", "R5"),
    Metric("val/minp", "mINP"),
)


@dataclass(frozen=True, kw_only=True)
class RetrievalNetwork(Network):
    """A network that embeds images."""

    pad: Whole = 2  # zeros around the image before the random crop, pixels
    pixels: Literal["imagenet", "half", "weights"] = "imagenet"  # mean and deviation; weights = as they were trained


@dataclass(frozen=True, kw_only=True)
class RetrievalTeacher(Teacher):
    """A teacher that embeds images, trained on labelled batches of its own."""

    network: RetrievalNetwork = field(default_factory=RetrievalNetwork)
    identities_per_batch: Annotated[int, Range(2)] = 16
    images_per_identity: Count = 6


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Batches of P identities × K images, and the supervised losses on them."""

    identities_per_batch: Annotated[int, Range(2)] = 16  # P
    images_per_identity: Count = 6  # K
    cross_entropy: Weight = 1.0
    triplet: Weight = 1.0
    label_smoothing: Probability = 0.1
    triplet_margin: Weight = 0.3  # Euclidean, of the feature before the neck

    @property
    def images(self) -> int:
        return self.identities_per_batch * self.images_per_identity


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to an image after the resize."""

    flip: Probability = 0.5
    erase: Probability = 0.5
    erase_fill: Literal["mean", "zero"] = "mean"
    draw_steps: Whole = 0  # steps whose random numbers are drawn at once; 0 = a whole epoch, for millions of images 64


@dataclass(frozen=True, kw_only=True)
class EmbedderTrain(Train):
    """The rate begins at a tenth; weight decay is on everything, biases and batch norms included."""

    constant_epochs: Whole = 40  # the cosine begins after this epoch
    least_rate: Weight = 1e-7


@dataclass(frozen=True, kw_only=True)
class RetrievalRecipe(Recipe):
    """What every training job of a retrieval network has, whatever the method."""

    student: RetrievalNetwork = field(default_factory=RetrievalNetwork)
    ap: PrecisionRule = "precision"  # average precision: at every hit, or by trapezoids as Market-1501's first tool


@dataclass(frozen=True, kw_only=True)
class EmbedderRecipe(RetrievalRecipe):
    """Numbers of a supervised embedder; defaults are the D3still authors' (card "D3still", section 3)."""

    embedding_dim: Count = 512
    labelled: Labelled = field(default_factory=Labelled)
    augment: Augment = field(default_factory=Augment)
    train: EmbedderTrain = field(default_factory=EmbedderTrain)


# Groups and fields of a training that decide how fast and where it runs and how it is scored, not what comes out.
# The data are in the fingerprint of the training images; benchmarks that train on the same ones share their teacher.
NOT_IN_THE_WEIGHTS = ("run.", "data.", "ap", "train.evaluate_every", "views.occluder_folder")


def check_labelled(labelled: int, what: str, workers: int) -> None:
    """Raises ValueError unless a P × K batch divides evenly among the workers."""
    if labelled % workers:
        raise ValueError(f"a batch of {what} = {labelled} images cannot be shared evenly by {workers} workers")


def check_network(whose: str, network: RetrievalNetwork, embedding_dim: int) -> None:
    """Raises ValueError, which says whose, when a network cannot be built or not start as asked."""
    try:
        check_buildable(embedder_config(network, embedding_dim), network.pretrained, network.weights)
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from error


def check(recipe: EmbedderRecipe, workers: int = 1) -> None:
    """Raises ValueError for values that are allowed alone but not together."""
    check_network("student", recipe.student, recipe.embedding_dim)
    check_labelled(recipe.labelled.images, "identities_per_batch × images_per_identity", workers)
    train = recipe.train
    if train.constant_epochs < train.warmup_epochs:
        raise ValueError(
            f"constant_epochs ({train.constant_epochs}) must not end before warmup_epochs ({train.warmup_epochs})"
        )
    find.dataset(recipe.data.name)


def learning_rate(train: EmbedderTrain, progress: Progress) -> float:
    """Rate of a step: linear warm-up, constant, cosine, all by epoch.

    >>> [round(learning_rate(EmbedderTrain(), Progress(e, 0, 0.0)), 6) for e in (1, 11, 41, 120)]
    [0.001, 0.01, 0.01, 4e-06]
    """
    t, base = progress.epoch - 1, train.rate
    if t < train.warmup_epochs:
        reached = t / train.warmup_epochs
        return base * (0.1 * (1 - reached) + reached)
    if t <= train.constant_epochs or train.constant_epochs >= train.epochs:
        return base
    fraction = (t - train.constant_epochs) / (train.epochs - train.constant_epochs)
    return train.least_rate + (base - train.least_rate) * (1 + math.cos(math.pi * fraction)) / 2


def optimizer(train: Train, module: nn.Module) -> Optimizer:
    """One rate and one decay for every parameter that trains."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if train.optimizer == "adamw":
        return AdamW(parameters, lr=train.rate, weight_decay=train.weight_decay)
    return SGD(parameters, lr=train.rate, momentum=train.momentum, weight_decay=train.weight_decay)


def embedder_config(network: RetrievalNetwork, embedding_dim: int, num_classes: int = 0) -> EmbedderConfig:
    """The network of a recipe.

    Raises:
        ValueError: no such network, or its weights do not say how their pixels were normalised.
    """
    mean, std = statistics(network.pixels, network.name)
    return EmbedderConfig(
        backbone=network.name,
        embedding_dim=embedding_dim,
        image_size=network.size,
        width=network.width,
        num_classes=num_classes,
        mean=mean,
        std=std,
    )


def build_embedder(network: RetrievalNetwork, embedding_dim: int, num_classes: int, seed: int) -> Embedder:
    """A network with initial weights that depend on the seed alone; a classifier for ``num_classes`` above 0."""
    torch.manual_seed(seed)
    config = embedder_config(network, embedding_dim, num_classes)
    return Embedder(config, pretrained=network.pretrained and not network.weights, weights=network.weights)


def networks_precision(train: Train, device: torch.device) -> Literal["float32", "bfloat16"]:
    if train.precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return train.precision


def scaled_schedule(train: EmbedderTrain, epochs: int) -> EmbedderTrain:
    """The schedule in another number of epochs: it keeps its shape."""
    scale = epochs / train.epochs
    return replace(
        train,
        epochs=epochs,
        warmup_epochs=round(train.warmup_epochs * scale),
        constant_epochs=round(train.constant_epochs * scale),
    )
