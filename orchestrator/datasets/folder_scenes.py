"""Bring your own scenes: ``<data-root>/{train,gallery}/images/*``, one list of boxes for each, and who is searched.

    <data-root>/train/images/….jpg, boxes.csv           trained on; its identities have nothing to do with the others
    <data-root>/gallery/images/….jpg, boxes.csv         searched in
    <data-root>/query.csv                               who is searched: boxes of gallery images
    or the same below <data-root>/scenes/

``boxes.csv`` has the columns ``image,x1,y1,x2,y2,identity`` and perhaps ``camera``; ``image`` is a path below
``images/``, corners are pixels, an empty identity is a person without one. ``query.csv`` has the same columns. Instead
of ``boxes.csv`` a ``boxes.json`` in COCO's form is read: ``images`` with ``id``, ``file_name`` and perhaps ``camera``,
``annotations`` with ``image_id``, ``bbox`` [x, y, width, height] and perhaps ``person_id``; all of them are people.

Identities are texts, matched between query and gallery; people who are trained on may have none, for methods that need
none. A query is searched in all gallery images but its own. Images without a box are trained on as background, and
searched in.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losses.oim import UNLABELLED
from orchestrator.datasets import layout
from orchestrator.datasets.images import Folder, ImageSet
from orchestrator.datasets.listing import files_below, is_image, left_out
from orchestrator.datasets.scenes import Queries, SceneSet, SearchData, check_test, frames_of_people, full_gallery

_NAME = "folder_scenes"
_LAYOUT = "{train,gallery}/images/*, {train,gallery}/boxes.csv (or boxes.json) and query.csv"
_LARGEST = 2**31  # of a corner, pixels
_COLUMNS = ("image", "x1", "y1", "x2", "y2", "identity")


@dataclass(frozen=True)
class _Row:
    """A box of a list, and where it is said."""

    image: str
    box: tuple[float, float, float, float]
    identity: str
    camera: str
    where: str


def load(data_root: str, evaluate_on: str = "test") -> SearchData:
    """One's own scenes.

    Raises:
        FileNotFoundError: where it looked and how the folder must look.
        ValueError: a list that is none, a box of no image, without area or with corners that are no numbers, a query
            that is no person of the gallery, or nobody to search.
    """
    check_test(_NAME, evaluate_on)
    root = layout.inside(layout.data_folder(_NAME, data_root, _LAYOUT), "scenes")
    rows = {side: _rows(root / side) for side in ("train", "gallery")}
    query = root / "query.csv"
    if not query.is_file():
        raise FileNotFoundError(f"{_NAME}: no query.csv in {root}; it must hold {_LAYOUT}")
    asked = list(_csv(query))
    known = sorted({row.identity for row in (*rows["gallery"], *asked)} - {""})
    number = {identity: i for i, identity in enumerate(known, 1)}
    trained = {identity: i for i, identity in enumerate(sorted({row.identity for row in rows["train"]} - {""}), 1)}
    (train, _), (gallery, frame) = (_set(root, side, rows[side], of) for side, of in
                                    (("train", trained), ("gallery", number)))  # fmt: skip
    queries, identity_Q = _queries(asked, gallery, frame, number)
    notice = "; ".join(filter(None, (_notice(root, side, s) for side, s in (("train", train), ("gallery", gallery)))))
    return SearchData(train, gallery, queries, {"all": full_gallery(gallery, queries, identity_Q)}, notice)


def _queries(
    asked: Sequence[_Row], gallery: SceneSet, frame: dict[str, int], number: dict[str, int]
) -> tuple[Queries, list[int]]:
    if not asked:
        raise ValueError(f"{_NAME}: query.csv has no row; it says who is searched")
    held = frames_of_people(gallery)
    for row in asked:
        if row.image not in frame:
            raise ValueError(f"{_NAME}: {row.where}: there is no gallery image {row.image!r}; a query is a box of one")
        if not row.identity:
            raise ValueError(f"{_NAME}: {row.where}: a query without identity cannot be right or wrong; name it")
        if not set(held.get(number[row.identity], {})) - {frame[row.image]}:
            raise ValueError(
                f"{_NAME}: {row.where}: identity {row.identity!r} is in no other gallery image than the query's, so "
                f"there is nothing to find; label it in gallery/boxes.csv or leave the query out"
            )
    queries = Queries(np.array([frame[row.image] for row in asked]), _boxes(asked))
    return queries, [number[row.identity] for row in asked]


def _set(root: Path, side: str, rows: Sequence[_Row], number: dict[str, int]) -> tuple[SceneSet, dict[str, int]]:
    """A side, and the number of every image."""
    folder = root / side / "images"
    keys = [file for file in files_below(_NAME, folder) if is_image(file)]
    if not keys:
        raise FileNotFoundError(f"{_NAME}: no images in {folder}; {root} must hold {_LAYOUT}")
    frame = {key: i for i, key in enumerate(keys)}
    of_frame: list[list[_Row]] = [[] for _ in keys]
    for row in rows:
        if row.image not in frame:
            raise ValueError(f"{_NAME}: {row.where}: a box of {row.image!r}, which is not in {folder}")
        of_frame[frame[row.image]].append(row)
    ordered = [row for own in of_frame for row in own]
    identity_N = np.array([number.get(row.identity, UNLABELLED) for row in ordered], np.int64)
    camera = _cameras(side, of_frame)
    frames = ImageSet(f"{_NAME}/{side}", tuple(keys), np.full(len(keys), -1), Folder(str(folder)), camera)
    return SceneSet(frames, _boxes(ordered), identity_N, np.array([len(own) for own in of_frame])), frame


def _cameras(side: str, of_frame: Sequence[Sequence[_Row]]) -> np.ndarray | None:
    """Of every image, -1 where no row says it; None where no row does."""
    named = sorted({row.camera for own in of_frame for row in own} - {""})
    if not named:
        return None
    camera = np.full(len(of_frame), -1)
    for place, own in enumerate(of_frame):
        said = {row.camera for row in own} - {""}
        if len(said) > 1:
            raise ValueError(f"{_NAME}: {own[0].where}: {side} image {own[0].image!r} has cameras {sorted(said)}")
        if said:
            camera[place] = named.index(said.pop())
    return camera


def _boxes(rows: Sequence[_Row]) -> np.ndarray:
    return np.array([row.box for row in rows]).round().astype(np.int32).reshape(-1, 4)


def _notice(root: Path, side: str, scenes: SceneSet) -> str:
    files = [file for file in files_below(_NAME, root / side / "images") if not is_image(file)]
    empty = np.flatnonzero(scenes.count_F == 0)
    without = f"{len(empty)} {side} images without a box, such as {scenes.frames.keys[empty[0]]}" if len(empty) else ""
    return "; ".join(filter(None, (left_out(files, f"{side}/images/<image>"), without)))


def _rows(folder: Path) -> list[_Row]:
    lists = [path for path in (folder / "boxes.csv", folder / "boxes.json") if path.is_file()]
    if not lists:
        raise FileNotFoundError(
            f"{_NAME}: no boxes.csv and no boxes.json in {folder}; {folder.parent} must hold {_LAYOUT}"
        )
    if len(lists) > 1:
        raise ValueError(f"{_NAME}: {folder} has boxes.csv and boxes.json; remove one of them")
    return list(_csv(lists[0]) if lists[0].suffix == ".csv" else _coco(lists[0]))


def _csv(path: Path) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(layout.text(_NAME, path), newline=""))
    lacking = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(f"{_NAME}: {path} has no column {', '.join(lacking)}; expected {','.join(_COLUMNS)}[,camera]")
    for line, row in enumerate(reader, 2):
        where = f"{path} line {line}"
        if None in (row[column] for column in _COLUMNS):
            raise ValueError(f"{_NAME}: {where} has too few fields")
        box = _corners(where, [row[name] for name in _COLUMNS[1:5]])
        yield _Row(row["image"], box, row["identity"].strip(), (row.get("camera") or "").strip(), where)


def _coco(path: Path) -> Iterator[_Row]:
    try:
        stored = json.loads(layout.text(_NAME, path))
        named = [(image["id"], str(image["file_name"]), image.get("camera")) for image in stored["images"]]
        images = {number: (file, camera) for number, file, camera in named}
        boxes = [(n, a, images.get(a["image_id"]), list(a["bbox"])) for n, a in enumerate(stored["annotations"])]
        categories = {c["id"]: str(c["name"]) for c in stored.get("categories") or ()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{_NAME}: {path} is no list of boxes in COCO's form: {type(error).__name__} {error}"
        ) from error
    twice = next((file for number, file, _ in named if images[number][0] != file), None)
    if twice is not None:
        raise ValueError(f"{_NAME}: {path} has two images of one id, one of them {twice!r}; give each its own")
    for number, annotation, image, box in boxes:
        where = f"{path} annotation {annotation.get('id', number)}"
        if image is None:
            raise ValueError(
                f"{_NAME}: {where}: a box of image_id {annotation['image_id']!r}, which is not among the images"
            )
        _check_person(where, annotation, categories)
        if len(box) != 4:
            raise ValueError(f"{_NAME}: {where}: bbox {box} must be x, y, width, height")
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in box):
            raise ValueError(f"{_NAME}: {where}: bbox {box} must be four numbers")
        x, y, width, height = box
        file, camera = image
        corners = _corners(where, [x, y, x + width, y + height])
        yield _Row(file, corners, _label(where, annotation.get("person_id")), _label(where, camera), where)


def _check_person(where: str, annotation: dict[str, Any], categories: dict[Any, str]) -> None:
    """Raises ValueError for what is no person."""
    category = categories.get(annotation.get("category_id"), "")
    if len(categories) > 1 and category.lower() not in ("person", "pedestrian"):
        raise ValueError(f"{_NAME}: {where} is of category {category!r}; leave all but people out of the list")
    if annotation.get("iscrowd"):
        raise ValueError(f"{_NAME}: {where} is a crowd and no person; leave it out of the list")


def _label(where: str, value: Any) -> str:
    """A person or camera of a JSON list as text: numbers without a fraction, "" for none."""
    if value is None or value == -1 or value != value:  # NaN is how tables write a blank
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{_NAME}: {where}: {value!r} must be a text or a whole number, as a person or a camera is")
    return str(int(value))


def _corners(where: str, values: Sequence[Any]) -> tuple[float, float, float, float]:
    try:
        x1, y1, x2, y2 = map(float, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_NAME}: {where}: corners {list(values)} must be four numbers x1, y1, x2, y2") from error
    if not all(abs(value) < _LARGEST for value in (x1, y1, x2, y2)):  # nor is NaN
        raise ValueError(f"{_NAME}: {where}: corners {x1:g},{y1:g},{x2:g},{y2:g} are no places in an image; mend them")
    if not (round(x2) > round(x1) and round(y2) > round(y1)):
        raise ValueError(
            f"{_NAME}: {where}: box {x1:g},{y1:g},{x2:g},{y2:g} has no area; x2 > x1 and y2 > y1 are needed"
        )
    return x1, y1, x2, y2
