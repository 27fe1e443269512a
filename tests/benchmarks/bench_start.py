"""What a trial costs beside its epochs: seconds from Tune's decision to the first step, and memory of its processes.

    python tests/benchmarks/bench_start.py [--trials 4]

Trials of D3still on ``demo``, one epoch each, one after the other on a local cluster; everything is prepared before.
Every Python of the cluster notes when it starts, imports torch, opens the first table and makes the first backward
pass, which is the first step: an audit hook in a ``sitecustomize`` of this benchmark, nothing of the project. Memory
is what the trial's processes hold of their own, and their share of what they hold together (PSS), at its highest. The
limit is a process that imports what a trial's worker does and makes its experiment and a step, without Ray; it is
also the obvious alternative, one trial by hand.
"""

import argparse
import itertools
import math
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
from orchestrator import find, fit
from orchestrator.launch import shelf
from orchestrator.method import Where
plan = shelf.read(__import__("pathlib").Path(sys.argv[1]))
point = plan.search_space.table()[0]
method, recipe = plan.recipe_of(point)
made = find.method(method).experiment(recipe, plan.prepared_for(point), Where(plan.where, 0, 1, torch.device("cpu")))
torch.set_num_threads(1)
made.task.train()(next(iter(made.batches(1)))).total.backward()
"""

MARKS = """
import os, sys, time

def marked(what, found=set()):
    if what not in found:
        found.add(what)
        with open(os.path.join(os.environ["BENCH_MARKS"], str(os.getpid())), "a") as file:
            print(time.monotonic(), what, file=file)

def noted(event, arguments):
    if event == "import" and arguments[0] == "torch":
        marked("torch")
    elif event == "import" and arguments[0] == "orchestrator.fit":
        from torch import Tensor
        backward = Tensor.backward
        Tensor.backward = lambda *given, **named: (marked("step"), backward(*given, **named))[1]
    elif event == "open" and str(arguments[0]).endswith("manifest.json"):
        marked("data")

if "BENCH_MARKS" in os.environ:
    marked("python")
    sys.addaudithook(noted)
"""

STAGES = {
    "python": "Tune, Train's controller, placement group, checkpoint folder",
    "torch": "the worker's Python and Ray in it",
    "data": "torch, torchvision, timm and the method",
    "step": "tables opened, student made, first batch and forward pass",
}  # what lies before a mark

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
    if given.trials < 2:
        parser.error(f"--trials {given.trials}: the first one also starts Ray's processes; ask for 2 or more")
    with tempfile.TemporaryDirectory(prefix="bench-start-") as storage:
        marks, site = Path(storage, "marks"), Path(storage, "site")
        marks.mkdir()
        site.mkdir()
        (site / "sitecustomize.py").write_text(MARKS)
        os.environ |= {
            "ORCHESTRATOR_STORAGE": storage,
            "BENCH_MARKS": str(marks),
            "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        measured(Path(storage), given.trials, marks)


def first_steps(marks: Path, decided: list[float]) -> list[dict[str, float]]:
    """Seconds of every stage of every trial, in their order, from the worker that made its first step."""
    workers = [
        {mark: float(when) for when, mark in map(str.split, reversed(file.read_text().splitlines()))}
        for file in marks.iterdir()
    ]  # Ray starts Python twice in one process: the first time counts
    found = []
    for start, after in zip(decided, [*decided[1:], math.inf], strict=True):
        (worker,) = [one for one in workers if start < one.get("step", -1.0) < after]
        moments = [start, *(worker[mark] for mark in STAGES)]
        found.append({mark: b - a for mark, (a, b) in zip(STAGES, itertools.pairwise(moments), strict=True)})
    return found


def measured(storage: Path, trials: int, marks: Path) -> None:
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
    assert all(r.status == "completed" for r in records), [r.message for r in records]
    stages = first_steps(marks, [board.decided[n] for n in sorted(board.decided)])
    first, end = [sum(one.values()) for one in stages], [board.over[n] - board.came[n] for n in board.came]
    usual = statistics.median(first[1:])
    print(f"to the first step: the first trial {first[0]:.1f} s, then {usual:.1f} s ({min(first[1:]):.1f} to "
          f"{max(first[1:]):.1f}); from the last epoch to the end {statistics.median(end):.1f} s")  # fmt: skip
    for mark, what in STAGES.items():
        print(f"  {statistics.median(one[mark] for one in stages[1:]):.1f} s  {what}")
    shown = ", ".join(f"{name} {value:.0f}" for name, value in sorted(most.items()))
    print(f"memory of one trial: {sum(most.values()):.0f} MiB ({shown})")
    alone = statistics.median(by_hand(marks, plan.folder) for _ in range(3))
    print(f"a process without Ray to its first step {alone:.1f} s: ours takes {usual / alone:.2f} × it")


def by_hand(marks: Path, folder: str) -> float:
    """Seconds to the first step of a process of its own, with as many threads as a trial has."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", ALONE, folder])
    if process.wait() != 0:
        raise RuntimeError(f"the process without Ray ended with {process.returncode}")
    lines = (marks / str(process.pid)).read_text().splitlines()
    return next(float(when) for when, mark in map(str.split, lines) if mark == "step") - start


if __name__ == "__main__":
    main()
