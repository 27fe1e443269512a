"""How sure a difference is: intervals, tests and power for means over queries, by whole identities and by seeds.

Queries of one person are not independent, so identities are resampled, each with all of its queries (cluster
bootstrap), the same ones for both sides (paired). With S_i the sum of the differences of identity i and n_i how many
queries it has,

    m = Σ S_i / Σ n_i        s² = I/(I - 1) · Σ (S_i - m n_i)² / (Σ n_i)²

and every resample gives t* = (m* - m) / s*, whose quantiles stand in for Student's (bootstrap-t: Efron and Tibshirani
1993, chapter 12.5; clusters: Davison and Hinkley 1997, chapter 3.8). It holds its level where the plain percentiles of
m* are too narrow. Seeds add a second source of error that no resample of queries shows; their mean has Student's t with
the degrees of freedom of their variance, and the two are added as Behrens and Fisher do: s t* + s_seed t. Two seeds
alone have one degree of freedom, whose quantile is 12.7: that is how little two seeds say. What a seed does to single
queries is counted on both sides of that sum, so intervals over three seeds or more are rather too wide than too narrow.

Where few identities differ at all, as in rank-1 accuracy, no resample knows how others would differ. There a test by
signs decides as well: were there no difference, S_i could as well be -S_i, so that five identities that all speak for
one side have a p-value of 2 · 2⁻⁵ whatever they add. The larger p-value counts, and the interval then holds 0.

What could be seen is the sum of two quantiles of that error, as for a normal one, of the side where it is larger. A
variance of few seeds is more often too small than too large; here it is taken to be as much larger as its median is too
small, so that half of such numbers are found in more than 80 of 100, and half in fewer. Where less than half of the
identities differ, a true difference makes more of them differ: the test by signs then says how many more are found.

Rates of pairs, such as those of face verification, are compared by what each pair adds to them
(:mod:`orchestrator.evaluation.influence`), and accuracies that differ in few pairs by signs as well.
"""

# Shape legend: Q = queries, I = identities, S = seeds, R = resamples, K = rows of a table.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from orchestrator.evaluation import influence
from orchestrator.evaluation.influence import Rate

RESAMPLES = 10_000  # at least
_BEYOND = 8  # of them on either side of what a table's correction asks of its smallest p-value
LEVEL = 0.05  # of a test; intervals hold 1 - LEVEL
POWER = 0.8
_RESTLESS = 0.1  # of equal rows so many are taken to vary more than others
_LEAST_SEEDS = 3  # that say enough about their own variance to be asked alone
_FEW = 1000  # identities that differ: beyond them the test by signs adds nothing
_SIGNS = 10_000  # resamples of signs that are in memory at once
_DRAWN = 2**18  # identities drawn at once: their counts stay in a core's cache
_ROUNDING = 1e-12  # of the largest value: what is less apart is equal


@dataclass(frozen=True)
class Seeds:
    """What seeds add to the error of a difference: the variance of its mean over seeds, with its degrees of freedom."""

    variance: float
    freedom: float


@dataclass(frozen=True)
class Difference:
    """A difference of two means, in the unit of the values."""

    value: float
    low: float
    high: float  # the interval [low, high] holds the true difference with probability 1 - LEVEL
    p: float  # of a difference at least so large where there is none
    error: float  # standard error, of queries and seeds together
    detectable: float  # the smallest true difference that would be found with probability POWER; inf = not known
    identities: int
    over_seeds: bool  # else the interval says nothing about other seeds

    @property
    def told_apart(self) -> bool:
        return self.p <= LEVEL


def resamples_of(comparisons: int) -> int:
    """How many resamples a table needs: so many that its correction leaves several of them.

    >>> resamples_of(1), resamples_of(171)
    (10000, 54720)
    """
    return max(RESAMPLES, math.ceil(2 * _BEYOND * comparisons / LEVEL))


def pooled(rows_KS: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Variance of a seed around its row's mean, taken to be the same in all rows, and its degrees of freedom.

    >>> pooled([[1.0, 3.0], [0.0, 2.0], [7.0]])
    (2.0, 2)
    """
    freedom = sum(len(row) - 1 for row in rows_KS)
    squares = sum(_variance(row) * (len(row) - 1) for row in rows_KS)
    return (squares / freedom if freedom else 0.0), freedom


def of_seeds(first_S: Sequence[float], second_S: Sequence[float], rows_KS: Sequence[Sequence[float]]) -> Seeds | None:
    """What seeds add to the error of the difference of two rows.

    With three seeds or more on both sides each side has its own variance (Welch 1947): with one for all rows of a
    table, 95 of 100 intervals hold only where rows are alike, and 63 of a row that seeds move five times as far as
    eleven others. Fewer seeds say too little alone; they are taken to have the variance of all rows, or their own, with
    its degrees of freedom, where an F test says that it is larger. Of two seeds of such a row 86 of 100 intervals then
    hold, instead of 62; whoever asked every row whose own variance happens to be larger would hold 91, and could tell
    equal rows apart half as often. Of a row of one seed nothing shows that it varies more than others.

    Args:
        first_S, second_S: a metric of every seed.
        rows_KS: of all rows of the table, these two among them.

    Returns:
        None where no row has two seeds.

    >>> of_seeds([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [])
    Seeds(variance=0.3333333333333333, freedom=2.0)
    """
    sides, (least, freedom) = (first_S, second_S), pooled(rows_KS)
    alone, of_all, own = own_variances(sides), 0.0, []
    for side in sides:
        variance = _variance(side)
        if alone or _restless(variance, len(side) - 1, least, freedom):
            own.append((variance / len(side), len(side) - 1))
        else:
            of_all += least / len(side)
    whole = of_all + sum(part for part, _ in own)
    if any(part for part, _ in own):  # Welch and Satterthwaite
        parts = [*own, (of_all, freedom)] if of_all else own
        found = whole**2 / sum(part**2 / degrees for part, degrees in parts)
        freedom = found if alone else min(found, freedom)
    return Seeds(whole, freedom) if freedom else None


def _variance(row_S: Sequence[float]) -> float:
    """Of a seed; 0 of a single one, and of equal values, whose mean is rounded."""
    variance = float(np.var(row_S, ddof=1)) if len(row_S) > 1 else 0.0
    return variance if variance > (_ROUNDING * float(np.abs(row_S).max())) ** 2 else 0.0


def _restless(variance: float, degrees: int, of_all: float, all_degrees: int) -> bool:
    """Whether a row varies more than the others together, by an F test."""
    if not 0 < degrees < all_degrees:
        return False
    others = max(of_all * all_degrees - variance * degrees, 0.0) / (all_degrees - degrees)
    least = float(stats.f.isf(_RESTLESS, degrees, all_degrees - degrees))
    return variance > least * others


def own_variances(rows_KS: Sequence[Sequence[Any]]) -> bool:
    """Whether rows have seeds enough to be asked for their own variance."""
    return min(map(len, rows_KS)) >= _LEAST_SEEDS


def difference(
    first_Q: np.ndarray,
    second_Q: np.ndarray,
    identity_Q: np.ndarray,
    seeds: Seeds | None = None,
    resamples: int | None = None,
    draw: int = 0,
    comparisons: int = 1,
) -> Difference:
    """How far the mean of the first is above that of the second, and how sure that is.

    Args:
        first_Q, second_Q: of every query, such as its average precision, the mean over seeds where there are several;
            NaN in both where the query is not counted.
        identity_Q: whose query it is.
        seeds: what seeds add; None = the interval is of these seeds alone.
        resamples: of identities; None = as many as the comparisons need.
        draw: of the resamples; the same gives the same numbers.
        comparisons: how many there are in the table, for whose correction ``detectable`` then allows: that of the first
            step of Holm's, where a difference stands alone.

    Raises:
        ValueError: lengths that differ, a value that is infinite, a query that one side counts and the other does not,
            fewer than two identities.

    >>> found = difference(np.array([1.0, 0.8, 0.9, 0.7]), np.array([0.5, 0.5, 0.6, 0.4]), np.array([3, 3, 8, 9]))
    >>> round(found.value, 3), found.identities, found.over_seeds
    (0.35, 3, False)
    """
    first_Q, second_Q, identity_Q = np.asarray(first_Q, float), np.asarray(second_Q, float), np.asarray(identity_Q)
    if not first_Q.shape == second_Q.shape == identity_Q.shape or first_Q.ndim != 1:
        raise ValueError(
            f"both sides and their identities must have one number per query, got {first_Q.shape}, {second_Q.shape} "
            f"and {identity_Q.shape}"
        )
    if np.isinf(first_Q).any() or np.isinf(second_Q).any():
        raise ValueError("a query has an infinite score; scores are finite, or NaN where a query is not counted")
    counted_Q = ~np.isnan(first_Q)
    if (counted_Q != ~np.isnan(second_Q)).any():
        apart = int((counted_Q != ~np.isnan(second_Q)).sum())
        raise ValueError(f"{apart} queries are counted on one side alone; were both scored by one protocol?")
    sum_I, count_I = _by_identity((first_Q - second_Q)[counted_Q], identity_Q[counted_Q])
    if len(sum_I) < 2:
        raise ValueError(f"the queries are of {len(sum_I)} identities; an interval needs two at least")
    mean, error = _mean_and_error(sum_I, count_I)
    if error <= _ROUNDING * max(np.abs(first_Q[counted_Q]).max(), np.abs(second_Q[counted_Q]).max()):
        error = 0.0
    generator, resamples = np.random.default_rng(draw), resamples or resamples_of(comparisons)
    pivot_R = error * _studentised(sum_I, count_I, mean, resamples, generator) if error else np.zeros(resamples)
    signs = _by_signs(sum_I / count_I.sum(), generator, comparisons)
    return _difference(mean, error, pivot_R, len(sum_I), seeds, generator, signs, comparisons)


def difference_of_rates(
    first: Rate, second: Rate, people_P2: np.ndarray,
    seeds: Seeds | None = None, draw: int = 0, comparisons: int = 1,
) -> Difference:  # fmt: skip
    """How far a rate of pairs is above another one of the same pairs, and how sure that is.

    Pairs are of two people each, so people cannot be drawn with all that is theirs and nothing of others; the error
    is that of :func:`orchestrator.evaluation.influence.variance`, with Student's t of as many people. Where a rate is
    a mean over pairs, as ten-fold accuracy, and few pairs differ, a test by their signs decides as well.

    Args:
        first, second: see :func:`orchestrator.evaluation.influence.rate`; means over seeds where there are several.
        people_P2: whose pair it is.
        seeds, draw, comparisons: as :func:`difference`.

    Raises:
        ValueError: lengths that differ, or pairs of fewer than two people.
    """
    counts = len(first.influence_P), len(second.influence_P), len(people_P2)
    if len(set(counts)) > 1:
        raise ValueError(f"pairs differ in number: {counts[0]}, {counts[1]} and people {counts[2]}")
    variance, people = influence.variance(first.influence_P - second.influence_P, people_P2)
    if people < 2:
        raise ValueError(f"the pairs are of {people} person; an interval needs two at least")
    generator, error = np.random.default_rng(draw), math.sqrt(variance)
    pivot_R, signs = error * generator.standard_t(people - 1, resamples_of(comparisons)), _Signs(0.0, 0.0)
    if first.share_P is not None and second.share_P is not None:
        signs = _by_signs(first.share_P - second.share_P, generator, comparisons)
    return _difference(first.value - second.value, error, pivot_R, people, seeds, generator, signs, comparisons)


class _Signs(NamedTuple):
    """What the test by signs says of a difference."""

    p: float
    detectable: float


def _difference(
    value: float, error: float, pivot_R: np.ndarray, identities: int, seeds: Seeds | None,
    generator: np.random.Generator, signs: _Signs, comparisons: int,
) -> Difference:  # fmt: skip
    """What the distribution of the error and the test by signs say of a difference, with what seeds add to it."""
    whole, usual_R = error, pivot_R
    if seeds is not None:
        spread = math.sqrt(seeds.variance)
        seeds_R = spread * generator.standard_t(seeds.freedom, len(pivot_R))
        # By which the median of an estimated variance is too small.
        usual_R = pivot_R + math.sqrt(seeds.freedom / stats.chi2.median(seeds.freedom)) * seeds_R
        pivot_R = pivot_R + seeds_R
        whole = math.hypot(error, spread)
    low, high = (float(bound) for bound in value - _quantile(pivot_R, [1 - LEVEL / 2, LEVEL / 2]))
    tail = LEVEL / comparisons / 2
    least, below, above, most = (float(x) for x in _quantile(usual_R, [tail, 1 - POWER, POWER, 1 - tail]))
    detectable = max(most - below, above - least, signs.detectable)
    p = max(_p(pivot_R, value), signs.p)
    if signs.p > LEVEL:
        low, high = min(low, 0.0), max(high, 0.0)
    if whole == 0.0:  # all differences are equal: nothing is known of others
        detectable = math.inf
        if value == 0.0:
            low, high = -math.inf, math.inf
    return Difference(value, low, high, p, whole, detectable, identities, seeds is not None)


def _by_signs(part_K: np.ndarray, generator: np.random.Generator, comparisons: int) -> _Signs:
    """Of parts that add up to a difference, each as likely to have the other sign were there none."""
    differ_K = part_K[part_K != 0]
    p = _p_by_signs(differ_K, generator, resamples_of(comparisons))
    if 2.0 ** (1 - len(part_K)) > LEVEL / comparisons:  # what all of them together would have
        return _Signs(p, math.inf)
    if not 0 < len(differ_K) < min(len(part_K) / 2, _FEW):
        return _Signs(p, 0.0)
    # How many more must differ, all to one side, until so many of all that do are on it that a fair coin is not.
    more_N = np.arange(min(len(part_K), _FEW) - len(differ_K) + 1)
    all_N = len(differ_K) + more_N
    needed_N = stats.binom.isf(LEVEL / comparisons / 2, all_N, 0.5) + 1
    power_N = stats.binom.sf(needed_N - 1, all_N, (len(differ_K) / 2 + more_N) / all_N)
    enough = np.flatnonzero(power_N >= POWER)
    more = float(more_N[enough[0]]) if len(enough) else math.inf
    return _Signs(p, more * float(np.abs(differ_K).mean()))


def _p_by_signs(sum_K: np.ndarray, generator: np.random.Generator, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of the sum of those that are not 0, if each could as well have the other sign.

    Of all signs where they are few, else of as many random ones as there are resamples; 0 where they are so many that
    this test and the other one are the same.
    """
    count = len(sum_K)
    if count > _FEW:
        return 0.0
    least = abs(sum_K.sum()) * (1 - 1e-12)  # equal sums differ in the last digit
    if 2**count <= resamples:
        positive = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs((2.0 * positive - 1.0) @ sum_K) >= least).mean())
    found = 0
    for start in range(0, resamples, _SIGNS):
        positive = generator.integers(0, 2, (min(_SIGNS, resamples - start), count), dtype=np.int8)
        found += int((np.abs((2.0 * positive - 1.0) @ sum_K) >= least).sum())
    return (found + 1) / (resamples + 1)


def holm(p_K: Sequence[float], comparisons: int | None = None) -> list[float]:
    """Holm's adjusted p-values: a row is told apart where its own is at most the level (Holm 1979).

    Args:
        p_K: of every test.
        comparisons: how many tests these are some of; None = these are all.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order, comparisons = sorted(range(len(p_K)), key=lambda row: p_K[row]), comparisons or len(p_K)
    adjusted, largest = [0.0] * len(p_K), 0.0
    for rank, row in enumerate(order):
        largest = max(largest, min(1.0, (comparisons - rank) * p_K[row]))
        adjusted[row] = largest
    return adjusted


def _by_identity(value_Q: np.ndarray, identity_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, row_Q = np.unique(identity_Q, return_inverse=True)
    return np.bincount(row_Q, value_Q), np.bincount(row_Q).astype(float)


def _mean_and_error(sum_I: np.ndarray, count_I: np.ndarray) -> tuple[float, float]:
    mean = sum_I.sum() / count_I.sum()
    identities = len(sum_I)
    variance = identities / (identities - 1) * ((sum_I - mean * count_I) ** 2).sum() / count_I.sum() ** 2
    return float(mean), math.sqrt(variance)


def _studentised(
    sum_I: np.ndarray, count_I: np.ndarray, mean: float, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """t* of every resample; infinite where all that was drawn is equal and yet not the mean.

    Everything is a sum over identities of how often each was drawn: one product with five columns.
    """
    identities = len(sum_I)
    centred_I = sum_I - mean * count_I  # sums of squares of these cancel nothing
    columns_I5 = np.stack([centred_I, count_I, centred_I**2, centred_I * count_I, count_I**2], axis=1)
    found_R = np.empty(resamples)
    step = max(1, _DRAWN // identities)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, identities, (rows, identities))  # 64 bits: bincount would copy any other
        drawn += np.arange(rows)[:, None] * identities
        times_RI = np.bincount(drawn.ravel(), minlength=rows * identities).reshape(rows, identities)
        away, count, squares, mixed, counts = (times_RI.astype(float) @ columns_I5).T
        shift = away / count
        variance = np.maximum(squares - 2 * shift * mixed + shift**2 * counts, 0.0) / count**2
        variance *= identities / (identities - 1)
        # Rounding leaves about 1e-16 of the squares where all that was drawn is equal.
        variance[variance <= 1e-14 * (squares + shift**2 * counts) / count**2] = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            t = shift / np.sqrt(variance)
        t[np.isnan(t)] = 0.0
        found_R[start : start + rows] = t
    return found_R


def _quantile(pivot_R: np.ndarray, share: Any) -> Any:
    """Without interpolation: of few identities some resamples are infinitely far away, and so may the bounds be."""
    return np.quantile(pivot_R, share, method="inverted_cdf")


def _p(pivot_R: np.ndarray, mean: float) -> float:
    """Two-sided: at most LEVEL where the interval leaves 0 out."""
    above, below = int((pivot_R >= mean).sum()), int((pivot_R <= mean).sum())
    return min(1.0, 2 * (min(above, below) + 1) / (len(pivot_R) + 1))
