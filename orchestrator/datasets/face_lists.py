"""What the readers of verification sets in their original layouts share: lists of pairs, and the images they name."""

# Shape legend: P pairs.

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from orchestrator.datasets import layout
from orchestrator.datasets.alignment import aligned_or_as_is
from orchestrator.datasets.faces import Pairs

FOLDS = 10  # of every published list
NOTICE = (
    "photographs of real people that were collected without asking them: for lawful research alone, faces are not to "
    "be shown or passed on"
)


@dataclass(frozen=True, eq=False)
class Listed:
    """Pairs as a list names them, fold by fold."""

    first: Sequence[str] = field(repr=False)  # paths below a root
    second: Sequence[str] = field(repr=False)
    same_P: np.ndarray = field(repr=False)  # bool
    where: Sequence[str] = field(repr=False)  # such as "pairs.txt line 7"
    folds: int = FOLDS


def check_verified_only(name: str, evaluate_on: str) -> None:
    """Raises ValueError for another part than the test one: there are no training faces to hold out."""
    if evaluate_on != "test":
        raise ValueError(f"{name} is only verified on: it has the part test alone, not {evaluate_on!r}")


def rows(name: str, path: Path, layout_: str) -> list[tuple[int, list[str]]]:
    """Every line that is not empty: its number, and its fields, split at tabs where it has some, else at spaces.

    Raises:
        FileNotFoundError: no such file, with the layout.
        ValueError: no UTF-8 text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no {path.name} in {path.parent}; --data-root must hold {layout_}")
    lines = enumerate(layout.text(name, path).splitlines(), 1)
    return [(number, line.strip().split("\t" if "\t" in line else None)) for number, line in lines if line.strip()]


def lfw_pairs(name: str, path: Path, layout_: str, image: Callable[[str, str], str]) -> Listed:
    """The list of LFW: ``10<TAB>300``, then for every fold 300 lines ``name n1 n2`` and 300 ``name1 n1 name2 n2``.

    Args:
        name: who asks, for the errors.
        path: of the list.
        layout_: what must be there.
        image: makes a path of a name and what follows it.

    Raises:
        FileNotFoundError, ValueError: no such list, or not the lines of each form that its first line tells of.
    """
    (_, head), *lines = rows(name, path, layout_) or [(1, [])]
    if len(head) != 2 or not all(text.isdigit() and int(text) for text in head):
        raise ValueError(
            f"{name}: {path} begins with {' '.join(head)!r}, expected the number of folds and of pairs of each kind in "
            f"a fold, such as 10<TAB>300"
        )
    folds, each = map(int, head)
    if len(lines) != folds * 2 * each:
        raise ValueError(
            f"{name}: {path} has {len(lines):,} lines of pairs, expected {folds} × 2 × {each} = {folds * 2 * each:,}, "
            f"{each} of one person and {each} of two in every fold; is the list complete?"
        )
    first, second, same, where = [], [], [], []
    for place, (number, fields) in enumerate(lines):
        same.append(place // each % 2 == 0)
        if len(fields) != (3 if same[-1] else 4) or (not same[-1] and fields[0] == fields[2]):
            form = "name n1 n2, a pair of one person" if same[-1] else "name1 n1 name2 n2, a pair of two people"
            raise ValueError(f"{name}: {path} line {number} is {' '.join(fields)!r}, expected {form}")
        first.append(image(*fields[:2]))
        second.append(image(fields[0] if same[-1] else fields[2], fields[-1]))
        where.append(f"{path.name} line {number}")
    # A single fold leaves nothing to choose its threshold on.
    return Listed(first, second, np.array(same), where, folds if folds > 1 else 0)


def flagged_pairs(name: str, path: Path, layout_: str, folder: str) -> Listed:
    """The list of CALFW and CPLFW: two lines ``file flag`` for each pair, flag 0 = of two people.

    The first half are pairs of one person, the second of two; every fold gets a tenth of both.

    Args:
        name: who asks, for the errors.
        path: of the list.
        layout_: what must be there.
        folder: in which the files lie.

    Raises:
        FileNotFoundError, ValueError: no such list, an odd number of lines, or other halves.
    """
    lines = rows(name, path, layout_)
    if len(lines) % (2 * 2 * FOLDS) or not lines:
        odd = "an odd number, so one image has no partner" if len(lines) % 2 else f"no {FOLDS} folds of equal halves"
        raise ValueError(f"{name}: {path} has {len(lines):,} lines, {odd}; two lines make a pair; is it complete?")
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    half = len(pairs) // 2
    for place, ((number, one), (_, two)) in enumerate(pairs):
        flags = {fields[-1] for fields in (one, two)}
        if len(one) != 2 or len(two) != 2 or len({flag == "0" for flag in flags}) > 1:
            raise ValueError(
                f"{name}: {path} lines {number} and the next are {' '.join(one)!r} and {' '.join(two)!r}, expected "
                f"a file and a flag each, 0 in both or in none"
            )
        if ("0" in flags) != (place >= half):
            raise ValueError(
                f"{name}: {path} line {number} has the flag {one[1]}, but the first {half:,} pairs must be of one "
                f"person and the last {half:,} of two, which have 0"
            )
    # Fold by fold: a tenth of the first half, then a tenth of the second.
    order = np.arange(len(pairs)).reshape(2, FOLDS, -1).swapaxes(0, 1).ravel()
    first, second = ([f"{folder}{pairs[row][side][1][0]}" for row in order] for side in (0, 1))
    return Listed(first, second, order < half, [f"{path.name} line {pairs[row][0][0]}" for row in order])


def check_counts(name: str, listed: Listed, each: int) -> Listed:
    """The list itself. Raises ValueError unless every fold has ``each`` pairs of both kinds, as published."""
    for fold, same_P in enumerate(np.array_split(listed.same_P, listed.folds or 1), 1):
        found = int(same_P.sum()), int((~same_P).sum())
        if listed.folds != FOLDS or found != (each, each):
            raise ValueError(
                f"{name}: fold {fold} of {listed.folds} has {found[0]:,} pairs of one person and {found[1]:,} of two, "
                f"expected {each} of both in each of {FOLDS}; is the list complete, and the right release?"
            )
    return listed


def verified(name: str, root: Path, listed: Listed, landmarks: Path) -> Pairs:
    """The verification set of a list: each image once, in the order in which pairs name them, aligned where needed.

    Raises:
        FileNotFoundError: pairs that name a missing image.
        ValueError: images that are neither aligned nor in the list of landmarks, or that lie outside the root.
    """
    row = {key: row for row, key in enumerate(dict.fromkeys(key for pair in _pairs(listed) for key in pair))}
    check_present(name, root, listed, {key for key in row if (root / key).is_file()})
    images = layout.image_set(name, root, list(row), np.full(len(row), -1))
    images = replace(images, reader=aligned_or_as_is(name, root, images.keys, landmarks))
    first_P, second_P = (np.array([row[key] for key in side], np.int64) for side in (listed.first, listed.second))
    return Pairs(images, first_P, second_P, listed.same_P, listed.folds)


def check_present(name: str, root: Path, listed: Listed, present: Container[str]) -> None:
    """Raises FileNotFoundError with the first pair that names a missing image, and how many pairs do."""
    lost = [(number, key) for number, pair in enumerate(_pairs(listed)) for key in pair if key not in present]
    if lost:
        number, key = lost[0]
        raise FileNotFoundError(
            f"{name}: {listed.where[number]} names {key}, which is not in {root}; {len({n for n, _ in lost}):,} of "
            f"{len(listed.same_P):,} pairs name a missing image; add the images, or take these pairs out of the list"
        )


def _pairs(listed: Listed) -> Iterator[tuple[str, str]]:
    return zip(listed.first, listed.second, strict=True)
