"""Clustering a whole training set before an epoch (R-SiamNet): time against its matrix product, memory, growth.

    python tests/benchmarks/bench_clustering.py       # 55,272 × 2048 as on CUHK-SYSU, five minutes
    python tests/benchmarks/bench_clustering.py --people 8192

The physical limit is the product of all pairs; ours needs half of it, since a similarity is of both its rows. The
obvious alternative holds the whole matrix: 12 GB here.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from losses.first_neighbours import first_neighbour_labels
from losses.similarity import unit_rows

_BLOCK = 4096
_IN_AN_IMAGE = 5  # people, as in CUHK-SYSU


def people(count: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of ``count`` people, ten of each identity or so, and their images."""
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randn(max(1, count // 10), width, generator=draw)
    identity = torch.randint(len(centre), (count,), generator=draw)
    embedding = centre[identity] + 1.5 * torch.randn(count, width, generator=draw)
    return embedding, torch.arange(count) // _IN_AN_IMAGE


def dense_labels(embedding_ND: torch.Tensor, image_N: torch.Tensor) -> torch.Tensor:
    """The pairwise rule on the whole matrix, by spreading the least number over links until nothing changes."""
    unit = unit_rows(embedding_ND)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    nearest = similarity.argmax(1)
    linked = nearest[:, None] == nearest[None, :]
    rows = torch.arange(len(nearest))
    linked[rows, nearest] = True
    linked |= linked.T.clone()
    linked &= image_N[:, None] != image_N[None, :]
    linked[rows, rows] = True
    label = rows.clone()
    while True:
        spread = torch.where(linked, label[None, :], len(label)).amin(1)
        if torch.equal(spread, label):
            return label.unique(return_inverse=True)[1]
        label = spread


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--people", type=int, default=55_272)
    parser.add_argument("--width", type=int, default=2048)
    args = parser.parse_args()
    some, image = people(min(3000, args.people), args.width, seed=1)
    same = torch.equal(first_neighbour_labels(some, image, block_rows=700), dense_labels(some, image))
    print(f"labels of {len(some):,} people equal those of the dense rule: {same}")
    for count in (args.people // 4, args.people // 2, args.people):
        embedding, image = people(count, args.width)
        before = _peak_gib()
        seconds, label = _timed(lambda own=(embedding, image): first_neighbour_labels(*own))
        unit = unit_rows(embedding)
        product, _ = _timed(lambda rows=unit: rows[:_BLOCK] @ rows.T)
        product *= count / min(_BLOCK, count)
        print(f"{count:,} × {args.width}: {seconds:.1f} s = {seconds / product:.2f} × its matrix product "
              f"({product:.1f} s, {torch.get_num_threads()} threads), {int(label.max()) + 1:,} clusters, "
              f"peak {_peak_gib():.2f} GiB "
              f"({before:.2f} before, embeddings {embedding.nbytes / 2**30:.2f})")  # fmt: skip
    strict, label = _timed(lambda: first_neighbour_labels(embedding, image, "strict"))
    print(f"strict rule: {strict:.1f} s, {int(label.max()) + 1:,} clusters, peak {_peak_gib():.2f} GiB")


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
