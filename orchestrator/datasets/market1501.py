"""Market-1501 (Zheng et al., ICCV 2015): people seen by six cameras.

    <data-root>/bounding_box_train/, query/, bounding_box_test/        0002_c1s1_000451_03.jpg: person 2, camera 1

Of the gallery, images of person -1 (junk: bad detections) are left out, those of person 0 (distractors) are kept.
Gallery images of the query's person and camera are removed. Some files of the release end in ``.jpg.jpg``.
"""

import numpy as np

from orchestrator.datasets import layout
from orchestrator.datasets.images import ImageSet, RetrievalData

_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
_COUNTS = {"train": (12_936, 751), "query": (3_368, 750), "gallery": (15_913, 751)}  # distractors are one identity
_GRAMMAR = r"(-?\d+)_c(\d)s\d+_\d+_\d+\."


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or file names)."""
    layout.check_part("market1501", evaluate_on)
    train, query, gallery = (layout.check_counts(_part(data_root, part), _COUNTS[part]) for part in _FOLDERS)
    layout.check_cameras(query, gallery, 6)
    if evaluate_on == "validation":
        return layout.held_out(train)
    return RetrievalData(train=train, query=query, gallery=gallery, camera_filter=True)


def labels(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Person and camera of every file name.

    >>> [x.tolist() for x in labels(["0002_c1s1_000451_03.jpg", "-1_c3s2_000001_00.jpg.jpg"])]
    [[2, -1], [1, 3]]
    """
    person, camera = layout.parse_names("market1501", names, _GRAMMAR).T
    return person, camera


def _part(data_root: str, part: str) -> ImageSet:
    expected = "bounding_box_train/, query/ and bounding_box_test/"
    root = layout.data_folder("market1501", data_root, expected)
    keys, numbers = layout.files(f"market1501/{part}", root, _FOLDERS[part], _GRAMMAR, expected)
    known = numbers[:, 0] >= 0
    keys = [key for key, k in zip(keys, known, strict=True) if k]
    return layout.image_set(f"market1501/{part}", root, keys, numbers[known, 0], numbers[known, 1])
