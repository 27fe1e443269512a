"""The supervised half of the D3still authors' code: label-smoothed cross-entropy and batch-hard triplet."""

# Shape legend: B = images of one rank's batch, D = embedding width, C = classes or channels.

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.similarity import at_least_float32
from losses.triplet import batch_hard_triplet
from models.embedder import Embedder
from orchestrator import distributed
from orchestrator.families.retrieval.recipe import (
    EmbedderRecipe,
    Labelled,
    learning_rate,
    networks_precision,
    optimizer,
)
from orchestrator.method import Batch, Evaluation, Experiment, Losses, Task, Where


def supervised_losses(own: Labelled, student: Embedder, images_BCHW: Tensor, label_B: Tensor) -> Losses:
    """Cross-entropy on the classifier's logits and triplet on the pooled feature, over the batch of all ranks."""
    pooled_BC, embedding_BD = student.with_pooled(images_BCHW)
    label_B = distributed.gather(label_B)
    terms, weights = {}, {}
    if own.cross_entropy:
        with torch.autocast(embedding_BD.device.type, enabled=False):
            logits_BC = student.classifier(distributed.gather(at_least_float32(embedding_BD)))
            terms["cross_entropy"] = F.cross_entropy(logits_BC, label_B, label_smoothing=own.label_smoothing)
        weights["cross_entropy"] = own.cross_entropy
    if own.triplet:
        pooled_BC = distributed.gather(at_least_float32(pooled_BC))
        terms["triplet"] = batch_hard_triplet(pooled_BC, label_B, own.triplet_margin)
        weights["triplet"] = own.triplet
    return Losses(terms, weights)


def experiment(
    recipe: EmbedderRecipe,
    task: Task,
    where: Where,
    batches: Callable[[int], Iterable[Batch]],
    evaluate: Callable[[Task], Evaluation],
    items_per_step: int,
) -> Experiment:
    """The training job of a task with the recipe's optimiser, schedule and precision."""
    return Experiment(
        task=task,
        optimizer=optimizer(recipe.train, task),
        rate=lambda progress: learning_rate(recipe.train, progress),
        batches=batches,
        evaluate=evaluate,
        precision=networks_precision(recipe.train, where.device),
        items_per_step=items_per_step,
        **loop_settings(recipe),
    )


def loop_settings(recipe: Any) -> dict[str, Any]:
    """What every recipe tells the training loop."""
    return {
        "epochs": recipe.train.epochs,
        "compile": recipe.run.compile,
        "clip_norm": recipe.train.clip_norm,
        "evaluate_every": recipe.train.evaluate_every,
        "checkpoint_every": recipe.run.checkpoint_every,
    }
