"""How long a paired bootstrap over identities takes, and the obvious alternative.

    python tests/benchmarks/bench_uncertainty.py [--queries 12000] [--resamples 10000]

For as many people as queries, and for fewer with several queries each. The limit is drawing the identities; the
alternative takes the queries of every resample out of the array and averages them.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from orchestrator.evaluation.uncertainty import difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=12_000)
    parser.add_argument("--resamples", type=int, default=10_000)
    given = parser.parse_args()
    print(f"{given.queries:,} queries, {given.resamples:,} resamples")
    for people in (given.queries, given.queries // 4, given.queries // 16):
        compare(given.queries, people, given.resamples)


def compare(queries: int, people: int, resamples: int) -> None:
    """Ours, the limit and the alternative."""
    rng = np.random.default_rng(0)
    identity_Q = np.arange(queries) * people // queries
    first_Q, second_Q = rng.random(queries), rng.random(queries)
    ours = min(taken(lambda: difference(first_Q, second_Q, identity_Q, resamples=resamples)) for _ in range(3))
    block, few = max(1, 2**18 // people), max(1, resamples // 50)  # the alternative in part, scaled up
    limit = min(taken(lambda: drawn(rng, people, block, resamples)) for _ in range(3))
    loop = taken(lambda: plain(first_Q - second_Q, identity_Q, few)) * resamples / few
    print(
        f"{people:6,} people: {ours:.2f} s, {ours / limit:.1f} × drawing them ({limit:.2f} s); "
        f"alternative {loop:.1f} s = {loop / ours:.0f} × ours"
    )


def taken(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def drawn(rng: np.random.Generator, people: int, block: int, resamples: int) -> None:
    for _ in range(-(-resamples // block)):
        rng.integers(0, people, (block, people))


def plain(value_Q: np.ndarray, identity_Q: np.ndarray, resamples: int) -> list[float]:
    """Means of resamples, each with the queries of the people it drew."""
    rng, people = np.random.default_rng(0), int(identity_Q[-1]) + 1
    rows = np.split(np.arange(len(identity_Q)), np.flatnonzero(np.diff(identity_Q)) + 1)
    return [
        value_Q[np.concatenate([rows[i] for i in rng.integers(0, people, people)])].mean() for _ in range(resamples)
    ]


if __name__ == "__main__":
    main()
