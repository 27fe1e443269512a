"""Partial-REID searched with its occluded images, as several public readers do.

    <data-root>/Partial-REID/{occluded,whole}_body_images/001_001.jpg …        person 1, image 1
    <data-root>/Market-1501-v15.09.15/        trained on: see orchestrator.datasets.market1501

Everything else is as in :mod:`orchestrator.datasets.partial_reid`.
"""

from orchestrator.datasets import partial_reid
from orchestrator.datasets.images import RetrievalData


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts or file names)."""
    return partial_reid.read("partial_reid_occluded", data_root, evaluate_on, "occluded_body_images")
