"""MSMT17 V1 (Wei et al., CVPR 2018): people seen by 15 cameras.

    <data-root>/list_train.txt, list_val.txt, list_query.txt, list_gallery.txt      <pid>/<file>.jpg <pid>
    <data-root>/train/<pid>/….jpg, test/<pid>/….jpg        0000_000_01_0303morning_0008_0.jpg: third field = camera

The layout of the D3still authors is read as well: ``<data-root>/{train,query,gallery}/<pid>_c<camera>….jpg``, in
which identity -1 is left out.

Trained on list_train and list_val together, as the published counts are; elsewhere val is often left out, and such
results are not comparable. Identities of train and test both start at 0 and are different people. Gallery images
of the query's person and camera are removed.
"""

import numpy as np

from orchestrator.datasets import layout
from orchestrator.datasets.images import ImageSet, RetrievalData

_COUNTS = {"train": (32_621, 1_041), "query": (11_659, 3_060), "gallery": (82_161, 3_060)}
_LISTS = {"train": ("list_train.txt", "list_val.txt"), "query": ("list_query.txt",), "gallery": ("list_gallery.txt",)}


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or rows)."""
    return read("msmt17", data_root, evaluate_on, folders={"train": "train", "test": "test"})


def read(name: str, data_root: str, evaluate_on: str, folders: dict[str, str]) -> RetrievalData:
    """Either release; they differ in the names of the two image folders."""
    layout.check_part(name, evaluate_on)
    sides = (layout.check_counts(_part(name, data_root, part, folders), _COUNTS[part]) for part in _COUNTS)
    return layout.search_across_cameras(*sides, cameras=15, evaluate_on=evaluate_on)


def _part(name: str, data_root: str, part: str, folders: dict[str, str]) -> ImageSet:
    expected = (
        f"list_{{train,val,query,gallery}}.txt with {' and '.join(folders.values())}, or {{train,query,gallery}}/"
    )
    root = layout.data_folder(name, data_root, expected)
    if not (root / _LISTS[part][0]).is_file() and (root / "query").is_dir():
        return layout.people(f"{name}/{part}", root, part, r"(-?\d+)_c(\d+)")
    rows = [row for file in _LISTS[part] for row in layout.table(name, root / file, 2, layout=expected)]
    folder = folders["train" if part == "train" else "test"]
    identity = np.array([layout.number(name, row[1]) for row in rows])
    camera = layout.parse_names(name, [row[0].rsplit("/", 1)[-1] for row in rows], r"\d+_\d+_(\d+)_")[:, 0]
    return layout.image_set(f"{name}/{part}", root, [f"{folder}/{row[0]}" for row in rows], identity, camera)
