"""Sets of labelled images, and how their pixels are read."""

import importlib
import io
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

from orchestrator.needs import digest, streamed_digest

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp"}
IMAGE_SUFFIXES |= {".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".tga", ".qoi"}
# Pillow can be built without these two.
IMAGE_SUFFIXES |= {".avif"} if "avif" in features.get_supported() else set()
IMAGE_SUFFIXES |= {".jp2", ".j2k", ".jpf", ".jpx"} if "jpg_2000" in features.get_supported() else set()

_ORIENTATION = 0x0112  # the EXIF tag: how a picture lies in its file
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Reader(Protocol):
    """Where encoded images come from: a dataclass of plain values, safe to use in forked and threaded workers.

    A reader that knows a checksum of every image without reading it may have a method ``checksum(key) -> bytes`` of
    32 bytes; its images are then not decoded before they are trained on.
    """

    def read(self, key: str) -> bytes: ...

    def stamp(self, keys: Sequence[str]) -> str:
        """Changes whenever the stored bytes may have changed; cheap, reads no image."""
        ...


@dataclass(frozen=True)
class Folder:
    """Files below a root; keys are relative paths."""

    root: str

    def read(self, key: str) -> bytes:
        return (Path(self.root) / key).read_bytes()

    def stamp(self, keys: Sequence[str]) -> str:
        def stats(start: int) -> list[list[Any]]:
            part = (keys[i] for i in range(start, min(start + 65_536, len(keys))))
            found = [(key, os.stat(f"{self.root}/{key}")) for key in part]
            return [[key, s.st_size, s.st_mtime_ns] for key, s in found]

        return streamed_digest(map(stats, range(0, len(keys), 65_536)))


@dataclass(frozen=True)
class Zip:
    """Members of a zip archive, read in place; keys are member names."""

    path: str

    def read(self, key: str) -> bytes:
        return _open_zip(self.path, os.getpid()).read(key)

    def stamp(self, keys: Sequence[str]) -> str:
        stat = os.stat(self.path)
        return digest([self.path, stat.st_size, stat.st_mtime_ns])


_ZIPS: dict[tuple[str, int], zipfile.ZipFile] = {}


def _open_zip(path: str, process: int) -> zipfile.ZipFile:
    # One handle per process: forked workers share file offsets.
    if (path, process) not in _ZIPS:
        _ZIPS[path, process] = zipfile.ZipFile(path)
    return _ZIPS[path, process]


def described(reader: Any) -> dict[str, Any]:
    """A reader as JSON values, so that a trial can open it without listing the data; :func:`rebuilt` reads them."""
    values = {f.name: getattr(reader, f.name) for f in fields(reader)}
    plain = {name: described(value) if is_dataclass(value) else value for name, value in values.items()}
    return {"reader": f"{type(reader).__module__}:{type(reader).__qualname__}", "fields": plain}


def rebuilt(plain: Mapping[str, Any]) -> Reader:
    """The reader that was described.

    Raises:
        ValueError: the class is not one of this project's readers, nor one that the program has loaded itself.
    """
    module, _, name = plain["reader"].partition(":")
    if not module.startswith("orchestrator.datasets.") and module not in sys.modules:
        raise ValueError(f"{plain['reader']!r} is no reader of orchestrator.datasets; prepare the data again")
    inside = {k: rebuilt(v) if isinstance(v, dict) and "reader" in v else v for k, v in plain["fields"].items()}
    return getattr(importlib.import_module(module), name)(**inside)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one side of a protocol. ``identity`` and ``camera`` are whole numbers, -1 = unknown.

    A set equals itself alone: fingerprints say whether two sets hold the same.
    """

    name: str  # such as "omniglot/train"
    keys: Sequence[str] = field(repr=False)
    identity: np.ndarray = field(repr=False)
    reader: Reader = field(repr=False)
    camera: np.ndarray | None = field(default=None, repr=False)
    fingerprint: str = ""  # of keys, labels and image bytes; known once the set is indexed

    def __post_init__(self):
        counts = {len(self.keys), len(self.identity)} | ({len(self.camera)} if self.camera is not None else set())
        if len(counts) != 1:
            raise ValueError(f"{self.name}: keys, identities and cameras differ in number: {sorted(counts)}")

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def labels(self) -> np.ndarray:
        """Class index 0 … C-1 of every image, classes in sorted order of identity."""
        return np.unique(self.identity, return_inverse=True)[1]

    @property
    def cameras(self) -> np.ndarray:
        """Camera of every image, -1 where the set has none."""
        return np.full(len(self), -1) if self.camera is None else self.camera

    @cached_property
    def num_identities(self) -> int:
        return len(np.unique(self.identity))

    def part(self, chosen: np.ndarray, name: str) -> "ImageSet":
        """The images of a mask, as a set of another name."""
        rows = np.flatnonzero(chosen)
        camera = None if self.camera is None else self.camera[rows]
        keys = Chosen(self.keys, rows)
        # A list that makes its keys when they are asked for, of millions of images, stays one.
        keys = keys.listed() if isinstance(self.keys, tuple | list) else keys
        return ImageSet(name, keys, self.identity[rows], self.reader, camera)


@dataclass(frozen=True)
class Chosen(Sequence[str]):
    """Some keys of a long list, in another order or fewer."""

    keys: Sequence[str]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        return self.keys[int(self.rows[index])]

    def listed(self) -> tuple[str, ...]:
        return tuple(self)


@dataclass(frozen=True)
class RetrievalData:
    """A benchmark: what is trained on, searched with and searched in, and the rule of the search."""

    train: ImageSet
    query: ImageSet
    gallery: ImageSet
    leave_one_out: bool = False  # query and gallery are the same set; an image does not find itself
    camera_filter: bool = False  # gallery images of the query's identity and camera are removed
    notice: str = ""  # what a user of the data should know, printed before every run

    def __post_init__(self):
        if self.leave_one_out and self.query is not self.gallery and tuple(self.query.keys) != tuple(self.gallery.keys):
            raise ValueError("leave-one-out needs the same images on both sides")
        if self.camera_filter and (self.query.camera is None or self.gallery.camera is None):
            raise ValueError("the camera rule needs cameras on both sides")

    @property
    def protocol(self) -> str:
        """One line for people, printed before every run."""
        rule = "each image against all others" if self.leave_one_out else "query against gallery"
        rule += ", same identity and camera removed" if self.camera_filter else ""
        sides = [f"{side} {len(s):,}/{s.num_identities:,}" for side, s in self.sets().items()]
        return f"images/identities: {', '.join(sides)}; {rule}"

    def sets(self) -> dict[str, ImageSet]:
        return {"train": self.train, "query": self.query} | ({} if self.leave_one_out else {"gallery": self.gallery})


def lost_queries(data: RetrievalData) -> tuple[int, str]:
    """How many queries have nothing to find, and why: each reason with count, first query, remedy."""
    queries = len(data.query)
    itself = int(data.leave_one_out or (data.camera_filter and data.query is data.gallery))
    identity = _numbered(np.concatenate([data.query.identity, data.gallery.identity]))
    others = _times(identity, queries) - itself
    left = others
    if data.camera_filter:  # the query itself is of its identity and camera, so it goes with them
        camera = _numbered(np.concatenate([data.query.camera, data.gallery.camera]))
        left = others + itself - _times(_numbered(identity * len(camera) + camera), queries)
    if itself:
        alone, remedy = "are the only image of their identity", "two or more are needed"
    else:
        alone, remedy = "have no image of their identity in the gallery", "both sides must name identities alike"
    removed = "have only images of their own camera to find, which the camera rule removes"
    reasons = (
        (others < 1, alone, remedy),
        ((others > 0) & (left < 1), removed, "a second camera must have seen their identity"),
    )
    said = [
        f"{lost.sum():,} {why}, first {printable(data.query.keys[int(lost.argmax())])} ({advice})"
        for lost, why, advice in reasons
        if lost.any()
    ]
    return int((left < 1).sum()), " and ".join(said)


def check_findable(data: RetrievalData) -> None:
    """Raises ValueError with the reason if no query has an image to find: nothing can be measured."""
    count, why = lost_queries(data)
    if count == len(data.query):
        raise ValueError(f"{data.query.name}: none of {count:,} queries can find anything: {why}")


def _numbered(values: np.ndarray) -> np.ndarray:
    """Every value as its place among the different ones, from 0."""
    return np.unique(values, return_inverse=True)[1]


def _times(number: np.ndarray, queries: int) -> np.ndarray:
    """(queries,) how often each of the first numbers is among the rest, which are the gallery's."""
    return np.bincount(number[queries:], minlength=len(number))[number[:queries]]


def printable(path: str) -> str:
    """A file name that is no UTF-8 with those bytes escaped, so that it can be shown and logged.

    >>> printable("Stra\\udcdfe.png")
    'Stra\\\\udcdfe.png'
    """
    return path.encode("utf-8", "backslashreplace").decode()


def check_labels(labels: np.ndarray, classes: int) -> None:
    """Raises ValueError unless every label is one of the classes of a network, 0 … classes - 1.

    To be called once, where the labels are on the host: a loss that looked would wait for the device at every step.
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels must be 0 to {classes - 1}, the classes of the classifier, got {labels.min()} to {labels.max()}; "
            f"is this the data the networks were made for?"
        )


def decode(data: bytes) -> Image.Image:
    """An RGB image, turned upright; transparency is laid on white, wide greys are scaled to 8 bits.

    Of an animation or of several pages, the first. Raises OSError for damaged or truncated data.
    """
    return decode_and_tell(data)[0]


def decode_and_tell(data: bytes) -> tuple[Image.Image, bool]:
    """The decoded image, and whether it was turned or scaled, which versions before 0.4 did not do."""
    with Image.open(io.BytesIO(data)) as stored:
        stored.load()
        image = eight_bit(upright(stored))
        mended = image is not stored
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), mended
        return image.convert("RGB"), mended


def size_of(data: bytes) -> tuple[int, int]:
    """Height and width of the decoded image, from its header alone."""
    with Image.open(io.BytesIO(data)) as stored:
        turned = stored.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        return stored.size if turned else stored.size[::-1]


def upright(image: Image.Image) -> Image.Image:
    """A loaded picture as its EXIF orientation says it is to be seen."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # whatever damaged metadata makes the parser raise, the pixels are whole
        return image
    return image.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else image


def eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or fractions scaled to 8 bits; any other picture as it is.

    Black to white is the first range that holds all values of the picture: of whole numbers 0 to 255
    and 0 to 65,535, of fractions 0 to 1 and 0 to 255; else its own least to greatest value. What is
    not finite is black or white.
    """
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    known = (1, 255) if image.mode == "F" else (255, 65_535)
    black, white = next(((0, top) for top in known if low >= 0 and high <= top), (low, high))
    scaled = np.nan_to_num((values - black) / ((white - black) or 1), nan=0.0, posinf=1.0, neginf=0.0)
    grey = Image.fromarray((scaled * 255).round().clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # the one value that is clear
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def frame(image: Image.Image, size: tuple[int, int], resize: str = "bilinear") -> Tensor:
    """uint8 (3, H, W), resized exactly to ``size`` with anti-aliased interpolation, bilinear or bicubic."""
    pixels = transform.pil_to_tensor(image)
    mode = transform.InterpolationMode(resize)
    return transform.resize(pixels, list(size), interpolation=mode, antialias=True)


@dataclass(frozen=True)
class Frames:
    """Reads and resizes images on request: the slow but always possible source of pixels."""

    images: ImageSet
    size: tuple[int, int]
    resize: str = "bilinear"

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """uint8 (B, 3, H, W). Raises OSError that names the image."""
        return torch.stack([frame(_decoded(self.images, int(i)), self.size, self.resize) for i in indices])


def _decoded(images: ImageSet, index: int) -> Image.Image:
    key = images.keys[index]
    try:
        return decode(images.reader.read(key))
    except Exception as error:  # whatever a damaged file makes the decoder raise, the file's name matters
        raise OSError(f"{images.name}: cannot read image {key!r}: {error}") from error


class _Fetch(torch.utils.data.Dataset):
    def __init__(self, function):
        self.function = function

    def __getitems__(self, indices: Any) -> Any:
        return self.function(indices)


def _as_is(batch: Any) -> Any:
    return batch


def fetch(function, requests: Iterable[Any], workers: int = 0) -> Iterator[Any]:
    """``function(request)`` for every request in order, computed ahead by worker processes when there are any."""
    if workers == 0:
        yield from map(function, requests)
        return
    loader = torch.utils.data.DataLoader(
        _Fetch(function), batch_sampler=requests, num_workers=workers, collate_fn=_as_is, prefetch_factor=4
    )
    yield from loader
