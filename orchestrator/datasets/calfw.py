"""Cross-Age LFW (Zheng et al., 2017): 6,000 pairs with a gap in age, only verified on.

    <data-root>/pairs_CALFW.txt         two lines ``file flag`` for each pair, also inside calfw/
    <data-root>/aligned images/….jpg    or images/….jpg
    <data-root>/landmarks.csv           image,x1,y1,…,x5,y5: five points of every image, as images/<file>

The list of landmarks is needed unless the images are 112 × 112. The list has 3,000 pairs of one person and then
3,000 of two: every one of the ten folds gets the next 300 of both.
"""

from pathlib import Path

from orchestrator.datasets import face_lists, layout
from orchestrator.datasets.faces import FaceData

_EACH = 300  # pairs of one person, and of two, in a fold


def load(data_root: str, evaluate_on: str = "test") -> FaceData:
    """Raises FileNotFoundError (what is missing where) and ValueError (list, counts, images that are not aligned)."""
    return read("calfw", data_root, evaluate_on)


def read(name: str, data_root: str, evaluate_on: str) -> FaceData:
    """Either of CALFW and CPLFW, which are laid out alike."""
    face_lists.check_verified_only(name, evaluate_on)
    expected = f"pairs_{name.upper()}.txt and the images in 'aligned images' or 'images'"
    root = layout.inside(layout.data_folder(name, data_root, expected), name, name.upper())
    listed = face_lists.flagged_pairs(name, root / f"pairs_{name.upper()}.txt", expected, _folder(root))
    face_lists.check_counts(name, listed, _EACH)
    return FaceData(None, {name: face_lists.verified(name, root, listed, root / "landmarks.csv")}, face_lists.NOTICE)


def _folder(root: Path) -> str:
    return next((f"{name}/" for name in ("aligned images", "images") if (root / name).is_dir()), "")
