"""The teacher's embeddings of a whole training set, made on a local Ray cluster by 1, 2 and 4 workers at once.

    python tests/benchmarks/bench_embedding.py                  # 100,000 images in 4 shards
    python tests/benchmarks/bench_embedding.py --images 40000   # 2 shards: at most two workers have work

Drawn PNG files of 32 pixels are indexed and decoded once; every number of workers then embeds them into a storage of
its own, by the path of a sweep's preparation: shards side by side, one thread each, joined to one table. A worker is a
logical CPU of the cluster, so there may be more of them than cores. Time begins with a started cluster and holds the
start of the worker processes. The limit is one worker's rate times min(workers, cores). The obvious alternative is a
plain loop of the network over frames in memory, in one process with one thread, and one such process a core; they are
as nice as Ray's workers. Where other work shares the cores, CPU seconds say more than seconds.
"""

import argparse
import contextlib
import hashlib
import io
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from models.embedder import Embedder, EmbedderConfig
from orchestrator import cache, checkpoint, find, on_ray
from orchestrator.launch.plan import Plan
from orchestrator.launch.preparing import Preparation
from orchestrator.launch.runner import InProcess, Runner
from orchestrator.needs import Need, Place
from orchestrator.progress import PreparationBar
from orchestrator.recipe import changed

SIDE, BATCH = 32, 256
WORKERS = (1, 2, 4)
CORES = len(os.sched_getaffinity(0))
SETTINGS = {
    "student.name": "resnet18", "student.width": 0.25, "student.size": f"{SIDE}x{SIDE}", "student.pretrained": "false",
    "student.pixels": "imagenet", "teacher.name": "resnet18", "teacher.width": 0.25, "teacher.size": f"{SIDE}x{SIDE}",
    "teacher.pretrained": "false", "teacher.pixels": "imagenet", "embedding_dim": 128, "views": "clean",
    "loader_workers": 0,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    count = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "data", count)
        recipe = recipe_of(root)
        place = Place(str(root / "prepared"), str(root / "data"))
        need = find.method("d3still").needs(recipe, place)["targets"]
        shards = [part for part in need.after.values() if part.piece]
        pixels = prepare(place, need)
        print(f"{count:,} images of {SIDE} pixels in {len(shards) or 1} shards, {CORES} cores")

        tables, first = [], 0.0
        for workers in WORKERS:
            own = Place(str(root / f"workers-{workers}"), place.data_root)
            shutil.copytree(place.storage, own.storage, copy_function=os.link)
            seconds, cpu, peak, table_ND = embedded(own, need, workers)
            first = first or count / seconds
            tables.append(table_ND)
            rate, rows = rated(count, seconds, cpu, first), hashlib.sha256(table_ND.tobytes()).hexdigest()[:12]
            limit = count / seconds / first / min(workers, CORES)
            print(f"{workers} worker(s)    {rate}, {limit:.2f} of the limit; peak {peak:.0f} MiB each; rows {rows}")
        print(f"tables bit-equal: {all(np.array_equal(tables[0], table) for table in tables)}")
        for processes in sorted({1, CORES}):
            seconds, cpu, plain_ND = plain(root / "teacher.safetensors", pixels, processes)
            gap = np.abs(plain_ND - tables[0]).max()
            print(f"plain loop × {processes}  {rated(count, seconds, cpu, first)}; rows differ by {gap:.0e} at most")


def rated(count: int, seconds: float, cpu: float, first: float) -> str:
    rate = count / seconds
    return f"{seconds:5.1f} s, {cpu:5.1f} CPU s {rate:6,.0f} images/s = {rate / first:.2f} × one worker"


def write_images(root: Path, count: int) -> None:
    """A folder data set: drawn small images of 100 identities, and a gallery of a few."""
    rng = np.random.default_rng(0)
    for i in range(100):
        for part in ("train", "gallery"):
            (root / part / f"{i:04d}").mkdir(parents=True)
    for i in range(count + 200):
        part = "train" if i < count else "gallery"
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        encoded = io.BytesIO()
        image.save(encoded, "PNG", compress_level=1)
        (root / part / f"{i % 100:04d}" / f"{i:06d}.png").write_bytes(encoded.getvalue())


def recipe_of(root: Path):
    """D3still on the folder with a random teacher that is given as a file."""
    torch.manual_seed(0)
    base = changed(find.recipe("d3still", "folder"), SETTINGS)
    own = base.teacher.network
    config = EmbedderConfig(
        backbone=own.name, width=own.width, image_size=own.size, embedding_dim=base.embedding_dim
    )  # fmt: skip
    checkpoint.save_model(root, Embedder(config), {}, "teacher")
    return changed(base, {"teacher.weights": str(root / "teacher.safetensors")})


def preparation(place: Place, runner: Runner) -> Preparation:
    plan = Plan("", "", "", "", {}, asdict(place), "", 1)
    return Preparation(plan, runner, PreparationBar(Console(quiet=True)))


def prepare(place: Place, need: Need) -> Path:
    """Meets everything that comes before the embeddings; the folder of the pixel cache."""
    prepares = preparation(place, InProcess())
    ready = {role: prepares.meet("d3still", part) for role, part in need.after.items() if not part.piece}
    return Path(place.folder(ready["pixels"].path))


def embedded(place: Place, need: Need, workers: int) -> tuple[float, float, float, np.ndarray]:
    """Seconds, CPU seconds of all workers, the largest peak of a worker's memory in MiB, and the table."""
    import ray

    ray.init(
        address="local", num_cpus=workers, num_gpus=0, object_store_memory=256 * 2**20, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    try:
        with on_ray.connected(dashboard=False) as runner:
            assert runner.capacity().calls == workers
            start = time.perf_counter()
            ready = preparation(place, runner).meet("d3still", need)
            seconds = time.perf_counter() - start
            cpu, peaks = zip(*workers_below(), strict=True)
    finally:
        ray.shutdown()
    table = cache.open_rows(place.folder(ready.path))
    return seconds, sum(cpu), max(peaks), table(np.arange(len(table)))


def workers_below() -> list[tuple[float, float]]:
    """CPU seconds and peak of memory in MiB of Ray's workers of this process, by Linux's own account."""
    fields = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name, stat = (folder / "cmdline").read_bytes(), (folder / "stat").read_text().rpartition(")")[2].split()
            fields[int(folder.name)] = (name, int(stat[1]), (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"))
    found = []
    for pid, (name, parent, cpu) in fields.items():
        if name.startswith(b"ray::") and fields[parent][1] == os.getpid():  # a child of the raylet, a child of this
            (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            found.append((cpu, int(peak) / 2**10))
    return found


def plain(weights: Path, pixels: Path, processes: int) -> tuple[float, float, np.ndarray]:
    """Seconds of the slowest process, CPU seconds of all, and all rows; starting the processes is free."""
    shares = [(str(weights), str(pixels), number, processes) for number in range(processes)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(_imported, range(processes)))
        found = list(pool.map(_plain_loop, shares))
    seconds, cpu, rows = zip(*found, strict=True)
    return max(seconds), sum(cpu), np.concatenate(rows)


def _imported(number: int) -> None:
    time.sleep(0.5)  # long enough that every process of the pool takes one


def _plain_loop(share: tuple[str, str, int, int]) -> tuple[float, float, np.ndarray]:
    weights, pixels, number, processes = share
    torch.set_num_threads(1)
    os.nice(15)  # as Ray does to its workers
    frames = cache.open_rows(pixels)
    frames = torch.from_numpy(frames(np.array_split(np.arange(len(frames)), processes)[number]))
    teacher, _ = checkpoint.load_model(weights)
    teacher.eval()
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in teacher.pixels)
    start, used = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        rows = [teacher((block / 255 - mean) / deviation) for block in frames.split(BATCH)]
    return time.perf_counter() - start, time.process_time() - used, torch.cat(rows).numpy()


if __name__ == "__main__":
    main()
