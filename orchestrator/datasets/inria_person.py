"""INRIA person (Dalal and Triggs, CVPR 2005): photographs with boxes of upright people and no identities.

    <data-root>/INRIAPerson/Train|Test/annotations/*.txt        "PASCAL Annotation Version 1.00", latin-1
    <data-root>/INRIAPerson/Train|Test/pos/*.png
    or the two folders right below <data-root>

The positives of both parts are trained on, 902 images with 1,826 boxes; it has no queries, so it is named in a union
behind a benchmark: ``--set data.name=prw+inria_person``. Corners are counted from 1 in the files, from 0 here.
"""

import re
from pathlib import Path

import numpy as np

from losses.oim import UNLABELLED
from orchestrator.datasets import layout
from orchestrator.datasets.scenes import Queries, SceneSet, SearchData, check_test, full_gallery, scene_set

_LAYOUT = "INRIAPerson/{Train,Test}/{pos,annotations}/"
_COUNTS = {"Train": (614, 1_237), "Test": (288, 589)}
_IMAGE = re.compile(r'^Image filename\s*:\s*"(.+)"\s*$', re.MULTILINE)
_OBJECTS = re.compile(r"^Objects with ground truth\s*:\s*(\d+)", re.MULTILINE)
_BOX = re.compile(
    r"^Bounding box for object \d+ .*\(Xmin, Ymin\) - \(Xmax, Ymax\)\s*:"
    r"\s*\((-?\d+),\s*(-?\d+)\)\s*-\s*\((-?\d+),\s*(-?\d+)\)",
    re.MULTILINE,
)


def load(data_root: str, evaluate_on: str = "test") -> SearchData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts, or a file that is no annotation)."""
    check_test("inria_person", evaluate_on)
    root = layout.inside(layout.data_folder("inria_person", data_root, _LAYOUT), "INRIAPerson")
    for part, expected in _COUNTS.items():
        frames, boxes = read_part(root, part)
        found = len(frames), sum(map(len, boxes))
        if found != expected:
            raise ValueError(f"inria_person/{part}: images, boxes are {found}, expected {expected}")
    return read(root)


def read(root: Path) -> SearchData:
    """What the annotation says, whatever its counts are."""
    keys, boxes = [], []
    for part in _COUNTS:
        own_keys, own_boxes = read_part(root, part)
        keys += own_keys
        boxes += own_boxes
    train = _set("inria_person/train", root, keys, boxes)
    nobody = SceneSet(train.frames.part(np.zeros(len(keys), bool), "inria_person/gallery"), np.zeros((0, 4), np.int32),
                      np.zeros(0, np.int64), np.zeros(0, np.int64))  # fmt: skip
    queries = Queries(np.zeros(0, np.int64), np.zeros((0, 4), np.int32))
    return SearchData(train, nobody, queries, {"none": full_gallery(nobody, queries, [])})


def _set(name: str, root: Path, keys: list[str], boxes: list[np.ndarray]) -> SceneSet:
    return scene_set(name, root, keys, boxes, [np.full(len(b), UNLABELLED) for b in boxes])


def read_part(root: Path, part: str) -> tuple[list[str], list[np.ndarray]]:
    """Image and boxes (n, 4) of every annotation file, in order of file name.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file that names no image, has not as many boxes as it says, or a box without area.
    """
    folder = root / part / "annotations"
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"inria_person: no annotations in {folder}; --data-root must hold {_LAYOUT}")
    return tuple(map(list, zip(*(_annotation(file) for file in files), strict=True)))


def _annotation(file: Path) -> tuple[str, np.ndarray]:
    text = file.read_text("latin-1")
    image, objects = _IMAGE.search(text), _OBJECTS.search(text)
    if image is None or objects is None:
        raise ValueError(f"inria_person: {file} names no image or no number of objects; is it an annotation?")
    box_n4 = np.array([[int(x) for x in match.groups()] for match in _BOX.finditer(text)], np.int64).reshape(-1, 4)
    if len(box_n4) != int(objects.group(1)):
        raise ValueError(f"inria_person: {file} has {len(box_n4)} boxes and says {objects.group(1)}")
    box_n4[:, :2] -= 1  # from 1, both corners inside: from 0, the second outside
    if (box_n4[:, 2:] <= box_n4[:, :2]).any():
        raise ValueError(f"inria_person: {file} has a box without area")
    return image.group(1), box_n4
