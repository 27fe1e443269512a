"""IJB-C (Maze et al., ICB 2018): 15.7 million pairs of templates of several images, only verified on.

    <data-root>/meta/ijbc_face_tid_mid.txt, ijbc_template_pair_label.txt, ijbc_name_5pts_score.txt
    <data-root>/meta/ijbc_1N_gallery_G1.csv, …_G2.csv, ijbc_1N_probe_mixed.csv      1:N, optional
    <data-root>/loose_crop/1.jpg …

All also inside IJBC/ or IJB-C/, and read as orchestrator.datasets.ijbb.
"""

from orchestrator.datasets import ijbb
from orchestrator.datasets.faces import FaceData

_COUNTS = (469_375, 23_124, 19_557, 15_658_489)  # images, templates, genuine and impostor pairs


def load(data_root: str, evaluate_on: str = "test") -> FaceData:
    """Raises FileNotFoundError (what is missing where) and ValueError (lists or counts)."""
    return ijbb.read("ijbc", data_root, evaluate_on, ("G1", "G2"), _COUNTS)
