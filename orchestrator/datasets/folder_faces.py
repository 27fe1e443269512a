"""Bring your own faces: ``<data-root>/{train,test}/<identity>/<image>``.

    <data-root>/train/0007/….jpg        trained on
    <data-root>/test/0042/….jpg         verified, other people
    <data-root>/pairs.txt               optional: which two images of test/ are compared, else 3,000 of each kind drawn
    <data-root>/landmarks.csv           optional: image,x1,y1,…,x5,y5 of every image, as train/0007/1.jpg

An identity is a folder name. pairs.txt has the form of LFW's: ``10<TAB>300``, then for every fold 300 lines
``name n1 n2`` and 300 lines ``name1 n1 name2 n2``, between tabs where names hold spaces; an image is its file name, or
the number n of ``<name>/<name>_000n``, with any extension.

Faces should be aligned, 112 × 112: others are aligned by landmarks.csv, and without it merely resized, which the
notice says. Images are told by their extension, in capital or small letters. Links are followed, hidden files are no
data, and every other file that is not read is counted in the notice. ``evaluate_on="validation"`` holds the last tenth
of the training identities out.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from orchestrator.datasets import face_lists
from orchestrator.datasets.alignment import SIZE, aligned_by
from orchestrator.datasets.faces import FaceData, Pairs, drawn_pairs, held_out
from orchestrator.datasets.images import Folder, ImageSet, Reader, printable
from orchestrator.datasets.layout import check_part
from orchestrator.datasets.listing import files_below, is_image, left_out

_PARTS = ("train", "test")
_LAYOUT = "{train,test}/<identity>/<image>"
_PAIRS = 3000  # of each kind that are drawn, at most


def load(data_root: str, evaluate_on: str = "test") -> FaceData:
    """One's own faces.

    Raises:
        FileNotFoundError: where it looked and how the folder must look, pairs that name a missing image, or a link
            that leads nowhere.
        ValueError: a list of pairs that is not complete, images without landmarks in a list of them, too few images
            for a pair, or an identity in both train and test.
    """
    check_part("folder_faces", evaluate_on)
    if not data_root:
        raise FileNotFoundError(f"folder_faces: --data-root DIR is needed, with {_LAYOUT}")
    root = Path(data_root)
    files = _files(root)
    keys = {part: [file for file in files[part] if _is_read(file)] for part in _PARTS}
    rest = [file for part in _PARTS for file in files[part] if not _is_read(file)]
    empty = next((part for part in _PARTS if not keys[part]), None)
    if empty:
        found = left_out(files[empty], f"{empty}/<identity>/<image>") or f"expected {empty}/<identity>/<image>"
        raise FileNotFoundError(f"folder_faces: no images in {root / empty}; {found}")
    both = {_person(key) for key in keys["train"]} & {_person(key) for key in keys["test"]}
    if both:
        raise ValueError(
            f"folder_faces: {len(both):,} identities are in both train and test, first {printable(min(both))}; what is "
            f"verified must be other people"
        )
    landmarks = root / "landmarks.csv"
    known = landmarks.is_file()
    reader = aligned_by("folder_faces", root, keys["train"] + keys["test"], landmarks) if known else Folder(str(root))
    train, test = (_image_set(part, keys[part], reader) for part in _PARTS)
    if evaluate_on == "validation":
        data = held_out(FaceData(train, {}))
    else:
        data = FaceData(train, {"val": _pairs(root, test)})
    said = (left_out(rest, _LAYOUT), "" if known else _resized(root, train, test))
    return replace(data, notice="; ".join(sentence for sentence in said if sentence))


def _files(root: Path) -> dict[str, list[str]]:
    """All files of both parts, as paths below the root, in order of their parts."""
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        name = entry.name.lower()
        if name in _PARTS and not (root / name).is_dir():  # in capitals, no folder, or a link that leads nowhere
            raise FileNotFoundError(f"folder_faces: {entry} would not be read; it must be a folder named {name}")
    missing = [part for part in _PARTS if not (root / part).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"folder_faces: {root} has no {' and no '.join(missing)} folder; it must hold {_LAYOUT}"
        )
    return {part: [f"{part}/{file}" for file in files_below("folder_faces", root / part)] for part in _PARTS}


def _is_read(file: str) -> bool:
    return file.count("/") == 2 and is_image(file)


def _person(key: str) -> str:
    return key.split("/")[1]


def _image_set(part: str, keys: list[str], reader: Reader) -> ImageSet:
    identity = np.unique([_person(key) for key in keys], return_inverse=True)[1].astype(np.int64)
    return ImageSet(f"folder_faces/{part}", tuple(keys), identity, reader)


def _pairs(root: Path, test: ImageSet) -> Pairs:
    """The pairs of the list, or drawn ones; images of the test part that no pair names are still in the set."""
    listing = root / "pairs.txt"
    if not listing.is_file():
        return drawn_pairs(test, _PAIRS, (0,))
    row = {key: row for row, key in enumerate(test.keys)}
    without_extension = {key.rpartition(".")[0]: key for key in test.keys}

    def image(person: str, text: str) -> str:
        key = f"test/{person}/{text}"
        if key not in row and text.isdigit():
            return without_extension.get(f"test/{person}/{person}_{int(text):04d}", key)
        return key

    listed = face_lists.lfw_pairs("folder_faces", listing, "pairs.txt", image)
    face_lists.check_present("folder_faces", root, listed, row)
    first_P, second_P = (np.array([row[key] for key in side], np.int64) for side in (listed.first, listed.second))
    return Pairs(test, first_P, second_P, listed.same_P, listed.folds)


def _resized(root: Path, *sets: ImageSet) -> str:
    """What is said of faces of another size; the first image of every identity is looked at, not each of millions."""
    keys = [images.keys[row] for images in sets for row in np.unique(images.identity, return_index=True)[1]]
    others = []
    for key in keys:
        try:
            with Image.open(root / key) as stored:  # reads the header alone
                if stored.size != (SIZE, SIZE):
                    others.append(f"{printable(key)} of {stored.width} × {stored.height}")
        except OSError:  # damaged pictures are counted and named before training
            continue
    if not others:
        return ""
    return (
        f"{len(others):,} of {len(keys):,} identities have faces that are not {SIZE} × {SIZE}, first {others[0]}: they "
        f"are resized, not aligned, as there is no landmarks.csv, which costs 6 to 14 points of accuracy"
    )
