"""Evaluation at MSMT17 size on random embeddings: time, peak memory, and the obvious alternative.

    python tests/benchmarks/bench_evaluation.py            # 11,659 × 82,161 × 512, about a minute on two cores
    python tests/benchmarks/bench_evaluation.py --scale 4  # a quarter of both sides

The limit is the matrix product (2·Q·G·D operations); the alternative sorts every row in full.
"""

import argparse
import resource
import time

import numpy as np
import torch

from orchestrator.evaluation.retrieval import evaluate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=int, default=1, help="divide both sides by this")
    parser.add_argument("--queries", type=int, default=11_659)
    parser.add_argument("--gallery", type=int, default=82_161)
    args = parser.parse_args()
    queries, gallery = args.queries // args.scale, args.gallery // args.scale
    rng = np.random.default_rng(0)
    query_QD = torch.from_numpy(rng.standard_normal((queries, 512), dtype=np.float32))
    gallery_GD = torch.from_numpy(rng.standard_normal((gallery, 512), dtype=np.float32))
    query_identity, gallery_identity = rng.integers(0, 3060, queries), rng.integers(0, 3060, gallery)
    query_camera, gallery_camera = rng.integers(0, 15, queries), rng.integers(0, 15, gallery)
    print(f"{queries} queries × {gallery} gallery images × 512, 15 cameras, {torch.get_num_threads()} threads")

    start = time.perf_counter()
    metrics = evaluate(query_QD, gallery_GD, query_identity, gallery_identity, query_camera, gallery_camera)
    elapsed = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # before the comparison below adds to it
    print(f"evaluate: {elapsed:.1f} s, peak memory of the process {peak:.2f} GiB, {metrics}")

    rows = slice(0, min(512, queries))  # the two comparisons on a part, scaled up
    parts = queries / len(query_QD[rows])
    start = time.perf_counter()
    similarity = query_QD[rows] @ gallery_GD.T
    product = (time.perf_counter() - start) * parts
    start = time.perf_counter()
    similarity.argsort(dim=1, descending=True, stable=True)
    sort = (time.perf_counter() - start) * parts
    print(f"limit (matrix product alone): {product:.1f} s; evaluate takes {elapsed / product:.2f} × the limit")
    print(
        f"alternative (product and stable sort): {product + sort:.1f} s = {(product + sort) / elapsed:.2f} × evaluate"
    )


if __name__ == "__main__":
    main()
