"""IJB-B (Whitelam et al., CVPRW 2017): 8 million pairs of templates of several images, only verified on.

    <data-root>/meta/ijbb_face_tid_mid.txt              image template medium
    <data-root>/meta/ijbb_template_pair_label.txt       template template 1 = one person, 0 = two
    <data-root>/meta/ijbb_name_5pts_score.txt           image x1 y1 … x5 y5 score of the detector, images in that order
    <data-root>/meta/ijbb_1N_gallery_S1.csv, …_S2.csv, ijbb_1N_probe_mixed.csv      1:N, optional: template,subject
    <data-root>/loose_crop/1.jpg …

All also inside IJBB/ or IJB-B/. Images are aligned by the five points as they are read.
"""

# Shape legend: N images, P pairs of templates, T templates of one side of a search.

from pathlib import Path

import numpy as np

from orchestrator.datasets import face_lists, layout
from orchestrator.datasets.alignment import Aligned, first_words, numbers
from orchestrator.datasets.faces import FaceData, Search, Templates
from orchestrator.datasets.images import ImageSet

_LISTS = ("face_tid_mid", "name_5pts_score", "template_pair_label")
_COUNTS = (227_630, 12_115, 10_270, 8_000_000)  # images, templates, genuine and impostor pairs


def load(data_root: str, evaluate_on: str = "test") -> FaceData:
    """Raises FileNotFoundError (what is missing where) and ValueError (lists or counts)."""
    return read("ijbb", data_root, evaluate_on, ("S1", "S2"), _COUNTS)


def read(
    name: str, data_root: str, evaluate_on: str, galleries: tuple[str, str], counts: tuple[int, int, int, int]
) -> FaceData:
    """Either of IJB-B and IJB-C; the searches are named g1 and g2 for both.

    Lists are parsed in one go and held as columns: 15.7 million pairs are 9 bytes each, names stay in their text.
    """
    face_lists.check_verified_only(name, evaluate_on)
    expected = f"meta/{name}_face_tid_mid.txt and its other lists, and loose_crop/"
    upper = name.upper()
    root = layout.inside(layout.data_folder(name, data_root, expected), upper, f"{upper[:3]}-{upper[3:]}")
    meta = {part: root / "meta" / f"{name}_{part}.txt" for part in _LISTS}
    for path in meta.values():
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no {path.name} in {path.parent}; --data-root must hold {expected}")
    keys = first_words(layout.text(name, meta["face_tid_mid"]).encode())
    template_N, medium_N = numbers(name, meta["face_tid_mid"], (1, 2), np.int32).T
    _check_same(name, meta, keys.fixed())
    score_N = numbers(name, meta["name_5pts_score"], (11,), np.float32)[:, 0]
    pairs_P3 = numbers(name, meta["template_pair_label"], (0, 1, 2), np.int32)
    first_P, second_P = (np.ascontiguousarray(pairs_P3[:, column]) for column in (0, 1))
    label_P = pairs_P3[:, 2]
    if not np.isin(label_P, (0, 1)).all():
        wrong = int(np.flatnonzero(~np.isin(label_P, (0, 1)))[0])
        raise ValueError(
            f"{name}: pair {wrong + 1} of {meta['template_pair_label']} has the label {label_P[wrong]}, not 0 or 1"
        )
    same_P = label_P == 1
    found = len(keys), len(np.unique(template_N)), int(same_P.sum()), int((~same_P).sum())
    if found != counts:
        raise ValueError(
            f"{name}: images, templates, genuine and impostor pairs are {found}, expected {counts}; is the release "
            f"complete, and the right one?"
        )
    crops = root / "loose_crop"
    missing = [row for row in range(len(keys)) if not (crops / keys[row]).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name}: {len(missing):,} of {len(keys):,} images are not in {crops}, first {keys[missing[0]]}"
        )
    reader = Aligned(str(crops), str(meta["name_5pts_score"]))
    images = ImageSet(name, keys, np.full(len(keys), -1), reader)
    searches = _searches(name, root / "meta", galleries)
    templates = Templates(images, template_N, medium_N, score_N, first_P, second_P, same_P, searches)
    return FaceData(None, {name: templates}, face_lists.NOTICE)


def _check_same(name: str, meta: dict[str, Path], names_N: np.ndarray) -> None:
    """Raises ValueError unless both lists of images have the same ones in one order."""
    others = first_words(layout.text(name, meta["name_5pts_score"]).encode()).fixed()
    if len(others) != len(names_N) or (others != names_N).any():
        short = min(len(others), len(names_N))
        first = (
            short if (others[:short] == names_N[:short]).all() else int((others[:short] != names_N[:short]).argmax())
        )
        raise ValueError(
            f"{name}: {meta['name_5pts_score'].name} has {len(others):,} images and {meta['face_tid_mid'].name} "
            f"{len(names_N):,}; they differ from image {first + 1} on, and must be the same in one order"
        )


def _searches(name: str, meta: Path, galleries: tuple[str, str]) -> dict[str, Search]:
    probes = meta / f"{name}_1N_probe_mixed.csv"
    lists = [meta / f"{name}_1N_gallery_{gallery}.csv" for gallery in galleries]
    present = [path.is_file() for path in (probes, *lists)]
    if not any(present):
        return {}
    if not all(present):
        lacking = (probes, *lists)[present.index(False)]
        raise FileNotFoundError(f"{name}: no {lacking.name} in {meta}; 1:N needs it, or remove the other *_1N_*.csv")
    probe_T, probe_subject_T = _subjects(name, probes)
    found = {}
    for number, path in enumerate(lists, 1):
        gallery_T, subject_T = _subjects(name, path)
        twice = np.flatnonzero(np.unique(subject_T, return_counts=True)[1] > 1)
        if len(twice):
            who = np.unique(subject_T)[twice[0]]
            raise ValueError(f"{name}: {path} has several templates of subject {who}; a gallery has one of each")
        found[f"g{number}"] = Search(gallery_T, subject_T, probe_T, probe_subject_T)
    return found


def _subjects(name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Templates, rising, and their subjects; the released lists have a line for every image of a template."""
    rows = np.unique(numbers(name, path, (0, 1), np.int32, comma=True), axis=0)
    template_T, count_T = np.unique(rows[:, 0], return_counts=True)
    if len(template_T) != len(rows):
        raise ValueError(f"{name}: {path} gives template {template_T[count_T.argmax()]} several subjects")
    return template_T, rows[:, 1]
