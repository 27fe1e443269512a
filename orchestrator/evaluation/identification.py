"""Who is it? Faces searched for among many: ranks of mates, and the open set. Re-exported by :mod:`.verification`."""

# Shape legend: P = probes, G = gallery, D = embedding width, B = probes of a block, R = gallery rows of a block.

import math
from typing import Literal

import numpy as np

from orchestrator.evaluation.templates import check_matrix, inverse_norms, precision

ROUNDED = 1e-9  # a rate times a count that should be whole
_BLOCK_BYTES = 256 * 2**20  # of similarities alive at once
_GALLERY_ROWS = 16_384  # compared at once, in the processor's cache


def mate_ranks(
    probe_PD: np.ndarray, gallery_GD: np.ndarray, probe_identity_P: np.ndarray, gallery_identity_G: np.ndarray
) -> np.ndarray:
    """Rank of every probe's mate: 1 + gallery rows that are nearer by cosine. 0 for a probe without a mate.

    CMC(k) is the share of ranks <= k among those above 0. Of several mates the nearest counts. Memory does not grow
    with P × G: a block of probes is compared with the gallery, which may be half precision or a memory map.

    Args:
        probe_PD, gallery_GD: raw or unit rows.
        probe_identity_P, gallery_identity_G: whose row each is.

    Returns:
        (P,) int64.

    Raises:
        ValueError: matrices of two widths, an empty gallery, a row that is not finite, or columns of another length.

    >>> gallery = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> mate_ranks(np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]), gallery, [4, 5, 6], [4, 5]).tolist()
    [1, 2, 0]
    """
    return _searched(probe_PD, gallery_GD, probe_identity_P, gallery_identity_G)[0]


def tpir_at_fpir(
    probe_PD: np.ndarray,
    gallery_GD: np.ndarray,
    probe_identity_P: np.ndarray,
    gallery_identity_G: np.ndarray,
    fpir: float,
    rule: Literal["strict", "released"] = "strict",
) -> float:
    """Open set: share of mated probes whose mate comes first, with a score above the threshold.

    The threshold is taken of the probes without a mate, of their n top scores: the (k + 1)-th largest with
    k = floor(fpir · n), or with ``rule="released"`` the one at index max(int(n · fpir) - 1, 0).

    Args:
        probe_PD, gallery_GD: raw or unit rows.
        probe_identity_P, gallery_identity_G: whose row each is.
        fpir: share of probes without a mate for whom somebody is found.
        rule: see above.

    Raises:
        ValueError: as :func:`mate_ranks`, a rate outside [0, 1], an unknown rule, or only one kind of probes.

    >>> gallery, probe = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    >>> tpir_at_fpir(probe, gallery, [4, 4, 6], [4, 5], fpir=0.0)
    0.5
    """
    if rule not in ("strict", "released"):
        raise ValueError(f'rule must be "strict" or "released", got {rule!r}')
    check_rate("fpir", fpir)
    rank_P, mate_P, top_P = _searched(probe_PD, gallery_GD, probe_identity_P, gallery_identity_G)
    mated, others = rank_P > 0, top_P[rank_P == 0]
    if not mated.any() or not len(others):
        raise ValueError(
            f"{int(mated.sum()):,} probes with a mate in the gallery and {len(others):,} without; both kinds are needed"
        )
    threshold = exceeded(others, fpir)
    if rule == "released":
        threshold = np.sort(others)[::-1][max(int(len(others) * fpir) - 1, 0)]
    return float(((rank_P == 1) & (mate_P > threshold))[mated].mean())


def _searched(
    probe_PD: np.ndarray, gallery_GD: np.ndarray, probe_identity_P: np.ndarray, gallery_identity_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every probe: rank and cosine of its mate (0 and -inf without one), and the largest cosine."""
    check_matrix("probes", probe_PD)
    check_matrix("the gallery", gallery_GD)
    probe_identity_P, gallery_identity_G = np.asarray(probe_identity_P), np.asarray(gallery_identity_G)
    for what, rows, identity in (("probes", probe_PD, probe_identity_P), ("gallery", gallery_GD, gallery_identity_G)):
        if identity.shape != (len(rows),):
            raise ValueError(f"{what}: need one identity for each of {len(rows):,} rows, got {identity.shape}")
    if not len(gallery_GD) or probe_PD.shape[1] != gallery_GD.shape[1]:
        raise ValueError(f"need a gallery as wide as the probes, got {probe_PD.shape} and {gallery_GD.shape}")
    dtype = np.result_type(precision(probe_PD), precision(gallery_GD))
    inverse_P, inverse_G = inverse_norms("probes", probe_PD), inverse_norms("the gallery", gallery_GD)
    rank_P = np.zeros(len(probe_PD), np.int64)
    mate_P, top_P = np.full((2, len(probe_PD)), -np.inf, dtype)
    # One product rounds equal rows differently at different places, and short numbers see ties where there are none:
    # what is within rounding of the mate is looked at again.
    tie = 8 * np.finfo(dtype).eps
    step = max(1, min(len(probe_PD), _BLOCK_BYTES // (dtype.itemsize * len(gallery_GD))))
    block_BG = np.empty((step, len(gallery_GD)), dtype)  # once: fresh memory is slow at first touch
    columns = [slice(first, first + _GALLERY_ROWS) for first in range(0, len(gallery_GD), _GALLERY_ROWS)]
    for start in range(0, len(probe_PD), step):
        block = slice(start, start + step)
        probe_BD = np.asarray(probe_PD[block], dtype) * inverse_P[block, None]
        for rows in columns:
            cosine_BR = probe_BD @ np.asarray(gallery_GD[rows], dtype).T * inverse_G[rows]
            block_BG[: len(probe_BD), rows] = cosine_BR
            probe, face = np.nonzero(probe_identity_P[block, None] == gallery_identity_G[rows])
            np.maximum.at(mate_P[block], probe, cosine_BR[probe, face])
            top_P[block] = np.maximum(top_P[block], cosine_BR.max(1))
        is_mated_B = mate_P[block] > -np.inf
        nearer_B = np.zeros(len(probe_BD), np.int64)
        close: list[tuple[np.ndarray, np.ndarray]] = []
        for rows in columns:
            above_BR = block_BG[: len(probe_BD), rows] - np.where(is_mated_B, mate_P[block], np.inf)[:, None]
            nearer_B += (above_BR > tie).sum(1)
            probe, face = np.nonzero(np.abs(above_BR) <= tie)
            close.append((start + probe, rows.start + face))
        pairs = tuple(np.concatenate(side) for side in zip(*close, strict=True))
        nearer_B += _nearer_exactly(probe_PD, gallery_GD, probe_identity_P, gallery_identity_G, *pairs)[block]
        rank_P[block] = np.where(is_mated_B, 1 + nearer_B, 0)
    return rank_P, mate_P, top_P


def _nearer_exactly(
    probe_PD: np.ndarray, gallery_GD: np.ndarray, probe_identity_P: np.ndarray, gallery_identity_G: np.ndarray,
    probe: np.ndarray, face: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """(P,) of the given pairs, that are as near as the mate but for rounding, how many are really nearer.

    In float64 and one pair at a time, where equal rows have equal cosines to the last digits.
    """
    cosine = np.empty(len(probe))
    for first in range(0, len(probe), _GALLERY_ROWS):
        part = slice(first, first + _GALLERY_ROWS)
        own, theirs = probe_PD[probe[part]].astype(np.float64), gallery_GD[face[part]].astype(np.float64)
        lengths = np.sqrt(np.einsum("nd,nd->n", own, own) * np.einsum("nd,nd->n", theirs, theirs))
        cosine[part] = np.einsum("nd,nd->n", own, theirs) / np.where(lengths > 0, lengths, 1)
    is_mate = probe_identity_P[probe] == gallery_identity_G[face]
    mate_P = np.full(len(probe_PD), np.inf)  # no mate among the pairs: none is nearer
    mate_P[probe[is_mate]] = -np.inf
    np.maximum.at(mate_P, probe[is_mate], cosine[is_mate])
    nearer = cosine > mate_P[probe] + 8 * np.finfo(np.float64).eps
    return np.bincount(probe[nearer], minlength=len(probe_PD))


def exceeded(score: np.ndarray, rate: float) -> np.floating:
    """The score that at most the given share of scores is greater than; -inf for all."""
    place = len(score) - 1 - math.floor(rate * len(score) + ROUNDED)
    return np.partition(score, place)[place] if place >= 0 else score.dtype.type(-np.inf)


def check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} must be a share in [0, 1], got {rate}; 1e-4 is one in ten thousand")
