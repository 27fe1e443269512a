"""Evaluation at MSMT17 size: time, peak memory, and the obvious alternative.

    python tests/benchmarks/bench_evaluation.py            # 11,659 × 82,161 × 512, about two minutes on two cores
    python tests/benchmarks/bench_evaluation.py --scale 4  # a quarter of both sides

Once on random embeddings and once on such as a trained network makes: images of one person lie around a point of
their own. The limit is the matrix product (2·Q·G·D operations); the alternative sorts every row in full.
"""

import argparse
import resource
import time

import numpy as np
import torch

from orchestrator.evaluation.retrieval import evaluate

PEOPLE, CAMERAS, WIDTH = 3060, 15, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=1, help="divide both sides by this")
    parser.add_argument("--queries", type=int, default=11_659)
    parser.add_argument("--gallery", type=int, default=82_161)
    args = parser.parse_args()
    queries, gallery = args.queries // args.scale, args.gallery // args.scale
    print(
        f"{queries} queries × {gallery} gallery images × {WIDTH}, {CAMERAS} cameras, {torch.get_num_threads()} threads"
    )
    rng = np.random.default_rng(0)
    identity = rng.integers(0, PEOPLE, queries), rng.integers(0, PEOPLE, gallery)
    camera = rng.integers(0, CAMERAS, queries), rng.integers(0, CAMERAS, gallery)
    centre_CD = rng.standard_normal((PEOPLE, WIDTH), dtype=np.float32)
    for kind, spread in (("random", 0.0), ("clustered", 1.0)):
        query_QD, gallery_GD = (
            torch.from_numpy(spread * centre_CD[own] + 1.5 * rng.standard_normal((len(own), WIDTH), dtype=np.float32))
            for own in identity
        )
        compare(kind, query_QD, gallery_GD, identity, camera)


def compare(kind: str, query_QD: torch.Tensor, gallery_GD: torch.Tensor, identity: tuple, camera: tuple) -> None:
    """Ours, the limit and the alternative, of one kind of embeddings."""
    start = time.perf_counter()
    metrics = evaluate(query_QD, gallery_GD, *identity, *camera)
    elapsed = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # before the comparison below adds to it
    print(f"{kind} embeddings: mAP {metrics.map:.4f}")
    print(f"  evaluate {elapsed:.1f} s, peak memory of the process {peak:.2f} GiB")
    start = time.perf_counter()
    for part_BD in query_QD.split(816):
        part_BD @ gallery_GD.T
    product = time.perf_counter() - start
    few_BD = query_QD[:512]  # of the alternative, a part, scaled up
    similarity_BG = few_BD @ gallery_GD.T
    start = time.perf_counter()
    similarity_BG.argsort(dim=1, descending=True, stable=True)
    whole = product + (time.perf_counter() - start) * len(query_QD) / len(few_BD)
    print(f"  limit (matrix product alone) {product:.1f} s: evaluate takes {elapsed / product:.2f} × the limit")
    print(f"  alternative (product and stable sort) {whole:.1f} s = {whole / elapsed:.2f} × evaluate")


if __name__ == "__main__":
    main()
