"""Bring your own data: ``<data-root>/{train,query,gallery}/<identity>/<image>``.

    <data-root>/train/0007/….jpg        trained on; its identities have nothing to do with the others
    <data-root>/query/0042/….jpg        searched with
    <data-root>/gallery/0042/….jpg      searched in

An identity is a folder name; query and gallery identities are matched by it. Cameras are optional: name every
query and gallery file ``…_c<number>…`` (``0042_c3_17.jpg`` is camera 3) and images of the query's identity and
camera are removed from its gallery, as in re-identification. Without a ``query`` folder the gallery is searched
leave-one-out: each image against all others. ``evaluate_on="validation"`` holds the last tenth of the training
identities out instead, to choose settings on.

Images are told by their extension, in capital or small letters (``IMAGE_SUFFIXES`` in
``orchestrator.datasets.images``). Links to files and to folders are followed. Hidden files and what
systems put beside images (``._0.jpg``, ``.ipynb_checkpoints/``, ``Thumbs.db``, ``__MACOSX/``) are no
data. Every other file that is not read (another extension, a folder deeper, beside the identity
folders) is counted in the notice printed before every run, and so are queries that have nothing to
find; if none has, the data are refused. README.md beside this file has it all as a table.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from orchestrator.datasets.images import Folder, ImageSet, RetrievalData, check_findable, lost_queries
from orchestrator.datasets.layout import check_part, held_out
from orchestrator.datasets.listing import files_below, is_image, left_out

_PARTS = ("train", "query", "gallery")
_LAYOUT = "{train,query,gallery}/<identity>/<image>"
_CAMERA = re.compile(r"_c(\d+)(?=[_.s])")  # in the file name only, never in a parent folder


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """One's own data.

    Raises:
        FileNotFoundError: where it looked and how the folder must look, or a link that leads nowhere.
        ValueError: mixed cameras, or data in which no query can find anything.
    """
    check_part("folder", evaluate_on)
    if not data_root:
        raise FileNotFoundError(f"folder: --data-root DIR is needed, with {_LAYOUT}")
    root = Path(data_root)
    files = _files(root)
    parts = {part: sorted(file for file in files[part] if _is_read(file)) for part in files}
    rest = [file for part in files for file in files[part] if not _is_read(file)]
    empty = next((part for part, keys in parts.items() if not keys), None)
    if empty:
        found = left_out(files[empty], f"{empty}/<identity>/<image>") or f"expected {empty}/<identity>/<image>"
        raise FileNotFoundError(f"folder: no images in {root / empty}; {found}")
    names = sorted({path.split("/")[1] for part in ("query", "gallery") for path in parts.get(part, ())})
    evaluated = {part: _image_set(root, part, parts[part], names) for part in ("query", "gallery") if part in parts}
    train = _image_set(root, "train", parts["train"], sorted({path.split("/")[1] for path in parts["train"]}))
    gallery = evaluated["gallery"]
    query = evaluated.get("query", gallery)
    cameras = {part: images.camera is not None for part, images in evaluated.items()}
    if len(set(cameras.values())) > 1:
        raise ValueError(f"folder: cameras (_c<number> in file names) in only one of query and gallery: {cameras}")
    if evaluate_on == "validation":
        held = held_out(train)
        check_findable(held)
        return replace(held, notice=_notice(held, rest))
    data = RetrievalData(
        train=train,
        query=query,
        gallery=gallery,
        leave_one_out="query" not in parts,
        camera_filter=gallery.camera is not None,
    )
    check_findable(data)
    return replace(data, notice=_notice(data, rest))


def _files(root: Path) -> dict[str, list[str]]:
    """All files of each part that is there, as paths below the root."""
    present = [part for part in _PARTS if (root / part).is_dir()]
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        name = entry.name.lower()
        if name in _PARTS and name not in present:  # in capitals, no folder, or a link that leads nowhere
            raise FileNotFoundError(f"folder: {entry} would not be read; it must be a folder named {name}")
    missing = [part for part in ("train", "gallery") if part not in present]
    if missing:
        raise FileNotFoundError(
            f"folder: {root} has no {' and no '.join(missing)} folder; it must hold {_LAYOUT}, query is optional"
        )
    return {part: [f"{part}/{file}" for file in files_below("folder", root / part)] for part in present}


def _is_read(file: str) -> bool:
    return file.count("/") == 2 and is_image(file)


def _notice(data: RetrievalData, rest: Sequence[str]) -> str:
    lost, why = lost_queries(data)
    searched = f"{lost:,} of {len(data.query):,} queries can find nothing and do not count: {why}" if lost else ""
    return "; ".join(sentence for sentence in (left_out(rest, _LAYOUT), searched) if sentence)


def _image_set(root: Path, part: str, keys: list[str], names: list[str]) -> ImageSet:
    number = {name: i for i, name in enumerate(names)}
    identity = np.array([number[key.split("/")[1]] for key in keys], dtype=np.int64)
    cameras = [_CAMERA.search(key.rsplit("/", 1)[1]) for key in keys]
    with_camera = sum(c is not None for c in cameras)
    if with_camera not in (0, len(keys)) and part != "train":
        unnamed = keys[cameras.index(None)]
        raise ValueError(
            f"folder: {with_camera} of {len(keys)} files in {part} name a camera (_c<number>); "
            f"all or none must, the first without is {unnamed}"
        )
    camera = np.array([int(c[1]) for c in cameras], dtype=np.int64) if with_camera == len(keys) else None
    return ImageSet(f"folder/{part}", tuple(keys), identity, Folder(str(root)), camera)
