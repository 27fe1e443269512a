"""Bring your own data: ``<data-root>/{train,query,gallery}/<identity>/<image>``.

An identity is a folder name; query and gallery identities are matched by it. Cameras are optional: name every
query and gallery file ``…_c<number>…`` (``0042_c3_17.jpg`` is camera 3) and images of the query's identity and
camera are removed from its gallery, as in re-identification. Without a ``query`` folder the gallery is searched
leave-one-out: each image against all others.
"""

import re
from pathlib import Path

import numpy as np

from orchestrator.datasets.images import IMAGE_SUFFIXES, Folder, ImageSet, RetrievalData

_CAMERA = re.compile(r"_c(\d+)(?=[_.s])")  # in the file name only, never in a parent folder


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (where it looked, how the folder must look) and ValueError (mixed cameras)."""
    if evaluate_on != "test":
        raise ValueError(f"folder data has no {evaluate_on} part; point --data-root at another folder instead")
    if not data_root:
        raise FileNotFoundError("folder: --data-root DIR is needed, with {train,query,gallery}/<identity>/<image>")
    root = Path(data_root)
    parts = {part: _images(root, part) for part in ("train", "query", "gallery") if (root / part).is_dir()}
    missing = [part for part in ("train", "gallery") if part not in parts]
    if missing:
        raise FileNotFoundError(
            f"folder: {root} has no {' and no '.join(missing)} folder; "
            f"it must hold {{train,query,gallery}}/<identity>/<image>, query is optional"
        )
    names = sorted({path.split("/")[1] for part in ("query", "gallery") for path in parts.get(part, ())})
    evaluated = {part: _image_set(root, part, parts[part], names) for part in ("query", "gallery") if part in parts}
    train = _image_set(root, "train", parts["train"], sorted({path.split("/")[1] for path in parts["train"]}))
    gallery = evaluated["gallery"]
    query = evaluated.get("query", gallery)
    cameras = {part: images.camera is not None for part, images in evaluated.items()}
    if len(set(cameras.values())) > 1:
        raise ValueError(f"folder: cameras (_c<number> in file names) in only one of query and gallery: {cameras}")
    return RetrievalData(
        train=train,
        query=query,
        gallery=gallery,
        leave_one_out="query" not in parts,
        camera_filter=gallery.camera is not None,
    )


def _images(root: Path, part: str) -> list[str]:
    found = sorted(
        str(path.relative_to(root)) for path in (root / part).glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES
    )
    if not found:
        raise FileNotFoundError(f"folder: no images in {root / part}; expected {part}/<identity>/<image>")
    return found


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
