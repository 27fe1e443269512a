"""Search among detected people at the size of PRW: time, peak memory, the limit, and the double loop.

    python tests/benchmarks/bench_person_search.py            # 2,057 queries × 6,112 frames × 40 boxes × 256
    python tests/benchmarks/bench_person_search.py --scale 4  # a quarter of queries and frames

The limit is the matrix product of queries and detections; the alternative is the loop over queries and frames that
the public code has, on a few queries.
"""

import argparse
import resource
import time

import numpy as np

from orchestrator.datasets.scenes import AllBut
from orchestrator.evaluation.person_search import evaluate_search, iou_threshold, overlaps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=int, default=1, help="divide queries and frames by this")
    parser.add_argument("--boxes", type=int, default=40, help="of a frame")
    args = parser.parse_args()
    queries, frames = 2_057 // args.scale, 6_112 // args.scale
    query_QD, targets, detections, embeddings = invented(queries, frames, args.boxes)
    galleries = AllBut(frames, [np.array([query % frames]) for query in range(queries)])
    print(f"{queries} queries × {frames} frames × {args.boxes} boxes × 256, targets {sum(map(len, targets)):,}")

    start = time.perf_counter()
    found = evaluate_search(query_QD, targets, galleries, detections, embeddings)
    elapsed = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"evaluate_search: {elapsed:.1f} s, peak memory of the process {peak:.2f} GiB, mAP {found.map:.4f}")

    rows_GD = np.concatenate(embeddings)
    start = time.perf_counter()
    for block in range(0, queries, 64):
        query_QD[block : block + 64] @ rows_GD.T
    product = time.perf_counter() - start
    few = range(0, queries, max(1, queries // 8))
    start = time.perf_counter()
    slow = [double_loop(query_QD[q], targets[q], galleries[q], detections, embeddings) for q in few]
    loops = (time.perf_counter() - start) / len(few) * queries
    assert np.allclose(slow, found.average_precision_Q[list(few)], atol=1e-6), "the double loop says otherwise"
    print(f"limit (matrix product alone): {product:.1f} s; evaluate_search takes {elapsed / product:.2f} × the limit")
    print(f"alternative (loop over queries and frames): {loops:.0f} s = {loops / elapsed:.1f} × evaluate_search")


def invented(
    queries: int, frames: int, boxes: int
) -> tuple[np.ndarray, list[dict], list[np.ndarray], list[np.ndarray]]:
    """Random detections; the person of every query is in some ten frames."""
    rng = np.random.default_rng(0)
    query_QD = rng.standard_normal((queries, 256), dtype=np.float32)
    query_QD /= np.linalg.norm(query_QD, axis=1, keepdims=True)
    corner = rng.uniform(0, 1000, (frames, boxes, 2))
    box = np.concatenate([corner, corner + rng.uniform(20, 200, (frames, boxes, 2))], axis=2)
    detections = list(np.concatenate([box, rng.uniform(0.5, 1, (frames, boxes, 1))], axis=2))
    embeddings = [rng.standard_normal((boxes, 256), dtype=np.float32) / 16 for _ in range(frames)]
    targets: list[dict] = []
    for query in range(queries):
        held = [int(f) for f in rng.permutation(frames)[:10] if f != query % frames]
        targets.append({f: box[f, rng.integers(boxes)] + rng.normal(0, 3, 4) for f in held})
        for frame, own in targets[-1].items():
            nearest = overlaps(box[frame], own[None])[:, 0].argmax()
            embeddings[frame][nearest] += 0.2 * query_QD[query]
    return query_QD, targets, detections, embeddings


def double_loop(query_D, held, gallery, detections, embeddings) -> float:
    """One query as the public code does it, frame by frame."""
    labels, scores, found = [], [], 0
    for frame in gallery:
        similarity = embeddings[frame] @ query_D
        label = np.zeros(len(similarity), bool)
        if frame in held:
            for detection in np.argsort(-similarity):
                if overlaps(detections[frame][detection : detection + 1, :4], held[frame][None]) >= iou_threshold(
                    held[frame]
                ):
                    label[detection], found = True, found + 1
                    break
        labels.append(label)
        scores.append(similarity)
    label, score = np.concatenate(labels), np.concatenate(scores)
    ordered = label[np.argsort(-score, kind="stable")]
    precision = ordered.cumsum() / np.arange(1, len(ordered) + 1)
    return float(precision[ordered].mean() * found / len(held)) if found else 0.0


if __name__ == "__main__":
    main()
