"""PRW (Zheng et al., CVPR 2017): persons in the frames of six campus cameras, v16.04.20.

    <data-root>/frames/c1s1_000151.jpg …
    <data-root>/annotations/c1s1_000151.jpg.mat …        rows: identity x y w h; identity -2 = without one
    <data-root>/frame_train.mat, frame_test.mat, query_info.txt
    or the same below <data-root>/PRW-v16.04.20/

A query is searched in all test frames but its own, also in those of its camera; the gallery "other cameras" leaves
these out. Identities of the training frames are numbered 1 … 482 in their order; 932, three boxes in all, is taken for
a person without identity, as it is no training identity of the release. Those of the gallery keep their numbers.
"""

from pathlib import Path

import numpy as np

from losses.oim import UNLABELLED
from orchestrator.datasets import layout
from orchestrator.datasets.scenes import (
    Queries,
    SceneSet,
    SearchData,
    check_test,
    full_gallery,
    gallery_without,
    laid_out,
    matlab,
    numbered,
    scene_set,
)

NO_IDENTITY = 932  # of the training frames
_LAYOUT = "frames/*.jpg, annotations/*.mat, frame_train.mat, frame_test.mat and query_info.txt"
_COUNTS = {"train": (5_704, 18_048, 482), "gallery": (6_112, 25_062, 544), "queries": 2_057}
_FIELDS = ("box_new", "anno_file", "anno_previous")


def load(data_root: str, evaluate_on: str = "test") -> SearchData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts, or a file that is no annotation)."""
    check_test("prw", evaluate_on)
    found = read(layout.inside(layout.data_folder("prw", data_root, _LAYOUT), "PRW-v16.04.20"))
    for side in ("train", "gallery"):
        own: SceneSet = getattr(found, side)
        counts = len(own), len(own.box_N4), own.num_identities
        if counts != _COUNTS[side]:
            raise ValueError(
                f"prw/{side}: frames, boxes, identities are {counts}, expected {_COUNTS[side]}; "
                f"is the data set complete, and the right release?"
            )
    if len(found.queries) != _COUNTS["queries"]:
        raise ValueError(
            f"prw: {len(found.queries)} queries, expected {_COUNTS['queries']:,}; is it the right release?"
        )
    return found


def read(root: Path) -> SearchData:
    """What the annotation says, whatever its counts are.

    Raises:
        FileNotFoundError: a file of the annotation is missing, or an image.
        ValueError: a file without the expected field, or a query without a frame.
    """
    train, gallery = (_set(root, part) for part in ("train", "test"))
    known = np.setdiff1d(train.identities, [NO_IDENTITY])
    train = SceneSet(train.frames, train.box_N4, numbered(train.identity_N, known), train.count_F)
    frame = {Path(key).stem: i for i, key in enumerate(gallery.frames.keys)}
    identities, boxes, frames = [], [], []
    for row in layout.table("prw", root / "query_info.txt", 6, layout=_LAYOUT):
        identity, *box, name = row
        if name not in frame:
            raise ValueError(f"prw: query_info.txt has {name}, which frame_test.mat has not")
        try:
            x, y, width, height = map(float, box)
            identities.append(int(identity))
        except ValueError as error:
            raise ValueError(
                f"prw: query_info.txt: {' '.join(row)!r} must be identity x y width height name"
            ) from error
        if not np.isfinite([x, y, width, height]).all():
            raise ValueError(f"prw: query_info.txt: {' '.join(row)!r} has a box that is no place in a frame")
        boxes.append(np.array([x, y, x + width, y + height]).astype(np.int32).clip(min=0))
        frames.append(frame[name])
    queries = Queries(np.array(frames, np.int64), np.array(boxes, np.int32).reshape(-1, 4))
    camera_F = gallery.frames.camera
    same = [np.flatnonzero(camera_F == camera_F[f]) for f in frames]
    galleries = {
        "all": full_gallery(gallery, queries, identities),
        "other cameras": gallery_without(gallery, identities, same),
    }
    return SearchData(train, gallery, queries, galleries)


def _set(root: Path, part: str) -> SceneSet:
    names = [f"{name}.jpg" for name in _frames(root / f"frame_{part}.mat", f"img_index_{part}")]
    rows = [_rows(root / "annotations" / f"{name}.mat") for name in names]
    camera = layout.parse_names("prw", names, r"c(\d)s\d+_\d+\.")[:, 0]
    found = [np.concatenate([r[:, 1:3], r[:, 1:3] + r[:, 3:5]], 1).astype(np.int32) for r in rows]
    identities = [np.where(r[:, 0] < 0, UNLABELLED, r[:, 0]).astype(np.int64) for r in rows]
    return scene_set(f"prw/{part}", root / "frames", names, found, identities, camera)


def _rows(path: Path) -> np.ndarray:
    """(n, 5) identity x y w h of a frame; what begins outside the image begins at its edge, as wide as it was."""
    stored = matlab("prw", path, _LAYOUT)
    field = next((f for f in _FIELDS if f in stored), None)
    if field is None:
        raise ValueError(f"prw: {path} has none of {', '.join(_FIELDS)}")
    with laid_out("prw", path):
        rows = np.asarray(stored[field], np.float64)
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise ValueError(f"prw: {field} of {path} is {rows.shape}, expected (n, 5): identity x y w h")
    if not np.isfinite(rows).all():
        raise ValueError(f"prw: {field} of {path} has a number that is not finite; take the annotation as released")
    return np.concatenate([rows[:, :1], rows[:, 1:].clip(min=0)], axis=1)


def _frames(path: Path, field: str) -> list[str]:
    stored = matlab("prw", path, _LAYOUT)
    if field not in stored:
        raise ValueError(f"prw: {path} has no field {field!r}")
    return [str(np.asarray(name).ravel()[0]) for name in stored[field].ravel()]
