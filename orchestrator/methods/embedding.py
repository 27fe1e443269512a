"""What every method that trains a retrieval embedder shares: recipe fields, supervised losses, optimiser, data.

The supervised half of the D3still authors' code: label-smoothed cross-entropy on the classifier and a
batch-hard triplet loss on the pooled feature, on a batch of P identities × K images.
"""

# Shape legend: B = images of one rank's batch, D = embedding width, C = classes.

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from losses.similarity import at_least_float32
from losses.triplet import batch_hard_triplet
from models.embedder import Embedder, EmbedderConfig, check_backbone, check_buildable
from orchestrator import cache, distributed, find
from orchestrator.cache import Progress, silent
from orchestrator.datasets.augmentation import DRAWS, Augmentation, normalised
from orchestrator.datasets.images import Frames, ImageSet, RetrievalData, digest, fetch
from orchestrator.datasets.sampling import identity_batches, own_part
from orchestrator.evaluation.retrieval import PrecisionRule, RetrievalMetrics, evaluate, nearest
from orchestrator.method import (
    Batch,
    Count,
    Experiment,
    Losses,
    Panel,
    Place,
    Positive,
    Probability,
    Range,
    Task,
    Weight,
    recipe_dict,
)

Pixels = Annotated[tuple[int, int], Range(8)]
Whole = Annotated[int, Range(0)]


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """What every training job of a retrieval network has, whatever the method."""

    dataset: str  # file name of the reader in orchestrator/datasets
    evaluate_on: Literal["test", "validation"] = "test"
    ap: PrecisionRule = "precision"  # average precision: at every hit, or by trapezoids as Market-1501's first tool
    # The network that is trained.
    student: str = "resnet18.tv_in1k"  # timm name
    student_size: Pixels = (64, 64)  # height × width in pixels
    student_pad: Whole = 2  # zeros around the image before the random crop, pixels
    pretrained: bool = True  # start from timm's ImageNet weights
    # Supervised losses on a batch of P identities × K images.
    identities_per_batch: Annotated[int, Range(2)] = 16  # P
    images_per_identity: Count = 6  # K
    label_smoothing: Probability = 0.1
    triplet_margin: Weight = 0.3  # Euclidean, of the feature before the neck
    # Augmentation after the resize.
    flip: Probability = 0.5
    erase: Probability = 0.5
    # Optimisation.
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive = 0.01
    momentum: Annotated[float, Range(0, 1)] = 0.9
    weight_decay: Weight = 5e-4
    epochs: Count = 120
    warmup_epochs: Whole = 10  # linear
    clip_norm: Weight = 0.0  # 0 = no clipping
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the networks; auto = bfloat16 on a GPU
    compile: bool = False
    evaluate_every: Count = 10  # epochs; the last epoch is always evaluated
    seed: Whole = 0
    # Data loading.
    pixel_cache: Literal["auto", "on", "off"] = "auto"  # auto = on up to 128 × 128 pixels
    loader_workers: Whole = 4  # processes that decode images that are not cached
    skip_unreadable: bool = False


# Fields of a training that decide how fast and where it runs, not what comes out of it.
NOT_PART_OF_A_TEACHER = (
    "pixel_cache", "loader_workers", "compile", "evaluate_every", "evaluate_on", "ap", "skip_unreadable",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EmbeddingRecipe(TrainingRecipe):
    """Numbers of a supervised embedder; defaults are the D3still authors' (card "D3still", section 3)."""

    student_width: Positive = 1.0  # scales the channels of a ResNet
    embedding_dim: Count = 512
    cross_entropy: Weight = 1.0
    triplet: Weight = 1.0
    erase_fill: Literal["mean", "zero"] = "mean"
    # The rate begins at a tenth; weight decay is on everything, biases and batch norms included.
    constant_epochs: Whole = 40  # the cosine begins after this epoch
    least_rate: Weight = 1e-7


def check_labelled(recipe: TrainingRecipe, workers: int) -> None:
    """Raises ValueError unless timm knows the student and the P × K batch divides evenly among the workers."""
    check_backbone(recipe.student)
    labelled = recipe.identities_per_batch * recipe.images_per_identity
    if labelled % workers:
        raise ValueError(
            f"a batch of identities_per_batch × images_per_identity = {labelled} images cannot be shared evenly "
            f"by {workers} workers"
        )


def check(recipe: EmbeddingRecipe, workers: int = 1) -> None:
    """Raises ValueError for values that are allowed alone but not together."""
    check_labelled(recipe, workers)
    check_buildable(student_config(recipe), recipe.pretrained)
    if recipe.constant_epochs < recipe.warmup_epochs:
        raise ValueError(
            f"constant_epochs ({recipe.constant_epochs}) must not end before warmup_epochs ({recipe.warmup_epochs})"
        )
    find.dataset(recipe.dataset)


def learning_rate(recipe: EmbeddingRecipe, epoch: int) -> float:
    """Rate of a 1-based epoch: linear warm-up, constant, cosine (stepped per epoch).

    >>> recipe = EmbeddingRecipe(dataset="demo")
    >>> [round(learning_rate(recipe, e), 6) for e in (1, 11, 41, 120)]
    [0.001, 0.01, 0.01, 4e-06]
    """
    t, base = epoch - 1, recipe.learning_rate
    if t < recipe.warmup_epochs:
        reached = t / recipe.warmup_epochs
        return base * (0.1 * (1 - reached) + reached)
    if t <= recipe.constant_epochs or recipe.constant_epochs >= recipe.epochs:
        return base
    fraction = (t - recipe.constant_epochs) / (recipe.epochs - recipe.constant_epochs)
    return recipe.least_rate + (base - recipe.least_rate) * (1 + math.cos(math.pi * fraction)) / 2


def optimizer(recipe: EmbeddingRecipe, task: Task) -> Optimizer:
    """One rate and one decay for every parameter that trains."""
    parameters = [p for p in task.parameters() if p.requires_grad]
    if recipe.optimizer == "adamw":
        return AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return SGD(parameters, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def student_config(recipe: EmbeddingRecipe, num_classes: int = 0) -> EmbedderConfig:
    return EmbedderConfig(
        backbone=recipe.student,
        embedding_dim=recipe.embedding_dim,
        image_size=recipe.student_size,
        width=recipe.student_width,
        num_classes=num_classes,
    )


def build_student(recipe: EmbeddingRecipe, num_classes: int) -> Embedder:
    """A student with initial weights that depend on the seed alone; a classifier for ``num_classes`` above 0."""
    torch.manual_seed(recipe.seed)
    return Embedder(student_config(recipe, num_classes), pretrained=recipe.pretrained)


def networks_precision(recipe: TrainingRecipe, device: torch.device) -> Literal["float32", "bfloat16"]:
    if recipe.precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return recipe.precision


def load_data(recipe: TrainingRecipe, place: Place, progress: Progress = silent) -> RetrievalData:
    """The indexed benchmark: counts checked, every image readable, fingerprints known.

    Raises:
        FileNotFoundError, ValueError, OSError: as the reader and :func:`orchestrator.cache.indexed`.
    """
    data = find.dataset(recipe.dataset)(place.data_root, recipe.evaluate_on)
    root = place.folder("cache")
    sets = {side: cache.indexed(s, root, recipe.skip_unreadable, progress) for side, s in data.sets().items()}
    return replace(data, **sets, **({"gallery": sets["query"]} if data.leave_one_out else {}))


def frames(
    recipe: TrainingRecipe,
    images: ImageSet,
    size: tuple[int, int],
    place: Place,
    progress: Progress = silent,
    verify: bool = False,
    resize: str = "bilinear",
) -> "cache.Rows | Frames":
    """Source of uint8 frames of one size: the pixel cache where it is used, else decoding."""
    if recipe.pixel_cache == "on" or (recipe.pixel_cache == "auto" and size[0] * size[1] <= 128 * 128):
        return cache.pixels(images, size, place.folder("cache"), progress, recipe.loader_workers, verify, resize)
    return Frames(images, size, resize)


def augmentation(recipe: EmbeddingRecipe) -> Augmentation:
    return Augmentation(flip=recipe.flip, erase=recipe.erase, erase_fill=recipe.erase_fill)


def labelled_requests(
    recipe: EmbeddingRecipe, images: ImageSet, epoch: int, rank: int, world: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(image numbers, draws) of this rank's P × K batches; every slot of the epoch has its own draws."""
    batches = identity_batches(
        images.identity, recipe.identities_per_batch, recipe.images_per_identity, (recipe.seed, epoch, 1)
    )
    height, width = recipe.student_size
    draws = augmentation(recipe).draw(batches.size, width / height, (recipe.seed, epoch, 2))
    draws = draws.reshape(*batches.shape, DRAWS)
    for indices, own in zip(batches, draws, strict=True):
        yield own_part(indices, rank, world), own_part(own.swapaxes(0, 1), rank, world).swapaxes(0, 1)


def labelled_loader(
    pixels: "cache.Rows | Frames", images: ImageSet
) -> Callable[[tuple[np.ndarray, np.ndarray]], Batch]:
    """Turns a labelled request (image numbers, draws) into what :func:`supervised_losses` is given."""
    labels = torch.from_numpy(images.labels)

    def load(request: tuple[np.ndarray, np.ndarray]) -> Batch:
        indices, draws = request
        return {
            "frames": torch.as_tensor(pixels(indices)),
            "draws": torch.from_numpy(draws),
            "label": labels[indices],
            "names": names_of(images, indices),
        }

    return load


def experiment(
    recipe: EmbeddingRecipe,
    task: Task,
    device: torch.device,
    batches: Callable[[int], Iterator[Batch]],
    evaluate: Callable[[Task], dict[str, float]],
    images_per_step: int,
) -> Experiment:
    """The training job of a task with the recipe's optimiser, schedule and precision."""
    return Experiment(
        task=task,
        optimizer=optimizer(recipe, task),
        epochs=recipe.epochs,
        learning_rate=lambda epoch: learning_rate(recipe, epoch),
        batches=batches,
        evaluate=evaluate,
        precision=networks_precision(recipe, device),
        compile=recipe.compile,
        clip_norm=recipe.clip_norm,
        evaluate_every=recipe.evaluate_every,
        images_per_step=images_per_step,
    )


def supervised_losses(recipe: EmbeddingRecipe, student: Embedder, images_BCHW: Tensor, label_B: Tensor) -> Losses:
    """Cross-entropy on the classifier's logits and triplet on the pooled feature, over the batch of all ranks."""
    pooled_BC, embedding_BD = student.with_pooled(images_BCHW)
    label_B = distributed.gather(label_B)
    terms, weights = {}, {}
    if recipe.cross_entropy:
        with torch.autocast(embedding_BD.device.type, enabled=False):
            logits_BC = student.classifier(distributed.gather(at_least_float32(embedding_BD)))
            terms["cross_entropy"] = F.cross_entropy(logits_BC, label_B, label_smoothing=recipe.label_smoothing)
        weights["cross_entropy"] = recipe.cross_entropy
    if recipe.triplet:
        terms["triplet"] = batch_hard_triplet(
            distributed.gather(at_least_float32(pooled_BC)), label_B, recipe.triplet_margin
        )
        weights["triplet"] = recipe.triplet
    return Losses(terms, weights)


@torch.no_grad()
def embed(
    model: nn.Module, source: "cache.Rows | Frames", count: int, device: torch.device, batch: int = 256,
    workers: int = 0, camera: np.ndarray | None = None,
) -> Tensor:  # fmt: skip
    """Raw float32 embeddings of all images, in order, in eval mode: (count, D) on the device.

    Every rank embeds a share and receives all rows. ``workers`` processes decode images that are not cached.
    ``camera`` is the number of every image's camera, for networks that are told.
    """
    was_training = model.training
    model.eval()
    share = -(-count // distributed.world_size())
    own = (np.arange(share) + distributed.rank() * share).clip(max=count - 1)  # the last share may repeat its end
    requests = [own[start : start + batch] for start in range(0, share, batch)]
    decoding = workers if isinstance(source, Frames) else 0
    parts = []
    for rows, frames in zip(requests, fetch(source, requests, decoding), strict=True):
        told = () if camera is None else (torch.from_numpy(camera[rows]).to(device),)
        parts.append(model(model_input(model, frames, device), *told).float())
    model.train(was_training)
    return distributed.gather_without_gradient(torch.cat(parts))[:count]


def teacher_folder(
    training: TrainingRecipe, place: Place, progress: Progress = silent, without: tuple[str, ...] = (), **more: str
) -> Path:
    """Where the teacher of a training recipe is or will be: named by the recipe and its training images.

    Args:
        training: the recipe.
        place: storage and data.
        progress: told of the indexing.
        without: further fields that are no part of the name.
        more: what else decides the teacher, such as the fingerprint of another input.
    """
    left_out = (*NOT_PART_OF_A_TEACHER, *without)
    values = {k: v for k, v in recipe_dict(training).items() if k not in left_out} | more
    data = find.dataset(training.dataset)(place.data_root, training.evaluate_on)
    train = cache.indexed(data.train, place.folder("cache"), training.skip_unreadable, progress)
    return Path(place.folder("teachers", digest([values, train.fingerprint])[:32]))


def model_input(model: nn.Module, frames: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """uint8 frames as the network wants its pixels."""
    return normalised(torch.as_tensor(frames).to(device), model.pixels)


def score(recipe: TrainingRecipe, data: RetrievalData, query_QD: Tensor, gallery_GD: Tensor) -> RetrievalMetrics:
    """Metrics under the benchmark's own protocol."""
    cameras = (data.query.camera, data.gallery.camera) if data.camera_filter else (None, None)
    return evaluate(
        query_QD, gallery_GD, data.query.identity, data.gallery.identity, *cameras,
        leave_one_out=data.leave_one_out, ap=recipe.ap,
    )  # fmt: skip


def panel(
    data: RetrievalData, embed_queries: Callable[[np.ndarray], Tensor], gallery_GD: Tensor, size: tuple[int, int],
    queries: int = 6, results: int = 10,
) -> Panel:  # fmt: skip
    """A few queries, spread over the set, with their first results under the benchmark's protocol.

    Args:
        data: the benchmark.
        embed_queries: query numbers -> raw embeddings.
        gallery_GD: raw embeddings of the whole gallery.
        size: of the shown pictures in pixels; at most 96 on a side are drawn.
        queries: how many.
        results: how many for each.
    """
    chosen = np.unique(np.linspace(0, len(data.query) - 1, queries).astype(int))
    removed_QG = np.zeros((len(chosen), len(data.gallery)), bool)
    if data.leave_one_out:
        removed_QG[np.arange(len(chosen)), chosen] = True
    if data.camera_filter:
        removed_QG |= (data.query.identity[chosen, None] == data.gallery.identity[None]) & (
            data.query.camera[chosen, None] == data.gallery.camera[None]
        )
    shown_results = min(results, len(data.gallery) - int(removed_QG.sum(1).max()))
    found_QR = nearest(embed_queries(chosen), gallery_GD, shown_results, removed_QG)
    scale = min(1.0, 96 / max(size))
    shown = Frames(data.gallery, (round(size[0] * scale), round(size[1] * scale)))
    return Panel(
        title="Queries and their first results, right framed green, wrong framed red",
        query=Frames(data.query, shown.size)(chosen).permute(0, 2, 3, 1).numpy(),
        results=np.stack([shown(row).permute(0, 2, 3, 1).numpy() for row in found_QR]),
        correct=data.query.identity[chosen, None] == data.gallery.identity[found_QR],
    )


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def classes_fingerprint(train: ImageSet) -> str:
    """Which identity is which class: classifiers of equal fingerprint have equal columns."""
    return digest(np.unique(train.identity).tolist())


def names_of(images: ImageSet, indices: np.ndarray) -> list[str]:
    return [images.keys[int(i)] for i in indices]


def after_training(recipe: TrainingRecipe) -> frozenset[str]:
    """Recipe fields of which a stored network can be scored with another value."""
    return frozenset({"ap"})


def plain_facts(recipe: TrainingRecipe, data: RetrievalData) -> dict[str, Any]:
    """What the record says about the data."""
    return {
        "protocol": data.protocol + ("; AP by trapezoids" if recipe.ap == "trapezoid" else ""),
        "train_fingerprint": data.train.fingerprint,
        "query_fingerprint": data.query.fingerprint,
        "gallery_fingerprint": data.gallery.fingerprint,
        "classes_fingerprint": classes_fingerprint(data.train),
    } | ({"notice": data.notice} if data.notice else {})
