"""Occluded-REID (Zhuo et al., ICME 2018): 200 people, five occluded and five whole images of each. Cross-domain.

    <data-root>/Occluded_REID/occluded_body_images/001/001_01.tif … and whole_body_images/
    <data-root>/Market-1501-v15.09.15/                     trained on: see orchestrator.datasets.market1501

Copies with ``query/`` and ``gallery/`` instead, or .jpg, or without the inner folders, are read as well; the counts
must be right. The person is the first number of the file name. There are no cameras: all queries get one and the whole
gallery another. A popular reader takes the image's number for the camera and so removes true matches.
"""

import numpy as np

from orchestrator.datasets import layout, market1501
from orchestrator.datasets.images import ImageSet, RetrievalData
from orchestrator.datasets.listing import files_below, is_image

_COUNT = (1_000, 200)
_FOLDERS = {"query": ("occluded_body_images", "query"), "gallery": ("whole_body_images", "gallery")}


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or file names)."""
    layout.check_part("occluded_reid", evaluate_on)
    train = market1501.part_of(data_root, "train")
    if evaluate_on == "validation":
        return layout.held_out(train)
    query, gallery = (layout.check_counts(_part(data_root, part), _COUNT) for part in ("query", "gallery"))
    return RetrievalData(train=train, query=query, gallery=gallery, camera_filter=True)


def _part(data_root: str, part: str) -> ImageSet:
    name = f"occluded_reid/{part}"
    root = layout.inside(layout.data_folder(name, data_root, "Occluded_REID/"), "Occluded_REID", "Occluded-REID")
    folder = layout.inside(root, *_FOLDERS[part])
    if folder == root:
        raise FileNotFoundError(f"{name}: no {' or '.join(_FOLDERS[part])} in {root}")
    keys = [f"{folder.name}/{file}" for file in files_below(name, folder) if is_image(file)]
    names = [key.rsplit("/", 1)[-1] for key in keys]
    identity, _ = layout.parse_names(name, names, r"(\d{3})_(\d{2})\.").T if keys else ([], [])
    camera = np.full(len(keys), 0 if part == "query" else 1)
    return layout.image_set(name, root, keys, identity, camera)
