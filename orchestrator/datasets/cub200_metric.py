"""CUB-200-2011, the split of metric learning: trained on birds 1 to 100, searched among birds 101 to 200.

    <data-root>/images.txt, image_class_labels.txt, train_test_split.txt, images/…

Files as in :mod:`orchestrator.datasets.cub200` (the official layout only), whose numbers are not
comparable.
"""

from orchestrator.datasets import layout
from orchestrator.datasets.cub200 import annotation, protocol, select
from orchestrator.datasets.images import RetrievalData

_LAYOUT = "images.txt, image_class_labels.txt, train_test_split.txt and images/"
_COUNTS = {"train": (5_864, 100), "test": (5_924, 100)}


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or rows)."""
    root = layout.data_folder("cub200_metric", data_root, _LAYOUT)
    paths, classes, _ = annotation("cub200_metric", root, _LAYOUT)
    sets = {
        "train": select("cub200_metric/train", root, paths, classes, classes <= 100),
        "test": select("cub200_metric/test", root, paths, classes, classes > 100),
    }
    return protocol("cub200_metric", sets, _COUNTS, evaluate_on)
