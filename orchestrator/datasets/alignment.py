"""Faces brought to where faces lie: five landmarks, a similarity transform, a bilinear warp.

    left eye, right eye, tip of the nose, left and right corner of the mouth, as the image shows them

A landmark is ``x, y`` in pixels, whole numbers being the middle of a pixel. Values are rounded down, and warping
does not smooth, as in the public code that made the packs of aligned faces: reduce very large photographs beforehand.
"""

# Shape legend: 5 landmarks, 2 coordinates x and y, 23 an affine map [A | b], N lines of a table of landmarks.

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from orchestrator.datasets import layout
from orchestrator.datasets.images import Folder, decode, printable
from orchestrator.needs import digest

SIZE = 112  # pixels of an aligned face
TEMPLATE_112 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
TEMPLATE_112_96 = TEMPLATE_112 - [8, 0]  # of the older faces, 112 high and 96 wide
COLUMNS = "image," + ",".join(f"{axis}{point}" for point in range(1, 6) for axis in "xy")  # of landmarks.csv


def similarity_transform(landmarks_52: np.ndarray, template: np.ndarray = TEMPLATE_112) -> np.ndarray:
    """The turn, scale and shift that bring landmarks nearest to a template, in least squares; never a mirror image.

    Landmarks and template as complex numbers z and w, less their means: a = Σ z̄ w / Σ |z|² is scale and turn.

    Args:
        landmarks_52: x and y of five points of an image.
        template: where they belong.

    Returns:
        (2, 3) the map: template point ≈ matrix[:, :2] @ landmark + matrix[:, 2].

    Raises:
        ValueError: no five finite points, or points that fix no scale: all in one place, or as a mirror shows them.

    >>> similarity_transform(2 * TEMPLATE_112 + 10).round(6).tolist()
    [[0.5, -0.0, -5.0], [0.0, 0.5, -5.0]]
    """
    points = np.asarray(landmarks_52, np.float64)
    if points.shape != template.shape or not np.isfinite(points).all():
        raise ValueError(f"landmarks must be {template.shape} finite numbers x, y, got {points.shape}: {points}")
    z, w = points @ [1, 1j], template @ [1, 1j]
    spread, span = np.square(np.abs(z - z.mean())).sum(), np.square(np.abs(w - w.mean())).sum()
    product = np.vdot(z - z.mean(), w - w.mean())
    # A fit that explains nothing has scale 0 and no inverse; 1e-6 is far below any face and far above rounding.
    if not spread > 0 or abs(product) < 1e-6 * np.sqrt(spread * span):
        raise ValueError(f"landmarks {points.tolist()} fix no turn and scale; five different points of a face must")
    a = product / spread
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align(image: Image.Image, landmarks_52: np.ndarray, size: int = SIZE) -> Image.Image:
    """The face of a photograph, size × size, bilinear; black where the photograph ends.

    Raises:
        ValueError: as :func:`similarity_transform`.
    """
    matrix_23 = similarity_transform(landmarks_52, TEMPLATE_112 * (size / SIZE))
    back_22 = np.linalg.inv(matrix_23[:, :2])
    # A black frame of one pixel, so that the edge fades into black; Pillow counts from a pixel's corner.
    half = np.full(2, 0.5)
    shift_2 = -back_22 @ (matrix_23[:, 2] + half) + half + 1
    data = (*back_22[0], shift_2[0], *back_22[1], shift_2[1])
    framed = ImageOps.expand(image, 1, 0)
    return framed.transform((size, size), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=0)


@dataclass(frozen=True)
class Aligned:
    """Photographs below a root, aligned as they are read; keys are relative paths.

    ``landmarks`` is a file of one line for each image, see :func:`landmark_table`; it is read once in every process.
    """

    root: str
    landmarks: str

    def read(self, key: str) -> bytes:
        """PNG. Raises ValueError for an image without landmarks, or with such that nothing can be aligned by."""
        image = decode((Path(self.root) / key).read_bytes())
        landmarks_52 = _table(self.landmarks, os.stat(self.landmarks).st_mtime_ns).of(key)
        stored = io.BytesIO()
        align(image, landmarks_52).save(stored, "PNG", compress_level=1)
        return stored.getvalue()

    def stamp(self, keys: Sequence[str]) -> str:
        stat = os.stat(self.landmarks)
        return digest([Folder(self.root).stamp(keys), self.landmarks, stat.st_size, stat.st_mtime_ns])


@dataclass(frozen=True, eq=False)
class FirstWords(Sequence[str]):
    """The first word of every line of a text, made when it is asked for: no object for each line is held."""

    content: bytes = field(repr=False)
    start_N: np.ndarray = field(repr=False)
    stop_N: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.start_N)

    def __getitem__(self, index: int) -> str:
        return self.content[self.start_N[index] : self.stop_N[index]].decode()

    def fixed(self) -> np.ndarray:
        """(N,) as byte strings of one width, to be compared and sorted."""
        length_N, characters = self.stop_N - self.start_N, np.frombuffer(self.content, np.uint8)
        width = int(length_N.max(initial=1))
        padded = np.zeros((len(self), width), np.uint8)
        for column in range(width):
            row_N = np.flatnonzero(column < length_N)
            padded[row_N, column] = characters[self.start_N[row_N] + column]
        return padded.view(f"S{width}")[:, 0]


def first_words(content: bytes, separators: bytes = b" \t", skip: int = 0) -> FirstWords:
    """The words before the first separator of every line that is not empty, ``skip`` such lines left out.

    >>> list(first_words(b"1.jpg 7 2\\r\\n\\n2.jpg"))
    ['1.jpg', '2.jpg']
    """
    content = content.removesuffix(b"\n") + b"\n"
    characters = np.frombuffer(content, np.uint8)
    break_N = np.flatnonzero(characters == ord("\n"))
    start_N = np.concatenate([[0], break_N[:-1] + 1])
    end_N = break_N - ((break_N > start_N) & (characters[break_N - 1] == ord("\r")))
    filled_N = end_N > start_N
    start_N, end_N = start_N[filled_N][skip:], end_N[filled_N][skip:]
    separator_N = np.flatnonzero(np.isin(characters, list(separators + b"\n")))
    return FirstWords(content, start_N, np.minimum(separator_N[np.searchsorted(separator_N, start_N)], end_N))


def numbers(name: str, path: Path, columns: Sequence[int], dtype: type, comma: bool = False) -> np.ndarray:
    """(N, columns) numbers of a long list, parsed without an object for each; with commas it has a header.

    Raises:
        ValueError: a line that has no such number at one of the columns, by its line number.
    """
    form = {"dtype": dtype, "comments": None, "delimiter": "," if comma else None, "usecols": columns, "ndmin": 2}
    try:
        return np.loadtxt(path, skiprows=int(comma), encoding="utf-8", **form)
    except (ValueError, OverflowError) as error:
        # Only now line by line, as the parser counts neither the header nor empty lines.
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip() and not (comma and number == 1):
                        np.loadtxt([line], **form)
                except (ValueError, OverflowError):
                    places = f"s {columns[0] + 1} to {columns[-1] + 1}" if len(columns) > 1 else f" {columns[0] + 1}"
                    raise ValueError(
                        f"{name}: {path} line {number} has no {np.dtype(dtype).name} in column{places}: "
                        f"{line.strip()[:80]!r}"
                    ) from error
        raise


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Five points of every image of a list."""

    path: str
    names: FirstWords = field(repr=False)
    points_N52: np.ndarray = field(repr=False)
    sorted_N: np.ndarray = field(repr=False)  # names as bytes
    row_N: np.ndarray = field(repr=False)  # of every sorted name

    def of(self, key: str) -> np.ndarray:
        """(5, 2). Raises ValueError for an image that is not listed."""
        wanted = os.fsencode(key)
        place = int(np.searchsorted(self.sorted_N, np.bytes_(wanted)))
        if place == len(self.sorted_N) or bytes(self.sorted_N[place]) != wanted:
            raise ValueError(f"{key} has no landmarks in {self.path}; add a line for it")
        return self.points_N52[self.row_N[place]]


def landmark_table(path: Path) -> Landmarks:
    """Landmarks of a list: ``image,x1,y1,…,x5,y5`` with that header in a ``.csv``, else ``image x1 y1 … x5 y5 score``.

    Raises:
        ValueError: a line without ten numbers, another header, or an image that is listed twice.
    """
    comma = path.suffix.lower() == ".csv"
    content = layout.text("landmarks", path).encode()
    header = content.partition(b"\n")[0].decode().strip().replace(" ", "").lower()
    if comma and header != COLUMNS:
        raise ValueError(f"landmarks: {path} must begin with the line {COLUMNS}, got {header[:80]!r}")
    names = first_words(content, b"," if comma else b" \t", skip=int(comma))
    points = numbers("landmarks", path, range(1, 11), np.float64, comma) if len(names) else np.zeros((0, 10))
    fixed_N = names.fixed()
    row_N = np.argsort(fixed_N, kind="stable")
    sorted_N = fixed_N[row_N]
    twice_N = np.flatnonzero(sorted_N[1:] == sorted_N[:-1])
    if len(twice_N):
        raise ValueError(f"landmarks: {path} lists {names[int(row_N[twice_N[0]])]} twice; keep one line")
    return Landmarks(str(path), names, points.reshape(-1, 5, 2), sorted_N, row_N)


@lru_cache(maxsize=4)
def _table(path: str, changed: int) -> Landmarks:
    return landmark_table(Path(path))  # read anew where the file's time has changed


def aligned_by(name: str, root: Path, keys: Sequence[str], landmarks: Path) -> Aligned:
    """A reader of images below a root that aligns them by a list. Raises ValueError for images that the list lacks."""
    known = landmark_table(landmarks)
    lacking = np.flatnonzero(~np.isin(np.array([os.fsencode(key) for key in keys]), known.sorted_N))
    if len(lacking):
        raise ValueError(
            f"{name}: {len(lacking):,} of {len(keys):,} images have no landmarks in {landmarks}, first "
            f"{printable(keys[int(lacking[0])])}; add their lines"
        )
    return Aligned(str(root), str(landmarks))


def aligned_or_as_is(name: str, root: Path, keys: Sequence[str], landmarks: Path) -> Aligned | Folder:
    """A reader of images below a root: aligned by a list of landmarks where there is one, else as they are.

    Raises:
        ValueError: images that the list lacks, or without a list images that are not aligned.
    """
    if landmarks.is_file():
        return aligned_by(name, root, keys, landmarks)
    wrong = [key for key in keys if _size(root / key) != (SIZE, SIZE)]
    if wrong:
        width, height = _size(root / wrong[0])
        raise ValueError(
            f"{name}: {len(wrong):,} of {len(keys):,} images are not {SIZE} × {SIZE}, first {wrong[0]} of {width} × "
            f"{height}, and there is no {landmarks}; faces that are not aligned cost 6 to 14 points of accuracy, so "
            f"put five landmarks of every image there ({COLUMNS}), or align the images"
        )
    return Folder(str(root))


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as stored:  # reads the header alone
            return stored.size
    except Exception as error:  # whatever a damaged file makes the decoder raise, the file's name matters
        raise OSError(f"{path} is no image that can be read: {error}") from error
