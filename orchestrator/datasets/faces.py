"""Benchmarks of face recognition: faces that are trained on, and sets on which faces are verified.

Faces are aligned: a reader gives images of 112 × 112 pixels in which eyes, nose and mouth lie where they always lie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from orchestrator.datasets.images import ImageSet

_HELD_OUT = 0.1  # of the training identities, for evaluate_on="validation"
_PAIRS = 3000  # of each kind that are drawn of a held-out part, at most


@dataclass(frozen=True, eq=False)
class Pairs:
    """A verification set: images, and which two of them are compared.

    Raises:
        ValueError: numbers of columns differ, a row that is no image, no pair of one kind, or folds of unequal size.
    """

    images: ImageSet  # identity may be -1: unknown
    first_P: np.ndarray = field(repr=False)  # row numbers of images
    second_P: np.ndarray = field(repr=False)
    same_P: np.ndarray = field(repr=False)  # bool: two images of one person
    folds: int = 10  # consecutive blocks of pairs of equal size; 0 = none

    def __post_init__(self) -> None:
        name = self.images.name
        counts = {len(self.first_P), len(self.second_P), len(self.same_P)}
        if len(counts) != 1:
            raise ValueError(f"{name}: columns of pairs differ in number: {sorted(counts)}")
        check_rows(name, len(self.images), self.first_P, self.second_P)
        check_kinds(name, self.same_P)
        if self.folds and len(self.same_P) % self.folds:
            raise ValueError(f"{name}: {len(self.same_P):,} pairs cannot be {self.folds} folds of equal size")

    @property
    def protocol(self) -> str:
        genuine = int(self.same_P.sum())
        rule = f"{self.folds} folds" if self.folds else "no folds"
        return f"{len(self.images):,} images, {genuine:,} genuine and {len(self.same_P) - genuine:,} impostor, {rule}"


@dataclass(frozen=True, eq=False)
class Search:
    """1:N: templates that are searched in, each of another subject, and templates that are searched with."""

    gallery_T: np.ndarray  # template ids
    gallery_subject_T: np.ndarray
    probe_T: np.ndarray
    probe_subject_T: np.ndarray  # not in the gallery: a probe without a mate


@dataclass(frozen=True, eq=False)
class Templates:
    """IJB: templates of several images each, and which two templates are compared.

    Raises:
        ValueError: numbers of columns differ, or a template that has no image.
    """

    images: ImageSet  # identity -1
    template_N: np.ndarray = field(repr=False)  # id of every image's template, not contiguous
    medium_N: np.ndarray = field(repr=False)  # id of its still or video
    score_N: np.ndarray = field(repr=False)  # of the face detector
    first_P: np.ndarray = field(repr=False)  # template ids
    second_P: np.ndarray = field(repr=False)
    same_P: np.ndarray = field(repr=False)
    searches: Mapping[str, Search] = field(default_factory=dict, repr=False)  # gallery "g1", "g2" -> 1:N

    def __post_init__(self) -> None:
        name, known = self.images.name, np.unique(self.template_N)
        counts = {len(self.images), len(self.template_N), len(self.medium_N), len(self.score_N)}
        if len(counts) != 1 or len({len(self.first_P), len(self.second_P), len(self.same_P)}) != 1:
            raise ValueError(f"{name}: columns differ in number: {sorted(counts)} of images, "
                             f"{len(self.first_P)}, {len(self.second_P)}, {len(self.same_P)} of pairs")  # fmt: skip
        asked = [self.first_P, self.second_P]
        asked += [ids for search in self.searches.values() for ids in (search.gallery_T, search.probe_T)]
        for ids in asked:
            lacking = ~np.isin(ids, known)
            if lacking.any():
                raise ValueError(
                    f"{name}: {lacking.sum():,} times a template without any image is asked for, first "
                    f"{ids[int(lacking.argmax())]}"
                )
        check_kinds(name, self.same_P)

    @property
    def protocol(self) -> str:
        genuine = int(self.same_P.sum())
        return (
            f"{len(self.images):,} images, {len(np.unique(self.template_N)):,} templates, {genuine:,} genuine and "
            f"{len(self.same_P) - genuine:,} impostor"
        )


VerificationSet = Pairs | Templates


@dataclass(frozen=True, eq=False)
class FaceData:
    """What is trained on, and what is verified, by the name that metrics have before the "/"."""

    train: ImageSet | None  # None: only verified on
    verification: Mapping[str, VerificationSet]
    notice: str = ""  # what a user of the data should know, printed before every run

    @property
    def protocol(self) -> str:
        """One line for people, printed before every run."""
        parts = [f"{name}: {one.protocol}" for name, one in self.verification.items()]
        if self.train is not None:
            parts.insert(0, f"train {len(self.train):,} images of {self.train.num_identities:,} identities")
        return "; ".join(parts)

    def sets(self) -> dict[str, ImageSet]:
        train = {} if self.train is None else {"train": self.train}
        return train | {name: one.images for name, one in self.verification.items()}


def check_rows(name: str, images: int, *columns: np.ndarray) -> None:
    """Raises ValueError where a pair names no image of the set."""
    for column in columns:
        if len(column) and not 0 <= column.min() <= column.max() < images:
            wrong = int(column.min() if column.min() < 0 else column.max())
            raise ValueError(f"{name}: a pair names image {wrong}, there are 0 to {images - 1}")


def check_kinds(name: str, same_P: np.ndarray) -> None:
    """Raises ValueError unless there are pairs of one person and of two."""
    genuine = int(same_P.sum())
    if not 0 < genuine < len(same_P):
        raise ValueError(
            f"{name}: {genuine:,} genuine and {len(same_P) - genuine:,} impostor pairs; both kinds are needed"
        )


def all_pairs(images: ImageSet) -> Pairs:
    """Every two images of a small set, without folds."""
    first_P, second_P = np.triu_indices(len(images), 1)
    return Pairs(images, first_P, second_P, images.identity[first_P] == images.identity[second_P], folds=0)


def drawn_pairs(images: ImageSet, pairs: int, seed: Sequence[int], folds: int = 10) -> Pairs:
    """Different pairs drawn by lot, in every fold as many genuine as impostor ones, genuine first.

    Args:
        images: of known identity.
        pairs: of each kind; fewer where there are no more.
        seed: of the draw.
        folds: into which they are cut.

    Raises:
        ValueError: too few images for one pair of each kind in every fold.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    order = np.argsort(images.identity, kind="stable")
    sizes = np.unique(images.identity, return_counts=True)[1].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    # Genuine pairs are numbered identity by identity, so that none of them has to be listed.
    of_identity = sizes * (sizes - 1) // 2
    ends = np.cumsum(of_identity)
    all_genuine, count = int(ends[-1]) if len(ends) else 0, len(images)
    all_impostor = count * (count - 1) // 2 - all_genuine
    each = min(pairs, all_genuine, all_impostor) // folds * folds
    if not each:
        raise ValueError(
            f"{images.name}: {all_genuine:,} genuine and {all_impostor:,} impostor pairs are too few for {folds} folds"
        )
    chosen = rng.choice(all_genuine, each, replace=False)
    group = np.searchsorted(ends, chosen, side="right")
    number = chosen - (ends[group] - of_identity[group])
    second = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) // 2).astype(np.int64)
    second -= second * (second - 1) // 2 > number  # where the root was rounded
    second += second * (second + 1) // 2 <= number
    first = number - second * (second - 1) // 2
    genuine = np.stack([order[starts[group] + first], order[starts[group] + second]])
    impostor = np.zeros((2, 0), np.int64)
    while impostor.shape[1] < each:
        found = np.sort(rng.integers(0, count, (2, 2 * each)), axis=0)
        found = found[:, images.identity[found[0]] != images.identity[found[1]]]
        merged = np.concatenate([impostor, found], axis=1)
        kept = np.unique(merged[0] * count + merged[1], return_index=True)[1]
        impostor = merged[:, np.sort(kept)]
    impostor = impostor[:, :each]
    blocks = [part.reshape(2, folds, each // folds) for part in (genuine, impostor)]
    first_P, second_P = np.concatenate(blocks, axis=2).reshape(2, -1)
    same_P = np.tile(np.repeat([True, False], each // folds), folds)
    return Pairs(images, first_P, second_P, same_P, folds)


def held_out(data: FaceData) -> FaceData:
    """``evaluate_on="validation"``: pairs of the last tenth of the training identities, the rest is trained on.

    Raises:
        ValueError: the data are only verified on, or nobody would be left to train on.
    """
    if data.train is None:
        raise ValueError("there are no training faces, so no part of them can be held out; verify on the test part")
    train, name = data.train, data.train.name.rsplit("/", 1)[0]
    identities = np.unique(train.identity)
    if len(identities) < 3:
        raise ValueError(f"{train.name}: {len(identities)} identities are too few to hold two of them out")
    mask = np.isin(train.identity, identities[-max(2, round(_HELD_OUT * len(identities))) :])
    validation = drawn_pairs(train.part(mask, f"{name}/validation"), _PAIRS, (0,))
    return replace(data, train=train.part(~mask, f"{name}/train-part"), verification={"val": validation})
