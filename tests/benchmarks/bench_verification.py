"""Face verification at the size of IJB-C: time and memory of scores and rates, folds of 6,000 pairs, one among many.

    python tests/benchmarks/bench_verification.py                    # 23,124 templates, 15.7 million pairs, two minutes
    python tests/benchmarks/bench_verification.py --pairs 1000000 --distractors 100000

Scores: the obvious alternative fetches both rows of every pair (64 GB here, so it is timed on a part). Two limits are
measured in the same run: reading these rows once at the bandwidth of memory, and one large product of all rows that
are named with each other, as ours makes products of the rows that a chunk of pairs names. Rates: the limit is reading
the scores once a rate, the alternative sorts them with their labels for every rate.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from orchestrator.evaluation.verification import (
    area_under_roc,
    equal_error_rate,
    mate_ranks,
    roc,
    tar_at_far,
    template_scores,
    ten_fold_accuracy,
)

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--templates", type=int, default=23_124)
    parser.add_argument("--gallery", type=int, default=3_531, help="templates that the others are compared with")
    parser.add_argument("--pairs", type=int, default=15_678_046)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--distractors", type=int, default=1_000_000, help="of the search; 0 leaves it out")
    parser.add_argument("--probes", type=int, default=256, help="of the search; MegaFace has 3,530")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    embedding_TD = unit_rows(rng, args.templates, args.width)
    first_P = rng.integers(0, args.gallery, args.pairs)
    second_P = rng.integers(args.gallery, args.templates, args.pairs)
    same_P = rng.random(args.pairs) < 0.00125
    same_P[:2] = True, False
    verify(embedding_TD, first_P, second_P, same_P)
    print("the same of pairs among all templates, in no order")
    verify(embedding_TD, rng.integers(0, args.templates, args.pairs), second_P, same_P)
    del first_P, second_P, same_P
    folds(rng)
    if args.distractors:
        search(rng, args.probes, args.distractors, args.width)


def verify(embedding_TD: np.ndarray, first_P: np.ndarray, second_P: np.ndarray, same_P: np.ndarray) -> None:
    pairs, width = len(first_P), embedding_TD.shape[1]
    print(f"{pairs:,} pairs of {len(embedding_TD):,} templates × {width}")
    scoring, score_P = timed(lambda: template_scores(embedding_TD, first_P, second_P))
    rating, rates = timed(lambda: [tar_at_far(score_P, same_P, far) for far in FARS])
    print(f"template_scores {scoring:.1f} s, tar_at_far at {len(FARS)} rates {rating:.1f} s, together "
          f"{scoring + rating:.1f} s; peak memory of the process {peak_mib():.0f} MiB")  # fmt: skip

    part = min(pairs, 200_000)
    gathering, scores = timed(lambda: gathered(embedding_TD, first_P[:part], second_P[:part]))
    assert np.allclose(scores, score_P[:part], atol=1e-5), "the gather of both sides says otherwise"
    pieces, _ = timed(
        lambda: [gathered(embedding_TD, first_P[p : p + 4096], second_P[p : p + 4096]) for p in range(0, part, 4096)]
    )
    gathering, pieces = gathering * pairs / part, pieces * pairs / part
    reading = pairs * 2 * width * embedding_TD.itemsize / bandwidth()
    side = embedding_TD[: min(4096, len(embedding_TD))]
    product, _ = timed(lambda: side @ side.T)
    product *= len(np.unique(first_P)) * len(np.unique(second_P)) / len(side) ** 2
    print(f"  alternative (gather of both sides) {gathering:.1f} s = {gathering / scoring:.1f} × ours, in pieces of "
          f"4,096 pairs {pieces:.1f} s = {pieces / scoring:.1f} × ours")  # fmt: skip
    print(f"  limit of a gather (rows read once) {reading:.1f} s: ours {scoring / reading:.2f} × it; "
          f"product of all rows {product:.1f} s: ours {scoring / product:.2f} × it")  # fmt: skip

    def sorted_rate(far: float) -> float:
        order_P = np.argsort(-score_P)
        false_P = np.cumsum(~same_P[order_P])
        return float(same_P[order_P][false_P <= far * false_P[-1]].sum() / same_P.sum())

    sorting, tar = timed(lambda: sorted_rate(FARS[-1]))
    assert abs(tar - rates[-1].tar) < 1e-4, "the sort says otherwise"
    reading = len(FARS) * (score_P.nbytes + same_P.nbytes) / bandwidth()
    print(f"  rates: sorting for each {len(FARS) * sorting:.1f} s = {len(FARS) * sorting / rating:.1f} × ours; limit "
          f"(scores read once a rate) {reading:.2f} s: ours {rating / reading:.0f} × it")  # fmt: skip
    for rule in (equal_error_rate, area_under_roc, roc):
        seconds, _ = timed(lambda rule=rule: rule(score_P, same_P))
        print(f"  {rule.__name__}: {seconds:.1f} s, peak {peak_mib():.0f} MiB")


def gathered(embedding_TD: np.ndarray, first_P: np.ndarray, second_P: np.ndarray) -> np.ndarray:
    return np.einsum("pd,pd->p", embedding_TD[first_P], embedding_TD[second_P])


def folds(rng: np.random.Generator) -> None:
    same_P = np.tile(np.repeat([True, False], 300), 10)
    score_P = np.clip(rng.normal(0.4 * same_P, 0.15), -1, 1)
    seconds, found = timed(lambda: ten_fold_accuracy(score_P, same_P), repeats=20)
    loop, mean = timed(lambda: loop_over_folds(score_P, same_P))
    assert abs(mean - found.mean) < 1e-12, "the loop says otherwise"
    sorting, _ = timed(lambda: np.sort(score_P), repeats=20)
    print(f"ten_fold_accuracy of 6,000 pairs: {1e3 * seconds:.2f} ms; loop over folds and thresholds {1e3 * loop:.0f} "
          f"ms = {loop / seconds:.0f} × ours; limit (sort of the scores) {1e3 * sorting:.2f} ms: ours "
          f"{seconds / sorting:.1f} × it")  # fmt: skip


def loop_over_folds(score_P: np.ndarray, same_P: np.ndarray) -> float:
    """As the public code: for every fold and threshold one look at all pairs of the other folds."""
    distance_P, fold_P, accuracy = 2 - 2 * score_P, np.arange(len(score_P)) // (len(score_P) // 10), []
    for fold in range(10):
        others, own = fold_P != fold, fold_P == fold
        right = [((distance_P[others] < t / 100) == same_P[others]).mean() for t in range(400)]
        accuracy.append(((distance_P[own] < np.argmax(right) / 100) == same_P[own]).mean())
    return float(np.mean(accuracy))


def search(rng: np.random.Generator, probes: int, distractors: int, width: int) -> None:
    gallery_GD, probe_PD = unit_rows(rng, distractors, width), unit_rows(rng, probes, width)
    gallery_GD[:probes] += 0.3 * probe_PD[: min(probes, distractors)]
    seconds, rank_P = timed(lambda: mate_ranks(probe_PD, gallery_GD, np.arange(probes), np.arange(distractors)))
    some_PD = probe_PD[: min(probes, 64)]
    product, cosine_PG = timed(lambda: some_PD @ gallery_GD.T)
    sorting, _ = timed(lambda: np.argsort(-cosine_PG[:2], axis=1))
    product, sorting = product * probes / len(some_PD), sorting * probes / 2
    print(f"mate_ranks of {probes:,} probes in {distractors:,} × {width}: {seconds:.1f} s, peak {peak_mib():.0f} MiB "
          f"(gallery {gallery_GD.nbytes / 2**20:.0f}), rank-1 {(rank_P == 1).mean():.3f}; limit (matrix product) "
          f"{product:.1f} s: ours {seconds / product:.2f} × it; alternative (product and sort of every row) "
          f"{product + sorting:.1f} s = {(product + sorting) / seconds:.1f} × ours")  # fmt: skip


def unit_rows(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    row_ND = rng.standard_normal((rows, width), dtype=np.float32)
    row_ND /= np.sqrt(np.einsum("nd,nd->n", row_ND, row_ND))[:, None]
    return row_ND


def bandwidth() -> float:
    """Bytes a second that one thread sums of a matrix that no cache holds."""
    block = np.ones(2**26, np.float32)
    seconds, _ = timed(block.sum, repeats=3)
    return block.nbytes / seconds


def timed(work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Seconds of the quickest repeat, and what it found."""
    best = np.inf
    for _ in range(repeats):
        started = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - started)
    return best, found


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
