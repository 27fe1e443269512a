"""Pictures of face verification: curves, how far genuine and impostor pairs lie apart, how near the teacher is."""

# Shape legend: N = images, P = pairs.

from collections.abc import Collection, Mapping

import numpy as np

from orchestrator.datasets.faces import Pairs
from orchestrator.evaluation.verification import flip_summed, roc
from orchestrator.families.face.data import Verified
from orchestrator.families.face.verify import Embedded, Found
from orchestrator.families.retrieval.search import small
from orchestrator.pictures import Lines, Picture, Sheet

_BINS = 60
_HARDEST = 8  # pairs of each kind


def pictures(
    verified: Verified, found: Found, teacher: Mapping[str, Embedded], faces_of: Collection[str]
) -> dict[str, Picture]:
    """Of a trained student, from what its evaluation found; ``faces_of`` are the sets whose faces may be shown."""
    pictured: dict[str, Picture] = {"roc": curves(verified, found)}
    for name, score_P in found.scores.items():
        pictured[f"scores_{name}"] = histograms(name, score_P, verified.sets[name].same_P)
    for name, theirs in teacher.items():
        if theirs.plain_ND.shape == found.embedded[name].plain_ND.shape:
            pictured[f"teacher_{name}"] = cosines(name, found.embedded[name], theirs)
    for name, one in verified.sets.items():
        if name in faces_of and isinstance(one, Pairs):
            pictured[f"hardest_{name}"] = hardest(name, verified, found.scores[name])
    return pictured


def curves(verified: Verified, found: Found) -> Lines:
    """TAR over FAR of every set; the axis is logarithmic, so the points of no false accept are left out."""
    lines = {}
    for name, score_P in found.scores.items():
        curve = roc(score_P, verified.sets[name].same_P, 100)
        kept = curve.far > 0
        lines[name] = tuple(zip(curve.far[kept].tolist(), (100 * curve.tar[kept]).tolist(), strict=True))
    return Lines("True accepts over false accepts", "false accept rate", "true accept rate, %", lines)


def histograms(name: str, score_P: np.ndarray, same_P: np.ndarray) -> Lines:
    """Share of genuine and of impostor pairs by score."""
    edges = np.linspace(min(-0.2, float(score_P.min())), 1, _BINS + 1)
    kinds = {"genuine": score_P[same_P], "impostor": score_P[~same_P]}
    return _shares(f"Pairs of {name} by cosine", "share of pairs, %", kinds, edges)


def cosines(name: str, own: Embedded, theirs: Embedded) -> Lines:
    """Share of images by the cosine between student and teacher."""
    own_ND, theirs_ND = (flip_summed(e.plain_ND, e.flipped_ND) for e in (own, theirs))
    cosine_N = (own_ND * theirs_ND).sum(1)
    edges = np.linspace(min(-0.05, float(cosine_N.min())), 1, _BINS // 2 + 1)
    return _shares(f"Images of {name}: student and teacher", "share of images, %", {"images": cosine_N}, edges)


def _shares(title: str, what: str, kinds: Mapping[str, np.ndarray], edges: np.ndarray) -> Lines:
    centres = (edges[:-1] + edges[1:]) / 2
    lines = {}
    for kind, values in kinds.items():
        share = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
        lines[kind] = tuple(zip(centres.tolist(), share.tolist(), strict=True))
    return Lines(title, "cosine", what, lines)


def hardest(name: str, verified: Verified, score_P: np.ndarray) -> Sheet:
    """Genuine pairs of the least score and impostor pairs of the largest, one face above the other."""
    one = verified.sets[name]
    order = np.argsort(score_P, kind="stable")
    genuine = order[one.same_P[order]][:_HARDEST]
    impostor = order[~one.same_P[order]][::-1][:_HARDEST]
    shown = min(len(genuine), len(impostor))
    rows = []
    for chosen in (genuine[:shown], impostor[:shown]):
        rows += [small(verified.frames[name](side[chosen])) for side in (one.first_P, one.second_P)]
    return Sheet(
        f"Hardest pairs of {name}: one person taken for two, two people taken for one", np.stack(rows),
        tuple(str(n + 1) for n in range(shown)), ("genuine", "genuine", "impostor", "impostor"),
    )  # fmt: skip
