"""How well pseudo labels agree with identities, counted over pairs of people: a diagnosis, never trained on."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """Of a clustering; pairs of people whose identity is known."""

    count: int
    largest: int  # members of the largest cluster
    alone: float  # share of people who are their own cluster
    pair_precision: float  # of pairs in one cluster, how many are one person; 1 without such a pair
    pair_recall: float  # of pairs of one person, how many are in one cluster; 1 without such a pair


def agreement(label_N: np.ndarray, identity_N: np.ndarray, known_N: np.ndarray) -> Agreement:
    """Compares clusters with identities.

    Args:
        label_N: cluster of every person.
        identity_N: identity of every person.
        known_N: bool, whose identity is known; the others count as members of clusters only.

    Raises:
        ValueError: not as many of each.

    >>> agreement(np.array([0, 0, 0, 1]), np.array([7, 7, 8, 8]), np.ones(4, bool))
    Agreement(count=2, largest=3, alone=0.25, pair_precision=0.3333333333333333, pair_recall=0.5)
    """
    if not len(label_N) == len(identity_N) == len(known_N):
        raise ValueError(f"{len(label_N)} labels, {len(identity_N)} identities, {len(known_N)} marks; expected equal")
    size_K = np.unique(label_N, return_counts=True)[1]
    label_n, identity_n = label_N[known_N], identity_N[known_N]
    both = _pairs(np.unique(np.stack([label_n, identity_n]), axis=1, return_counts=True)[1])
    together, same = (_pairs(np.unique(x, return_counts=True)[1]) for x in (label_n, identity_n))
    return Agreement(
        count=len(size_K),
        largest=int(size_K.max(initial=0)),
        alone=float((size_K == 1).sum() / max(len(label_N), 1)),
        pair_precision=both / together if together else 1.0,
        pair_recall=both / same if same else 1.0,
    )


def _pairs(count_K: np.ndarray) -> int:
    return int((count_K * (count_K - 1) // 2).sum())
