"""Partial-REID (Zheng et al., ICCV 2015): 60 people, five partial, occluded and whole images of each. Cross-domain.

    <data-root>/Partial-REID/{partial,occluded,whole}_body_images/001_001.jpg …        person 1, image 1
    <data-root>/Partial-REID/Probe.txt, Gallery.txt        optional: relative paths instead of whole folders
    <data-root>/Market-1501-v15.09.15/                     trained on: see orchestrator.datasets.market1501

Partial images search whole ones, as in the SUReID paper; ``partial_reid_occluded`` searches with the occluded ones, as
several public readers do. Usually reported with rank-1 and rank-3. There are no cameras: all queries get one and the
whole gallery another.
"""

import numpy as np

from orchestrator.datasets import layout, market1501
from orchestrator.datasets.images import ImageSet, RetrievalData

_COUNT = (300, 60)
_GRAMMAR = r"(\d{3})_(\d{3})\.jpg$"


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or file names)."""
    return read("partial_reid", data_root, evaluate_on, "partial_body_images")


def read(name: str, data_root: str, evaluate_on: str, queries: str) -> RetrievalData:
    """Either query folder."""
    layout.check_part(name, evaluate_on)
    train = market1501.part_of(data_root, "train")
    if evaluate_on == "validation":
        return layout.held_out(train)
    folders = {"query": (queries, "Probe.txt"), "gallery": ("whole_body_images", "Gallery.txt")}
    query, gallery = (layout.check_counts(_part(name, data_root, p, *f), _COUNT) for p, f in folders.items())
    return RetrievalData(train=train, query=query, gallery=gallery, camera_filter=True)


def _part(name: str, data_root: str, part: str, folder: str, listing: str) -> ImageSet:
    given = layout.data_folder(name, data_root, "Partial-REID/")
    root = layout.inside(given, "Partial-REID", "Partial_REID", "Partial-REID_Dataset")
    name = f"{name}/{part}"
    # The lists are those of the partial images; they do not know the occluded ones.
    if (root / listing).is_file() and folder != "occluded_body_images":
        keys = [row[0].replace("\\", "/") for row in layout.table(name, root / listing, 1)]
        numbers = layout.parse_names(name, [key.rsplit("/", 1)[-1] for key in keys], _GRAMMAR)
    else:
        expected = "partial_body_images/, occluded_body_images/ and whole_body_images/"
        keys, numbers = layout.files(name, root, folder, _GRAMMAR, expected)
    return layout.image_set(name, root, keys, numbers[:, 0], np.full(len(keys), 0 if part == "query" else 1))
