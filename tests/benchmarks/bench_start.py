"""What a trial costs beside its epochs: seconds from Tune's decision to the first step, and memory of its processes.

    python tests/benchmarks/bench_start.py [--trials 4]

Trials of D3still on ``demo``, one epoch each, one after the other on a local cluster; everything is prepared before.
The first step is when the first epoch was reported, less what it took. Memory is what the trial's processes hold of
their own, and their share of what they hold together (PSS), at its highest. The limit is a process that imports what
a trial's worker does and makes its experiment, without Ray; it is also the obvious alternative, one trial by hand.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ALONE = """
import sys
import torch
from orchestrator import find
from orchestrator.launch import shelf
from orchestrator.method import Where
plan = shelf.read(__import__("pathlib").Path(sys.argv[1]))
point = plan.search_space.table()[0]
method, recipe = plan.recipe_of(point)
made = find.method(method).experiment(recipe, plan.prepared_for(point), Where(plan.where, 0, 1, torch.device("cpu")))
next(iter(made.batches(1)))
"""

OF_A_TRIAL = ("Implicit", "Train", "Queue", "Synchronization")  # parts of the titles of its processes


class Board:
    """When trials were decided on, when their first epoch came, and when they ended."""

    def __init__(self):
        self.decided: dict[int, float] = {}
        self.came: dict[int, float] = {}
        self.over: dict[int, float] = {}

    def started(self, number, point, epochs):
        self.decided[number] = time.monotonic()

    def epoch(self, number, epoch, value):
        self.came.setdefault(number, time.monotonic())

    def happened(self, number, what): ...

    def ended(self, number, status, value, message=""):
        self.over[number] = time.monotonic()


def memory(stop: threading.Event, found: dict[str, float]) -> None:
    """The most that processes of a trial hold, by their title, in MiB."""
    while not stop.wait(0.5):
        now: dict[str, float] = {}
        for process in Path("/proc").iterdir():
            try:
                title = (process / "cmdline").read_bytes().split(b"\0")[0].decode()
                if title.startswith("ray::") and any(part in title for part in OF_A_TRIAL):
                    lines = (process / "smaps_rollup").read_text().splitlines()
                    name = title.removeprefix("ray::").partition(".")[0]
                    now[name] = now.get(name, 0) + sum(int(x.split()[1]) for x in lines if x.startswith("Pss:")) / 1024
            except (OSError, ValueError):
                continue
        for name, value in now.items():
            found[name] = max(found.get(name, 0), value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-start-") as storage:
        os.environ["ORCHESTRATOR_STORAGE"] = storage
        measured(Path(storage), given.trials)


def measured(storage: Path, trials: int) -> None:
    from rich.console import Console

    from orchestrator import on_ray, tracking
    from orchestrator.launch import asked, preparing, shelf
    from orchestrator.launch.runner import driving
    from orchestrator.progress import PreparationBar
    from search_spaces._space import SearchSpace

    cells = {f"row {number}": {"alpha": 10.0 + number} for number in range(trials)}
    space = SearchSpace(method="d3still", question="How long?", cells=cells)
    recipes, place = asked.resolve(space, "demo", {"train.epochs": 1, "teacher.train.epochs": 1}, None, "")
    plan = shelf.new_plan("start", space, "start", "demo", recipes, place, tracking.tracking_uri(str(storage)), trials,
                          1, 1, 0.0)  # fmt: skip
    board, most, stop = Board(), {}, threading.Event()
    with on_ray.connected(dashboard=False) as runner, driving(plan), PreparationBar(Console(quiet=True)) as bar:
        plan = preparing.prepared(plan, runner, bar)
        threading.Thread(target=memory, args=(stop, most), daemon=True).start()
        records = runner.sweep(plan, board)
        stop.set()
    epoch_s = {r.number: r.metrics["perf/epoch_s"] for r in records}
    first = [board.came[n] - epoch_s[n] - board.decided[n] for n in sorted(board.came)]
    end = statistics.median(board.over[n] - board.came[n] for n in board.came)
    usual = statistics.median(first[1:])
    print(f"to the first step: the first trial {first[0]:.1f} s, then {usual:.1f} s ({min(first[1:]):.1f} to "
          f"{max(first[1:]):.1f}); from the last epoch to the end {end:.1f} s")  # fmt: skip
    shown = ", ".join(f"{name} {value:.0f}" for name, value in sorted(most.items()))
    print(f"memory of one trial: {sum(most.values()):.0f} MiB ({shown})")
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", ALONE, plan.folder], check=True)
        seconds.append(time.monotonic() - start)
    alone = statistics.median(seconds)
    print(f"a process without Ray to its first batch {alone:.1f} s: ours takes {usual / alone:.2f} × it")


if __name__ == "__main__":
    main()
