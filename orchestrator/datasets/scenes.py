"""Scenes with several people: frames, boxes, identities, and who is searched where.

Identities are whole numbers from 1; :data:`losses.oim.UNLABELLED` marks a person without one. A person search is
trained on all boxes of the training frames, and scored on the frames of the gallery: for every query a list of frames,
and in some of them the box of the person.
"""

# Shape legend: F = frames, N = boxes of all frames, Q = queries.

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from losses.oim import UNLABELLED
from orchestrator.datasets import layout
from orchestrator.datasets.images import ImageSet

Targets = Mapping[int, np.ndarray]  # frame of the gallery -> box (4,) of the person


@dataclass(frozen=True, eq=False)
class SceneSet:
    """Frames with the boxes of their people; boxes lie frame by frame, x1 y1 x2 y2 in pixels of the original image.

    >>> box = np.array([[0, 0, 9, 9], [5, 5, 20, 30], [1, 1, 4, 8]], np.int32)
    >>> frames = ImageSet("x", ("a.jpg", "b.jpg", "c.jpg"), np.full(3, -1), None)
    >>> scenes = SceneSet(frames, box, np.array([1, UNLABELLED, 1]), np.array([2, 0, 1]))
    >>> scenes.identity_N[scenes.rows(0)].tolist(), len(scenes.boxes(1)), scenes.num_identities
    ([1, 5555], 0, 1)
    """

    frames: ImageSet  # its identities say nothing
    box_N4: np.ndarray
    identity_N: np.ndarray
    count_F: np.ndarray  # boxes of every frame

    def __post_init__(self) -> None:
        boxes = len(self.box_N4)
        if self.box_N4.shape != (boxes, 4) or self.identity_N.shape != (boxes,) or self.count_F.sum() != boxes:
            raise ValueError(
                f"{self.frames.name}: {boxes} boxes, {len(self.identity_N)} identities and frames with "
                f"{self.count_F.sum()} boxes; expected as many of each"
            )
        if len(self.count_F) != len(self.frames):
            raise ValueError(f"{self.frames.name}: {len(self.count_F)} counts of boxes for {len(self.frames)} frames")

    def __len__(self) -> int:
        return len(self.frames)

    @cached_property
    def _start_F(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.count_F)])

    def rows(self, frame: int) -> slice:
        """Where the boxes of a frame lie."""
        return slice(int(self._start_F[frame]), int(self._start_F[frame + 1]))

    def boxes(self, frame: int) -> np.ndarray:
        """(n, 4)"""
        return self.box_N4[self.rows(frame)]

    @cached_property
    def identities(self) -> np.ndarray:
        """The identities that occur, in order; a person without one is none."""
        return np.unique(self.identity_N[self.identity_N != UNLABELLED])

    @property
    def num_identities(self) -> int:
        return len(self.identities)


@dataclass(frozen=True)
class Queries:
    """People who are searched: a box of a frame of the gallery each."""

    frame_Q: np.ndarray
    box_Q4: np.ndarray

    def __len__(self) -> int:
        return len(self.frame_Q)


@dataclass(frozen=True)
class Gallery:
    """Where every query is searched, and where its person is."""

    frames: Sequence[np.ndarray]  # of every query, frames of the gallery
    targets: Sequence[Targets]


@dataclass(frozen=True)
class SearchData:
    """A benchmark of person search."""

    train: SceneSet
    gallery: SceneSet
    queries: Queries
    galleries: Mapping[str, Gallery]  # by name, such as "100"; the first is what the benchmark is known by
    notice: str = ""  # what a user of the data should know, printed before every run

    @property
    def protocol(self) -> str:
        """One line for people, printed before every run."""
        sides = [
            f"{name} {len(s):,}/{len(s.box_N4):,}/{s.num_identities:,}"
            for name, s in (("train", self.train), ("gallery", self.gallery))
        ]
        searched = f"{len(self.queries):,} queries, gallery {next(iter(self.galleries))}"
        return f"frames/boxes/identities: {', '.join(sides)}; {searched}"


@dataclass(frozen=True)
class AllBut:
    """Of every query all frames but some, made when they are asked for: thousands of long lists need no memory."""

    frames: int
    left_out: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.left_out)

    def __getitem__(self, query: int) -> np.ndarray:
        kept_F = np.ones(self.frames, bool)
        kept_F[self.left_out[query]] = False
        return np.flatnonzero(kept_F)


def numbered(identity_N: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Identities of a release as 1 … K in the order of ``known``; others have none.

    >>> numbered(np.array([7, 483, 932, UNLABELLED]), np.array([7, 483])).tolist()
    [1, 2, 5555, 5555]
    """
    number = {int(identity): i for i, identity in enumerate(np.sort(known), 1)}
    return np.array([number.get(int(identity), UNLABELLED) for identity in identity_N], np.int64)


def matlab(name: str, path: Path, layout: str) -> dict[str, Any]:
    """The variables of a MATLAB file by name.

    Raises:
        FileNotFoundError: no such file, with the layout.
        ValueError: it is none of MATLAB's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no {path.name} in {path.parent}; --data-root must hold {layout}")
    try:
        return loadmat(path)
    except Exception as error:  # whatever scipy makes of such a file
        raise ValueError(f"{name}: {path} cannot be read: {error}") from error


@contextmanager
def laid_out(name: str, path: Path) -> Iterator[None]:
    """Whatever a file of another layout makes its reader raise becomes a ValueError that names the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        if str(error).startswith(f"{name}: "):
            raise
        raise ValueError(
            f"{name}: {path} is not laid out as the release's ({error}); take the annotation as it was released"
        ) from error


def check_test(name: str, evaluate_on: str) -> None:
    """Raises ValueError for another part than the test one: the releases hold no training identities out."""
    if evaluate_on != "test":
        raise ValueError(f"{name} is scored on its test part, got data.part={evaluate_on}")


def scene_set(
    name: str,
    root: Path,
    keys: Sequence[str],
    boxes: Sequence[np.ndarray],
    identities: Sequence[np.ndarray],
    camera: np.ndarray | None = None,
) -> SceneSet:
    """A set from the boxes and identities of every frame, files below a root.

    Raises:
        FileNotFoundError, ValueError: as :func:`orchestrator.datasets.layout.image_set`.
    """
    frames = layout.image_set(name, root, list(keys), np.full(len(keys), -1), camera)
    count_F = np.array([len(b) for b in boxes], np.int64)
    box_N4 = np.concatenate(boxes) if len(boxes) else np.zeros((0, 4))
    identity_N = np.concatenate(identities) if len(identities) else np.zeros(0)
    return SceneSet(frames, box_N4.astype(np.int32), identity_N.astype(np.int64), count_F)


def frames_of_people(gallery: SceneSet) -> dict[int, dict[int, np.ndarray]]:
    """Identity -> frame -> box; the first one where a frame has a person twice."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for frame in range(len(gallery)):
        rows = gallery.rows(frame)
        for identity, box in zip(gallery.identity_N[rows].tolist(), gallery.box_N4[rows], strict=True):
            if identity != UNLABELLED:
                found.setdefault(identity, {}).setdefault(frame, box)
    return found


def gallery_without(gallery: SceneSet, identity_Q: Sequence[int], left_out: Sequence[np.ndarray]) -> Gallery:
    """Every query is searched in all frames but those that are left out."""
    held, targets = frames_of_people(gallery), []
    for identity, left in zip(identity_Q, left_out, strict=True):
        skipped = set(left.tolist())
        targets.append({frame: box for frame, box in held.get(int(identity), {}).items() if frame not in skipped})
    return Gallery(AllBut(len(gallery), left_out), targets)


def full_gallery(gallery: SceneSet, queries: Queries, identity_Q: Sequence[int]) -> Gallery:
    """Every query is searched in all frames but its own."""
    return gallery_without(gallery, identity_Q, [np.array([frame]) for frame in queries.frame_Q])


def sized_gallery(gallery: SceneSet, whole: Gallery, queries: Queries, size: int) -> Gallery:
    """Every query is searched in ``size`` frames: those that hold its person, and others drawn by its number."""
    frames, targets = [], []
    for query in range(len(queries)):
        own = np.array(sorted(whole.targets[query]), np.int64)[:size]
        others = np.setdiff1d(whole.frames[query], own)
        rng = np.random.default_rng([size, query])
        frames.append(np.sort(np.concatenate([own, rng.permutation(others)[: size - len(own)]])))
        targets.append({frame: whole.targets[query][frame] for frame in own.tolist()})
    return Gallery(frames, targets)


def queries_of(gallery: SceneSet, each: int) -> tuple[Queries, np.ndarray]:
    """The first ``each`` boxes of every identity that is in more than one frame, and their identities."""
    found = [
        (frame, box, identity)
        for identity, frames in sorted(frames_of_people(gallery).items())
        if len(frames) > 1
        for frame, box in list(frames.items())[:each]
    ]
    frame_Q = np.array([frame for frame, _, _ in found], np.int64)
    box_Q4 = np.array([box for _, box, _ in found], np.int32).reshape(-1, 4)
    return Queries(frame_Q, box_Q4), np.array([identity for _, _, identity in found], np.int64)
