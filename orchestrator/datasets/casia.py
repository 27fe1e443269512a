"""CASIA-WebFace, packed and laid out as :mod:`orchestrator.datasets.face_records` says."""

from orchestrator.datasets import face_records
from orchestrator.datasets.faces import FaceData


def load(data_root: str, evaluate_on: str = "test") -> FaceData:
    """As :func:`orchestrator.datasets.face_records.load`; records in another number than published are told of."""
    return face_records.load(data_root, evaluate_on, "CASIA-WebFace")
