"""Stanford Online Products (Oh Song et al., CVPR 2016).

    <data-root>/Ebay_train.txt, Ebay_test.txt      a header, then <image_id> <class_id> <super_class_id> <path>
    <data-root>/<super class>_final/….JPG

The layout of the D3still authors is read as well: ``<data-root>/{train,test}/<class>_<image id>.JPG``.

Each of the 60,502 test images searches the 60,501 others; classes of train and test differ.
"""

from orchestrator.datasets import layout
from orchestrator.datasets.images import ImageSet, RetrievalData

_COUNTS = {"train": (59_551, 11_318), "test": (60_502, 11_316)}
_LAYOUT = "Ebay_train.txt and Ebay_test.txt with their images, or {train,test}/<class>_<image id>.JPG"


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or rows)."""
    layout.check_part("sop", evaluate_on)
    train = layout.check_counts(_part(data_root, "train"), _COUNTS["train"])
    if evaluate_on == "validation":
        return layout.held_out(train)
    test = layout.check_counts(_part(data_root, "test"), _COUNTS["test"])
    if set(train.identity) & set(test.identity):
        raise ValueError("sop: some classes are in both train and test")
    return RetrievalData(train=train, query=test, gallery=test, leave_one_out=True)


def _part(data_root: str, part: str) -> ImageSet:
    name, root = f"sop/{part}", layout.data_folder("sop", data_root, _LAYOUT)
    listing = root / f"Ebay_{part}.txt"
    if not listing.is_file() and (root / part).is_dir():
        keys, numbers = layout.files(name, root, part, r"(\d+)_(\d+)\.")
        return layout.image_set(name, root, keys, numbers[:, 0])
    rows = layout.table("sop", listing, 4, skip=1, layout=_LAYOUT)
    return layout.image_set(name, root, [row[3] for row in rows], [layout.number("sop", row[1]) for row in rows])
