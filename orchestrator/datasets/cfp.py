"""Celebrities in Frontal-Profile (Sengupta et al., WACV 2016): 500 people, two times 7,000 pairs, only verified on.

    <data-root>/Protocol/Pair_list_F.txt, Pair_list_P.txt               number and path of every image, from 1
    <data-root>/Protocol/Split/{FF,FP}/{01,…,10}/{same,diff}.txt        n1,n2: two numbers, 350 lines each
    <data-root>/Data/Images/001/frontal/01.jpg, 001/profile/01.jpg …
    <data-root>/landmarks.csv       image,x1,y1,…,x5,y5: five points of every image, as Data/Images/001/frontal/01.jpg

All also inside cfp-dataset/. The list of landmarks is needed unless the images are aligned, 112 × 112. ``cfp_ff``
compares frontal faces, ``cfp_fp`` a frontal one (n1) with a profile (n2).
"""

from pathlib import Path, PurePosixPath

import numpy as np

from orchestrator.datasets import face_lists, layout
from orchestrator.datasets.face_lists import Listed
from orchestrator.datasets.faces import FaceData

_EACH = 350  # pairs of one person, and of two, in a fold
_SETS = {"cfp_fp": "FP", "cfp_ff": "FF"}
_LAYOUT = "Protocol/Pair_list_{F,P}.txt, Protocol/Split/{FF,FP}/{01,…,10}/{same,diff}.txt and Data/Images/"


def load(data_root: str, evaluate_on: str = "test") -> FaceData:
    """Raises FileNotFoundError (what is missing where) and ValueError (lists, counts, images that are not aligned)."""
    face_lists.check_verified_only("cfp", evaluate_on)
    root = layout.inside(layout.data_folder("cfp", data_root, _LAYOUT), "cfp-dataset")
    paths = {letter: _paths(root / "Protocol" / f"Pair_list_{letter}.txt") for letter in "FP"}
    found = {}
    for name, letters in _SETS.items():
        folds = [_fold(name, root / "Protocol" / "Split" / letters / f"{f:02d}", paths, letters) for f in range(1, 11)]
        first, second, same, where = ([v for fold in folds for v in fold[column]] for column in range(4))
        listed = face_lists.check_counts(name, Listed(first, second, np.array(same), where), _EACH)
        found[name] = face_lists.verified(name, root, listed, root / "landmarks.csv")
    return FaceData(None, found, face_lists.NOTICE)


def _paths(path: Path) -> dict[str, str]:
    """Number -> path below the root; the list has it as seen from its own folder."""
    found = {}
    for number, fields in face_lists.rows("cfp", path, _LAYOUT):
        if len(fields) != 2:
            raise ValueError(f"cfp: {path} line {number} is {' '.join(fields)!r}, expected a number and a path")
        found[fields[0]] = str(PurePosixPath(*(part for part in PurePosixPath(fields[1]).parts if part != "..")))
    return found


def _fold(name: str, folder: Path, paths: dict[str, dict[str, str]], letters: str) -> tuple[list, list, list, list]:
    first, second, same, where = [], [], [], []
    for kind in ("same", "diff"):
        path = folder / f"{kind}.txt"
        for number, fields in face_lists.rows("cfp", path, _LAYOUT):
            pair = [text.strip() for text in "".join(fields).split(",")]
            if len(pair) != 2 or any(n not in paths[letter] for n, letter in zip(pair, letters, strict=True)):
                raise ValueError(
                    f"{name}: {path} line {number} is {' '.join(fields)!r}, expected two numbers n1,n2 of "
                    f"Pair_list_{letters[0]}.txt and Pair_list_{letters[1]}.txt"
                )
            first.append(paths[letters[0]][pair[0]])
            second.append(paths[letters[1]][pair[1]])
            same.append(kind == "same")
            where.append(f"{'/'.join(path.parts[-4:])} line {number}")
    return first, second, same, where
