"""Occluded-DukeMTMC (Miao et al., ICCV 2019): DukeMTMC-reID divided anew, every query occluded. Your own copy only.

Its authors publish lists of file names alone, because DukeMTMC was withdrawn. Either layout:

    <data-root>/Occluded_Duke/{bounding_box_train,query,bounding_box_test}/        built from the lists
    <data-root>/{train,query,gallery}.list, and DukeMTMC-reID/ with its three folders beside them, or its folders

One file name a line. 1,870 of the 2,210 query images are also in the gallery: the camera rule removes them, and
without that rule rank-1 would be inflated.
"""

from pathlib import Path

import numpy as np

from orchestrator.datasets import dukemtmc, layout
from orchestrator.datasets.images import ImageSet, RetrievalData
from orchestrator.datasets.listing import files_below

_COUNTS = {"train": (15_618, 702), "query": (2_210, 519), "gallery": (17_661, 1_110)}
_LISTS = {part: f"{part}.list" for part in _COUNTS}


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or file names)."""
    layout.check_part("occluded_duke", evaluate_on)
    root = layout.data_folder("occluded_duke", data_root, "Occluded_Duke/, or three .list files and DukeMTMC-reID/")
    if not (root / _LISTS["train"]).is_file():
        return dukemtmc.read("occluded_duke", layout.inside(root, "Occluded_Duke"), evaluate_on, _COUNTS)
    sides = (layout.check_counts(_listed(root, part), _COUNTS[part]) for part in _COUNTS)
    return layout.search_across_cameras(
        *sides, cameras=dukemtmc.CAMERAS, evaluate_on=evaluate_on, notice=dukemtmc.NOTICE
    )


def _listed(root: Path, part: str) -> ImageSet:
    name = f"occluded_duke/{part}"
    names = [row[0].rsplit("/", 1)[-1] for row in layout.table(name, root / _LISTS[part], 1)]
    identity, camera = layout.parse_names(name, names, dukemtmc.GRAMMAR).T
    images = layout.inside(root, dukemtmc.FOLDER)
    # A query of the new division may lie in any folder of the old one.
    folders = [layout.PEOPLE[part], *(f for f in layout.PEOPLE.values() if f != layout.PEOPLE[part])]
    where = {file: folder for folder in reversed(folders) for file in files_below(name, images / folder, depth=1)}
    keys = [f"{where.get(n, folders[0])}/{n}" for n in names]
    return layout.image_set(name, images, keys, np.asarray(identity), np.asarray(camera))
