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
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

from orchestrator.needs import digest, streamed_digest

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff"}


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


@dataclass(frozen=True)
class ImageSet:
    """Images of one side of a protocol. ``identity`` and ``camera`` are whole numbers, -1 = unknown."""

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

    @cached_property
    def num_identities(self) -> int:
        return len(np.unique(self.identity))

    def part(self, chosen: np.ndarray, name: str) -> "ImageSet":
        """The images of a mask, as a set of another name."""
        rows = np.flatnonzero(chosen)
        camera = None if self.camera is None else self.camera[rows]
        return ImageSet(name, Chosen(self.keys, rows).listed(), self.identity[rows], self.reader, camera)


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


def decode(data: bytes) -> Image.Image:
    """An RGB image; transparency is laid on white. Raises OSError for damaged or truncated data."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")


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
