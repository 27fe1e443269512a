"""Labeled Faces in the Wild (Huang et al., 2007): 6,000 pairs of photographs of 5,749 people, only verified on.

    <data-root>/pairs.txt                       10<TAB>300, then ten folds of 300 pairs of one person and 300 of two
    <data-root>/lfw/<Name>/<Name>_0001.jpg …    250 × 250; or below lfw_funneled, lfw-deepfunneled or <data-root>
    <data-root>/landmarks.csv                   image,x1,y1,…,x5,y5: five points of every <Name>/<Name>_0001.jpg

The list of landmarks is needed unless the images are aligned already, 112 × 112. Folds are as in pairs.txt.
"""

from orchestrator.datasets import face_lists, layout
from orchestrator.datasets.faces import FaceData

_EACH = 300  # pairs of one person, and of two, in a fold
_LAYOUT = "pairs.txt, lfw/<Name>/<Name>_0001.jpg and landmarks.csv"


def load(data_root: str, evaluate_on: str = "test") -> FaceData:
    """Raises FileNotFoundError (what is missing where) and ValueError (list, counts, images that are not aligned)."""
    face_lists.check_verified_only("lfw", evaluate_on)
    root = layout.data_folder("lfw", data_root, _LAYOUT)
    listed = face_lists.lfw_pairs("lfw", root / "pairs.txt", _LAYOUT, _image)
    face_lists.check_counts("lfw", listed, _EACH)
    images = layout.inside(root, "lfw", "lfw_funneled", "lfw-deepfunneled")
    pairs = face_lists.verified("lfw", images, listed, root / "landmarks.csv")
    return FaceData(None, {"lfw": pairs}, face_lists.NOTICE)


def _image(person: str, number: str) -> str:
    return f"{person}/{person}_{layout.number('lfw: pairs.txt', number):04d}.jpg"
