"""Several students on one device: what 1, 2, 4 and 8 small ones train together, each a process as a trial is.

    python tests/benchmarks/bench_students.py [--students 1 2 4 8] [--seconds 10]

On a GPU all share it, as trials with ``--gpus-per-worker 0.25`` do; without one all are pinned to one core, which
shows what sharing itself costs where a student alone fills its device. The limit of a core is what one student trains.
Memory is each process's own: what torch reserves of the GPU, or what it shares with nobody.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from bench_training import DEVICE, GPU, VARIANTS, experiment_of, recipe_of, step, synchronise

from orchestrator.fit import sent_ahead
from orchestrator.needs import Place
from orchestrator.recipe import changed


def student(recipe: Any, place: Place, ready: Barrier, seconds: float, answer: Any) -> None:
    """Trains for so many seconds, once all are ready; sends its images a second."""
    if not GPU:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    made = experiment_of(recipe, place)
    batches = sent_ahead(endless(made), DEVICE)
    for _ in range(3):
        step(made, next(batches))
    synchronise()
    ready.wait()
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step(made, next(batches))
        synchronise()
        images += recipe.batch_size
    answer.send((images / (time.perf_counter() - start), own_memory()))
    ready.wait()  # nobody's memory goes before all have been looked at


def endless(made: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        epoch += 1
        yield from made.batches(epoch)


def own_memory() -> float:
    """MiB of the device where there is one; else of the process alone."""
    if GPU:
        return torch.cuda.max_memory_reserved() / 2**20
    private = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Private")]
    return sum(int(line.split()[1]) for line in private) / 1024


def together(count: int, recipe: Any, place: Place, seconds: float) -> list[tuple[float, float]]:
    """Images a second and memory of each of so many students."""
    processes = multiprocessing.get_context("spawn")
    ready, answers, workers = processes.Barrier(count), [], []
    for _ in range(count):
        ours, theirs = processes.Pipe()
        worker = processes.Process(target=student, args=(recipe, place, ready, seconds, theirs))
        worker.start()
        theirs.close()
        answers.append(ours)
        workers.append(worker)
    found = [answer.recv() for answer in answers]
    for worker in workers:
        worker.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--images", type=int, default=4096 if GPU else 1024)
    given = parser.parse_args()
    print(torch.cuda.get_device_name() if GPU else "one core of a CPU", f"torch {torch.__version__}", sep=", ")
    with tempfile.TemporaryDirectory() as folder:
        recipe, place = recipe_of(Path(folder), given.images, 64, 1)
        recipe = changed(recipe, VARIANTS["the same, tables on the device"])
        experiment_of(recipe, place)  # tables are made once, before anybody is timed
        alone = 0.0
        for count in given.students:
            found = together(count, recipe, place, given.seconds)
            rates = [rate for rate, _ in found]
            alone = alone or sum(rates) / count
            print(
                f"{count} at once: {sum(rates):7.0f} images/s = {sum(rates) / alone:.2f} × one student; each "
                f"{min(rates):.0f} to {max(rates):.0f}; {max(memory for _, memory in found):.0f} MiB each"
            )


if __name__ == "__main__":
    main()
