"""Market-1501 (Zheng et al., ICCV 2015): people seen by six cameras.

    <data-root>/bounding_box_train/, query/, bounding_box_test/        0002_c1s1_000451_03.jpg: person 2, camera 1
    or the same below <data-root>/Market-1501-v15.09.15/

Of the gallery, images of person -1 (junk: bad detections) are left out, those of person 0 (distractors) are kept.
Gallery images of the query's person and camera are removed. Some files of the release end in ``.jpg.jpg``.
"""

import numpy as np

from orchestrator.datasets import layout
from orchestrator.datasets.images import ImageSet, RetrievalData

_COUNTS = {"train": (12_936, 751), "query": (3_368, 750), "gallery": (15_913, 751)}  # distractors are one identity
_GRAMMAR = r"(-?\d+)_c(\d)s\d+_\d+_\d+\."


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or file names)."""
    layout.check_part("market1501", evaluate_on)
    sides = (part_of(data_root, part) for part in _COUNTS)
    return layout.search_across_cameras(*sides, cameras=6, evaluate_on=evaluate_on)


def part_of(data_root: str, part: str) -> ImageSet:
    """The training, query or gallery side; cross-domain benchmarks train on the first."""
    given = layout.data_folder("market1501", data_root, layout.PEOPLE_LAYOUT)
    root = layout.inside(given, "Market-1501-v15.09.15")
    images = layout.people(f"market1501/{part}", root, layout.PEOPLE[part], _GRAMMAR, layout.PEOPLE_LAYOUT)
    return layout.check_counts(images, _COUNTS[part])


def labels(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Person and camera of every file name.

    >>> [x.tolist() for x in labels(["0002_c1s1_000451_03.jpg", "-1_c3s2_000001_00.jpg.jpg"])]
    [[2, -1], [1, 3]]
    """
    person, camera = layout.parse_names("market1501", names, _GRAMMAR).T
    return person, camera
