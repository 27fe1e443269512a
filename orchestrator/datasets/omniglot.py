"""Omniglot (Lake et al., Science 2015): handwritten characters of 50 alphabets, MIT licence.

Train on the 964 characters of the background alphabets; retrieve the 659 unseen characters of the evaluation
alphabets, each image against all others. The two original zips are read in place:

    <data-root>/images_background.zip    images_background/<Alphabet>/character<NN>/<NNNN>_<drawer>.png
    <data-root>/images_evaluation.zip

``evaluate_on="validation"`` holds the last five background alphabets out instead, to choose settings on.
The drawer (1 … 20) is stored as the camera; the protocol does not use it: a drawer drew each character once.
"""

import zipfile
from pathlib import Path

import numpy as np

from orchestrator.datasets.images import ImageSet, RetrievalData, Zip
from orchestrator.datasets.listing import is_hidden

_COUNTS = {"background": (19_280, 964), "evaluation": (13_180, 659)}
_VALIDATION_ALPHABETS = 5


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (where it looked, what belongs there) and ValueError (wrong counts)."""
    background = _read(data_root, "background")
    if evaluate_on == "test":
        test = _read(data_root, "evaluation")
        return RetrievalData(train=background, query=test, gallery=test, leave_one_out=True)
    alphabets = np.array([key.split("/")[1] for key in background.keys])
    held_out = np.isin(alphabets, np.unique(alphabets)[-_VALIDATION_ALPHABETS:])
    validation = background.part(held_out, "omniglot/validation")
    return RetrievalData(
        train=background.part(~held_out, "omniglot/train-part"),
        query=validation,
        gallery=validation,
        leave_one_out=True,
    )


def _read(data_root: str, part: str) -> ImageSet:
    path = Path(data_root) / f"images_{part}.zip"
    if not data_root or not path.is_file():
        raise FileNotFoundError(
            f"omniglot: no {path.name} in {data_root or '(no --data-root given)'}; --data-root must hold the original "
            f"images_background.zip and images_evaluation.zip"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            keys = sorted(n for n in archive.namelist() if n.endswith(".png") and not is_hidden(n))
    except zipfile.BadZipFile as error:
        raise ValueError(f"omniglot: {path} is no complete zip file ({error}); download it again") from error
    classes = ["/".join(key.split("/")[1:3]) for key in keys]
    identity = np.unique(classes, return_inverse=True)[1].astype(np.int64)
    found, expected = (len(keys), len(set(classes))), _COUNTS[part]
    if found != expected:
        raise ValueError(
            f"omniglot: {path} has {found[0]} images of {found[1]} characters, "
            f"expected {expected[0]} of {expected[1]}; is the download complete?"
        )
    camera = np.array([int(key.rsplit("_", 1)[1].removesuffix(".png")) for key in keys], dtype=np.int64)
    name = "train" if part == "background" else "test"
    return ImageSet(f"omniglot/{name}", tuple(keys), identity, Zip(str(path)), camera)
