"""What must exist before a trial, as plain values: needs with computed keys, and what meets them.

A need says what a thing is made from; its key is a digest of that, so two recipes share a preparation if and
only if their keys are equal. A :class:`Ready` says where the thing is and what its content is; the ledger
(``<storage>/ready/<key>.json``) holds one for every need that was met.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Report = Callable[[str, int, int], None]  # what, done, total


def silent(what: str, done: int, total: int) -> None:
    """The progress callback of somebody who does not look."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def streamed_digest(*lists: Iterable[Iterable[Any]]) -> str:
    """:func:`digest` of a list of lists that are too long to be held: each is given as blocks of its items.

    >>> streamed_digest([["a"], ["b"]], [[1, 2]]) == digest([["a", "b"], [1, 2]])
    True
    """
    sha = hashlib.sha256(b"[")
    for number, blocks in enumerate(lists):
        sha.update(b",[" if number else b"[")
        first = True
        for block in blocks:
            text = json.dumps(list(block), separators=(",", ":"))[1:-1]
            sha.update((text if first or not text else f",{text}").encode())
            first = first and not text
        sha.update(b"]")
    sha.update(b"]")
    return sha.hexdigest()


@dataclass(frozen=True)
class Place:
    """Where a job reads and writes: absolute paths, plain strings, the same on every node."""

    storage: str  # a folder that all nodes share or, with an object storage, each node's own copy of it
    data_root: str = ""
    remote: str = ""  # URI of the object storage, if it is one

    def folder(self, *parts: str) -> str:
        return str(Path(self.storage, *parts))

    def address(self, *parts: str) -> str:
        """Where all nodes see the same small file: ledgers, plans, leases."""
        return "/".join([self.remote.rstrip("/"), *parts]) if self.remote else self.folder(*parts)


@dataclass(frozen=True)
class Need:
    """One thing that must exist."""

    kind: str  # "index", "pixels", "teacher", "embeddings", …
    made_from: Mapping[str, Any] = field(hash=False)  # JSON values that decide the content
    after: Mapping[str, "Need"] = field(default_factory=dict, hash=False)  # role -> what it is made with
    how: Mapping[str, Any] = field(default_factory=dict, compare=False)  # what its maker must know and decides nothing
    title: str = field(default="", compare=False)  # for people
    trial: tuple[str, str, Mapping[str, Any]] | None = field(default=None, compare=False)
    # A need with a trial is met by a training: its method, benchmark and flat recipe.
    network: bool = field(default=False, compare=False)  # a network runs: a GPU is used where there is one
    piece: bool = field(default=False, compare=False)  # of what needs it; pieces are made side by side

    @cached_property
    def key(self) -> str:
        """Equal for equal things, whoever needs them."""
        after = {role: need.key for role, need in self.after.items()}
        return digest([self.kind, dict(self.made_from), after])[:32]

    def plain(self) -> dict[str, Any]:
        """JSON values, to be sent to another process; the inverse is :meth:`of`."""
        return {
            "kind": self.kind,
            "made_from": dict(self.made_from),
            "after": {role: need.plain() for role, need in self.after.items()},
            "how": dict(self.how),
            "title": self.title,
            "network": self.network,
            "piece": self.piece,
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Need":
        return cls(**{**plain, "after": {role: cls.of(need) for role, need in plain["after"].items()}})


@dataclass(frozen=True)
class Ready:
    """What meets a need."""

    key: str
    kind: str
    path: str  # below the storage folder, so that a storage that was moved is found again
    fingerprint: str  # of the content, compared when a sweep is resumed or a run scored again; "" = never
    # For the record: counts, fingerprints, and under these names what commands and reports show, one line each:
    # "protocol" (how is scored), "rule" (what is unusual about it), "notice" (of the data's owner), "teacher" (its name
    # in published tables), "teacher_metrics" and "chance_metrics" (under the names of the method's metrics).
    told: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)  # role -> fingerprint of what it was made with

    def plain(self) -> dict[str, Any]:
        return asdict(self)


class Prepared(Mapping[str, Ready]):
    """Role ("train", "teacher", "gallery embeddings") -> what is ready for it, and where the storage is now."""

    def __init__(self, place: Place, roles: Mapping[str, Ready]):
        self.place, self._roles = place, dict(roles)

    def __getitem__(self, role: str) -> Ready:
        return self._roles[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def path(self, role: str) -> str:
        """Absolute path of what is ready for a role."""
        return self.place.folder(self._roles[role].path)

    def told(self) -> dict[str, Any]:
        """What everything that is ready tells the record, together."""
        found: dict[str, Any] = {}
        for ready in self._roles.values():
            found |= ready.told
        return found

    def plain(self) -> dict[str, Any]:
        return {role: ready.plain() for role, ready in self._roles.items()}

    @classmethod
    def of(cls, place: Place, plain: Mapping[str, Any]) -> "Prepared":
        return cls(place, {role: Ready(**ready) for role, ready in plain.items()})
