"""The only door to Arrow: tables that are computed once, memory mapped, and never used when damaged.

A cache is a folder ``<root>/<kind>-<fingerprint>/`` with ``data.arrow`` (Arrow IPC) and ``manifest.json``. Its
fingerprint is the SHA-256 of what it was computed from, so a changed teacher, data set or transform is another
cache. It is written under a temporary name and renamed; a lock makes concurrent builders build once.

Row access is a gather from the memory map (about a million rows a second for embeddings); Parquet or
``Table.take`` would be a hundred times slower.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from orchestrator.datasets.images import Frames, ImageSet, decode, digest, fetch
from orchestrator.evaluation import retrieval

FORMAT = 1
_BATCH_BYTES = 32 * 2**20  # of one record batch
_UNREADABLE_NAMED = 5

Progress = Callable[[str, int, int], None]  # what, done, total
Block = Mapping[str, np.ndarray]  # column -> rows of numbers: (rows, width) or (rows,)


def silent(what: str, done: int, total: int) -> None:
    """The progress callback of somebody who does not look."""


class DamagedCache(Exception):
    """A cache that must not be used; the message says which part differs."""


@dataclass
class Rows:
    """Rows of a cache by number. Opens lazily; picklable, since every process maps the file itself."""

    folder: Path
    manifest: dict[str, Any]
    _columns: dict[str, tuple[np.ndarray, list[np.ndarray]]] | None = None

    def __len__(self) -> int:
        return self.manifest["rows"]

    def __call__(self, indices: Sequence[int] | np.ndarray, column: str = "value") -> np.ndarray:
        """A copy of the rows: (len(indices), *shape of a row)."""
        starts, chunks = self._chunks()[column]
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"rows must be between 0 and {len(self) - 1}, got {indices.min()} … {indices.max()}")
        if len(chunks) == 1:
            return chunks[0][indices]
        out = np.empty((len(indices), *self.manifest["columns"][column]["shape"]), chunks[0].dtype)
        owner = np.searchsorted(starts, indices, side="right") - 1
        for chunk in np.unique(owner):
            own = owner == chunk
            out[own] = chunks[chunk][indices[own] - starts[chunk]]
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "_columns": None}

    def _chunks(self) -> dict[str, tuple[np.ndarray, list[np.ndarray]]]:
        if self._columns is None:
            reader = pa.ipc.open_file(pa.memory_map(str(self.folder / "data.arrow")))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            starts = np.cumsum([0] + [b.num_rows for b in batches[:-1]])
            self._columns = {}
            for name, column in self.manifest["columns"].items():
                flat = [b.column(name).flatten().to_numpy() for b in batches]
                self._columns[name] = starts, [f.reshape(-1, *column["shape"]) for f in flat]
        return self._columns


def ensure(
    root: str | Path,
    kind: str,
    made_from: Mapping[str, Any],
    blocks: Callable[[], Iterator[Block]],
    verify: bool = False,
) -> Rows:
    """The cache of ``blocks()``, built now unless it is there and whole.

    Args:
        root: folder of all caches, on storage that supports file locks.
        kind: first part of the folder name, such as "pixels".
        made_from: JSON values that determine the content; hashed to the fingerprint.
        blocks: yields the rows in order, a block at a time; called only to build.
        verify: also compare the SHA-256 of the data, not only its size (a second per GiB).

    Raises:
        ValueError: a block holds NaN or infinity.
    """
    root = Path(root)
    made_from = json.loads(json.dumps({**made_from, "format": FORMAT}))
    folder = root / f"{kind}-{digest(made_from)[:32]}"
    _remove_stale(root)
    with locked(root, folder.name):
        if folder.exists():
            try:
                return open_rows(folder, made_from, verify)
            except DamagedCache as damage:
                warnings.warn(f"{damage}; building it again", stacklevel=2)
        partial = root / f"{folder.name}.tmp-{os.getpid()}"
        partial.mkdir(parents=True)
        try:
            _write(partial, made_from, blocks())
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(partial, folder)
            _sync(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return open_rows(folder, made_from)


def open_rows(folder: str | Path, made_from: Mapping[str, Any] | None = None, verify: bool = False) -> Rows:
    """Opens a cache that must exist.

    Raises:
        DamagedCache: something is missing, has another size, another content, or was made from something else.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise DamagedCache(f"cache {folder.name} is damaged: manifest.json cannot be read ({error})") from error
    if made_from is not None and manifest["made_from"] != made_from:
        keys = set(made_from) | set(manifest["made_from"])
        differing = sorted(k for k in keys if made_from.get(k) != manifest["made_from"].get(k))
        raise DamagedCache(f"cache {folder.name} was made from another {', '.join(differing)}")
    data = folder / "data.arrow"
    size = data.stat().st_size if data.exists() else 0
    if size != manifest["bytes"]:
        raise DamagedCache(f"cache {folder.name} is damaged: data.arrow has {size} bytes, expected {manifest['bytes']}")
    if verify and file_hash(data) != manifest["sha256"]:
        raise DamagedCache(f"cache {folder.name} is damaged: the content of data.arrow has changed")
    return Rows(folder, manifest)


def _remove_stale(root: Path) -> None:
    """Half-built folders whose builder is dead: nobody holds their lock."""
    for partial in root.glob("*.tmp-*"):
        with open(root / ".locks" / f"{partial.name.split('.tmp-')[0]}.lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(root: str | Path, name: str) -> Iterator[None]:
    """Holds a lock across processes; the system releases it when its holder dies."""
    locks = Path(root) / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / f"{name}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def indexed(images: ImageSet, root: str | Path, skip_unreadable: bool = False, progress: Progress = silent) -> ImageSet:
    """The set with its fingerprint, after every image was read once: an Arrow table key/identity/camera/sha256.

    The fingerprint covers keys, labels and image bytes, not where the files lie. A table is made again only
    when the listing or a file's size or time changed.

    Raises:
        OSError: some images cannot be decoded; names the first and counts all. With ``skip_unreadable`` they
            are left out instead, with a warning that says the same.
    """
    camera = images.camera if images.camera is not None else np.full(len(images), -1)
    listing = {
        "name": images.name,
        "stamp": images.reader.stamp(),
        "listing": digest([list(images.keys), images.identity.tolist(), camera.tolist()]),
    }

    def rows() -> Iterator[Block]:
        hashes = np.zeros((len(images), 32), np.uint8)
        readable = np.zeros((len(images), 1), np.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i, (sha, ok) in enumerate(pool.map(lambda key: _hash_and_decode(images, key), images.keys)):
                hashes[i], readable[i] = np.frombuffer(sha, np.uint8), ok
                if i % 256 == 0 or i + 1 == len(images):
                    progress(f"checking {images.name}", i + 1, len(images))
        labels = np.stack([images.identity, camera], axis=1).astype(np.int64)
        yield {"label": labels, "sha256": hashes, "readable": readable}

    table = ensure(root, "index", listing, rows, verify=True)
    everything = np.arange(len(images))
    readable = table(everything, "readable")[:, 0].astype(bool)
    hashes = table(everything, "sha256")
    if not readable.all():
        broken = [key for key, ok in zip(images.keys, readable, strict=True) if not ok]
        named = ", ".join(broken[:_UNREADABLE_NAMED]) + (", …" if len(broken) > _UNREADABLE_NAMED else "")
        message = f"{images.name}: {len(broken)} of {len(images)} images cannot be read: {named}"
        if not skip_unreadable:
            raise OSError(f"{message}; repair them or leave them out with --set skip_unreadable=true")
        warnings.warn(f"{message}; left out", stacklevel=2)
    keys = tuple(key for key, ok in zip(images.keys, readable, strict=True) if ok)
    identity = images.identity[readable]
    content = [list(keys), identity.tolist(), camera[readable].tolist(), hashes[readable].tobytes().hex()]
    return dataclasses.replace(
        images,
        keys=keys,
        identity=identity,
        camera=None if images.camera is None else images.camera[readable],
        fingerprint=digest([images.name, content]),
    )


def pixels(
    images: ImageSet,
    size: tuple[int, int],
    root: str | Path,
    progress: Progress = silent,
    workers: int = 0,
    verify: bool = False,
    resize: str = "bilinear",
) -> Rows:
    """uint8 frames (3, H, W) of all images, decoded and resized once for all trials."""
    made_from = {"images": images.fingerprint, "size": list(size), "resize": f"{resize} antialias"}

    def blocks() -> Iterator[Block]:
        done = 0
        for frames in fetch(Frames(images, size, resize), _ranges(len(images), 256), workers):
            done += len(frames)
            progress(f"decoding {images.name} at {size[0]}×{size[1]}", done, len(images))
            yield {"value": frames.numpy()}

    return ensure(root, "pixels", made_from, blocks, verify)


def embeddings(
    images: ImageSet,
    teacher: str,
    transform: Mapping[str, Any],
    embed: Callable[[np.ndarray], Iterator[Mapping[str, Tensor | np.ndarray]]],
    root: str | Path,
    views: int = 1,
    progress: Progress = silent,
    verify: bool = False,
) -> Rows:
    """Raw float32 teacher embeddings, one row per image and view (row = image · views + view).

    Args:
        images: indexed set; its fingerprint is part of the cache's.
        teacher: fingerprint of the teacher's weights.
        transform: JSON description of what happens to an image before the teacher sees it, and of what is stored
            beside its embedding.
        embed: maps row numbers to blocks of columns in order: "value", the embedding, and whatever else belongs
            to the row, such as the "draws" of its view.
    """
    made_from = {"images": images.fingerprint, "teacher": teacher, "transform": dict(transform), "views": views,
                 "dtype": "float32", "normalised": False}  # fmt: skip
    rows = len(images) * views

    def blocks() -> Iterator[Block]:
        done = 0
        for columns in embed(np.arange(rows)):
            done += len(columns["value"])
            progress(f"teacher embeddings of {images.name}" + (f", {views} views" if views > 1 else ""), done, rows)
            yield {name: v.cpu().numpy() if isinstance(v, Tensor) else v for name, v in columns.items()}

    return ensure(root, "embeddings", made_from, blocks, verify)


def neighbours(embedded: Rows, top_k: int, root: str | Path, progress: Progress = silent, verify: bool = False) -> Rows:
    """Every image's nearest images of the whole set by the teacher: columns "index" (K,) int32, "cosine" (K,).

    K is ``top_k`` rounded up to a power of two (at least 256, at most all images): a sweep over top_k shares one
    table, of which it reads the first columns.

    Args:
        embedded: the teacher's clean embeddings of the set; its fingerprint is part of the cache's.
    """
    count = min(len(embedded), max(256, 1 << (top_k - 1).bit_length()))
    made_from = {"embeddings": embedded.manifest["fingerprint"], "neighbours": count}

    def blocks() -> Iterator[Block]:
        done, rows = 0, np.arange(len(embedded))
        for index, cosine in retrieval.neighbours(embedded(rows), count):
            done += len(index)
            progress(f"{count} nearest of the training set", done, len(embedded))
            yield {"index": index, "cosine": cosine}

    return ensure(root, "neighbours", made_from, blocks, verify)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's state; the fingerprint of a teacher."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _hash_and_decode(images: ImageSet, key: str) -> tuple[bytes, bool]:
    try:
        data = images.reader.read(key)
    except Exception:  # zip and system errors alike
        return bytes(32), False
    try:
        decode(data)
    except Exception:  # a damaged file may make the decoder raise anything; it is counted and named
        return hashlib.sha256(data).digest(), False
    return hashlib.sha256(data).digest(), True


def _write(folder: Path, made_from: Mapping[str, Any], blocks: Iterator[Block]) -> None:
    rows, waiting, waiting_bytes = 0, [], 0
    columns: dict[str, dict[str, Any]] = {}
    writer = None
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink:
        for block in blocks:
            for name, values in block.items():
                if values.dtype.kind == "f" and not np.isfinite(values).all():
                    raise ValueError(f"{folder.name.split('.')[0]}: column {name!r} has values that are not finite")
            if writer is None:
                columns = {n: {"shape": v.shape[1:], "dtype": str(v.dtype)} for n, v in block.items()}
                fields = [(n, _list_type(v)) for n, v in block.items()]
                writer = pa.ipc.new_file(sink, pa.schema(fields, metadata={"made_from": json.dumps(made_from)}))
            waiting.append(block)
            waiting_bytes += sum(v.nbytes for v in block.values())
            rows += len(next(iter(block.values())))
            if waiting_bytes >= _BATCH_BYTES:
                writer.write_batch(_record_batch(waiting))
                waiting, waiting_bytes = [], 0
        if writer is None:
            raise ValueError(f"{folder.name.split('.')[0]}: nothing to store")
        if waiting:
            writer.write_batch(_record_batch(waiting))
        writer.close()
    _sync(folder / "data.arrow")
    manifest = {
        "tool": f"retrieval-distillation-orchestrator {_tool_version()}",
        "made_from": dict(made_from),
        "fingerprint": digest(made_from),
        "rows": rows,
        "columns": columns,
        "bytes": (folder / "data.arrow").stat().st_size,
        "sha256": file_hash(folder / "data.arrow"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _sync(folder / "manifest.json")


def _tool_version() -> str:
    try:
        return version("retrieval-distillation-orchestrator")
    except PackageNotFoundError:  # a checkout that is not installed
        return "checkout"


def _list_type(values: np.ndarray) -> pa.DataType:
    return pa.list_(pa.from_numpy_dtype(values.dtype), int(np.prod(values.shape[1:])))


def _record_batch(blocks: list[Block]) -> pa.RecordBatch:
    columns = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
    arrays = [pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), type=_list_type(v)) for v in columns.values()]
    return pa.record_batch(arrays, names=list(columns))


def _ranges(count: int, step: int) -> list[range]:
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
