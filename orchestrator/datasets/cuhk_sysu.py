"""CUHK-SYSU (Xiao et al., CVPR 2017): street scenes and film frames for person search.

    <data-root>/Image/SSM/s1.jpg … s18184.jpg
    <data-root>/annotation/Images.mat, pool.mat
    <data-root>/annotation/test/train_test/Train.mat, TestG50.mat … TestG4000.mat
    or the same below <data-root>/CUHK-SYSU/

Frames of ``pool`` are the gallery, the others are trained on. An identity is the position in ``Train``, from 1; in the
gallery the position in ``TestG50``. A query is searched in the frames that its TestG file lists, 100 by default.
Departs from the public code where a query lists a frame twice (four of 2,900 in TestG100): it is searched once.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from losses.oim import UNLABELLED
from orchestrator.datasets import layout
from orchestrator.datasets.scenes import Gallery, Queries, SceneSet, SearchData, check_test, laid_out, matlab, scene_set

SIZES = ("100", "50", "500", "1000", "2000", "4000")  # of the galleries; the first is the usual one
_LAYOUT = "Image/SSM/*.jpg and annotation/*.mat"
_COUNTS = {"train": (11_206, 55_272, 5_532), "gallery": (6_978, 40_871, 2_900), "queries": 2_900}
_TOLERANCE = 15  # boxes of the training frames; papers count 55,260


def load(data_root: str, evaluate_on: str = "test") -> SearchData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts, or a file that is no annotation)."""
    check_test("cuhk_sysu", evaluate_on)
    root = layout.inside(layout.data_folder("cuhk_sysu", data_root, _LAYOUT), "CUHK-SYSU")
    found = read(root)
    for side in ("train", "gallery"):
        _check_counts(side, getattr(found, side), _COUNTS[side])
    if len(found.queries) != _COUNTS["queries"]:
        raise ValueError(
            f"cuhk_sysu: {len(found.queries)} queries, expected {_COUNTS['queries']:,}; is it the right release?"
        )
    return found


def read(root: Path, images: str = "Image/SSM") -> SearchData:
    """What the annotation says, whatever its counts are.

    Raises:
        FileNotFoundError: a file of the annotation is missing, or an image.
        ValueError: a file without the expected field.
    """
    annotation, split = root / "annotation", root / "annotation" / "test" / "train_test"
    with laid_out("cuhk_sysu", annotation / "Images.mat"):
        boxes = {_text(entry["imname"]): _boxes(entry["box"]) for entry in _cells(annotation / "Images.mat", "Img")}
    with laid_out("cuhk_sysu", annotation / "pool.mat"):
        pool = [_text(name) for name in _cells(annotation / "pool.mat", "pool")]
    if missing := [name for name in pool if name not in boxes]:
        raise ValueError(f"cuhk_sysu: pool.mat has {missing[0]}, which Images.mat has not")
    identity = {name: np.full(len(box), UNLABELLED) for name, box in boxes.items()}
    with laid_out("cuhk_sysu", split / "Train.mat"):
        for number, person in enumerate(_cells(split / "Train.mat", "Train"), 1):
            for scene in _entries(_entries(person)[0]["scene"]):
                _assign(identity, boxes, scene, number)
    first = next(s for s in ("50", *SIZES) if (split / f"TestG{s}.mat").is_file() or s == SIZES[-1])
    entries = _cells(split / f"TestG{first}.mat", f"TestG{first}")
    train = sorted(set(boxes) - set(pool))
    frame = {name: i for i, name in enumerate(pool)}
    with laid_out("cuhk_sysu", split / f"TestG{first}.mat"):
        for number, person in enumerate(entries, 1):
            for scene in [_entries(person["Query"])[0], *_held(person)]:
                _assign(identity, boxes, scene, number)
        queries = [_entries(person["Query"])[0] for person in entries]
        box_Q4 = np.array([_corners(_box(q)[None])[0] for q in queries]).reshape(-1, 4)
        frame_Q = np.array([_frame(frame, q) for q in queries], np.int64)
    return SearchData(
        train=_set("cuhk_sysu/train", root / images, train, boxes, identity),
        gallery=_set("cuhk_sysu/gallery", root / images, pool, boxes, identity),
        queries=Queries(frame_Q, box_Q4),
        galleries={
            size: _gallery(split / f"TestG{size}.mat", f"TestG{size}", frame)
            for size in SIZES
            if (split / f"TestG{size}.mat").is_file()
        },
    )


def _gallery(path: Path, field: str, frame: dict[str, int]) -> Gallery:
    frames, targets = [], []
    with laid_out("cuhk_sysu", path):
        for person in _cells(path, field):
            frames.append(np.array([_frame(frame, entry) for entry in _entries(person["Gallery"])], np.int64))
            targets.append({_frame(frame, e): _corners(_box(e)[None])[0] for e in _held(person)})
    return Gallery(frames, targets)


def _frame(frame: dict[str, int], entry: Any) -> int:
    """Number of the gallery's frame that an entry is in."""
    name = _text(entry["imname"])
    if name not in frame:
        raise ValueError(f"cuhk_sysu: {name} is searched, and pool.mat has no such frame; is it the right release?")
    return frame[name]


def _held(person: Any) -> list[Any]:
    """Entries of a gallery that hold the person: they come first, the others have no box."""
    found = []
    for entry in _entries(person["Gallery"]):
        if not entry["idlocate"].size:
            break
        found.append(entry)
    return found


def _assign(identity: dict[str, np.ndarray], boxes: dict[str, np.ndarray], scene: Any, number: int) -> None:
    """Gives a person's number to the box that is exactly the scene's."""
    name = _text(scene["imname"])
    if name not in boxes:
        raise ValueError(f"cuhk_sysu: person {number} is in {name}, which Images.mat has not")
    same = np.flatnonzero((boxes[name] == _box(scene)).all(1))
    identity[name][same[:1]] = number


def _set(name: str, root: Path, names: list[str], boxes: dict, identity: dict) -> SceneSet:
    own = [_corners(boxes[n]) for n in names]
    return scene_set(name, root, names, own, [identity[n] for n in names])


def _boxes(entries: Any) -> np.ndarray:
    """(n, 4) x y w h of a frame, int32; boxes without a width or height are left out."""
    found = np.array([_box(entry) for entry in _entries(entries)], np.int32).reshape(-1, 4)
    return found[(found[:, 2] > 0) & (found[:, 3] > 0)]


def _box(entry: Any) -> np.ndarray:
    return np.asarray(entry["idlocate"], np.float64).reshape(-1)[:4].astype(np.int32)


def _corners(box_n4: np.ndarray) -> np.ndarray:
    """x y w h -> x1 y1 x2 y2"""
    return np.concatenate([box_n4[:, :2], box_n4[:, :2] + box_n4[:, 2:]], axis=1)


def _check_counts(side: str, found: SceneSet, expected: tuple[int, int, int]) -> None:
    counts = (len(found), len(found.box_N4), found.num_identities)
    close = side == "train" and abs(counts[1] - expected[1]) <= _TOLERANCE
    if counts[0] != expected[0] or counts[2] != expected[2] or (counts[1] != expected[1] and not close):
        raise ValueError(
            f"cuhk_sysu/{side}: {counts[0]:,} frames, {counts[1]:,} boxes, {counts[2]:,} identities; "
            f"expected {expected[0]:,}, {expected[1]:,} and {expected[2]:,}; is the data set "
            f"complete, and the right release?"
        )
    if counts[1] != expected[1]:
        warnings.warn(f"cuhk_sysu/{side}: {counts[1]:,} boxes, papers count {expected[1]:,} or so", stacklevel=3)


# --- MATLAB's nesting -------------------------------------------------------------------------------------------------


def _field(path: Path, field: str) -> np.ndarray:
    stored = matlab("cuhk_sysu", path, _LAYOUT)
    if field not in stored:
        known = [name for name in stored if not name.startswith("_")]
        raise ValueError(f"cuhk_sysu: {path} has no field {field!r}; it has {', '.join(known) or 'none'}")
    return stored[field]


def _cells(path: Path, field: str) -> list[Any]:
    return list(_field(path, field).ravel())


def _entries(value: Any) -> list[Any]:
    """Structs of a nested array."""
    return list(np.asarray(value).ravel())


def _text(value: Any) -> str:
    return str(np.asarray(value).ravel()[0])
