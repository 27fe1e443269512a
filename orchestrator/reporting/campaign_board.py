"""The display of a campaign: a line a sweep, what is in use, when the whole will end."""

import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.launch.campaign import State
from orchestrator.launch.leading import Watched
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.progress import PreparationBar, label

_QUIET_SECONDS = 30.0  # between status blocks where nothing can be redrawn


@dataclass
class Line:
    """What is known of one sweep."""

    title: str
    state: str = "waiting"  # preparing, running, done, failed, left out
    why: str = ""
    total: int = 0
    completed: int = 0
    pruned: int = 0
    failed: int = 0
    best: float | None = None
    metric: str = ""
    gpus: float = 0.0  # of one trial
    cpus: int = 1
    running: dict[int, tuple[float, int, int]] = field(default_factory=dict)  # number -> start, epoch, epochs
    seconds: list[float] = field(default_factory=list)  # of trials that ended here

    @property
    def done(self) -> int:
        return self.completed + self.pruned + self.failed

    @property
    def left(self) -> int:
        return 0 if self.state in ("done", "failed", "left out") else max(0, self.total - self.done)

    def cells(self) -> list[str]:
        failed = f"{self.failed} failed" if self.failed else ""
        pruned = f"{self.pruned} stopped early" if self.pruned else ""
        best = f"best {self.metric} {self.best:.4f}" if self.best is not None else ""
        running = f"{len(self.running)} running" if self.running else ""
        why = self.why if self.state in ("failed", "left out") else ""
        notes = " · ".join(part for part in (running, pruned, failed, best, why) if part)
        return [self.title, f"{self.done}/{self.total}" if self.total else "", self.state, notes]


class CampaignBoard(Watched):
    """Told by the threads of a campaign; drawn on a terminal, printed in blocks elsewhere."""

    def __init__(self, console: Console, state: State, standing: Sequence[tuple[str, int, int]] = ()):
        """``standing``: title, finished trials and planned trials of the sweeps."""
        self.console, self.state = console, state
        self.lines = {
            entry.title: Line(entry.title, "left out" if entry.left_out else "waiting", entry.left_out)
            for entry in state.entries
        }
        for title, done, total in standing:
            self.lines[title].completed, self.lines[title].total = done, total
        self._lock, self._printed = threading.RLock(), time.monotonic()
        self._live = Live(console=console, get_renderable=self.table, refresh_per_second=1, transient=True)

    def __enter__(self) -> "CampaignBoard":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.console.is_terminal:
            self._live.stop()

    # --- told -----------------------------------------------------------------------------------------------------

    def board(self, title: str, plan: Plan, known: list[TrialRecord]) -> "SweepBoard":
        line = self.lines[title]
        with self._lock:
            line.total, line.metric = plan.trials, plan.metric
            line.gpus, line.cpus = plan.workers * plan.gpus_per_worker, plan.workers
            line.completed = line.pruned = line.failed = 0
            for record in known:
                if record.status != "running":
                    _count(line, record.status, record.value)
        return SweepBoard(self, line)

    def bar(self, title: str) -> "_Lines":
        return _Lines(self, title)

    def said(self, title: str, state: str, why: str = "") -> None:
        with self._lock:
            self.lines[title].state, self.lines[title].why = state, why
        self.event(title, state + (f": {why}" if why else ""))

    def event(self, title: str, text: str) -> None:
        """One line of something that happened to a sweep."""
        self.console.print(f"  {time.strftime('%H:%M:%S')} {title}: {text}", markup=False, highlight=False)
        self.quiet()

    def quiet(self) -> None:
        """Prints the block where nothing can be redrawn, if it was not printed lately."""
        if self.console.is_terminal or time.monotonic() - self._printed < _QUIET_SECONDS:
            return
        self._printed = time.monotonic()
        for text in self.text():
            self.console.print(text, markup=False, highlight=False)

    # --- shown ----------------------------------------------------------------------------------------------------

    def text(self) -> list[str]:
        """The block as plain lines."""
        with self._lock:
            rows = [line.cells() for line in self.lines.values()]
        width = max(len(row[0]) for row in rows)
        return [f"  | {row[0]:{width}} {row[1]:>9} {row[2]:9} {row[3]}".rstrip() for row in rows] + [
            f"  | {self.whole()}"
        ]

    def table(self) -> Table:
        """The block as a terminal draws it."""
        table = Table.grid(padding=(0, 2))
        with self._lock:
            for line in self.lines.values():
                table.add_row(*line.cells())
        table.add_row(self.whole())
        return table

    def whole(self) -> str:
        """What is in use, and when everything will have ended."""
        numbers = self.numbers()
        used = f"{numbers['gpus']:g} GPUs" if numbers["gpus"] else f"{numbers['workers']:g} workers"
        parts = [f"{numbers['done']:g}/{numbers['trials']:g} trials done", f"{numbers['running']:g} running on {used}"]
        if numbers["failed"]:
            parts.append(f"{numbers['failed']:g} failed")
        minutes = numbers.get("eta_minutes")
        return " · ".join([*parts, "ETA unknown yet" if minutes is None else f"ETA {minutes:.0f} min"])

    def numbers(self) -> dict[str, float]:
        """The whole in numbers; without "eta_minutes" before the first trial has ended."""
        with self._lock:
            lines = [line for line in self.lines.values() if line.state != "left out"]
            found = {
                "trials": float(sum(line.total for line in lines)),
                "done": float(sum(line.done for line in lines)),
                "running": float(sum(len(line.running) for line in lines)),
                "failed": float(sum(line.failed for line in lines)),
                "gpus": sum(len(line.running) * line.gpus for line in lines),
                "workers": float(sum(len(line.running) * line.cpus for line in lines)),
            }
            known = [second for line in lines for second in line.seconds]
            if known:
                usual, now = statistics.mean(known), time.monotonic()
                work = sum(line.left * (statistics.mean(line.seconds) if line.seconds else usual) for line in lines)
                gone = sum(now - start for line in lines for start, _, _ in line.running.values())
                found["eta_minutes"] = max(0.0, work - gone) / max(1, self.state.concurrent) / 60
            return found


@dataclass
class SweepBoard:
    """One sweep's part of a campaign's display."""

    whole: CampaignBoard
    line: Line

    def started(self, number: int, point: Mapping[str, Any], epochs: int) -> None:
        with self.whole._lock:
            again = number in self.line.running
            self.line.running[number] = (time.monotonic(), 0, epochs)
        self.whole.event(self.line.title, f"trial {number} {'restarted' if again else 'started'}: {label(point)}")

    def epoch(self, number: int, epoch: int, value: float | None) -> None:
        with self.whole._lock:
            start, before, epochs = self.line.running.get(number, (time.monotonic(), 0, 0))
            self.line.running[number] = (start, max(epoch, before), epochs)
        self.whole.quiet()

    def happened(self, number: int, what: str) -> None:
        self.whole.event(self.line.title, f"trial {number}: {what}")

    def ended(self, number: int, status: str, value: float | None, message: str = "") -> None:
        with self.whole._lock:
            start, epoch, _ = self.line.running.pop(number, (time.monotonic(), 0, 0))
            self.line.seconds.append(time.monotonic() - start)
            _count(self.line, status, value)
        shown = f": {self.line.metric} {value:.4f}" if value is not None else ""
        self.whole.event(
            self.line.title,
            f"trial {number} {status} after epoch {epoch}{shown}" + (f" ({message})" if message else ""),
        )


class _Lines(PreparationBar):
    """The progress of one sweep's preparation among others: lines with its name."""

    def __init__(self, whole: CampaignBoard, title: str):
        super().__init__(whole.console)
        self.bar.disable = True  # several at once cannot be drawn
        self.whole, self.title = whole, title

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = 0
            self.whole.event(self.title, f"{what} ({total})")

    def board(self, metric: str, known: Sequence[Any], trials: int) -> SweepBoard:
        return SweepBoard(self.whole, Line(f"{self.title}, teacher", total=trials, metric=metric))

    def line(self, text: str) -> None:
        self.whole.event(self.title, text.strip().replace("[bold]", "").replace("[/bold]", ""))


def _count(line: Line, status: str, value: float | None) -> None:
    line.completed += status == "completed"
    line.pruned += status == "pruned"
    line.failed += status == "failed"
    if status == "completed" and value is not None:
        line.best = max(value, line.best if line.best is not None else value)
