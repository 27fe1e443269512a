"""Recipes: one job's numbers as frozen dataclasses in groups, and the names by which people set them.

What every job has lives in the groups here; families extend them; a method adds its paper's symbols flat.
A field's name is its dotted path, such as ``teacher.train.epochs``. People may leave out what is not needed
to tell it from others: ``teacher.epochs``, or a last name that no other field has.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

R = TypeVar("R")


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
Share = Annotated[float, Range(0, 1, above=True)]
Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Pixels = Annotated[tuple[int, int], Range(8)]  # height × width


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on and scored on."""

    name: str = "demo"  # file name of the reader in orchestrator/datasets
    part: Literal["test", "validation"] = "test"  # what is scored on; validation is held out of the training part
    fraction: Share = 1.0  # of the training images; a smaller one is inside every larger one
    skip_unreadable: bool = False  # leave out images that cannot be decoded, instead of stopping


@dataclass(frozen=True, kw_only=True)
class Train:
    """Optimisation."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    rate: Positive = 0.01  # learning rate at its highest
    momentum: Probability = 0.9  # of sgd
    weight_decay: Weight = 5e-4
    epochs: Count = 120
    warmup_epochs: Whole = 10  # linear
    clip_norm: Weight = 0.0  # largest norm of the gradient, 0 = no clipping
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the networks; auto = bfloat16 on a GPU
    evaluate_every: Count = 10  # epochs; the last epoch is always evaluated
    seed: Whole = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """How fast and where a job runs; never part of what comes out of it."""

    loader_workers: Whole = 4  # processes that decode images that are not cached
    # on = decoded once for all trials, as auto does up to 128 × 128 pixels; device = on, and the device holds frames
    # and teacher's tables, as auto does on a GPU where they fit in half of its free memory
    pixel_cache: Literal["auto", "on", "off", "device"] = "auto"
    compile: bool = False
    checkpoint_every: Whole = 0  # epochs; 0 = as often as a kill may lose at most five minutes


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network and what it starts from."""

    name: str = "resnet18.tv_in1k"  # of timm, or package.module:function of one's own
    size: Pixels = (64, 64)  # of the input
    width: Positive = 1.0  # scales the channels of a ResNet
    pretrained: bool = True  # start from timm's ImageNet weights
    weights: FilePath = ""  # start from a local file instead


@dataclass(frozen=True, kw_only=True)
class TeacherTrain:
    """What is a teacher's own in its training; the rest is as the benchmark trains such a network."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    rate: Positive = 0.01
    epochs: Count = 120
    seed: Whole = 0


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen network, and how it is trained where its weights are not given."""

    network: Network = field(default_factory=Network)
    train: TeacherTrain = field(default_factory=TeacherTrain)
    weights: FilePath = ""  # a trained teacher's .safetensors; empty = found by what it is made from, or trained


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that launch, reporting and tracking may read of a recipe."""

    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    run: Run = field(default_factory=Run)


def check_cached_on_host(run: Run, why: str) -> None:
    """Raises ValueError where a method whose frames stay with the host is asked to hold them on the device."""
    if run.pixel_cache == "device":
        raise ValueError(f"run.pixel_cache=device: {why}; use on")


def fields_of(recipe: Any) -> dict[str, Any]:
    """Dotted path of every field -> its annotation with its :class:`Range`, in order.

    >>> list(fields_of(Data()))
    ['name', 'part', 'fraction', 'skip_unreadable']
    """
    found: dict[str, Any] = {}
    hints = _annotations(type(recipe))
    for own in dataclasses.fields(recipe):
        value = getattr(recipe, own.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{own.name}.{path}": kind for path, kind in fields_of(value).items()}
        else:
            found[own.name] = hints[own.name]
    return found


@lru_cache(maxsize=256)  # a record is read field by field, each of which looks at all
def _annotations(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def value_of(recipe: Any, path: str) -> Any:
    """The value of a field by its full path."""
    for name in path.split("."):
        recipe = getattr(recipe, name)
    return recipe


def path_of(recipe: Any, name: str) -> str:
    """The full path of the field that a name means.

    Raises:
        ValueError: no field is meant (the near ones are named), or several are (all are named).

    >>> path_of(Recipe(), "epochs"), path_of(Teacher(), "epochs")
    ('train.epochs', 'train.epochs')
    """
    return _path(name, fields_of(recipe))


def _path(name: str, paths: Mapping[str, Any]) -> str:
    if name in paths:
        return name
    meant = _meant(name, paths)
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise ValueError(f"{name} is {' or '.join(short(path, paths) for path in meant)}; say which")
    known = {short(path, paths) for path in paths}
    raise ValueError(f"the recipe has no field {name!r}" + did_you_mean(name, known))


def short(path: str, paths: Iterable[str]) -> str:
    """The shortest name of a field that is not another's too.

    >>> short("teacher.train.epochs", ["train.epochs", "teacher.train.epochs", "teacher.train.rate"])
    'teacher.epochs'
    """
    paths, parts = list(paths), path.split(".")
    for name in dict.fromkeys((parts[-1], f"{parts[0]}.{parts[-1]}")):
        if name == path or (name not in paths and _meant(name, paths) == [path]):
            return name
    return path


def check_field(recipe: Any, name: str, value: Any) -> Any:
    """The value as the field's type; text is parsed.

    Raises:
        ValueError: unknown or ambiguous field, wrong type, or outside the field's range.
    """
    paths = fields_of(recipe)
    return _checked(name, paths[_path(name, paths)], value)


def _checked(name: str, annotation: Any, value: Any) -> Any:
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


def changed(recipe: R, settings: Mapping[str, Any]) -> R:
    """The recipe with some fields replaced, each checked; names as people write them.

    Raises:
        ValueError: as :func:`check_field`, or a field that is named twice.
    """
    values: dict[str, Any] = {}
    paths = fields_of(recipe)
    for name, value in settings.items():
        path = _path(name, paths)
        if path in values:
            raise ValueError(f"{path} is set twice")
        values[path] = _checked(name, paths[path], value)
    return _replaced(recipe, values)


def flat(recipe: Any) -> dict[str, Any]:
    """Plain JSON values of every field by dotted path, in order; the inverse is :func:`recipe_from`."""
    return {path: _plain(value_of(recipe, path)) for path in fields_of(recipe)}


def recipe_from(template: R, values: Mapping[str, Any]) -> R:
    """The recipe of these values by full path; what is not named is as in the template.

    Raises:
        ValueError: a path that the template does not have, or a value that it does not allow.
    """
    unknown = sorted(set(values) - set(fields_of(template)))
    if unknown:
        raise ValueError(f"the recipe has no field {unknown[0]!r}" + did_you_mean(unknown[0], fields_of(template)))
    return changed(template, values)


def differing(recipe: Any, other: Any) -> dict[str, Any]:
    """Fields of a recipe, by shortest name, whose value another recipe of its class does not have."""
    theirs = flat(other)
    own = flat(recipe)
    return {short(path, own): value for path, value in own.items() if theirs.get(path, _ABSENT) != value}


_ABSENT = object()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause that lists the near names, or all of them when none is near.

    >>> did_you_mean("bta", ["alpha", "beta"])
    '; did you mean beta?'
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else f"; there are: {', '.join(known)}"


def _meant(name: str, paths: Iterable[str]) -> list[str]:
    """Paths that end as the name does and hold its other words in their order."""
    words = name.split(".")

    def means(path: str) -> bool:
        rest = iter(path.split("."))
        return path.split(".")[-1] == words[-1] and all(word in rest for word in words)

    return [path for path in paths if means(path)]


def _replaced(recipe: R, values: Mapping[str, Any]) -> R:
    own: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        group, _, rest = path.partition(".")
        if rest:
            groups.setdefault(group, {})[rest] = value
        else:
            own[path] = value
    for group, inside in groups.items():
        own[group] = _replaced(getattr(recipe, group), inside)
    return dataclasses.replace(recipe, **own)


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
