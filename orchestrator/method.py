"""The contract between a method and everything that runs it.

A method file holds, in this order: docstring, ``Recipe``, the ``Task``, ``METHOD``. What varies between
methods is behind the few names here; ``fit.py`` knows no method, and a method knows no rank, log or cluster.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

Batch = dict[str, Any]  # tensors, or dicts of tensors for a step that sees batches of different kinds


class Losses(NamedTuple):
    """Unweighted terms, so that trials with different weights compare, and their weights under the same names."""

    terms: dict[str, Tensor]
    weights: dict[str, float]
    observed: Mapping[str, Tensor] = MappingProxyType({})  # scalars for the log that nobody trains on

    @property
    def total(self) -> Tensor:
        """The one scalar that is back-propagated."""
        return sum(self.weights[name] * term for name, term in self.terms.items())


class Task(nn.Module):
    """A student in training, its frozen teacher (or none), and the losses between them.

    Sub-modules whose names begin with ``teacher`` are left out of checkpoints; everything else, projectors and
    buffers (banks, queues, thresholds) included, is in them. ``forward`` maps one batch to :class:`Losses`, computed
    over the whole batch of all ranks: gather embeddings with ``orchestrator.distributed.gather`` first.
    """

    student: nn.Module
    teacher: nn.Module | None

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None):
        super().__init__()
        self.student, self.teacher = student, teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Task":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()  # a teacher never updates its batch-norm statistics
        return self

    def start_epoch(self, epoch: int) -> None:
        """Work over the whole training set before epoch 1, 2, …, such as re-clustering; results go to buffers."""

    def after_step(self) -> None:
        """State that follows the optimiser step, such as a memory bank; called under ``no_grad``."""


@dataclass
class Experiment:
    """One training job as :func:`orchestrator.fit.fit` runs it, on one rank."""

    task: Task
    optimizer: Optimizer
    epochs: int
    learning_rate: Callable[[int], float]  # 1-based epoch -> rate of the whole epoch
    batches: Callable[[int], Iterable[Batch]]  # 1-based epoch -> this rank's batches; same draws on every call
    evaluate: Callable[[Task], dict[str, float]]  # metrics such as "val/map", fractions in [0, 1]
    precision: Literal["float32", "bfloat16"] = "float32"  # of the networks; losses are float32 always
    compile: bool = False
    clip_norm: float = 0.0  # largest gradient norm, 0 = no clipping
    evaluate_every: int = 1  # epochs; the last epoch is always evaluated
    images_per_step: int = 0  # over all ranks, for images/s


@dataclass(frozen=True)
class Place:
    """Where a job reads and writes: absolute paths, plain strings, the same on every node."""

    storage: str
    data_root: str = ""

    def folder(self, *parts: str) -> str:
        return "/".join((self.storage, *parts))


@dataclass(frozen=True)
class Metric:
    """One score of a method as logs name it and tables title it."""

    name: str  # what was scored, a slash, the score, such as "val/map"
    title: str
    percent: bool = True  # a fraction in [0, 1] that tables show as percent


@dataclass(frozen=True)
class Method:
    """What ``METHOD`` of a method file is."""

    paper: str
    recipes: Mapping[str, Any]  # benchmark -> recipe, a frozen dataclass; "demo" always
    metrics: tuple[Metric, ...]  # the first is what a sweep maximises and tables show first
    check: Callable[[Any, int], None]  # recipe, workers; raises ValueError for values that cannot work together
    # Everything expensive that all trials share, built once before any of them; returns facts for the record.
    prepare: Callable[[Any, Place], dict[str, Any]]
    experiment: Callable[[Any, Place, int, int, Any], Experiment]  # recipe, place, rank, world size, device
    # Names of recipe fields that change what `prepare` builds; all others may vary inside one sweep.
    prepared_by: frozenset[str] = field(default_factory=frozenset)
    preparation: str = ""  # what kind is prepared: methods of one kind share it where those fields are equal
    has_teacher: bool = False
    # What must be trained first, as (method name, recipe) of a teacher; None when there is nothing to train.
    teacher: Callable[[Any, Place], tuple[str, Any] | None] = lambda recipe, place: None
    # Folder of that teacher, trained or not; known before training. The last argument is a progress callback.
    teacher_folder: Callable[[Any, Place, Any], str] = lambda recipe, place, progress: ""
    # A stored student scored again from images and caches: student, recipe, place -> metrics.
    evaluate: Callable[[nn.Module, Any, Place], dict[str, float]] | None = None
    # How published tables name the networks of a recipe: (query network, gallery network or teacher).
    networks: Callable[[Any], tuple[str, str]] = lambda recipe: ("", "")
    # Names of recipe fields of which a stored student can be scored and exported with another value.
    after_training: Callable[[Any], frozenset[str]] = lambda recipe: frozenset()
    # The recipe with everything switched off that scoring a stored student does not need.
    for_evaluation: Callable[[Any], Any] = lambda recipe: recipe
    # Pictures of a trained student by name, as plain data that orchestrator.figures draws.
    pictures: Callable[[nn.Module, Any, Place], dict[str, "Panel | Sheet | Points"]] | None = None


@dataclass(frozen=True)
class Panel:
    """Pictures of a few queries with what was found for them; plain pixels, drawn by ``orchestrator.figures``."""

    title: str
    query: np.ndarray  # (Q, H, W, 3) uint8
    results: np.ndarray  # (Q, R, H, W, 3) uint8, best first
    correct: np.ndarray  # (Q, R) bool


@dataclass(frozen=True)
class Sheet:
    """A table of pictures with names of rows and columns."""

    title: str
    images: np.ndarray  # (R, C, H, W, 3) uint8
    columns: tuple[str, ...]
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Points:
    """Maps of the same points in the plane, side by side."""

    title: str
    maps: Mapping[str, np.ndarray]  # name -> (N, 2)
    label: np.ndarray  # (N,) whole numbers; one colour each
    marked: np.ndarray  # (N,) bool: drawn with another mark
    marks: tuple[str, str]  # what unmarked and marked points are


@dataclass(frozen=True)
class Range:
    """Bounds of a recipe field, written in its annotation: ``Annotated[float, Range(0, 1)]``."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # low itself is not allowed

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'above' if self.above else 'at least'} {self.low:g}" + (
            f" and at most {self.high:g}" if self.high < math.inf else ""
        )


FilePath = Annotated[str, "file"]  # made absolute where it is typed: workers run in folders of their own
Positive = Annotated[float, Range(0, above=True)]
Weight = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]


def field_types(recipe: Any) -> dict[str, Any]:
    """Field name -> annotation with its :class:`Range`."""
    return get_type_hints(type(recipe), include_extras=True)


def check_field(recipe: Any, name: str, value: Any) -> Any:
    """The value as the recipe field's type; text is parsed.

    Raises:
        ValueError: unknown field (the near ones are named), wrong type, or outside the field's range.
    """
    types = field_types(recipe)
    if name not in types:
        raise ValueError(f"the recipe has no field {name!r}" + did_you_mean(name, types))
    annotation = types[name]
    bounds = next((a for a in get_args(annotation) if isinstance(a, Range)), None)
    if annotation == FilePath and value:
        value = str(Path(value).expanduser().absolute())
    plain = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    try:
        value = _parse(plain, value)
    except (ValueError, TypeError, KeyError, StopIteration) as error:
        raise ValueError(f"{name} must be {_describe(plain)}, got {value!r}") from error
    if bounds is not None and not all(v in bounds for v in (value if isinstance(value, tuple) else (value,))):
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return value


def changed(recipe: Any, settings: Mapping[str, Any]) -> Any:
    """The recipe with some fields replaced, each checked."""
    return dataclasses.replace(recipe, **{name: check_field(recipe, name, value) for name, value in settings.items()})


def recipe_dict(recipe: Any) -> dict[str, Any]:
    """Plain JSON values of every field, in order."""
    return {f.name: _plain(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}


def recipe_from(template: Any, values: Mapping[str, Any]) -> Any:
    """The inverse of :func:`recipe_dict`, for a template of the same recipe class."""
    return changed(template, values)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause that lists the near names, or all of them when none is near.

    >>> did_you_mean("bta", ["alpha", "beta"])
    '; did you mean beta?'
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else f"; there are: {', '.join(known)}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _parse(kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        # Text from a command line means the option that is written so, whole numbers included.
        return next(option for option in get_args(kind) if str(option) == str(value))
    if get_origin(kind) is tuple:
        parts = value.lower().replace("x", ",").split(",") if isinstance(value, str) else list(value)
        if len(parts) != len(get_args(kind)):
            raise ValueError
        return tuple(_parse(k, p) for k, p in zip(get_args(kind), parts, strict=True))
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return int(value)
    if kind is float:
        if isinstance(value, bool) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    return str(value)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(v) for v in get_args(kind))
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} numbers such as {'x'.join(['64'] * len(get_args(kind)))}"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
