"""Verification packs: encoded face images, two and two compared, and whether they show one person.

``<name>.bin`` is a pickle of (list of 2P encoded images, list of P truth values), written by Python 2 or 3; images 2i
and 2i + 1 are pair i. A pickle can run programs: the few names that such packs need stand for stand-ins made here,
which build bytes and truth values, and every other name is refused before anything is called.

``<name>.npz`` is the safe form: ``encoded`` uint8, all images one after the other; ``offset`` int64 (2P + 1,), where
each begins and the last ends; ``same`` bool (P,). It holds no object.
"""

# Shape legend:
#   P = pairs, H, W = pixels

import io
import math
import operator
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orchestrator.datasets.images import decode, size_of

_BYTES = 2 << 30  # of a pack; the largest public one has about 0.2 GiB
_PIXELS = 1 << 24  # of an image
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}


class Encoded(NamedTuple):
    """A pack whose images were not decoded yet."""

    encoded: Sequence[bytes]  # 2P
    same_P: np.ndarray  # bool


@dataclass(frozen=True, eq=False)
class Pictures(Sequence[np.ndarray]):
    """uint8 RGB (H, W, 3), decoded when they are asked for."""

    encoded: Sequence[bytes] = field(repr=False)
    size: int | None  # of the shorter side; None: as stored

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> np.ndarray:
        image = decode(self.encoded[operator.index(index)])
        short = min(image.size)
        if self.size is not None and short != self.size:
            width, height = (max(self.size, round(side * self.size / short)) for side in image.size)
            image = image.resize((width, height))
        return np.array(image)


class Pack(NamedTuple):
    """A pack whose images can all be decoded."""

    images: Pictures  # 2P
    same_P: np.ndarray  # bool


def load(path: str | Path, size: int | None = 112) -> Pack:
    """A pack of either form, every image decoded once to see that it can be.

    Args:
        path: ``.npz`` is the safe form, any other ending the pickled one.
        size: pixels of the shorter side, to which other images are resized; None leaves them as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a forbidden name in the pickle (nothing was called), damaged, wrong types or numbers, too large, or
            an image that cannot be decoded, by its number.
    """
    found = opened(path)
    for number, data in enumerate(found.encoded):
        try:
            height, width = size_of(data)
            if height * width > _PIXELS:
                raise ValueError(f"{height} × {width} pixels, more than {_PIXELS:,} are refused")
            decode(data)
        except Exception as error:  # whatever damaged data make the decoder raise
            raise ValueError(f"{path}: image {number} cannot be decoded: {_line(error)}; get the pack anew") from error
    return Pack(Pictures(found.encoded, size), found.same_P)


def opened(path: str | Path) -> Encoded:
    """A pack of either form, its types and numbers checked, no image decoded; raises as :func:`load` but for that."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such verification pack")
    if path.stat().st_size > _BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, packs of more than {_BYTES:,} are refused")
    try:
        found = _unzipped(path) if path.suffix == ".npz" else _unpickled(path.read_bytes())
        if len(found.encoded) != 2 * len(found.same_P) or not len(found.same_P):
            raise ValueError(
                f"{len(found.encoded)} images and {len(found.same_P)} flags, expected two images a flag; get it anew"
            )
        if sum(map(len, found.encoded)) > _BYTES:
            raise ValueError(f"images of more than {_BYTES:,} bytes")
    except Exception as error:  # damaged files make both formats raise anything
        raise ValueError(f"{path}: no verification pack: {_line(error)}") from error
    return found


def save(path: str | Path, encoded: Sequence[bytes], same_P: Sequence[bool] | np.ndarray) -> None:
    """Writes the safe form, under another name until it is complete.

    Raises:
        ValueError: not two images for each truth value.
    """
    path = Path(path)
    if len(encoded) != 2 * len(same_P):
        raise ValueError(
            f"{path}: {len(encoded)} images and {len(same_P)} flags, expected two images a flag; get it anew"
        )
    offset = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(hidden, "wb") as file:
            np.savez(file, encoded=np.frombuffer(b"".join(encoded), np.uint8), offset=offset,
                     same=np.asarray(same_P, bool))  # fmt: skip
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def _line(error: Exception) -> str:
    text = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))  # what Pillow calls a picture without a file
    return " ".join(text.split()) or type(error).__name__


def _unzipped(path: Path) -> Encoded:
    with zipfile.ZipFile(path) as archive:
        stored = sum(member.file_size for member in archive.infolist())
    if stored > _BYTES:
        raise ValueError(f"{stored:,} bytes when unpacked, more than {_BYTES:,} are refused")
    with np.load(path, allow_pickle=False) as arrays:
        encoded, offset, same_P = (arrays[name] for name in ("encoded", "offset", "same"))
    types = [(encoded, np.uint8), (offset, np.int64), (same_P, np.bool_)]
    if any(array.ndim != 1 or array.dtype != kind for array, kind in types):
        found = ", ".join(f"{array.dtype} {array.shape}" for array, _ in types)
        raise ValueError(f"encoded, offset and same are {found}, expected uint8, int64 and bool of one dimension")
    if not len(offset) or offset[0] != 0 or offset[-1] != len(encoded) or (np.diff(offset) < 0).any():
        raise ValueError(f"offsets must rise from 0 to the {len(encoded):,} bytes of the images")
    data, bounds = encoded.tobytes(), offset.tolist()
    return Encoded(tuple(data[a:b] for a, b in pairwise(bounds)), same_P)


def _unpickled(data: bytes) -> Encoded:
    # A memo index of four billion in a file of ten bytes would have the reader take 60 GB.
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if operation.name in _PUTS and argument > count:
            raise ValueError(f"memo index {argument} after {count} operations")
    found = _Unpickler(data).load()
    if not isinstance(found, tuple | list) or len(found) != 2 or not all(isinstance(part, list) for part in found):
        raise ValueError(f"expected (images, flags), two lists, found {type(found).__name__}")
    images, flags = found
    wrong = next((i for i, flag in enumerate(flags) if not isinstance(flag, bool)), None)
    if wrong is not None:
        raise ValueError(f"flag {wrong} is {type(flags[wrong]).__name__}, expected a truth value")
    return Encoded(tuple(_image(i, image) for i, image in enumerate(images)), np.array(flags, bool))


def _image(number: int, entry: Any) -> bytes:
    if isinstance(entry, bytes):
        return entry
    if not isinstance(entry, _Array) or entry.raw is None:
        kind = "text" if isinstance(entry, str) else type(entry).__name__
        raise ValueError(f"image {number} is {kind}, expected encoded bytes or a uint8 array")
    count = math.prod(entry.shape)
    if entry.dtype.code != "u1" or entry.shape not in ((count,), (count, 1)) or count != len(entry.raw):
        raise ValueError(
            f"image {number} is an array of {entry.dtype.code} {entry.shape} with {len(entry.raw)} bytes, "
            f"expected uint8 (n,) or (n, 1)"
        )
    return entry.raw


class _Type:
    """Stands for numpy.dtype of a code such as u1; what a pickle says further of it is not needed."""

    def __init__(self, code: Any, *rest: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else str(code)

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands for numpy.ndarray: what a pickle says of one, checked when it is used."""

    raw: bytes | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, raw = state
        self.fill(shape, dtype, raw)

    def fill(self, shape: Any, dtype: Any, raw: Any) -> None:
        if not isinstance(dtype, _Type) or not isinstance(raw, bytes):
            raise ValueError(f"an array of {type(dtype).__name__} and {type(raw).__name__} is no array of bytes")
        if not isinstance(shape, tuple) or not all(isinstance(side, int) and side >= 0 for side in shape):
            raise ValueError(f"an array of shape {shape!r}")
        self.shape, self.dtype, self.raw = shape, dtype, raw


def _array(*ignored: Any) -> _Array:
    """Stands for ``_reconstruct``: an array whose content follows."""
    return _Array()


def _truth(dtype: Any, raw: Any) -> bool:
    if not isinstance(dtype, _Type) or dtype.code != "b1" or not isinstance(raw, bytes) or len(raw) != 1:
        raise ValueError("a number that is no truth value")
    return raw != b"\0"


class _Unpickler(pickle.Unpickler):
    """Knows the stand-ins alone; nothing of numpy, nor of this file, can be reached or changed from a pickle."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        left = len(data)

        def copied(content: bytearray | str) -> bytes:
            """One text that is copied a thousand times would make gigabytes of a small file."""
            nonlocal left
            left -= len(content)
            if left < 0:
                raise ValueError("more bytes than the file has")
            return content.encode("latin1") if isinstance(content, str) else bytes(content)

        def encode(text: Any, encoding: Any = "latin1") -> bytes:
            """Stands for ``_codecs.encode``: how Python 3 writes bytes for Python 2."""
            if not isinstance(text, str) or encoding not in ("latin1", "latin-1", b"latin1", b"latin-1"):
                raise ValueError(f"text encoded as {encoding!r}, expected latin1")
            return copied(text)

        def from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
            """Stands for ``_frombuffer``: an array with its content."""
            found = _Array()
            found.fill(shape, dtype, copied(buffer) if isinstance(buffer, bytearray) else buffer)
            return found

        # Wrapped anew for each file: a pickle may set attributes of what it is given.
        calls: dict[tuple[str, str], Callable[..., Any]] = {("_codecs", "encode"): encode}
        for core in ("numpy.core", "numpy._core"):
            calls[f"{core}.multiarray", "_reconstruct"] = _array
            calls[f"{core}.multiarray", "scalar"] = _truth
            calls[f"{core}.numeric", "_frombuffer"] = from_buffer
        calls["numpy", "dtype"] = _Type
        calls["numpy", "ndarray"] = _array
        self._calls = {name: _Call(call) for name, call in calls.items()}

    def find_class(self, module: str, name: str) -> "_Call":
        if (module, name) not in self._calls:
            raise pickle.UnpicklingError(
                f"{module}.{name} is forbidden; nothing was executed; a pack holds lists, bytes and numpy arrays, "
                f"get it from whom you trust"
            )
        return self._calls[module, name]


class _Call:
    """A function that a pickle can call and do nothing else with."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a name of the allow-list cannot be changed")
