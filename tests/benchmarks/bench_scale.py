"""A list of millions of images: indexed in bounded memory, opened by a trial at once, drawn in blocks.

    python tests/benchmarks/bench_scale.py --images 6000000

The images are names and bytes made on the fly; their reader knows a checksum of each, as an archive with an index
does, so nothing is decoded. Limits: 2 GiB of memory for the index, one second to open it, 100 MB a rank for the random
numbers of an epoch. The obvious alternative, one Python list of keys and one array of all draws, is measured beside.
"""

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator import indexing
from orchestrator.datasets.augmentation import Augmentation
from orchestrator.datasets.images import ImageSet
from orchestrator.datasets.sampling import shuffled_batches
from orchestrator.families.retrieval.data import Drawn


@dataclass(frozen=True)
class Names(Sequence[str]):
    """Names of images that are nowhere stored."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        return f"{index // 70:06d}/{index:08d}.jpg"


@dataclass(frozen=True)
class MadeUp:
    """Bytes made from a name."""

    def read(self, key: str) -> bytes:
        return key.encode()

    def checksum(self, key: str) -> bytes:
        return hashlib.sha256(key.encode()).digest()

    def stamp(self, keys: Sequence[str]) -> str:
        return f"made up, {len(keys)}"


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def indexed(root: str, count: int, answer: Any) -> None:
    start = time.perf_counter()
    images = ImageSet("scale/train", Names(count), np.arange(count) // 70, MadeUp())
    table = indexing.index(images, root)
    fingerprint = indexing.checked(images, table).fingerprint
    answer.put((time.perf_counter() - start, peak_mib(), str(table.folder), fingerprint))


def opened(folder: str, answer: Any) -> None:
    before, start = peak_mib(), time.perf_counter()
    images = indexing.open_index(folder, "scale/train", MadeUp(), False)
    names = [images.keys[int(i)] for i in np.linspace(0, len(images) - 1, 512)]
    labels = images.labels[:512]
    seconds = time.perf_counter() - start
    answer.put((seconds, peak_mib() - before, len(images), names[-1], int(labels[-1])))


def drawn(count: int, draw_steps: int, answer: Any) -> None:
    batches = shuffled_batches(count, 512, (0, 1, 3))
    tracemalloc.start()
    start = time.perf_counter()
    draws = Drawn(batches, Augmentation(), 1.0, (0, 1, 4), draw_steps, 0, 8)
    steps = sum(1 for _ in draws)
    answer.put((time.perf_counter() - start, tracemalloc.get_traced_memory()[1] / 1e6, steps))


def apart(function: Any, *arguments: Any) -> Any:
    """A process of its own, whose peak of memory is its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=function, args=(*arguments, answer))
    process.start()
    found = answer.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6_000_000)
    count = parser.parse_args().images
    with tempfile.TemporaryDirectory() as root:
        seconds, peak, folder, fingerprint = apart(indexed, root, count)
        print(f"index    {count:,} images: {seconds:.0f} s, peak {peak:.0f} MiB (limit 2048), {fingerprint[:12]}")
        seconds, more, found, name, label = apart(opened, folder)
        last = f"last {name} of class {label}"
        print(f"open     {seconds:.3f} s (limit 1), {more:.0f} MiB more; {found:,} images, {last}")
        for steps in (64, 0):
            seconds, peak, number = apart(drawn, count, steps)
            how = f"blocks of {steps} steps" if steps else "the whole epoch at once"
            print(f"draws    {how}: {number:,} steps, {seconds:.1f} s, peak {peak:.0f} MB a rank (limit 100)")


if __name__ == "__main__":
    main()
