"""The contract between a method and everything that runs it.

A method file holds, in this order: docstring, ``Recipe``, the ``Task``, ``METHOD``. What varies between
methods is behind the few names here; ``fit.py`` knows no method, and a method knows no log or cluster.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from orchestrator.needs import Need, Place, Prepared, Ready, Report
from orchestrator.pictures import Picture
from orchestrator.recipe import Recipe

Batch = dict[str, Any]  # tensors, or dicts of tensors for a step that sees batches of different kinds


class Losses(NamedTuple):
    """Unweighted terms, so that trials with different weights compare, and their weights under the same names."""

    terms: dict[str, Tensor]
    weights: Mapping[str, float | Tensor]  # a weight that follows the step is a number on the device
    observed: Mapping[str, Tensor] = MappingProxyType({})  # scalars for the log that nobody trains on
    kept: Mapping[str, Tensor] = MappingProxyType({})  # detached, of this rank; handed to Task.after_step

    @property
    def total(self) -> Tensor:
        """The one scalar that is back-propagated.

        Raises:
            ValueError: there is no term.
        """
        if not self.terms:
            raise ValueError("a step without any loss term has nothing to train on")
        return reduce(add, (self.weights[name] * term for name, term in self.terms.items()))


class Task(nn.Module):
    """A student in training, its frozen teacher (or none), and the losses between them.

    ``frozen`` names the sub-modules that never change, exactly: they stay in eval mode, get no gradient and are in
    no checkpoint. Everything else is in it: projectors, and every buffer (banks, queues, thresholds, positions).
    ``forward`` maps one batch to :class:`Losses`, computed over the whole batch of all ranks: gather embeddings
    with ``orchestrator.distributed.gather`` first.

    ``sharded`` names sub-modules whose parameters are too many for one rank: each rank has other rows of them, in rank
    order, says which as their ``rows``, a range, and computes their whole gradient itself. Checkpoints hold the rows
    of all ranks, and at the end of a training so does the module on rank 0.
    """

    frozen: frozenset[str] = frozenset({"teacher"})
    sharded: frozenset[str] = frozenset()

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # done so far; counted by the loop
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Task":
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()  # a teacher never updates its batch-norm statistics
        return self

    def frozen_modules(self) -> list[nn.Module]:
        """The modules that ``frozen`` names, those that there are."""
        found = (getattr(self, name, None) for name in sorted(self.frozen))
        return [module for module in found if module is not None]

    def sharded_parameters(self) -> dict[str, tuple[nn.Parameter, range]]:
        """Parameters of which this rank has some rows alone, and which."""
        return {
            f"{name}.{key}": (parameter, self.get_submodule(name).rows)
            for name in sorted(self.sharded)
            for key, parameter in self.get_submodule(name).named_parameters()
        }

    def stored(self) -> dict[str, Tensor]:
        """Parameters and buffers that a checkpoint holds: all but those of frozen modules."""
        left_out = {f"{name}." for name in self.frozen}
        return {
            key: value
            for key, value in self.state_dict().items()
            if not any(key.startswith(prefix) for prefix in left_out)
        }

    def after_step(self, kept: Mapping[str, Tensor]) -> None:
        """State that follows the optimiser step, such as a memory bank, from what ``forward`` kept.

        Called under ``no_grad`` on every rank with its own rows. Gather them: buffers must be equal on all ranks.
        """


@dataclass(frozen=True)
class Progress:
    """Where training stands when a step begins."""

    epoch: int  # from 1
    step: int  # of all steps of the training so far, from 0; within the epoch where its length is not known
    within: float  # share of the epoch that is done, in [0, 1); 0 where the epoch's length is not known


@dataclass(frozen=True)
class Queries:
    """The scores of single queries whose means are metrics: what intervals are made from.

    Attributes:
        identity_Q: whose query each is; queries of one identity are not independent.
        scores: metric -> (Q,), as fractions; NaN where the protocol does not count the query.
    """

    identity_Q: np.ndarray
    scores: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PairScores:
    """The scores of single pairs of a verification set.

    Attributes:
        score_P: higher is nearer.
        same_P: whether the pair is of one person.
        people_P2: which two people, by numbers that mean nothing else.
        folds: of the accuracy; 0 = none.
        templates: whether templates are compared, of which other rates are usual.
    """

    score_P: np.ndarray
    same_P: np.ndarray
    people_P2: np.ndarray
    folds: int = 0
    templates: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, rates as fractions, and what pictures are made from."""

    metrics: Mapping[str, float]
    found: Any = None  # of the family's own type; never logged
    queries: Queries | None = None  # where metrics are means over queries
    pairs: Mapping[str, PairScores] = field(default_factory=dict)  # where they are rates of pairs: set -> its pairs


@dataclass
class Experiment:
    """One training job as :func:`orchestrator.fit.fit` runs it, on one rank."""

    task: Task
    optimizer: Optimizer
    epochs: int
    rate: Callable[[Progress], float]  # of every step; a group's "rate_scale" and "frozen_epochs" are applied to it
    batches: Callable[[int], Iterable[Batch]]  # 1-based epoch -> this rank's batches; same draws on every call
    evaluate: Callable[[Task], Evaluation]
    # Work over the whole training set before epoch 1, 2, …, such as re-clustering: on all ranks, in eval mode, without
    # gradient. What it returns is logged; what later epochs need of it goes to the task's buffers.
    start_epoch: Callable[[Task, int], Mapping[str, float]] | None = None
    steps_per_epoch: int = 0  # known in advance; needed by a rate that looks at Progress.within
    precision: Literal["float32", "bfloat16"] = "float32"  # of the networks; losses are float32 always
    compile: bool = False
    unused_parameters: bool = False  # some steps leave some parameters without a gradient
    clip_norm: float = 0.0  # largest gradient norm, 0 = no clipping
    evaluate_every: int = 1  # epochs; the last epoch is always evaluated
    checkpoint_every: int = 0  # epochs; 0 = when the last one is five minutes old
    items_per_step: int = 0  # images (or scenes, pairs) over all ranks, for the throughput


@dataclass(frozen=True)
class Where:
    """Where a job runs."""

    place: Place
    rank: int
    world: int
    device: torch.device
    share: float = 1.0  # of the device that is this job's, where several share it


@dataclass(frozen=True)
class Metric:
    """A number that a method measures."""

    name: str  # as logged, with what was scored first: "val/tar_1e-4"
    title: str  # as printed: "TAR@1e-4"
    percent: bool = True


class Method:
    """What ``METHOD`` of a method file is: one subclass for each family, one instance for each file.

    Attributes:
        paper: what is re-implemented.
        recipes: benchmark -> recipe; "demo" always.
        metrics: what is measured; the first is what a sweep maximises and tables show first.
        family: methods of one family meet each other's needs.
    """

    family: ClassVar[str]
    paper: str
    recipes: Mapping[str, Recipe]
    metrics: tuple[Metric, ...]

    def check(self, recipe: Any, workers: int = 1) -> None:
        """Raises ValueError for values that are allowed alone but not together, or networks that cannot be built."""

    def needs(self, recipe: Any, place: Place, purpose: Literal["train", "score"] = "train") -> dict[str, Need]:
        """What must exist before a trial, or before a stored student is scored, by role; reads no image."""
        raise NotImplementedError

    def make(self, need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
        """Meets a need of this family that is not a training; ``after`` has the roles of ``need.after``."""
        raise NotImplementedError

    def experiment(self, recipe: Any, prepared: Prepared, where: Where) -> Experiment:
        """The training job of one rank. Opens what is prepared; builds and reads nothing else."""
        raise NotImplementedError

    def score(self, student: nn.Module, recipe: Any, prepared: Prepared, where: Where) -> Evaluation:
        """A student under the benchmark's protocol; the experiment's ``evaluate`` calls it too."""
        raise NotImplementedError

    def pictures(
        self, student: nn.Module, recipe: Any, prepared: Prepared, evaluation: Evaluation, where: Where
    ) -> dict[str, Picture]:
        """Pictures of a trained student, from what its evaluation found."""
        return {}

    def networks(self, recipe: Any) -> tuple[str, str]:
        """How printed tables name the networks of a recipe: (student, teacher), "none" where there is no teacher."""
        return "", ""

    def after_training(self, recipe: Any) -> frozenset[str]:
        """Recipe fields of which a stored student can be scored and exported with another value."""
        return frozenset()
