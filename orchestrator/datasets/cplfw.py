"""Cross-Pose LFW (Zheng and Deng, 2018): 6,000 pairs with a difference in pose, only verified on.

    <data-root>/pairs_CPLFW.txt, 'aligned images'/ or images/, landmarks.csv, also inside cplfw/

Laid out and folded as orchestrator.datasets.calfw.
"""

from orchestrator.datasets import calfw
from orchestrator.datasets.faces import FaceData


def load(data_root: str, evaluate_on: str = "test") -> FaceData:
    """Raises FileNotFoundError (what is missing where) and ValueError (list, counts, images that are not aligned)."""
    return calfw.read("cplfw", data_root, evaluate_on)
