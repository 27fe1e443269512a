"""The index of a set of images: read once, then opened by a trial from its table alone.

The table holds key, identity, camera and class, SHA-256 and whether the image can be decoded. Its fingerprint
covers keys, labels and image bytes, not where the files lie.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import cache
from orchestrator.datasets.images import Chosen, ImageSet, decode_and_tell
from orchestrator.needs import Report, digest, silent, streamed_digest

_UNREADABLE_NAMED = 5
_BLOCK = 4096  # images that wait in the pool of threads at once
_UNREADABLE, _PLAIN, _MENDED = 0, 1, 2  # what the column "readable" holds


def index(images: ImageSet, root: str | Path, progress: Report = silent) -> cache.Rows:
    """The table of a set, after every image was read once: key, identity, camera and class, SHA-256, readable or not.

    A reader's own checksum stands for reading and decoding. A table is made again only when the listing or a file's
    size or time has changed.
    """
    camera = images.cameras
    listing = {
        "name": images.name,
        "stamp": images.reader.stamp(images.keys),
        "listing": listing_digest(images.keys, images.identity, camera),
        "keys": True,  # 0.3 stored none
    }

    def rows() -> Iterator[cache.Block]:
        checksum = getattr(images.reader, "checksum", None)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in cache.ranges(len(images), _BLOCK):
                keys = [images.keys[i] for i in part]
                if checksum is None:
                    found = list(pool.map(partial(_hash_and_decode, images), keys))
                else:
                    found = [(checksum(key), _PLAIN) for key in keys]
                span = slice(part.start, part.stop)
                labels = (images.identity[span], camera[span], images.labels[span])
                yield {
                    "key": keys,
                    "label": np.stack(labels, axis=1).astype(np.int64),
                    "sha256": np.frombuffer(b"".join(sha for sha, _ in found), np.uint8).reshape(-1, 32),
                    "readable": np.array([[ok] for _, ok in found], np.uint8),
                }
                progress(f"checking {images.name}", part.stop, len(images))

    return cache.ensure(root, "index", listing, rows, verify=True)


def indexed(images: ImageSet, root: str | Path, skip_unreadable: bool = False, progress: Report = silent) -> ImageSet:
    """The set as its table holds it, with its fingerprint: of keys, labels and image bytes, not of where they lie.

    Raises:
        OSError: some images cannot be decoded; names the first and counts all. With ``skip_unreadable`` they
            are left out instead, with a warning that says the same.
    """
    return checked(images, index(images, root, progress), skip_unreadable)


_REMEDY = "repair them or leave them out with --set skip_unreadable=true"


def checked(images: ImageSet, table: cache.Rows, skip_unreadable: bool = False, remedy: str = _REMEDY) -> ImageSet:
    """The set as its table holds it; see :func:`indexed`."""
    broken = np.flatnonzero(table.all("readable")[:, 0] == 0)
    if len(broken):
        keys = [images.keys[int(i)] for i in broken[:_UNREADABLE_NAMED]]
        named = ", ".join(keys) + (", …" if len(broken) > _UNREADABLE_NAMED else "")
        message = f"{images.name}: {len(broken)} of {len(images)} images cannot be read: {named}"
        if not skip_unreadable:
            raise OSError(f"{message}; {remedy}")
        warnings.warn(f"{message}; left out", stacklevel=2)
    found = open_index(table.folder, images.name, images.reader, images.camera is not None)
    readable = np.flatnonzero(table.all("readable")[:, 0])
    parts = cache.ranges(len(readable), 65_536)
    hashes = (table(readable[part.start : part.stop], "sha256").tobytes().hex() for part in parts)
    fingerprint = _content_digest(found, hashes)
    if (table.all("readable") == _MENDED).any():  # other pixels than 0.3 made of the same bytes
        fingerprint = digest([fingerprint, "upright, 8 bits"])
    return open_index(table.folder, images.name, images.reader, images.camera is not None, fingerprint)


def open_index(folder: str | Path, name: str, reader: Any, cameras: bool, fingerprint: str = "") -> ImageSet:
    """A set from its table alone: nothing is listed, no file is looked at, keys stay in the memory map."""
    table = cache.open_rows(folder)
    labels, readable = table.all("label"), table.all("readable")[:, 0]
    keys: Sequence[str] = table.text("key")
    whole = bool(readable.all())
    if not whole:
        rows = np.flatnonzero(readable)
        keys, labels = Chosen(keys, rows), labels[rows]
    found = ImageSet(name, keys, labels[:, 0], reader, labels[:, 1] if cameras else None, fingerprint)
    if whole:  # with images left out classes may have gone too, and are counted anew
        found.__dict__["labels"] = labels[:, 2]
    return found


def listing_digest(keys: Sequence[str], *labels: np.ndarray) -> str:
    """Of the keys and labels of a set; in blocks, so that millions of them need little memory."""
    parts = cache.ranges(len(keys), 65_536)
    return streamed_digest(([keys[i] for i in part] for part in parts), *(_listed(label, parts) for label in labels))


def _listed(values: np.ndarray, parts: Sequence[range]) -> Iterator[list[Any]]:
    for part in parts:
        yield values[part.start : part.stop].tolist()


def _content_digest(images: ImageSet, hashes: Iterator[str]) -> str:
    """``digest([name, [keys, identities, cameras, hashes]])``, as 0.3 computed it, without holding the text."""
    sha = hashlib.sha256(f"[{json.dumps(images.name)},[[".encode())
    for number, values in enumerate((images.keys, images.identity, images.cameras)):
        sha.update(b"],[" if number else b"")
        for part in cache.ranges(len(images), 65_536):
            block = [values[i] for i in part] if number == 0 else values[part.start : part.stop].tolist()
            sha.update((("," if part.start else "") + json.dumps(block, separators=(",", ":"))[1:-1]).encode())
    sha.update(b'],"')
    for text in hashes:
        sha.update(text.encode())
    sha.update(b'"]]')
    return sha.hexdigest()


def _hash_and_decode(images: ImageSet, key: str) -> tuple[bytes, int]:
    try:
        data = images.reader.read(key)
    except Exception:  # zip and system errors alike
        return bytes(32), _UNREADABLE
    sha = hashlib.sha256(data).digest()
    try:
        _, mended = decode_and_tell(data)
    except Exception:  # a damaged file may make the decoder raise anything; it is counted and named
        return sha, _UNREADABLE
    return sha, _MENDED if mended else _PLAIN
