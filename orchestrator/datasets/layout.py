"""What the readers of published data sets share: annotation files, file names, counts, a held-out part.

Identities come from the annotation, or from the *file name* alone where the name is the annotation; never from
the full path, where a parent folder such as ``2024_data`` would change them.
"""

import codecs
import re
from collections import Counter
from pathlib import Path

import numpy as np

from orchestrator.datasets.images import Folder, ImageSet, RetrievalData, check_findable
from orchestrator.datasets.listing import files_below, is_image

_HELD_OUT = 0.1  # of the training identities, for evaluate_on="validation"


def data_folder(name: str, data_root: str, layout: str) -> Path:
    """The data root as a path; raises FileNotFoundError that says how it must look."""
    if not data_root:
        raise FileNotFoundError(f"{name}: --data-root DIR is needed; it must hold {layout}")
    return Path(data_root)


def table(name: str, path: Path, columns: int, skip: int = 0, layout: str = "") -> list[list[str]]:
    """Rows of a white-space separated annotation file, empty lines left out.

    Raises:
        FileNotFoundError: no such file, with the layout.
        ValueError: a row without ``columns`` fields, by its line number, or no UTF-8 text.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{name}: no {path.name} in {path.parent}" + (f"; it must hold {layout}" * bool(layout))
        )
    rows = []
    for number, line in enumerate(text(name, path).splitlines(), 1):
        fields = line.split()
        if number <= skip or not fields:
            continue
        if len(fields) != columns:
            raise ValueError(f"{name}: {path} line {number} has {len(fields)} fields, expected {columns}: {line!r}")
        rows.append(fields)
    return rows


def text(name: str, path: Path) -> str:
    """What a list says: UTF-8, with or without the byte order mark that Windows' editors put first.

    Raises:
        ValueError: other bytes, by file and line.
    """
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        found = content.decode()
        problem, at = "zero bytes, as in UTF-16", content.find(b"\0")
    except UnicodeDecodeError as error:
        found, problem, at = "", error.reason, error.start
    if at >= 0:
        line = content.count(b"\n", 0, at) + 1
        raise ValueError(f"{name}: {path} line {line} is not UTF-8 text ({problem}); save it as UTF-8")
    return found


def number(name: str, text: str, prefix: str = "") -> int:
    """A whole number after a fixed prefix; raises ValueError that names the text."""
    digits = text.removeprefix(prefix)
    if not text.startswith(prefix) or not digits.isdigit():
        raise ValueError(f"{name}: {text!r} is no number" + (f" after {prefix!r}" if prefix else ""))
    return int(digits)


def files(name: str, root: Path, folder: str, grammar: str, layout: str = "") -> tuple[list[str], np.ndarray]:
    """Images directly in a folder, in order of name, and the numbers that the grammar finds in each file name.

    Raises:
        FileNotFoundError: no such folder, no image in it, or a link that leads nowhere.
        ValueError: a file name that does not follow the grammar.
    """
    directory = root / folder
    names = [n for n in files_below(name, directory, depth=1) if is_image(n)]
    if not names:
        raise FileNotFoundError(f"{name}: no images in {directory}" + (f"; {root} must hold {layout}" * bool(layout)))
    return [f"{folder}/{n}" for n in names], parse_names(name, names, grammar)


def parse_names(name: str, names: list[str], grammar: str) -> np.ndarray:
    """The numbers that a regular expression's groups find in every file name: (names, groups)."""
    pattern = re.compile(grammar)
    found = [pattern.match(n) for n in names]
    if None in found:
        raise ValueError(f"{name}: file name {names[found.index(None)]!r} does not follow {grammar!r}")
    return np.array([[int(g) for g in m.groups()] for m in found], dtype=np.int64)


def image_set(
    name: str, root: Path, keys: list[str], identity: np.ndarray | list[int], camera: np.ndarray | None = None
) -> ImageSet:
    """Images below a root.

    Raises:
        FileNotFoundError: the first listed image that is not there, and how many are missing.
        ValueError: an image that is listed twice, or that lies outside the root.
    """
    outside = next((key for key in keys if Path(key).is_absolute() or ".." in Path(key).parts), None)
    if outside is not None:
        raise ValueError(f"{name}: {outside} is not a path below {root}")
    if len(set(keys)) != len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise ValueError(f"{name}: {twice} is listed twice")
    missing = [key for key in keys if not (root / key).is_file()]
    if missing:
        raise FileNotFoundError(f"{name}: {len(missing)} of {len(keys)} images are missing, first {root / missing[0]}")
    return ImageSet(name, tuple(keys), np.asarray(identity, dtype=np.int64), Folder(str(root)), camera)


# Folders of Market-1501 and of what is laid out as it.
PEOPLE = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
PEOPLE_LAYOUT = "bounding_box_train/, query/ and bounding_box_test/"


def people(name: str, root: Path, folder: str, grammar: str, layout: str = "") -> ImageSet:
    """A folder of images with person and camera in the file name; person -1 is left out."""
    keys, numbers = files(name, root, folder, grammar, layout)
    known = numbers[:, 0] >= 0
    keys = [key for key, k in zip(keys, known, strict=True) if k]
    return image_set(name, root, keys, numbers[known, 0], numbers[known, 1])


def inside(root: Path, *names: str) -> Path:
    """The first of the named folders below a root that exists, or the root itself."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def check_counts(images: ImageSet, expected: tuple[int, int]) -> ImageSet:
    """The set itself.

    Raises:
        ValueError: it does not hold the published number of images and identities.
    """
    found = len(images), images.num_identities
    if found != expected:
        raise ValueError(
            f"{images.name}: {found[0]:,} images of {found[1]:,} identities, expected {expected[0]:,} of "
            f"{expected[1]:,}; is the data set complete, and the right release?"
        )
    return images


def check_cameras(query: ImageSet, gallery: ImageSet, cameras: int) -> None:
    """Raises ValueError unless cameras are 1 … ``cameras`` and every query's identity is in the gallery."""
    for images in (query, gallery):
        if images.camera.min() < 1 or images.camera.max() > cameras:
            raise ValueError(
                f"{images.name}: cameras {images.camera.min()} to {images.camera.max()}, expected 1 to {cameras}"
            )
    lost = set(query.identity) - set(gallery.identity)
    if lost:
        raise ValueError(f"{query.name}: {len(lost)} identities are not in the gallery, such as {min(lost)}")


def search_across_cameras(
    train: ImageSet, query: ImageSet, gallery: ImageSet, cameras: int, evaluate_on: str, notice: str = ""
) -> RetrievalData:
    """The protocol of data sets with cameras: what shares the query's person and camera is removed.

    Raises:
        ValueError: cameras out of range, identities that the gallery lacks, nothing to be found.
    """
    check_cameras(query, gallery, cameras)
    if evaluate_on == "validation":
        return held_out(train)
    data = RetrievalData(train=train, query=query, gallery=gallery, camera_filter=True, notice=notice)
    check_findable(data)
    return data


def check_part(name: str, evaluate_on: str) -> None:
    """Raises ValueError unless the part is test or validation."""
    if evaluate_on not in ("test", "validation"):
        raise ValueError(f"{name} has the parts test and validation, not {evaluate_on!r}")


def held_out(train: ImageSet, mask: np.ndarray | None = None) -> RetrievalData:
    """``evaluate_on="validation"``: the last tenth of the training identities is searched, the rest trained on.

    To choose settings on, so that the test part is looked at once. Every held-out image is a query against all
    others; with cameras, those of its identity and camera are removed.

    Args:
        train: the whole training part.
        mask: which of its images to hold out instead.
    """
    identities = np.unique(train.identity)
    if mask is None:
        mask = np.isin(train.identity, identities[-max(1, round(_HELD_OUT * len(identities))) :])
    name = train.name.rsplit("/", 1)[0]
    validation = train.part(mask, f"{name}/validation")
    return RetrievalData(
        train=train.part(~mask, f"{name}/train-part"),
        query=validation,
        gallery=validation,
        leave_one_out=train.camera is None,
        camera_filter=train.camera is not None,
    )
