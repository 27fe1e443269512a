"""What a campaign of thousands of trials costs beside the trials: simulated, on many nodes that are one machine.

    python tests/benchmarks/bench_campaign.py [--trials 1000] [--nodes 8] [--gpus 8] [--seconds 120]

Trials sleep, report and write checkpoints; everything else is real: the pool, Tune, the studies (SQLite), MLflow's
store (SQLite), early stopping. A trial is a process on the head, as ours are, that holds a placement group of one
simulated GPU on one of the nodes, which the janitor gives back. Missing are Ray Train's processes in that group, of
which this machine could not hold so many. At the end, a driver that finds everything finished, as --resume does.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

EPOCHS = 6
SWEEPS = 4


def fake(config: dict) -> None:
    """A trial that sleeps, reports, and writes a checkpoint of a MiB after every epoch."""
    import ray.tune
    from ray.experimental.internal_kv import _internal_kv_put

    group = ray.util.placement_group([{"GPU": 1}])
    assert group.wait(60)
    _internal_kv_put(
        f"orchestrator/{ray.tune.get_context().get_trial_id()}", ray.cloudpickle.dumps((group.id.hex(), None))
    )
    job, (low, high) = json.loads(config["job"]), map(float, os.environ["BENCH_SECONDS"].split())
    seconds = random.Random(job["number"]).uniform(low, high)
    folder = Path(job["train_storage"]) / job["name"]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    for epoch in range(1, EPOCHS + 1):
        time.sleep(seconds / EPOCHS)
        (folder / "state.tmp").write_bytes(b"0" * 2**20)
        os.replace(folder / "state.tmp", folder / "state.pt")
        ray.tune.report({"epoch": epoch, "val/map": epoch / EPOCHS})
    (folder / "at_work.json").write_text(json.dumps([began, time.time()]))
    ray.tune.report({"epoch": EPOCHS, "val/map": 1.0, "ended": True})


def plans(storage: Path, trials: int) -> list:
    """Sweeps of a table of rows and seeds; nothing needs to be prepared for trials that sleep."""
    from orchestrator import find, tracking
    from orchestrator.launch import shelf
    from orchestrator.needs import Place
    from search_spaces._space import SearchSpace

    place, each = Place(str(storage)), trials // SWEEPS
    uri, recipe = tracking.tracking_uri(str(storage)), find.recipe("d3still", "demo")
    tracking.client(uri)
    found = []
    for number in range(SWEEPS):
        cells = {f"row {row}": {"beta": 0.01 * (row + 1)} for row in range(each // 5)}
        space = SearchSpace(method="d3still", question="?", cells=cells, seeds=tuple(range(5)))
        plan = shelf.new_plan(
            f"simulated{number}", space, f"simulated {number}", "demo", {"d3still": recipe}, place, uri,
            len(space.table()), 64, 1, 1.0,
        )  # fmt: skip
        plan = dataclasses.replace(plan, prepared={name: {} for name in cells})
        shelf.save(plan)
        found.append(plan)
    return found


class Board:
    """Counts."""

    def __init__(self, watch: "Watch"):
        self.watch = watch

    def started(self, number, point, epochs):
        self.watch.running += 1

    def epoch(self, number, epoch, value): ...

    def happened(self, number, what):
        print(f"trial {number}: {what}", flush=True)

    def ended(self, number, status, value, message=""):
        self.watch.running -= 1
        self.watch.done += 1
        self.watch.look()


class Watch:
    """Memory and CPU time of this process as trials end."""

    def __init__(self):
        self.running = self.done = 0
        self.memory: dict[int, float] = {}
        self.began, self.cpu = time.monotonic(), time.process_time()

    def look(self) -> None:
        if self.done % 50 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory[self.done] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            print(f"  {self.done} done, {time.monotonic() - self.began:.0f} s, {self.running} running, "
                  f"driver {self.memory[self.done]:.0f} MiB, {time.process_time() - self.cpu:.0f} s of CPU",
                  flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--resume", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.resume:
        resumed(Path(given.resume))
        return
    low, high = 0.75 * given.seconds, 1.25 * given.seconds
    os.environ["BENCH_SECONDS"] = f"{low} {high}"
    with tempfile.TemporaryDirectory(prefix="bench-campaign-") as storage:
        simulated(Path(storage), given.trials, given.nodes, given.gpus, (low, high))
        subprocess.run([sys.executable, __file__, "--resume", storage], check=True)


def simulated(storage: Path, trials: int, nodes: int, gpus: int, seconds: tuple[float, float]) -> None:
    from orchestrator import mlflow_store
    from orchestrator.launch.pool import Limit, Pool
    from orchestrator.on_ray import environment, sweep

    for name, value in environment.RAY.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.cluster_utils import Cluster

    calls: Counter = Counter()
    patient = mlflow_store._Patient.__getattr__

    def counted(self, name):
        calls[name] += 1
        return patient(self, name)

    mlflow_store._Patient.__getattr__ = counted
    made = plans(storage, trials)
    machine = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(nodes):
        machine.add_node(num_cpus=0, num_gpus=gpus, object_store_memory=80 * 2**20)
    ray.init(address=machine.address, log_to_driver=False, logging_level="ERROR")
    watch, everything = Watch(), nodes * gpus
    pool = Pool(lambda: Limit(everything, everything))
    for plan in made:
        pool.add(plan, Board(watch))
    pool.close()
    asked = []
    next_of = pool.next

    def timed():
        start = time.perf_counter()
        found = next_of()
        if found is not None:
            asked.append(time.perf_counter() - start)
        return found

    pool.next = timed
    begun, cpu = time.monotonic(), time.process_time()
    sweep.drive(pool, fake)
    wall, cpu = time.monotonic() - begun, time.process_time() - cpu
    total = sum(len(plan.search_space.table()) for plan in made)
    work = sorted(json.loads(file.read_text()) for file in storage.glob("sweeps/*/train/*/at_work.json"))
    print(f"{total} trials of {sum(seconds) / 2:.0f} s on {everything} GPUs of {nodes} nodes: {wall:.0f} s")
    # All processes of all nodes start on this machine: filling the cluster takes it longer than it takes the nodes.
    first, filled, last, end = work[0][0], work[everything - 1][0], work[-1][0], max(end for _, end in work)
    print(f"GPUs at work: {_at_work(work, filled, last, everything):.1f} % of the time between the first trial of the "
          f"last GPU and the start of the last trial; {_at_work(work, first, end, everything):.1f} % with filling "
          f"({filled - first:.0f} s) and emptying ({end - last:.0f} s)")  # fmt: skip
    usual = sorted(1000 * seconds for seconds in asked)
    print(f"scheduler: {cpu / total:.3f} s of the driver's CPU a trial")
    print(f"the next trial is found in {usual[len(usual) // 2]:.0f} ms, at most {usual[-1]:.0f}")
    first, last = watch.memory.get(100, math.nan), watch.memory[max(watch.memory)]
    grown = 100 * (last / first - 1)
    print(f"driver memory: {first:.0f} MiB after 100 trials, {last:.0f} after {max(watch.memory)} ({grown:+.1f} %)")
    requests = sum(calls.values())
    print(f"MLflow: {requests / total:.1f} requests of the driver a trial, {requests / wall:.1f} a second")
    ray.shutdown()
    machine.shutdown()


def _at_work(work: list[list[float]], start: float, end: float, gpus: int) -> float:
    """Percent of the time of all GPUs between two moments."""
    busy = sum(max(0.0, min(end, ended) - max(start, began)) for began, ended in work)
    return 100 * busy / (gpus * (end - start))


def resumed(storage: Path) -> None:
    """What --resume does where everything has ended."""
    begun = time.monotonic()
    from orchestrator.launch import shelf, study
    from orchestrator.launch.pool import Limit, Pool

    found = [shelf.read(folder) for folder in sorted((storage / "sweeps").iterdir())]
    imported = time.monotonic()
    pool = Pool(lambda: Limit(64))
    for plan in found:
        pool.add(plan, Board(Watch()))
    pool.close()
    assert pool.is_over and pool.next() is None
    known = time.monotonic()
    rows = [row for plan in found for row in study.records(plan)]
    assert all(row.status == "completed" for row in rows)
    print(f"resume of {len(rows)} finished trials: {known - begun:.1f} s until nothing is left to do "
          f"({imported - begun:.1f} s of imports), {time.monotonic() - known:.1f} s for the table")  # fmt: skip


if __name__ == "__main__":
    main()
