"""The words a campaign is written in. Standard library only, so that listing all campaigns loads nothing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sweep:
    """One sweep of a campaign: a search space on a benchmark.

    Attributes:
        space: file name in search_spaces.
        on: the benchmark.
        priority: its share of the cluster beside the others'; two of the same get the same.
        trials: how many in total, of a space that is sampled; 0 = as the space says.
        seeds: of a table, instead of the space's own.
        settings: recipe fields, such as {"train.epochs": 4}, for every trial.
        workers: Ray Train workers of one trial.
    """

    space: str
    on: str = "demo"
    priority: float = 1.0
    trials: int = 0
    seeds: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1

    def __post_init__(self):
        for name, kind in (("priority", int | float), ("trials", int), ("workers", int)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{self.space} on {self.on}: {name} is {getattr(self, name)!r}, expected a number")
        if not (self.priority > 0 and math.isfinite(self.priority)):
            raise ValueError(f"{self.space} on {self.on}: priority {self.priority} must be above 0")
        if self.trials < 0 or self.workers < 1:
            raise ValueError(f"{self.space} on {self.on}: {self.trials} trials of {self.workers} workers cannot be run")

    @property
    def title(self) -> str:
        return f"{self.space} on {self.on}"


@dataclass(frozen=True)
class Campaign:
    """Several sweeps that share a cluster.

    Attributes:
        question: what the campaign answers, one line.
        sweeps: in the order in which they are prepared and shown.
        trials: the most that may run in all; 0 = everything that is planned.
        gpu_hours: the most that trials may use in all; 0 = as many as they need.
    """

    question: str
    sweeps: tuple[Sweep, ...]
    trials: int = 0
    gpu_hours: float = 0.0

    def __post_init__(self):
        if isinstance(self.sweeps, Sweep):
            raise ValueError("sweeps is one Sweep; a tuple of one needs a comma: sweeps=(Sweep(…),)")
        if odd := [sweep for sweep in self.sweeps if not isinstance(sweep, Sweep)]:
            raise ValueError(f"sweeps holds {odd[0]!r}, expected Sweep(…)")
        titles = [sweep.title for sweep in self.sweeps]
        if not titles:
            raise ValueError("a campaign needs sweeps")
        if twice := next((title for title in titles if titles.count(title) > 1), ""):
            raise ValueError(f"a campaign has {twice} twice")
        if self.trials < 0 or not (self.gpu_hours >= 0 and math.isfinite(self.gpu_hours)):
            raise ValueError(f"a budget of {self.trials} trials and {self.gpu_hours} GPU hours must not be below 0")
