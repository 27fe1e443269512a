"""Training frames of several data sets as one: what is searched is the first one's.

A key is the name of its data set and its key there, so that data sets may have file names in common.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from losses.oim import UNLABELLED
from orchestrator.datasets.images import ImageSet, Reader
from orchestrator.datasets.scenes import SceneSet, SearchData
from orchestrator.needs import digest


@dataclass(frozen=True)
class Either:
    """Reads ``name/key`` by its own reader, and every other key by the next."""

    name: str
    own: Reader
    other: Reader | None = None

    def read(self, key: str) -> bytes:
        name, _, inside = key.partition("/")
        if name == self.name:
            return self.own.read(inside)
        if self.other is None:
            raise FileNotFoundError(f"no data set of the union has the key {key!r}")
        return self.other.read(key)

    def stamp(self, keys: Sequence[str]) -> str:
        own = [key.partition("/")[2] for key in keys if key.startswith(f"{self.name}/")]
        rest = [key for key in keys if not key.startswith(f"{self.name}/")]
        return digest([self.name, self.own.stamp(own), self.other.stamp(rest) if self.other else ""])


def union(found: dict[str, SearchData]) -> SearchData:
    """The first one's gallery and queries, and the training frames of all in their order.

    Raises:
        ValueError: the first has nobody to search.
    """
    first = next(iter(found.values()))
    if not len(first.queries):
        raise ValueError(f"{next(iter(found))} has nobody to search; name it behind a benchmark, such as prw+…")
    if len(found) == 1:
        return first
    notice = " ".join(data.notice for data in found.values() if data.notice)
    return replace(first, train=_joined({name: data.train for name, data in found.items()}), notice=notice)


def _joined(parts: dict[str, SceneSet]) -> SceneSet:
    reader: Reader | None = None
    for name, scenes in reversed(parts.items()):
        reader = Either(name, scenes.frames.reader, reader)
    keys = tuple(f"{name}/{key}" for name, scenes in parts.items() for key in scenes.frames.keys)
    camera_F = np.concatenate([scenes.frames.cameras for scenes in parts.values()])
    frames = ImageSet(f"{'+'.join(parts)}/train", keys, np.full(len(keys), -1), reader, camera_F)
    return SceneSet(
        frames,
        np.concatenate([scenes.box_N4 for scenes in parts.values()]),
        renumbered([scenes.identity_N for scenes in parts.values()]),
        np.concatenate([scenes.count_F for scenes in parts.values()]),
    )


def renumbered(identities: Sequence[np.ndarray]) -> np.ndarray:
    """Identities of all parts from 1, part by part; no two parts share one, and none becomes UNLABELLED.

    >>> renumbered([np.array([7, 9, UNLABELLED]), np.array([7])]).tolist()
    [1, 2, 5555, 3]
    """
    found, known = [], 0
    for identity_N in identities:
        labelled_N = identity_N != UNLABELLED
        number_N = np.full(len(identity_N), UNLABELLED, np.int64)
        number_N[labelled_N] = 1 + known + np.unique(identity_N[labelled_N], return_inverse=True)[1]
        known += len(np.unique(identity_N[labelled_N]))
        number_N[labelled_N] += number_N[labelled_N] >= UNLABELLED
        found.append(number_N)
    return np.concatenate(found)
