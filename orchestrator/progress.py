"""One readable display of a sweep: a live line on a terminal, plain event lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_QUIET_SECONDS = 20.0  # between status lines where nothing can be redrawn


def label(point: Mapping[str, Any], values: str = ".3g") -> str:
    """A point of a space in one short line, with the papers' symbols.

    >>> label({"beta": 0.25, "cell": "L_f", "seed": 1})
    'β=0.25 L_f seed=1'
    """
    parts = []
    for name, value in point.items():
        text = f"{value:{values}}" if isinstance(value, float) else str(value)
        parts.append(text if name == "cell" else f"{symbol(name)}={text}")
    return " ".join(parts)


def symbol(name: str) -> str:
    """The paper's letter for a recipe field, or the field's name."""
    return {"alpha": "α", "beta": "β", "gamma": "γ", "top_k": "k", "lambda1": "λ1", "lambda2": "λ2"}.get(name, name)


class Board:
    """Trials done, running and failed, epochs of the running ones, the best so far, and when it will end."""

    def __init__(
        self, console: Console, trials: int, epochs: int, metric: str, known: list[tuple[int, str, float | None]]
    ):
        self.console, self.trials, self.epochs, self.metric = console, trials, epochs, metric
        self.best: list[float] = []
        self.done = 0
        self.running: dict[int, tuple[int, float | None]] = {}
        self.failed = self.pruned = 0
        for _, status, value in known:
            if status != "running":
                self._count(status, value)
        self.started_at, self.epochs_here = time.monotonic(), 0
        self._last_line = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def started(self, number: int, point: dict[str, Any]) -> None:
        again = number in self.running
        self.running[number] = (0, None)
        self.console.print(f"  trial {number} {'restarted' if again else 'started'}: {label(point)}", markup=False)

    def epoch(self, number: int, epoch: int, value: float | None) -> None:
        before, last = self.running.get(number, (0, None))
        self.epochs_here += 1
        self.running[number] = (max(epoch, before), value if value is not None else last)
        if not self.console.is_terminal and time.monotonic() - self._last_line > _QUIET_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(self._status(), highlight=False)

    def ended(self, number: int, status: str, value: float | None, message: str = "") -> None:
        epoch, last = self.running.pop(number, (0, None))
        self._count(status, value)
        shown = value if value is not None else last
        text = f"  trial {number} {status} after epoch {epoch}" + (
            f": {self.metric} {shown:.4f}" if shown is not None else ""
        )
        self.console.print(text + (f" ({message})" if message else ""), highlight=False, markup=False)

    def _count(self, status: str, value: float | None) -> None:
        self.done += 1
        self.failed += status == "failed"
        self.pruned += status == "pruned"
        self.best += [value] if status == "completed" and value is not None else []

    def _status(self) -> str:
        parts = [f"  {self.done}/{self.trials} trials done"]
        if self.pruned:
            parts.append(f"{self.pruned} stopped early")
        if self.failed:
            parts.append(f"{self.failed} failed")
        running = ", ".join(f"t{n} epoch {e}/{self.epochs}" for n, (e, _) in sorted(self.running.items()))
        parts.append(f"running: {running or 'starting'}")
        if self.best:
            parts.append(f"best {self.metric} {max(self.best):.4f}")
        return " · ".join([*parts, self._eta()])

    def _eta(self) -> str:
        elapsed = time.monotonic() - self.started_at
        left = (self.trials - self.done) * self.epochs - sum(e for e, _ in self.running.values())
        if not self.epochs_here:
            return f"{elapsed:.0f} s"
        seconds = elapsed / self.epochs_here * max(0, left)
        return f"ETA {seconds / 60:.0f} min" if seconds > 90 else f"ETA {seconds:.0f} s"

    def _render(self) -> Any:
        table = Table.grid()
        table.add_row(Text(self._status()))
        return table
