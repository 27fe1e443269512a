"""Packed training faces and verification packs, as MS1MV2, MS1MV3, Glint360K and CASIA-WebFace are passed on.

    <data-root>/train.rec, train.idx     aligned faces; without the .idx the records are counted, which is said
    <data-root>/property                 classes,height,width
    <data-root>/lfw.bin, agedb_30.bin …  verification packs; of lfw.bin and lfw.npz the .npz, which is safe, is read

Labels are found once and kept in ``train.index.npz`` beside the ``.rec``. Where key 0 says which keys describe
identities, two headers of each identity are read; otherwise, or where these two disagree, all.

``evaluate_on="validation"`` verifies on the last tenth of the training identities and needs no pack.
"""

# Shape legend:
#   N = images, I = identities, P = pairs

import hashlib
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orchestrator.datasets import faces, layout, verification_pack
from orchestrator.datasets.faces import FaceData, Pairs
from orchestrator.datasets.images import ImageSet, decode
from orchestrator.datasets.recordio import Headers, RecordIO, headers, record_at
from orchestrator.needs import digest

_LAYOUT = "train.rec, train.idx, property and verification packs (*.bin or *.npz)"
_SIDE = 112  # pixels of an aligned face
_EXACT = 2**24  # up to here every whole number is a float32
_FOLDS = 10
_PUBLIC = {
    (490_623, 10_572): "CASIA-WebFace",
    (5_822_653, 85_742): "MS1MV2",
    (5_179_510, 93_431): "MS1MV3",
    (17_091_657, 360_232): "Glint360K",
    (4_235_242, 205_990): "WebFace4M",
    (12_720_066, 617_970): "WebFace12M",
    (42_474_557, 2_059_906): "WebFace42M",
}
PRIVACY = (
    "face images are biometric data, and public training sets were collected without consent: use them for research "
    "that your law and their terms allow, never to identify people without their consent"
)


class Index(NamedTuple):
    """The images of a ``.rec``."""

    key_N: np.ndarray  # int64, ascending
    offset_N: np.ndarray  # int64, byte of the record
    label_N: np.ndarray  # int32


@dataclass(frozen=True, eq=False)
class Keys(Sequence[str]):
    """``key@offset`` of every image, made when it is asked for: millions of texts would be gigabytes."""

    key_N: np.ndarray = field(repr=False)
    offset_N: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.key_N)

    def __getitem__(self, index: int) -> str:
        return f"{self.key_N[index]}@{self.offset_N[index]}"


@dataclass(frozen=True)
class Records:
    """Images of a ``.rec``; a key holds the place of its record, so that no index is needed to read it."""

    path: str

    def read(self, key: str) -> bytes:
        """The encoded image; raises ValueError by file and byte offset where there is none."""
        offset = int(key.partition("@")[2])
        image = record_at(self.path, offset).image
        if not image:
            raise ValueError(f"{self.path}: byte {offset}: the record holds no image")
        return image

    def stamp(self, keys: Sequence[str]) -> str:
        stat = os.stat(self.path)
        return digest([self.path, stat.st_size, stat.st_mtime_ns])

    def checksum(self, key: str) -> bytes:
        """Of size and time of the file and the key: 100 GB are not read to index them. The same where it is moved."""
        stat = os.stat(self.path)
        return hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} {key}".encode()).digest()


@dataclass(frozen=True)
class PackImages:
    """Images of a verification pack by their number; a process opens the pack once."""

    path: str

    def read(self, key: str) -> bytes:
        stat = os.stat(self.path)
        return _pack(self.path, stat.st_size, stat.st_mtime_ns).encoded[int(key)]

    def stamp(self, keys: Sequence[str]) -> str:
        stat = os.stat(self.path)
        return digest([self.path, stat.st_size, stat.st_mtime_ns])

    def checksum(self, key: str) -> bytes:
        """Of the bytes, once they were decoded: pairs count on every image, so none can be left out later.

        Raises:
            ValueError: the image cannot be decoded.
        """
        data = self.read(key)
        try:
            decode(data)
        except Exception as error:  # whatever damaged data make the decoder raise
            raise ValueError(f"{self.path}: image {key} cannot be decoded: {error}; get the pack anew") from error
        return hashlib.sha256(data).digest()


# Plain bytes, so that forked workers share them; a pack has about 100 MB.
@lru_cache(maxsize=2)
def _pack(path: str, size: int, time: int) -> verification_pack.Encoded:
    return verification_pack.opened(path)


def load(data_root: str, evaluate_on: str = "test", expected: str = "") -> FaceData:
    """Raises FileNotFoundError (what is missing) and ValueError (damaged, or labels that ``property`` denies).

    ``expected`` is the public set that this should be; another number of records or people is told in the notice, not
    refused: copies differ, and so do the numbers that are published of them.
    """
    layout.check_part("face_records", evaluate_on)
    root = layout.data_folder("face_records", data_root, _LAYOUT)
    for name in ("train.rec", "property"):
        if not (root / name).is_file():
            raise FileNotFoundError(f"face_records: no {name} in {root}; it must hold {_LAYOUT}")
    packs = _packs(root) if evaluate_on == "test" else {}
    if evaluate_on == "test" and not packs:
        raise FileNotFoundError(
            f"face_records: no verification pack in {root}; add packs such as lfw.bin, or verify on held-out "
            f"identities with --set data.part=validation"
        )
    index = open_index(root / "train.rec")
    classes, height, width = _property(root / "property")
    labels = np.unique(index.label_N)
    if len(labels) != classes or labels[-1] >= classes:
        raise ValueError(
            f"face_records: {root / 'property'} says {classes:,} classes, train.rec has {len(labels):,} different "
            f"labels up to {labels[-1]:,}; correct the property, or number labels from 0 without gaps"
        )
    notice = [PRIVACY]
    known = _PUBLIC.get((len(index.key_N), len(labels)))
    if expected and known != expected:
        images, people = next(counts for counts, name in _PUBLIC.items() if name == expected)
        notice.append(
            f"{expected} has {images:,} images of {people:,} people, these are {len(index.key_N):,} of {len(labels):,}"
        )
    if known:
        notice.append(f"these are the counts of {known}, for non-commercial research alone")
    if (height, width) != (_SIDE, _SIDE):
        notice.append(f"faces have {height} × {width} pixels, not {_SIDE} × {_SIDE}, and are resized")
    keys, reader = Keys(index.key_N, index.offset_N), Records(str(root / "train.rec"))
    train = ImageSet("face_records/train", keys, index.label_N.astype(np.int64), reader)
    verification = {name: _pairs(name, path) for name, path in packs.items()}
    notice += [f"{name} has no {_FOLDS} folds of equal size, so its accuracy is that at equal error rates"
               for name, pairs in verification.items() if not pairs.folds]  # fmt: skip
    data = FaceData(train, verification, "; ".join(notice))
    return data if evaluate_on == "test" else faces.held_out(data)


def open_index(path: str | Path) -> Index:
    """Keys, offsets and labels of the images of a ``.rec``, from ``<stem>.index.npz`` beside it where that is of
    these files, made anew and kept there otherwise; where it cannot be kept, a warning says so.

    Raises:
        FileNotFoundError: no such ``.rec``.
        ValueError: damaged, no image, or a label that is no whole number from 0 to 2²⁴.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    kept = path.with_suffix(".index.npz")
    stamp = [value for one in (path, path.with_suffix(".idx")) for value in _size_and_time(one)]
    try:
        with np.load(kept, allow_pickle=False) as stored:
            if stored["stamp"].tolist() == stamp:
                return Index(stored["key"], stored["offset"], stored["label"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there or damaged: it is made anew
    index = _indexed(RecordIO(path))
    hidden = kept.with_name(f".{kept.name}.{os.getpid()}")
    try:
        with open(hidden, "wb") as file:
            np.savez(file, stamp=stamp, key=index.key_N, offset=index.offset_N, label=index.label_N)
        os.replace(hidden, kept)
    except OSError as error:
        hidden.unlink(missing_ok=True)
        warnings.warn(f"{kept} cannot be written ({error.strerror}): the index is made anew each time", stacklevel=2)
    return index


def _size_and_time(path: Path) -> tuple[int, int]:
    stat = path.stat() if path.is_file() else None
    return (stat.st_size, stat.st_mtime_ns) if stat else (-1, -1)


def _indexed(records: RecordIO) -> Index:
    key_N, offset_N = records.keys, records.offsets
    if not len(key_N):
        raise ValueError(f"{records.path}: no record in the file")
    # Headers are read of few records, so that the end of the file is looked at here.
    headers(records.path, offset_N[[int(offset_N.argmax())]])
    first = records.record(int(key_N[0]))
    described = key_N[0] == 0 and first.flag == 2 and not first.image
    if not described:
        return _all_headers(records, np.ones(len(key_N), bool))
    images_end, end = (float(value) for value in first.labels_K)
    if not (images_end.is_integer() and end.is_integer() and 1 <= images_end <= end):
        raise ValueError(f"{records.path}: key 0 says images end at key {images_end} and identities at {end}")
    if end > _EXACT:  # the two numbers may be rounded: what holds an image is one
        return _all_headers(records, key_N > 0)
    images_N, identities_N = (key_N > 0) & (key_N < images_end), (key_N >= images_end) & (key_N < end)
    label_N = _labels_of_ranges(records, np.flatnonzero(images_N), np.flatnonzero(identities_N))
    if label_N is None:
        return _all_headers(records, images_N)
    return Index(key_N[images_N], offset_N[images_N], label_N)


def _labels_of_ranges(records: RecordIO, image_N: np.ndarray, identity_I: np.ndarray) -> np.ndarray | None:
    """Labels from the first and last image of each identity; None where the ranges do not tell.

    Args:
        records: whose key 0 describes them.
        image_N: rows of the images.
        identity_I: rows of the records that describe identities.
    """
    said = headers(records.path, records.offsets[identity_I])
    first_I, end_I = said.label_N.astype(np.int64), said.second_N.astype(np.int64)
    order = np.argsort(first_I, kind="stable")
    order = order[first_I[order] < end_I[order]]
    first_I, end_I = first_I[order], end_I[order]
    key_N = records.keys[image_N]
    contiguous = len(key_N) and key_N[0] == 1 and key_N[-1] == len(key_N)
    covered = len(first_I) and first_I[0] == 1 and end_I[-1] == len(key_N) + 1 and (first_I[1:] == end_I[:-1]).all()
    if not (contiguous and covered and (said.flag_N == 2).all()):
        return None
    offset_N = records.offsets[image_N]
    begin, last = (headers(records.path, offset_N[key_I - 1]) for key_I in (first_I, end_I - 1))
    if not (begin.image_N.all() and last.image_N.all() and (begin.label_N == last.label_N).all()):
        return None
    return np.repeat(_whole(records, begin, offset_N[first_I - 1]), end_I - first_I)


def _all_headers(records: RecordIO, chosen_N: np.ndarray) -> Index:
    """The chosen records that hold an image."""
    key_N, offset_N = records.keys[chosen_N], records.offsets[chosen_N]
    found = headers(records.path, offset_N)
    if not found.image_N.any():
        raise ValueError(f"{records.path}: none of {len(key_N):,} records holds an image")
    key_N, offset_N = key_N[found.image_N], offset_N[found.image_N]
    return Index(key_N, offset_N, _whole(records, Headers(*(column[found.image_N] for column in found)), offset_N))


def _whole(records: RecordIO, found: Headers, offset_N: np.ndarray) -> np.ndarray:
    label_N = found.label_N
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero(~((label_N >= 0) & (label_N <= _EXACT) & (label_N == np.floor(label_N))))
    if len(wrong):
        raise ValueError(
            f"{records.path}: byte {offset_N[wrong[0]]}: label {label_N[wrong[0]]} is no whole number from 0 to 2**24"
        )
    return label_N.astype(np.int32)


def _property(path: Path) -> tuple[int, int, int]:
    words = layout.text("face_records", path).strip().split(",")
    if len(words) != 3 or not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"face_records: {path} is {','.join(words)[:80]!r}, expected classes,height,width")
    classes, height, width = map(int, words)
    return classes, height, width


def _packs(root: Path) -> dict[str, Path]:
    """Name -> file; the safe form where a pack is there in both."""
    files = sorted(p for p in root.iterdir() if p.suffix in (".bin", ".npz") and not p.name.endswith(".index.npz"))
    return {path.stem: path for path in files if path.name[0] != "."}


def _pairs(name: str, path: Path) -> Pairs:
    stat = path.stat()
    same_P = _pack(str(path), stat.st_size, stat.st_mtime_ns).same_P
    count = 2 * len(same_P)
    keys = tuple(map(str, range(count)))
    images = ImageSet(f"face_records/{name}", keys, np.full(count, -1), PackImages(str(path)))
    folds = 0 if len(same_P) % _FOLDS else _FOLDS
    return Pairs(images, np.arange(0, count, 2), np.arange(1, count, 2), same_P, folds)
