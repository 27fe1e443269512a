"""Sets of labelled images, and how their pixels are read."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff"}


class Reader(Protocol):
    """Where encoded images come from. Picklable; safe to use in forked and threaded workers."""

    def read(self, key: str) -> bytes: ...

    def stamp(self) -> str:
        """Changes whenever the stored bytes may have changed; cheap, reads no image."""
        ...


@dataclass(frozen=True)
class Folder:
    """Files below a root; keys are relative paths."""

    root: str
    keys: tuple[str, ...] = field(repr=False)

    def read(self, key: str) -> bytes:
        return (Path(self.root) / key).read_bytes()

    def stamp(self) -> str:
        stats = ((key, os.stat(Path(self.root) / key)) for key in self.keys)
        return digest([[key, s.st_size, s.st_mtime_ns] for key, s in stats])


@dataclass(frozen=True)
class Zip:
    """Members of a zip archive, read in place; keys are member names."""

    path: str

    def read(self, key: str) -> bytes:
        return _open_zip(self.path, os.getpid()).read(key)

    def stamp(self) -> str:
        stat = os.stat(self.path)
        return digest([self.path, stat.st_size, stat.st_mtime_ns])


_ZIPS: dict[tuple[str, int], zipfile.ZipFile] = {}


def _open_zip(path: str, process: int) -> zipfile.ZipFile:
    # One handle per process: forked workers share file offsets.
    if (path, process) not in _ZIPS:
        _ZIPS[path, process] = zipfile.ZipFile(path)
    return _ZIPS[path, process]


@dataclass(frozen=True)
class ImageSet:
    """Images of one side of a protocol. ``identity`` and ``camera`` are whole numbers, -1 = unknown."""

    name: str  # such as "omniglot/train"
    keys: tuple[str, ...] = field(repr=False)
    identity: np.ndarray = field(repr=False)
    reader: Reader = field(repr=False)
    camera: np.ndarray | None = field(default=None, repr=False)
    fingerprint: str = ""  # of keys, labels and image bytes; set by orchestrator.cache.indexed

    def __post_init__(self):
        counts = {len(self.keys), len(self.identity)} | ({len(self.camera)} if self.camera is not None else set())
        if len(counts) != 1:
            raise ValueError(f"{self.name}: keys, identities and cameras differ in number: {sorted(counts)}")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def labels(self) -> np.ndarray:
        """Class index 0 … C-1 of every image, classes in sorted order of identity."""
        return np.unique(self.identity, return_inverse=True)[1]

    @property
    def num_identities(self) -> int:
        return len(np.unique(self.identity))

    def part(self, chosen: np.ndarray, name: str) -> "ImageSet":
        """The images of a mask, as a set of another name."""
        keys = tuple(key for key, c in zip(self.keys, chosen, strict=True) if c)
        camera = None if self.camera is None else self.camera[chosen]
        reader = Folder(self.reader.root, keys) if isinstance(self.reader, Folder) else self.reader
        return ImageSet(name, keys, self.identity[chosen], reader, camera)


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
        if self.leave_one_out and self.query.keys != self.gallery.keys:
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
        _Fetch(function), batch_sampler=list(requests), num_workers=workers, collate_fn=_as_is, prefetch_factor=4
    )
    yield from loader


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""

    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
