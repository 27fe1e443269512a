"""The only door to Arrow: tables that are computed once, memory mapped, and never used when damaged.

A cache is a folder ``<root>/<kind>-<fingerprint>/`` with ``data.arrow`` (Arrow IPC) and ``manifest.json``. Its
fingerprint is the SHA-256 of what it was computed from, so a changed teacher, data set or transform is another
cache. It is written under a temporary name and renamed; a lock makes concurrent builders build once.

Row access is a gather from the memory map (about a million rows a second for embeddings); Parquet or
``Table.take`` would be a hundred times slower.
"""

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
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from orchestrator.datasets.images import Chosen, Frames, ImageSet, decode_and_tell, fetch
from orchestrator.evaluation import retrieval
from orchestrator.needs import Report, digest, silent, streamed_digest

FORMAT = 1
_BATCH_BYTES = 32 * 2**20  # of one record batch
_UNREADABLE_NAMED = 5
_INDEX_BLOCK = 4096  # images that wait in the pool of threads at once

Block = Mapping[str, Any]  # column -> rows of numbers, (rows, width), or a list of texts


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

    def all(self, column: str = "value") -> np.ndarray:
        """Every row: the memory map itself where it is in one piece, else a copy."""
        _, chunks = self._chunks()[column]
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def text(self, column: str) -> "Texts":
        """A column of texts, read from the memory map one by one."""
        return Texts(self, column)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "_columns": None}

    def _chunks(self) -> dict[str, tuple[np.ndarray, list[Any]]]:
        if self._columns is None:
            batches = []
            for folder in self.folders():
                reader = pa.ipc.open_file(pa.memory_map(str(folder / "data.arrow")))
                batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
            starts = np.cumsum([0] + [b.num_rows for b in batches[:-1]])
            self._columns = {}
            for name, column in self.manifest["columns"].items():
                found = [b.column(name) for b in batches]
                if column["dtype"] != "text":
                    found = [f.flatten().to_numpy().reshape(-1, *column["shape"]) for f in found]
                self._columns[name] = starts, found
        return self._columns

    def folders(self) -> list[Path]:
        """Where the data lie: the own folder, or those of the tables that were joined."""
        parts = self.manifest.get("parts")
        return [self.folder] if parts is None else [self.folder.parent / part for part in parts]


@dataclass(frozen=True)
class Texts(Sequence[str]):
    """Texts in the memory map of a cache; as picklable as the cache."""

    rows: Rows
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        starts, chunks = self.rows._chunks()[self.column]
        index %= len(self)
        chunk = int(np.searchsorted(starts, index, side="right")) - 1
        return chunks[chunk][index - int(starts[chunk])].as_py()


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
    made_from = _with_format(made_from)
    folder = root / f"{kind}-{digest(made_from)[:32]}"
    _remove_stale(root)
    with locked(root, folder.name):
        if folder.exists():
            try:
                return open_rows(folder, made_from, verify)
            except DamagedCache as damage:
                warnings.warn(f"{damage}; building it again", stacklevel=2)
        building = root / f"{folder.name}.tmp-{os.getpid()}"
        building.mkdir(parents=True)
        try:
            _write(building, made_from, blocks())
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(building, folder)
            _sync(root)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return open_rows(folder, made_from)


def _with_format(made_from: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({**made_from, "format": FORMAT}))


def there(root: str | Path, kind: str, made_from: Mapping[str, Any]) -> Rows | None:
    """The cache of these values where it exists and is whole, else None; never builds."""
    made_from = _with_format(made_from)
    folder = Path(root) / f"{kind}-{digest(made_from)[:32]}"
    try:
        return open_rows(folder, made_from)
    except DamagedCache:
        return None


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
    if "parts" in manifest:
        for part in manifest["parts"]:
            open_rows(folder.parent / part, verify=verify)
        return Rows(folder, manifest)
    data = folder / "data.arrow"
    size = data.stat().st_size if data.exists() else 0
    if size != manifest["bytes"]:
        raise DamagedCache(f"cache {folder.name} is damaged: data.arrow has {size} bytes, expected {manifest['bytes']}")
    if verify and file_hash(data) != manifest["sha256"]:
        raise DamagedCache(f"cache {folder.name} is damaged: the content of data.arrow has changed")
    return Rows(folder, manifest)


def _remove_stale(root: Path) -> None:
    """Half-built folders whose builder is dead: nobody holds their lock."""
    for half_built in root.glob("*.tmp-*"):
        with open(root / ".locks" / f"{half_built.name.split('.tmp-')[0]}.lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(half_built, ignore_errors=True)


@contextmanager
def locked(root: str | Path, name: str) -> Iterator[None]:
    """Holds a lock across processes; the system releases it when its holder dies."""
    locks = Path(root) / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / f"{name}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def index(images: ImageSet, root: str | Path, progress: Report = silent) -> Rows:
    """The table of a set, after every image was read once: key, identity, camera and class, SHA-256, readable or not.

    A reader's own checksum stands for reading and decoding. A table is made again only when the listing or a file's
    size or time has changed.
    """
    camera = _camera(images)
    listing = {
        "name": images.name,
        "stamp": images.reader.stamp(images.keys),
        "listing": listing_digest(images.keys, images.identity, camera),
        "keys": True,  # 0.3 stored none
    }

    def rows() -> Iterator[Block]:
        checksum = getattr(images.reader, "checksum", None)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in _ranges(len(images), _INDEX_BLOCK):
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

    return ensure(root, "index", listing, rows, verify=True)


def indexed(images: ImageSet, root: str | Path, skip_unreadable: bool = False, progress: Report = silent) -> ImageSet:
    """The set as its table holds it, with its fingerprint: of keys, labels and image bytes, not of where they lie.

    Raises:
        OSError: some images cannot be decoded; names the first and counts all. With ``skip_unreadable`` they
            are left out instead, with a warning that says the same.
    """
    return checked(images, index(images, root, progress), skip_unreadable)


def checked(images: ImageSet, table: Rows, skip_unreadable: bool = False) -> ImageSet:
    """The set as its table holds it; see :func:`indexed`."""
    broken = np.flatnonzero(table.all("readable")[:, 0] == 0)
    if len(broken):
        keys = [images.keys[int(i)] for i in broken[:_UNREADABLE_NAMED]]
        named = ", ".join(keys) + (", …" if len(broken) > _UNREADABLE_NAMED else "")
        message = f"{images.name}: {len(broken)} of {len(images)} images cannot be read: {named}"
        if not skip_unreadable:
            raise OSError(f"{message}; repair them or leave them out with --set skip_unreadable=true")
        warnings.warn(f"{message}; left out", stacklevel=2)
    found = open_index(table.folder, images.name, images.reader, images.camera is not None)
    readable = np.flatnonzero(table.all("readable")[:, 0])
    hashes = (
        table(readable[part.start : part.stop], "sha256").tobytes().hex() for part in _ranges(len(readable), 65_536)
    )
    fingerprint = _content_digest(found, hashes)
    if (table.all("readable") == _MENDED).any():  # other pixels than 0.3 made of the same bytes
        fingerprint = digest([fingerprint, "upright, 8 bits"])
    return open_index(table.folder, images.name, images.reader, images.camera is not None, fingerprint)


def open_index(folder: str | Path, name: str, reader: Any, cameras: bool, fingerprint: str = "") -> ImageSet:
    """A set from its table alone: nothing is listed, no file is looked at, keys stay in the memory map."""
    table = open_rows(folder)
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


def folder_below(storage: str, rows: Rows) -> str:
    """Where a cache lies below the storage folder: what the ledger and records hold."""
    return str(rows.folder.relative_to(storage))


def _camera(images: ImageSet) -> np.ndarray:
    return images.camera if images.camera is not None else np.full(len(images), -1)


def listing_digest(keys: Sequence[str], *labels: np.ndarray) -> str:
    """Of the keys and labels of a set; in blocks, so that millions of them need little memory."""
    parts = _ranges(len(keys), 65_536)
    return streamed_digest(([keys[i] for i in part] for part in parts), *(_listed(label, parts) for label in labels))


def _listed(values: np.ndarray, parts: Sequence[range]) -> Iterator[list[Any]]:
    for part in parts:
        yield values[part.start : part.stop].tolist()


def _content_digest(images: ImageSet, hashes: Iterator[str]) -> str:
    """``digest([name, [keys, identities, cameras, hashes]])``, as 0.3 computed it, without holding the text."""
    sha = hashlib.sha256(f"[{json.dumps(images.name)},[[".encode())
    camera = _camera(images)
    for number, values in enumerate((images.keys, images.identity, camera)):
        sha.update(b"],[" if number else b"")
        for part in _ranges(len(images), 65_536):
            block = [values[i] for i in part] if number == 0 else values[part.start : part.stop].tolist()
            sha.update((("," if part.start else "") + json.dumps(block, separators=(",", ":"))[1:-1]).encode())
    sha.update(b'],"')
    for text in hashes:
        sha.update(text.encode())
    sha.update(b'"]]')
    return sha.hexdigest()


def pixels(
    images: ImageSet,
    size: tuple[int, int],
    root: str | Path,
    progress: Report = silent,
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
    made_from: Mapping[str, Any],
    embed: Callable[[np.ndarray], Iterator[Mapping[str, Tensor | np.ndarray]]],
    rows: range,
    root: str | Path,
    title: str,
    progress: Report = silent,
    verify: bool = False,
) -> Rows:
    """Raw float32 embeddings of some rows of a table (row = image · views + view).

    Args:
        made_from: what the whole table is made from, see :func:`embeddings_made_from`; with "shard" where it is a part.
        embed: maps row numbers to blocks of columns in order: "value", the embedding, and whatever else belongs
            to the row, such as the "draws" of its view.
        rows: which.
        root: folder of all caches.
        title: for people.
    """

    def blocks() -> Iterator[Block]:
        done = 0
        for columns in embed(np.arange(rows.start, rows.stop)):
            done += len(columns["value"])
            progress(f"teacher embeddings of {title}", done, len(rows))
            yield {name: v.cpu().numpy() if isinstance(v, Tensor) else v for name, v in columns.items()}

    return ensure(root, "embeddings", made_from, blocks, verify)


def embeddings_made_from(images: str, teacher: str, transform: Mapping[str, Any], views: int = 1) -> dict[str, Any]:
    """What decides a table of embeddings.

    Args:
        images: fingerprint of the set.
        teacher: fingerprint of the teacher's weights.
        transform: JSON description of what happens to an image before the teacher sees it, and of what is stored
            beside its embedding.
        views: how many of every image.
    """
    return {
        "images": images, "teacher": teacher, "transform": dict(transform), "views": views, "dtype": "float32",
        "normalised": False,
    }  # fmt: skip


def joined(root: str | Path, kind: str, made_from: Mapping[str, Any], parts: Sequence[Rows]) -> Rows:
    """Tables one after the other as one: a manifest that names their folders; no row is copied."""
    root, made_from = Path(root), _with_format(made_from)
    folder = root / f"{kind}-{digest(made_from)[:32]}"
    with locked(root, folder.name):
        if not folder.exists():
            building = root / f"{folder.name}.tmp-{os.getpid()}"
            building.mkdir(parents=True)
            manifest = {
                "tool": f"retrieval-distillation-orchestrator {_tool_version()}",
                "made_from": made_from,
                "fingerprint": digest(made_from),
                "rows": sum(len(part) for part in parts),
                "columns": parts[0].manifest["columns"],
                "parts": [part.folder.name for part in parts],
            }
            (building / "manifest.json").write_text(json.dumps(manifest, indent=1))
            _sync(building / "manifest.json")
            os.replace(building, folder)
            _sync(root)
    return open_rows(folder, made_from)


def neighbour_count(top_k: int, images: int) -> int:
    """How many neighbours a table holds: a power of two, at least 256, so that a sweep over top_k shares one."""
    return min(images, max(256, 1 << (top_k - 1).bit_length()))


def neighbours(embedded: Rows, count: int, root: str | Path, progress: Report = silent, verify: bool = False) -> Rows:
    """Every image's nearest images of the whole set by the teacher: columns "index" (K,) int32, "cosine" (K,).

    K is ``count``, see :func:`neighbour_count`; a loss reads the first columns.

    Args:
        embedded: the teacher's clean embeddings of the set; its fingerprint is part of the cache's.
    """
    count = min(count, len(embedded))
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


_UNREADABLE, _PLAIN, _MENDED = 0, 1, 2  # what the column "readable" holds


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


def _write(folder: Path, made_from: Mapping[str, Any], blocks: Iterator[Block]) -> None:
    rows, waiting, waiting_bytes = 0, [], 0
    columns: dict[str, dict[str, Any]] = {}
    writer = None
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink:
        for block in blocks:
            for name, values in block.items():
                if not isinstance(values, list) and values.dtype.kind == "f" and not np.isfinite(values).all():
                    raise ValueError(f"{folder.name.split('.')[0]}: column {name!r} has values that are not finite")
            if writer is None:
                columns = {n: _column(v) for n, v in block.items()}
                fields = [(n, _list_type(v)) for n, v in block.items()]
                writer = pa.ipc.new_file(sink, pa.schema(fields, metadata={"made_from": json.dumps(made_from)}))
            waiting.append(block)
            waiting_bytes += sum(64 * len(v) if isinstance(v, list) else v.nbytes for v in block.values())
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


def _column(values: Any) -> dict[str, Any]:
    if isinstance(values, list):
        return {"shape": [], "dtype": "text"}
    return {"shape": values.shape[1:], "dtype": str(values.dtype)}


def _list_type(values: Any) -> pa.DataType:
    if isinstance(values, list):
        return pa.large_string()
    return pa.list_(pa.from_numpy_dtype(values.dtype), int(np.prod(values.shape[1:])))


def _record_batch(blocks: list[Block]) -> pa.RecordBatch:
    arrays = []
    for name, first in blocks[0].items():
        if isinstance(first, list):
            arrays.append(pa.array([text for b in blocks for text in b[name]], pa.large_string()))
        else:
            values = np.concatenate([b[name] for b in blocks])
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=_list_type(values)))
    return pa.record_batch(arrays, names=list(blocks[0]))


def _ranges(count: int, step: int) -> list[range]:
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
