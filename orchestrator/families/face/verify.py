"""One pass over every verification set, and its scores: what every face network is measured with."""

# Shape legend: N = images, D = embedding width, P = pairs.

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.datasets.faces import Pairs, Search, Templates, VerificationSet
from orchestrator.evaluation.influence import people_of
from orchestrator.evaluation.verification import (
    MEAN_ACCURACY,
    area_under_roc,
    averaged,
    equal_error_rate,
    flip_summed,
    mate_ranks,
    measured_fars,
    pair_scores,
    shown,
    tar_at_far,
    template_embeddings,
    ten_fold_accuracy,
    tpir_at_fpir,
    val_at_far,
)
from orchestrator.families.face.data import OWN, Verified
from orchestrator.families.retrieval import search
from orchestrator.families.retrieval.data import Source
from orchestrator.method import Evaluation, PairScores, Queries


@dataclass(frozen=True)
class Embedded:
    """Raw embeddings of a set: of its images, and of their mirror images."""

    plain_ND: np.ndarray
    flipped_ND: np.ndarray


@dataclass(frozen=True)
class Found:
    """What an evaluation found, for pictures: embeddings, and of each set the scores of its pairs."""

    embedded: Mapping[str, Embedded] = field(default_factory=dict)
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)


class _BothSides(nn.Module):
    """Images -> their embedding and that of their mirror image, side by side."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.pixels = network, network.pixels

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return torch.cat([self.network(images_BCHW), self.network(images_BCHW.flip(3))], dim=1)


def embedded(student: nn.Module, source: Source, count: int, device: torch.device, workers: int = 0) -> Embedded:
    """All images of a set, by every rank a share."""
    both = _BothSides(student)
    both.train(student.training)
    sides_N2D = search.embed(both, source, count, device, workers=workers).cpu().numpy()
    return Embedded(*np.split(sides_N2D, 2, axis=1))


def evaluate(
    student: nn.Module, verified: Verified, device: torch.device, workers: int = 0,
    teacher: Mapping[str, Embedded] | None = None,
) -> Evaluation:  # fmt: skip
    """Every set's metrics, and how near the student is to its teacher where the teacher's embeddings are given."""
    found = {
        name: embedded(student, verified.frames[name], len(one.images), device, workers)
        for name, one in verified.sets.items()
    }
    return scored(found, verified.sets, teacher or {})


def scored(
    found: Mapping[str, Embedded], sets: Mapping[str, VerificationSet], teacher: Mapping[str, Embedded] | None = None
) -> Evaluation:
    """Metrics of embeddings.

    Without a set called "val", val/accuracy is the mean over those that
    :func:`orchestrator.evaluation.verification.averaged` names.
    """
    metrics: dict[str, float] = {}
    scores, searched = {}, {}
    for name, one in sets.items():
        of_set, scores[name], probes = (_pairs if isinstance(one, Pairs) else _templates)(one, found[name])
        if probes is not None:
            searched[name] = probes
            of_set |= {metric: float(score_Q.mean()) for metric, score_Q in probes.scores.items()}
        metrics |= {f"{name}/{metric}": value for metric, value in of_set.items()}
    if OWN not in sets:
        pairs = {name: one for name, one in sets.items() if isinstance(one, Pairs)}
        mean = [metrics[f"{name}/accuracy"] for name in averaged({name: one.folds for name, one in pairs.items()})]
        metrics |= {MEAN_ACCURACY: float(np.mean(mean))} if mean else {}
    for name, theirs in (teacher or {}).items():
        metrics |= {f"{name}/{metric}": value for metric, value in agreement(found[name], theirs).items()}
    pairs = {name: _compared(one, scores[name]) for name, one in sets.items()}
    return Evaluation(metrics, Found(found, scores), queries=_together(searched), pairs=pairs)


def _compared(one: VerificationSet, score_P: np.ndarray) -> PairScores:
    """Scores with whose pairs they are: as the set says or, where it does not, genuine pairs join one person."""
    if isinstance(one, Pairs):
        identity_N, rows_P2 = np.asarray(one.images.identity), np.stack([one.first_P, one.second_P], axis=1)
        known = (identity_N >= 0).all()
        people_P2 = identity_N[rows_P2] if known else people_of(rows_P2, one.same_P)
        return PairScores(score_P, one.same_P, people_P2, one.folds)
    rows_P2 = np.unique(np.stack([one.first_P, one.second_P], axis=1), return_inverse=True)[1].reshape(-1, 2)
    return PairScores(score_P, one.same_P, people_of(rows_P2, one.same_P), templates=True)


def by_chance(sets: Mapping[str, VerificationSet]) -> dict[str, float]:
    """The metrics of random embeddings, the same every time."""
    rng = np.random.default_rng(0)
    drawn = {name: Embedded(*rng.standard_normal((2, len(one.images), 128), np.float32)) for name, one in sets.items()}
    return dict(scored(drawn, sets).metrics)


def agreement(own: Embedded, theirs: Embedded) -> dict[str, float]:
    """Mean cosine to the teacher's embeddings, where widths are equal, and correlation of both cosine matrices.

    At most a thousand images: more would change neither.
    """
    own_ND, theirs_ND = (flip_summed(e.plain_ND, e.flipped_ND) for e in (own, theirs))
    rows = np.unique(np.linspace(0, len(own_ND) - 1, 1000).astype(int))
    own_ND, theirs_ND = own_ND[rows], theirs_ND[rows]
    above = np.triu_indices(len(rows), 1)
    own_P, theirs_P = ((e_ND @ e_ND.T)[above] for e_ND in (own_ND, theirs_ND))
    flat = own_P.std() == 0 or theirs_P.std() == 0  # of a collapsed network nothing correlates
    found = {"teacher_gram": 0.0 if flat else float(np.corrcoef(own_P, theirs_P)[0, 1])}
    if own_ND.shape == theirs_ND.shape:
        found["teacher_cosine"] = float((own_ND * theirs_ND).sum(1).mean())
    return found


def _pairs(one: Pairs, found: Embedded) -> tuple[dict[str, float], np.ndarray, Queries | None]:
    """Accuracy with and without mirror images, TAR at every rate that the impostors can measure; identification.

    Without folds the accuracy is that at the threshold of equal error rates, which is chosen on the set itself.
    """
    unit_ND = flip_summed(found.plain_ND, found.flipped_ND)
    score_P = pair_scores(unit_ND, one.first_P, one.second_P)
    eer = equal_error_rate(score_P, one.same_P)
    metrics = {"accuracy": 1 - eer, "eer": eer, "auc": area_under_roc(score_P, one.same_P)}
    metrics |= _tars(score_P, one.same_P, "tar_", "strict")
    if one.folds:
        plain_P = pair_scores(flip_summed(found.plain_ND, None), one.first_P, one.second_P)
        folded = ten_fold_accuracy(score_P, one.same_P, one.folds)
        metrics |= {
            "accuracy": folded.mean, "accuracy_deviation": folded.std,
            "accuracy_plain": ten_fold_accuracy(plain_P, one.same_P, one.folds).mean,
        }  # fmt: skip
        if 1e-3 * (~one.same_P).sum() >= 1:
            metrics["val_1e-3"] = val_at_far(score_P, one.same_P, 1e-3, one.folds).mean
    return metrics, score_P, _first_image_each(unit_ND, np.asarray(one.images.identity))


def _tars(score_P: np.ndarray, same_P: np.ndarray, prefix: str, rule: str) -> dict[str, float]:
    return {
        f"{prefix}{name}": tar_at_far(score_P, same_P, far, rule).tar for name, far in measured_fars(same_P).items()
    }


def _first_image_each(unit_ND: np.ndarray, identity_N: np.ndarray) -> Queries | None:
    """Identification: the first image of everybody is searched in, all others are searched with.

    None where nobody is known to be somebody, or has a second image.
    """
    first = np.unique(identity_N, return_index=True)[1]
    others = np.setdiff1d(np.arange(len(identity_N)), first)
    if (identity_N < 0).any() or not len(others):
        return None
    # In float64: of a network whose embeddings are nearly one, float32 sees ties alone, which count for the mate.
    unit_ND = unit_ND.astype(np.float64)
    rank_Q = mate_ranks(unit_ND[others], unit_ND[first], identity_N[others], identity_N[first])
    return Queries(identity_N[others], {"rank1": (rank_Q == 1).astype(float), "rank5": (rank_Q <= 5).astype(float)})


def _together(searched: Mapping[str, Queries]) -> Queries | None:
    """The probes of all sets one after another: a set's score is NaN for those of others, whose people are others."""
    if not searched:
        return None
    set_Q = np.repeat(np.arange(len(searched)), [len(one.identity_Q) for one in searched.values()])
    of_set_2Q = np.stack([set_Q, np.concatenate([one.identity_Q for one in searched.values()])])
    scores = {}
    for number, (name, one) in enumerate(searched.items()):
        for metric, score_Q in one.scores.items():
            scores[f"{name}/{metric}"] = all_Q = np.full(len(set_Q), np.nan)
            all_Q[set_Q == number] = score_Q
    return Queries(np.unique(of_set_2Q, axis=1, return_inverse=True)[1].reshape(-1), scores)


def _templates(one: Templates, found: Embedded) -> tuple[dict[str, float], np.ndarray, None]:
    """IJB: flip-summed embeddings with their norm, times the detector's score (N1D1F1).

    ``tar_`` is the nearest point of the curve, as the public scripts and so the published numbers have it;
    ``tar_strict_`` never exceeds the rate.
    """
    template_T, unit_TD = template_embeddings(
        found.plain_ND, found.flipped_ND, one.score_N, one.template_N, one.medium_N
    )
    rows: Callable[[np.ndarray], np.ndarray] = lambda ids: np.searchsorted(template_T, ids)  # noqa: E731
    score_P = pair_scores(unit_TD, rows(one.first_P), rows(one.second_P))
    metrics = _tars(score_P, one.same_P, "tar_", "nearest") | _tars(score_P, one.same_P, "tar_strict_", "strict")
    searches = [_search(own, unit_TD, rows) for own in one.searches.values()]
    names = {name for each in searches for name in each}
    return metrics | {name: float(np.mean([each[name] for each in searches])) for name in sorted(names)}, score_P, None


def _search(own: Search, unit_TD: np.ndarray, rows: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """1:N on one gallery; published numbers are means over the galleries."""
    gallery_GD, probe_PD = unit_TD[rows(own.gallery_T)], unit_TD[rows(own.probe_T)]
    asked = probe_PD, gallery_GD, own.probe_subject_T, own.gallery_subject_T
    rank_P = mate_ranks(*asked)
    mated = rank_P > 0
    found = {f"rank{k}": float((rank_P[mated] <= k).mean()) for k in (1, 5)} if mated.any() else {}
    if mated.any() and not mated.all():
        found |= {f"tpir_{shown(fpir)}": tpir_at_fpir(*asked, fpir) for fpir in (1e-1, 1e-2)}
    return found
