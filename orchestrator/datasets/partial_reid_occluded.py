"""Partial-REID searched with its occluded images, as several public readers do; see partial_reid."""

from orchestrator.datasets import partial_reid
from orchestrator.datasets.images import RetrievalData


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or file names)."""
    return partial_reid.read("partial_reid_occluded", data_root, evaluate_on, "occluded_body_images")
