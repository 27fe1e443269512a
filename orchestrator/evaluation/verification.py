"""How face verification is scored: are two images of one person? And how a person is found among many.

Card "Unified face", section 6. A score is higher for nearer faces; the cosine of unit rows where a rule speaks of
distances. Numpy in, plain numbers and arrays out; 15.7 million pairs, or a gallery of a million faces, are never held
more than a few numbers a pair, or a block of probes, at a time.
"""

# Shape legend: P = pairs (or probes, beside a gallery), F = folds, G = gallery, D = embedding width, K = thresholds,
# B = probes and R = gallery rows of a block.

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from orchestrator.evaluation.identification import ROUNDED, check_rate, exceeded, mate_ranks, tpir_at_fpir
from orchestrator.evaluation.templates import flip_summed, pair_scores, template_embeddings, template_scores

__all__ = [
    "MEAN_ACCURACY", "Roc", "TarAtFar", "TenFold", "ValAtFar", "area_under_roc", "averaged", "equal_error_rate",
    "flip_summed", "mate_ranks", "pair_scores", "roc", "tar_at_far", "template_embeddings", "template_scores",
    "ten_fold_accuracy", "tpir_at_fpir", "val_at_far",
]  # fmt: skip

MEAN_ACCURACY = "val/accuracy"  # how the mean over several sets is called, where none is the data set's own
_AVERAGED = ("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw")  # in the column "Avg" of published tables
_GRID = np.arange(400) / 100  # squared distances, 0 … 3.99
_FINE_GRID = np.arange(4000) / 1000
_FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_LARGEST = 1.01  # cosine, in half precision


def averaged(folds: Mapping[str, int]) -> list[str]:
    """Of which sets of pairs an accuracy is the mean: the five whose average papers print, where they are all there.

    Else the sets with folds, else all.

    >>> averaged({"orl": 0, "lfw": 10})
    ['lfw']
    """
    folded = [name for name, count in folds.items() if count]
    return list(_AVERAGED) if set(_AVERAGED) <= set(folded) else folded or list(folds)


class TenFold(NamedTuple):
    """Fractions in [0, 1]; thresholds are squared distances of unit rows."""

    mean: float
    std: float  # population, over folds
    accuracy_F: np.ndarray
    threshold_F: np.ndarray


class ValAtFar(NamedTuple):
    """Fractions in [0, 1]; thresholds are squared distances of unit rows."""

    mean: float  # share of genuine pairs that are accepted
    std: float  # population, over folds
    far: float  # reached on the folds that the thresholds were not chosen on, mean
    val_F: np.ndarray
    far_F: np.ndarray
    threshold_F: np.ndarray


class TarAtFar(NamedTuple):
    """Fractions in [0, 1], and the score above which ("strict") or from which on ("nearest") a pair is accepted."""

    tar: float
    threshold: float
    far: float  # really reached


class Roc(NamedTuple):
    """Points of the curve from (0, 0) to (1, 1); pairs with score >= threshold are accepted."""

    far: np.ndarray
    tar: np.ndarray
    threshold: np.ndarray  # falling, the first is infinite


def ten_fold_accuracy(score_P: np.ndarray, same_P: np.ndarray, folds: int = 10) -> TenFold:
    """Share of right decisions on each fold, with the threshold that is best on the others.

    Squared distance 2 - 2 · cosine, thresholds 0, 0.01, …, 3.99; accepted when strictly below; the first best one
    counts. Folds are consecutive and not shuffled.

    Args:
        score_P: cosines.
        same_P: whether the pair is of one person.
        folds: into which the pairs are cut.

    Raises:
        ValueError: as all of this file (no pair of one kind, a score that is not finite, columns of two lengths), or
            folds that cannot be of equal size.

    >>> ten_fold_accuracy(np.array([0.9, 0.1, 0.9, 0.2]), np.array([True, False, True, False]), folds=2)[:2]
    (1.0, 0.0)
    """
    genuine_FK, impostor_FK = _accepted(score_P, same_P, folds, _GRID)
    impostors_F = impostor_FK[:, -1:]
    right_FK = genuine_FK[:, :-1] + impostors_F - impostor_FK[:, :-1]
    best_F = (right_FK.sum(0) - right_FK).argmax(1)  # on the other folds; the first best
    accuracy_F = right_FK[np.arange(folds), best_F] / (len(score_P) // folds)
    return TenFold(float(accuracy_F.mean()), float(accuracy_F.std()), accuracy_F, _GRID[best_F])


def val_at_far(score_P: np.ndarray, same_P: np.ndarray, far: float, folds: int = 10) -> ValAtFar:
    """Share of genuine pairs accepted on each fold, with a threshold that keeps the others below a false accept rate.

    As :func:`ten_fold_accuracy` on a grid of 0.001, with the largest threshold whose rate on the other folds is at
    most the target. Released code interpolates the threshold over the rate, which repeated rates leave undefined.

    Args:
        score_P: cosines.
        same_P: whether the pair is of one person.
        far: target.
        folds: into which the pairs are cut.

    Raises:
        ValueError: as all of this file, folds that cannot be of equal size or lack a kind of pairs, a rate outside
            [0, 1], or one that so few impostor pairs cannot measure.

    >>> val_at_far(np.array([0.9, 0.1, 0.8, 0.2]), np.array([True, False, True, False]), far=0.5, folds=2).mean
    1.0
    """
    genuine_FK, impostor_FK = _accepted(score_P, same_P, folds, _FINE_GRID)
    genuine_F, impostors_F = genuine_FK[:, -1], impostor_FK[:, -1]
    check_rate("far", far)
    if far * impostors_F.sum() < 1 - ROUNDED:
        raise ValueError(
            f"a false accept rate of {far:g} cannot be measured on {impostors_F.sum():,} impostor pairs; ask for "
            f"{1 / impostors_F.sum():.2g} or more"
        )
    for kind, count_F in (("genuine", genuine_F), ("impostor", impostors_F)):
        if not count_F.all():
            raise ValueError(
                f"fold {int(count_F.argmin())} has no {kind} pair; order pairs so that every fold has some"
            )
    others_FK, others_F = impostor_FK.sum(0) - impostor_FK, impostors_F.sum() - impostors_F
    # Rates rise with the threshold, and nothing is below 0: the count is the number of the largest that is allowed.
    chosen_F = (others_FK[:, :-1] <= far * others_F[:, None] + ROUNDED).sum(1) - 1
    fold_F = np.arange(folds)
    val_F, far_F = genuine_FK[fold_F, chosen_F] / genuine_F, impostor_FK[fold_F, chosen_F] / impostors_F
    return ValAtFar(float(val_F.mean()), float(val_F.std()), float(far_F.mean()), val_F, far_F, _FINE_GRID[chosen_F])


def tar_at_far(
    score_P: np.ndarray, same_P: np.ndarray, far: float, rule: Literal["strict", "nearest"] = "strict"
) -> TarAtFar:
    """Share of genuine pairs that are accepted at a false accept rate.

    ``strict``: k = floor(far · impostors), the threshold is the (k + 1)-th largest impostor score, a pair is accepted
    when its score is **greater**: the target is never exceeded, whatever ties there are.

    ``nearest``, as public IJB scripts: of the curve over all distinct scores (accepted when score >= threshold, with
    the point (0, 0)) the point whose rate is nearest to the target; of two equally near ones the larger rate, then the
    larger share.

    Args:
        score_P: any scores, higher is nearer.
        same_P: whether the pair is of one person.
        far: target.
        rule: see above.

    Raises:
        ValueError: as all of this file, a rate outside [0, 1], or an unknown rule.

    >>> score, same = np.array([0.9, 0.6, 0.7, 0.5, 0.2, 0.1]), np.array([True, True, False, False, False, False])
    >>> tar_at_far(score, same, far=0.25)
    TarAtFar(tar=1.0, threshold=0.5, far=0.25)
    """
    if rule not in ("strict", "nearest"):
        raise ValueError(f'rule must be "strict" or "nearest", got {rule!r}')
    genuine, impostor = _kinds(score_P, same_P)
    check_rate("far", far)
    threshold = bound = exceeded(impostor, far)  # accepted above it
    if rule == "nearest":
        # The rates of the curve beside the target: that of the strict rule, and the next larger one. Distances are
        # those of floating rates, as the public scripts compare them.
        fewer, more = (impostor > bound).mean(), (impostor >= bound).mean()
        if abs(more - far) <= abs(fewer - far):
            bound = np.max(impostor, where=impostor < bound, initial=-np.inf)
        # The lowest score above the bound: the largest share of all points of this rate.
        threshold = min(np.min(kind, where=kind > bound, initial=np.inf) for kind in (genuine, impostor))
    return TarAtFar(float((genuine > bound).mean()), float(threshold), float((impostor > bound).mean()))


def measured_fars(same_P: np.ndarray) -> dict[str, float]:
    """The usual false accept rates that the impostor pairs can measure, by how metrics write them.

    >>> measured_fars(np.array([True, *100 * [False]]))
    {'1e-1': 0.1, '1e-2': 0.01}
    """
    impostors = int((~same_P).sum())
    return {shown(far): far for far in _FARS if far * impostors >= 1 - ROUNDED}


def shown(rate: float) -> str:
    """A rate as metrics' names have it.

    >>> shown(1e-4)
    '1e-4'
    """
    return f"{rate:.0e}".replace("e-0", "e-")


def equal_error_rate(score_P: np.ndarray, same_P: np.ndarray) -> float:
    """(FPR + FNR) / 2 at the first smallest |FPR - FNR| over all distinct scores and (0, 0); nothing is interpolated.

    Raises:
        ValueError: as all of this file.

    >>> equal_error_rate(np.array([0.9, 0.4, 0.6, 0.1]), np.array([True, True, False, False]))
    0.5
    """
    _, genuine_K, impostor_K = _curve(score_P, same_P)
    genuine, impostors = int(genuine_K[-1]), int(impostor_K[-1])
    # In whole numbers, so that two points that are equally far are seen to be so.
    first = np.abs(impostor_K * genuine - (genuine - genuine_K) * impostors).argmin()
    return float(impostor_K[first] / impostors + (genuine - genuine_K[first]) / genuine) / 2


def area_under_roc(score_P: np.ndarray, same_P: np.ndarray) -> float:
    """Area under the curve over all distinct scores by trapezoids: P(genuine > impostor) + P(equal) / 2.

    Raises:
        ValueError: as all of this file.

    >>> area_under_roc(np.array([0.9, 0.4, 0.6, 0.4]), np.array([True, True, False, False]))
    0.625
    """
    _, genuine_K, impostor_K = _curve(score_P, same_P)
    return float(np.trapezoid(genuine_K / genuine_K[-1], impostor_K / impostor_K[-1]))


def roc(score_P: np.ndarray, same_P: np.ndarray, points: int = 1000) -> Roc:
    """The curve for a picture: at most ``points`` points, evenly over the logarithm of the false accept rate.

    Of all points of one rate, the one of the largest share is kept.

    Raises:
        ValueError: as all of this file, or fewer than four points.

    >>> roc(np.array([0.9, 0.6, 0.7, 0.1]), np.array([True, True, False, False])).tar.tolist()
    [0.0, 0.5, 1.0, 1.0]
    """
    if points < 4:  # both ends, and the shares at no and at one false accept
        raise ValueError(f"a curve needs at least 4 points, got {points}")
    threshold_K, genuine_K, impostor_K = _curve(score_P, same_P)
    impostors = impostor_K[-1]
    wanted = np.concatenate([[0], np.geomspace(1, impostors, points - 2)])
    kept = np.unique(np.append(np.searchsorted(impostor_K, wanted, side="right") - 1, 0))
    return Roc(impostor_K[kept] / impostors, genuine_K[kept] / genuine_K[-1], threshold_K[kept])


def _accepted(score_P: np.ndarray, same_P: np.ndarray, folds: int, grid_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many genuine and impostor pairs of every fold are nearer than each threshold, and all of them: (F, K + 1)."""
    score_P, same_P = checked(score_P, same_P)
    if folds < 2 or len(score_P) % folds:
        raise ValueError(f"{len(score_P):,} pairs cannot be {folds} folds of equal size; need two folds or more")
    if np.abs(score_P).max() > _LARGEST:
        raise ValueError(f"scores must be cosines, got {score_P[np.abs(score_P).argmax()]}; use unit embeddings")
    # Rounding must not make a face nearer to itself than 0, where nothing is accepted.
    distance_P = np.maximum(2 - 2 * score_P.astype(np.float64), 0)
    passed_P = np.searchsorted(grid_K, distance_P, side="right")  # the first threshold above the distance
    cell_P = (np.arange(len(score_P)) // (len(score_P) // folds)) * (len(grid_K) + 1) + passed_P
    genuine_FK, impostor_FK = (
        np.bincount(cell_P[kind], minlength=folds * (len(grid_K) + 1)).reshape(folds, -1).cumsum(1)
        for kind in (same_P, ~same_P)
    )
    return genuine_FK, impostor_FK


def _curve(score_P: np.ndarray, same_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Infinity and all distinct scores, falling, and how many genuine and impostor pairs are at least as near: (K,)."""
    genuine, impostor = _kinds(score_P, same_P)
    threshold_K = np.append(np.unique(np.concatenate([genuine, impostor])), np.inf)
    counts = []
    for kind in (genuine, impostor):
        kind.sort()
        counts.append((len(kind) - np.searchsorted(kind, threshold_K))[::-1])
    return threshold_K[::-1], *counts


def _kinds(score_P: np.ndarray, same_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of genuine and of impostor pairs, copies."""
    score_P, same_P = checked(score_P, same_P)
    return score_P[same_P], score_P[~same_P]


def checked(score_P: np.ndarray, same_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    score_P, given_P = np.asarray(score_P), np.asarray(same_P)
    same_P = given_P.astype(bool)
    if (same_P != given_P).any():
        raise ValueError(f"pairs must be True or False, got {given_P[same_P != given_P][0]}; -1 often means False")
    if score_P.ndim != 1 or score_P.shape != same_P.shape:
        raise ValueError(f"need one score for each pair, got scores {score_P.shape} and pairs {same_P.shape}")
    score_P = score_P.astype(np.result_type(score_P.dtype, np.float32), copy=False)
    finite_P = np.isfinite(score_P)
    if not finite_P.all():
        first = int(finite_P.argmin())
        raise ValueError(
            f"{int((~finite_P).sum()):,} of {len(score_P):,} scores are not finite, first {score_P[first]} of pair "
            f"{first}; give a pair that cannot be compared a low score"
        )
    genuine = int(same_P.sum())
    if not 0 < genuine < len(same_P):
        raise ValueError(f"{genuine:,} genuine and {len(same_P) - genuine:,} impostor pairs; both kinds are needed")
    return score_P, same_P
