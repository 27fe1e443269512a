"""In-Shop Clothes Retrieval (DeepFashion, Liu et al., CVPR 2016).

    <data-root>/Eval/list_eval_partition.txt       number of images, a header, <img/…jpg> <id_########> <part>
    <data-root>/img/…                              the 256 × 256 release, which is meant for retrieval

The layout of the D3still authors is read as well: ``<data-root>/{train,query,gallery}/<item>_….jpg``.

Query and gallery hold different images of the same 3,985 items, nothing is removed. Published counts are checked;
the D3still paper's text (72,712 images, 7,986 classes) does not match its own parts, which sum to these.
"""

import numpy as np

from orchestrator.datasets import layout
from orchestrator.datasets.images import ImageSet, RetrievalData

_COUNTS = {"train": (25_882, 3_997), "query": (14_218, 3_985), "gallery": (12_612, 3_985)}
_LAYOUT = "Eval/list_eval_partition.txt and img/, or {train,query,gallery}/<item>_….jpg"


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts, rows, or items that overlap)."""
    layout.check_part("inshop", evaluate_on)
    parts = {part: layout.check_counts(images, _COUNTS[part]) for part, images in _parts(data_root).items()}
    train, query, gallery = (parts[part] for part in ("train", "query", "gallery"))
    if set(query.identity) != set(gallery.identity) or set(query.identity) & set(train.identity):
        raise ValueError("inshop: query and gallery must hold the same items, none of them in train")
    if evaluate_on == "validation":
        return layout.held_out(train)
    return RetrievalData(train=train, query=query, gallery=gallery)


def _parts(data_root: str) -> dict[str, ImageSet]:
    root = layout.data_folder("inshop", data_root, _LAYOUT)
    listing = root / "Eval/list_eval_partition.txt"
    if not listing.is_file() and (root / "train").is_dir():
        found = {part: layout.files(f"inshop/{part}", root, part, r"(\d+)_") for part in _COUNTS}
        return {part: layout.image_set(f"inshop/{part}", root, keys, n[:, 0]) for part, (keys, n) in found.items()}
    rows = layout.table("inshop", listing, 3, skip=2, layout=_LAYOUT)
    known = np.array([row[2] for row in rows])
    unknown = set(known) - set(_COUNTS)
    if unknown:
        raise ValueError(f"inshop: {listing} has the unknown parts {', '.join(sorted(unknown))}")
    identity = np.array([layout.number("inshop", row[1], "id_") for row in rows])
    keys = np.array([row[0] for row in rows])
    return {
        part: layout.image_set(f"inshop/{part}", root, keys[known == part].tolist(), identity[known == part])
        for part in _COUNTS
    }
