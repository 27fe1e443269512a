"""Neighbours of a whole training set (CSD and ROP): time and memory of the table that is made once.

    python tests/benchmarks/bench_neighbours.py            # 60,000 × 512, 256 neighbours, two minutes on two cores
    python tests/benchmarks/bench_neighbours.py --images 10000

The physical limit is the matrix product of all pairs; the obvious alternative sorts every row.
"""

import argparse
import resource
import tempfile
import time

import numpy as np
import torch

from orchestrator import cache, tables
from orchestrator.cache import Block


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--neighbours", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    images, count, width = args.images, args.neighbours, args.width
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(images // 5, width)).astype(np.float32)
    with tempfile.TemporaryDirectory() as root:

        def blocks():
            for start in range(0, images, 4096):
                rows = np.arange(start, min(start + 4096, images))
                block: Block = {"value": centres[rows % len(centres)] + rng.normal(size=(len(rows), width), scale=0.7)
                                .astype(np.float32)}  # fmt: skip
                yield block

        embedded = cache.ensure(root, "embeddings", {"images": images}, blocks)
        before = _peak_gib()
        started = time.perf_counter()
        table = tables.neighbours(embedded, count, root)
        seconds = time.perf_counter() - started
        print(f"{images:,} × {width}, {table.manifest['columns']['index']['shape'][0]} neighbours, "
              f"{torch.get_num_threads()} threads: {seconds:.1f} s, peak {_peak_gib():.2f} GiB "
              f"({before:.2f} before), table {table.manifest['bytes'] / 2**20:.0f} MiB")  # fmt: skip
        x = torch.nn.functional.normalize(torch.from_numpy(embedded(np.arange(images))), dim=1)
    some = x[:2048]
    product = _seconds(lambda: some @ x.T) * images / len(some)
    similarity = some @ x.T
    sorting = _seconds(lambda: similarity.argsort(dim=1, descending=True, stable=True)) * images / len(some)
    print(f"matrix product alone {product:.1f} s (ours {seconds / product:.2f} ×)")
    print(f"product and a stable sort of every row {product + sorting:.1f} s "
          f"({(product + sorting) / seconds:.2f} × ours)")  # fmt: skip


def _seconds(work) -> float:
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
