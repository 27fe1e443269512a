"""CUB-200-2011 (Wah et al., 2011), the official *classification* split: all 200 birds in train and test.

    <data-root>/images.txt                     <image_id> <path below images/>
    <data-root>/image_class_labels.txt         <image_id> <class_id>
    <data-root>/train_test_split.txt           <image_id> <1 = train>
    <data-root>/images/…

The layout of the D3still authors is read as well: ``<data-root>/{train,test}/<class>_<image>.jpg``.

Their published numbers are of this closed-set split, and its validation part is one too: two of every ten images
of each class. Metric learning uses another one, of disjoint classes:
:mod:`orchestrator.datasets.cub200_metric`. Numbers of the two are not comparable. Each test image searches all
others.
"""

from pathlib import Path

import numpy as np

from orchestrator.datasets import layout
from orchestrator.datasets.images import ImageSet, RetrievalData

_COUNTS = {"train": (5_994, 200), "test": (5_794, 200)}
_LAYOUT = "images.txt, image_class_labels.txt, train_test_split.txt and images/, or {train,test}/<class>_<image>.jpg"


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or rows)."""
    root = layout.data_folder("cub200", data_root, _LAYOUT)
    if not (root / "images.txt").is_file() and (root / "train").is_dir():
        found = {part: layout.files(f"cub200/{part}", root, part, r"(\d+)_(\d+)\.") for part in _COUNTS}
        sets = {part: layout.image_set(f"cub200/{part}", root, keys, n[:, 0]) for part, (keys, n) in found.items()}
    else:
        paths, classes, in_train = annotation("cub200", root, _LAYOUT)
        sets = {
            "train": select("cub200/train", root, paths, classes, in_train),
            "test": select("cub200/test", root, paths, classes, ~in_train),
        }
    if evaluate_on == "validation":
        train = layout.check_counts(sets["train"], _COUNTS["train"])
        order = np.argsort(train.labels, kind="stable")
        starts = np.searchsorted(train.labels[order], train.labels[order])  # where each image's class begins
        mask = np.zeros(len(train), bool)
        mask[order] = (np.arange(len(train)) - starts) % 10 < 2  # two of ten, so that they find each other
        return layout.held_out(train, mask)
    return protocol("cub200", sets, _COUNTS, evaluate_on)


def annotation(name: str, root: Path, expected: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paths below the root, classes and the classification split's train flags, by image id."""
    columns = {
        file: {layout.number(name, row[0]): row[1] for row in layout.table(name, root / file, 2, layout=expected)}
        for file in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    }
    paths, classes, split = columns.values()
    for file, column in columns.items():
        differing = set(paths) ^ set(column)
        if differing:
            raise ValueError(f"{name}: images.txt and {file} differ in {len(differing)} image ids, {min(differing)} …")
    ids = sorted(paths)
    return (
        np.array([f"images/{paths[i]}" for i in ids]),
        np.array([layout.number(name, classes[i]) for i in ids]),
        np.array([split[i] == "1" for i in ids]),
    )


def select(name: str, root: Path, paths: np.ndarray, classes: np.ndarray, mask: np.ndarray) -> ImageSet:
    """The images of a mask."""
    return layout.image_set(name, root, paths[mask].tolist(), classes[mask])


def protocol(
    name: str, sets: dict[str, ImageSet], counts: dict[str, tuple[int, int]], evaluate_on: str
) -> RetrievalData:
    """Counts checked; every test image searches all others."""
    layout.check_part(name, evaluate_on)
    train, test = (layout.check_counts(sets[part], counts[part]) for part in ("train", "test"))
    if evaluate_on == "validation":
        return layout.held_out(train)
    return RetrievalData(train=train, query=test, gallery=test, leave_one_out=True)
