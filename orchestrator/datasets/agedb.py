"""AgeDB-30 (Moschoglou et al., CVPRW 2017): 6,000 pairs that lie 30 years apart, only verified on.

    <data-root>/04_FINAL_protocol_30_years.mat      the official ten splits of 600 pairs
    <data-root>/03_Protocol_Images/….jpg
    <data-root>/landmarks.csv                       image,x1,y1,…,x5,y5: five points of every image, by file name

All also inside AgeDB/. The list of landmarks is needed unless the images are aligned, 112 × 112. The variable
``splits`` has a cell for each fold: a structure whose first field is 2 × 600 cells with an image's name and age, and
which holds 600 labels, -1 = two people. Where it has no labels a name's first part, before ``_``, says who it is, as in
the public code that made the packs.
"""

from pathlib import Path

import numpy as np

from orchestrator.datasets import face_lists, layout
from orchestrator.datasets.face_lists import Listed
from orchestrator.datasets.faces import FaceData
from orchestrator.datasets.scenes import laid_out, matlab

_EACH = 300  # pairs of one person, and of two, in a fold
_PROTOCOL, _FOLDER = "04_FINAL_protocol_30_years.mat", "03_Protocol_Images"
_LAYOUT = f"{_PROTOCOL} and {_FOLDER}/"


def load(data_root: str, evaluate_on: str = "test") -> FaceData:
    """Raises FileNotFoundError (what is missing where) and ValueError (protocol, counts, images not aligned)."""
    face_lists.check_verified_only("agedb", evaluate_on)
    root = layout.inside(layout.data_folder("agedb", data_root, _LAYOUT), "AgeDB")
    listed = face_lists.check_counts("agedb", _listed(root / _PROTOCOL), _EACH)
    pairs = face_lists.verified("agedb_30", root / _FOLDER, listed, root / "landmarks.csv")
    return FaceData(None, {"agedb_30": pairs}, face_lists.NOTICE)


def _listed(path: Path) -> Listed:
    stored = matlab("agedb", path, _LAYOUT)
    if "splits" not in stored:
        raise ValueError(f"agedb: {path} has no variable splits; take the protocol as it was released")
    first, second, same, where = [], [], [], []
    with laid_out("agedb", path):
        splits = stored["splits"].ravel()
        for fold, cell in enumerate(splits, 1):
            split = cell.ravel()[0]
            names = [[str(image.ravel()[0][0].ravel()[0]) for image in side] for side in split[0]]
            labels = [np.asarray(field).ravel() for field in list(split)[1:]]
            labels = [field for field in labels if len(field) == len(names[0]) and np.isin(field, (-1, 1)).all()]
            # zip is strict: a split that has an image without a partner is refused.
            people = [a.split("_")[0] == b.split("_")[0] for a, b in zip(*names, strict=True)]
            same += (labels[0] == 1).tolist() if labels else people
            first += [f"{name}.jpg" for name in names[0]]
            second += [f"{name}.jpg" for name in names[1]]
            where += [f"{path.name} split {fold} pair {pair}" for pair in range(1, len(names[0]) + 1)]
    return Listed(first, second, np.array(same, bool), where, len(splits))
