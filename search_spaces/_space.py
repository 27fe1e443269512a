"""The words a search space is written in. Standard library only, so that listing all spaces loads nothing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Float:
    """A real number between two bounds, on a logarithmic scale if ``log``."""

    low: float
    high: float
    log: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Int:
    """A whole number between two bounds, both included."""

    low: int
    high: int
    log: bool = False

    def __contains__(self, value: int) -> bool:
        return self.low <= value <= self.high and int(value) == value


@dataclass(frozen=True)
class Choice:
    """One of the listed plain values."""

    options: tuple[Any, ...]

    def __post_init__(self):
        object.__setattr__(self, "options", tuple(map(plain, self.options)))

    def __contains__(self, value: Any) -> bool:
        return plain(value) in self.options


def plain(value: Any) -> Any:
    """A pair such as a size as the text that recipes read: samplers and databases take no pairs.

    >>> plain((48, 32)), plain(0.5)
    ('48x32', 0.5)
    """
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class SearchSpace:
    """What a sweep varies. Either ``tune`` (a sampler explores) or ``cells`` × ``seeds`` (a table is filled).

    Attributes:
        method: file name in orchestrator/methods; a cell may name another as its setting "method".
        question: what the sweep answers, one line.
        tune: recipe field -> Float, Int or Choice.
        start: points tried first, the paper's values; each names every tuned field.
        cells: row name -> recipe settings of that row.
        seeds: seeds every cell is run with.
        fix: recipe settings of all trials.
        trials: how many in total when nothing else is asked for, start points included; cells count themselves.
        metric: maximised; empty = the method's first.
        early_stopping: whether ASHA may end weak trials; tables are always run in full.
        picture: names of the one or two tuned fields whose curves and heat map the report draws.
        compare: a picture of its runs, such as "matches", that the report shows of every row of a table.
    """

    method: str
    question: str
    tune: Mapping[str, Float | Int | Choice] = field(default_factory=dict)
    start: tuple[Mapping[str, Any], ...] = ()
    cells: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    fix: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 20
    metric: str = ""
    early_stopping: bool = True
    picture: tuple[str, ...] = ()
    compare: str = ""

    def __post_init__(self):
        start = tuple({name: plain(value) for name, value in point.items()} for point in self.start)
        object.__setattr__(self, "start", start)
        if bool(self.tune) == bool(self.cells):
            raise ValueError("a space has either tune or cells")
        if self.compare and not self.cells:
            raise ValueError(f"compare={self.compare!r} is of the rows of a table, and there is none")
        both = set(self.tune) & set(self.fix)
        if both:
            raise ValueError(f"{sorted(both)} cannot be both tuned and fixed")
        for point in self.start:
            if set(point) != set(self.tune):
                raise ValueError(f"start point {dict(point)} must name exactly {sorted(self.tune)}")
            for name, value in point.items():
                if value not in self.tune[name]:
                    raise ValueError(f"start point {name} = {value} is outside {self.tune[name]}")
        for name, bounds in self.tune.items():
            if not isinstance(bounds, Choice) and not (bounds.low < bounds.high and math.isfinite(bounds.high)):
                raise ValueError(f"{name}: bounds must rise and be finite, got {bounds}")
            if not isinstance(bounds, Choice) and bounds.log and bounds.low <= 0:
                raise ValueError(f"{name}: a logarithmic scale needs a lower bound above 0, got {bounds.low}")

    def table(self) -> list[dict[str, Any]]:
        """Points that are run in any case, in order: start points, or every cell with every seed."""
        if self.cells:
            return [{"cell": name, "seed": seed} for seed in self.seeds for name in self.cells]
        return [dict(point) for point in self.start]

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method of the space, its own first where it is used."""
        named = [cell.get("method", self.method) for cell in self.cells.values()] or [self.method]
        return tuple(sorted(dict.fromkeys(named), key=lambda name: name != self.method))

    def method_of(self, point: Mapping[str, Any]) -> str:
        """Which method a point is a trial of."""
        return self.cells[point["cell"]].get("method", self.method) if self.cells else self.method

    def settings(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Recipe settings of one point."""
        if self.cells:
            cell = {name: value for name, value in self.cells[point["cell"]].items() if name != "method"}
            return {**self.fix, **cell, "train.seed": point["seed"]}
        return {**self.fix, **point}
