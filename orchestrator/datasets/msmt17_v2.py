"""MSMT17 V2: the release with blurred faces.

    <data-root>/list_train.txt, list_val.txt, list_query.txt, list_gallery.txt
    <data-root>/mask_train_v2/<pid>/….jpg, mask_test_v2/<pid>/….jpg

Everything else is as in :mod:`orchestrator.datasets.msmt17`.
"""

from orchestrator.datasets import msmt17
from orchestrator.datasets.images import RetrievalData


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises as :func:`orchestrator.datasets.msmt17.load`."""
    return msmt17.read("msmt17_v2", data_root, evaluate_on, {"train": "mask_train_v2", "test": "mask_test_v2"})
