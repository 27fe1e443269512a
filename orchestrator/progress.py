"""One readable display of a sweep: a live line on a terminal, plain event lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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

    def __init__(self, console: Console, metric: str, known: Sequence[Any], trials: int):
        """``known`` are the records of trials that are there already."""
        self.console, self.trials, self.metric = console, trials, metric
        self.best: list[float] = []
        self.done = 0
        self.running: dict[int, tuple[int, float | None]] = {}
        self.epochs: dict[int, int] = {}  # of every trial that was started
        self.failed = self.pruned = 0
        for record in known:
            if record.status != "running":
                self._count(record.status, record.value)
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

    def started(self, number: int, point: Mapping[str, Any], epochs: int) -> None:
        again = number in self.running
        self.running[number], self.epochs[number] = (0, None), epochs
        self.console.print(f"  trial {number} {'restarted' if again else 'started'}: {label(point)}", markup=False)

    def epoch(self, number: int, epoch: int, value: float | None) -> None:
        before, last = self.running.get(number, (0, None))
        self.epochs_here += 1
        self.running[number] = (max(epoch, before), value if value is not None else last)
        if not self.console.is_terminal and time.monotonic() - self._last_line > _QUIET_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(self._status(), highlight=False)

    def happened(self, number: int, what: str) -> None:
        self.console.print(f"  trial {number}: {what}", markup=False)

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
        running = ", ".join(f"t{n} epoch {e}/{self.epochs[n]}" for n, (e, _) in sorted(self.running.items()))
        parts.append(f"running: {running or 'starting'}")
        if self.best:
            parts.append(f"best {self.metric} {max(self.best):.4f}")
        return " · ".join([*parts, self._eta()])

    def _eta(self) -> str:
        elapsed = time.monotonic() - self.started_at
        if not self.epochs_here:
            return f"{elapsed:.0f} s"
        each = sum(self.epochs.values()) / len(self.epochs)
        left = (self.trials - self.done) * each - sum(e for e, _ in self.running.values())
        seconds = elapsed / self.epochs_here * max(0, left)
        return f"ETA {seconds / 60:.0f} min" if seconds > 90 else f"ETA {seconds:.0f} s"

    def _render(self) -> Any:
        table = Table.grid()
        table.add_row(Text(self._status()))
        return table


class PreparationBar:
    """A progress bar with an ETA for every step of a preparation; plain lines where nothing can be redrawn."""

    def __init__(self, console: Console):
        self.console = console
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total)
            if not self.console.is_terminal:
                self.console.print(f"  {what} ({total})", highlight=False, markup=False)
        self.bar.update(self.tasks[what], completed=done)

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(f"  {text}", highlight=False)

    def board(self, metric: str, known: Sequence[Any], trials: int) -> Any:
        """The display of a training that the preparation needs."""
        return Board(self.console, metric, known, trials)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Makes room for another display."""
        self.bar.stop()
        try:
            yield
        finally:
            self.bar.start()

    def __enter__(self) -> "PreparationBar":
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()
