"""What each pair adds to a rate of face verification: how far the rate moves when pairs are others.

A rate that is no mean over pairs is one to first order (its influence function: Hampel 1974). With e_p the share of
pair p, a rate is off by about Σ e_p, and the error of a difference is that of sums of differences of e_p. Where a
threshold follows from the data, it moves too: a genuine pair is weighed against impostor pairs by the slope of the
curve there, dTAR / dFAR, read off between half and twice the rate on the logarithm of FAR, along which curves are
smooth.

A pair is of two people, and pairs that share one are not independent:

    Var(Σ e_p) = Σ over pairs p, q that share a person of e_p e_q = Σ_people S_i² - Σ_{two people} D_ij²

with S_i the sum over the pairs of person i and D_ij that over the pairs of i and j, whose products would be counted
twice (dyadic clusters: Aronow, Samii and Assenova 2015).
"""

# Shape legend: P = pairs, I = people.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from orchestrator.evaluation.verification import checked, equal_error_rate, measured_fars, tar_at_far, ten_fold_accuracy
from orchestrator.method import PairScores


@dataclass(frozen=True)
class Rate:
    """A rate with what every pair adds to it."""

    value: float
    influence_P: np.ndarray  # to first order; sums to zero
    share_P: np.ndarray | None = None  # exactly, where the rate is a mean over pairs; sums to the value


def mean_over_sets(rates: Sequence[Rate]) -> Rate:
    """The mean of the rates of several sets of pairs, of which none is in two; pairs in the order of the sets."""
    shares = [one.share_P for one in rates]
    return Rate(
        float(np.mean([one.value for one in rates])),
        np.concatenate([one.influence_P for one in rates]) / len(rates),
        None if any(share_P is None for share_P in shares) else np.concatenate(shares) / len(rates),
    )


def mean_over_seeds(rates: Sequence[Rate]) -> Rate:
    """The mean of one rate of the same pairs over several networks."""
    shares = [one.share_P for one in rates]
    return Rate(
        float(np.mean([one.value for one in rates])),
        np.mean([one.influence_P for one in rates], axis=0),
        None if any(share_P is None for share_P in shares) else np.mean(shares, axis=0),
    )


def rates(pairs: PairScores) -> list[str]:
    """Names of the rates that can be said of a set: "accuracy", "eer", "auc", "tar_1e-3", …, as metrics have them."""
    fars = measured_fars(pairs.same_P)
    if pairs.templates:
        return [f"{prefix}{far}" for prefix in ("tar_", "tar_strict_") for far in fars]
    return ["accuracy", "eer", "auc", *(f"tar_{far}" for far in fars)]


def rate(pairs: PairScores, name: str) -> Rate:
    """A rate by its name, with what every pair adds to it.

    Raises:
        ValueError: the set has no such rate.
    """
    if name not in rates(pairs):
        raise ValueError(f"no rate {name!r}; there are {', '.join(rates(pairs))}")
    score_P, same_P = checked(pairs.score_P, pairs.same_P)
    score_P = score_P.astype(np.float64)
    if name.startswith("tar_"):
        rule = "strict" if name.startswith("tar_strict_") or not pairs.templates else "nearest"
        return _tar(score_P, same_P, float(name.rpartition("_")[2]), rule)
    if name == "auc":
        return _area(score_P, same_P)
    if name == "accuracy" and pairs.folds:
        return _ten_fold(score_P, same_P, pairs.folds)
    errors = _equal_errors(score_P, same_P)
    return errors if name == "eer" else Rate(1 - errors.value, -errors.influence_P)


def variance(influence_P: np.ndarray, people_P2: np.ndarray) -> tuple[float, int]:
    """Variance of the sum over pairs, and the number of people; at least that of independent pairs."""
    _, person_P2 = np.unique(people_P2, return_inverse=True)
    person_P2 = person_P2.reshape(-1, 2)
    of_two_P = person_P2[:, 0] != person_P2[:, 1]
    people = int(person_P2.max()) + 1
    sum_I = np.bincount(person_P2[:, 0], influence_P, people)
    sum_I += np.bincount(person_P2[of_two_P, 1], influence_P[of_two_P], people)
    # Pairs of the same two people are among those of either, and count once.
    lower_P, upper_P = np.sort(person_P2[of_two_P].astype(np.int64), axis=1).T
    _, dyad_P = np.unique(lower_P * people + upper_P, return_inverse=True)
    sum_of_dyads = np.bincount(dyad_P, influence_P[of_two_P])
    single = float((influence_P**2).sum())
    shared = float((sum_I**2).sum() - (sum_of_dyads**2).sum())
    return max(single, shared) * people / max(1, people - 1), people


def people_of(rows_P2: np.ndarray, same_P: np.ndarray) -> np.ndarray:
    """Whose the two sides of pairs are, where nobody says: rows that genuine pairs join are one person's.

    >>> people_of(np.array([[0, 1], [1, 4], [0, 2]]), np.array([True, True, False])).tolist()
    [[0, 0], [0, 0], [0, 1]]
    """
    count, (first, second) = int(rows_P2.max()) + 1, rows_P2[same_P].T
    joined = coo_array((np.ones(len(first), bool), (first, second)), (count, count))
    return connected_components(joined, directed=False)[1][rows_P2]


def _ten_fold(score_P: np.ndarray, same_P: np.ndarray, folds: int) -> Rate:
    """A threshold that makes accuracy largest moves it by nothing to first order: pairs are right or wrong."""
    threshold_F = ten_fold_accuracy(score_P, same_P, folds).threshold_F
    threshold_P = np.repeat(threshold_F, len(score_P) // folds)
    right_P = (np.maximum(2 - 2 * score_P, 0) < threshold_P) == same_P
    return Rate(float(right_P.mean()), (right_P - right_P.mean()) / len(right_P), right_P / len(right_P))


def _tar(score_P: np.ndarray, same_P: np.ndarray, far: float, rule: str) -> Rate:
    value, threshold, reached = tar_at_far(score_P, same_P, far, rule)
    accepted_P = score_P > threshold if rule == "strict" else score_P >= threshold
    influence_P = np.where(same_P, accepted_P - value, 0.0) / same_P.sum()
    slope = _slope(score_P, same_P, max(reached, far))
    return Rate(value, influence_P - slope * np.where(same_P, 0.0, accepted_P - reached) / (~same_P).sum())


def _equal_errors(score_P: np.ndarray, same_P: np.ndarray) -> Rate:
    """Where both errors are equal they move in opposite directions as the threshold does: a weighted mean of both."""
    value = equal_error_rate(score_P, same_P)
    threshold = np.quantile(score_P[~same_P], 1 - min(max(value, 0.0), 1.0), method="inverted_cdf")
    accepted_P, slope = score_P > threshold, _slope(score_P, same_P, max(value, 1 / (~same_P).sum()))
    genuine = np.where(same_P, ~accepted_P, 0.0)
    impostor = np.where(same_P, 0.0, accepted_P)
    centred = [
        (kind - np.where(own, kind[own].mean(), 0.0)) / own.sum()
        for kind, own in ((genuine, same_P), (impostor, ~same_P))
    ]
    return Rate(value, (centred[0] + slope * centred[1]) / (1 + slope))


def _area(score_P: np.ndarray, same_P: np.ndarray) -> Rate:
    """Placements (DeLong et al. 1988): of which share of the other kind a pair is on the right side."""
    placed_P = np.empty(len(score_P))
    for own, sign in ((same_P, 1), (~same_P, -1)):
        others, scores = np.sort(sign * score_P[~own]), sign * score_P[own]
        placed_P[own] = (others.searchsorted(scores) + others.searchsorted(scores, "right")) / (2 * len(others))
    value = float(placed_P[same_P].mean())
    return Rate(value, (placed_P - value) / np.where(same_P, same_P.sum(), (~same_P).sum()))


def _slope(score_P: np.ndarray, same_P: np.ndarray, far: float) -> float:
    """dTAR / dFAR at a false accept rate."""
    impostors, genuine = np.sort(score_P[~same_P]), np.sort(score_P[same_P])
    rates_2 = np.array([far / 2, min(1.0, 2 * far)])
    allowed_2 = np.minimum(np.maximum(1, np.ceil(rates_2 * len(impostors))), len(impostors)).astype(int)
    accepted_2 = 1 - genuine.searchsorted(impostors[len(impostors) - allowed_2], "right") / len(genuine)
    reached_2 = allowed_2 / len(impostors)
    if allowed_2[0] == allowed_2[1]:
        return 0.0
    return float((accepted_2[1] - accepted_2[0]) / math.log(reached_2[1] / reached_2[0]) / far)
