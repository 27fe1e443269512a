"""The only door to Arrow: tables that are computed once, memory mapped, and never used when damaged.

A cache is a folder ``<root>/<kind>-<fingerprint>/`` with ``data.arrow`` (Arrow IPC) and ``manifest.json``. Its
fingerprint is the SHA-256 of what it was computed from, so a changed teacher, data set or transform is another
cache. It is written under a temporary name and renamed; a lease makes concurrent builders build once.

Row access is a gather from the memory map (about a million rows a second for embeddings); Parquet or
``Table.take`` would be a hundred times slower.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from orchestrator import leases
from orchestrator.needs import digest
from orchestrator.store import file_hash as file_hash

FORMAT = 1
_BATCH_BYTES = 32 * 2**20  # of one record batch

Block = Mapping[str, Any]  # column -> rows of numbers, (rows, width), or a list of texts, or of bytes
_LISTED = {"text": pa.large_string(), "bytes": pa.large_binary()}  # columns of rows that differ in length


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
        """A column of texts or of bytes, read from the memory map one by one."""
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
                if column["dtype"] not in _LISTED:
                    found = [f.flatten().to_numpy().reshape(-1, *column["shape"]) for f in found]
                self._columns[name] = starts, found
        return self._columns

    def folders(self) -> list[Path]:
        """Where the data lie: the own folder, or those of the tables that were joined."""
        parts = self.manifest.get("parts")
        return [self.folder] if parts is None else [self.folder.parent / part for part in parts]


@dataclass(frozen=True)
class Texts(Sequence[str]):
    """Texts, or bytes, in the memory map of a cache; as picklable as the cache."""

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
        root: folder of all caches, which hosts may share.
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
    with _building(root, folder.name):
        if folder.exists():
            try:
                return open_rows(folder, made_from, verify)
            except DamagedCache as damage:
                warnings.warn(f"{damage}; building it again", stacklevel=2)
        building = root / f"{folder.name}.tmp-{uuid.uuid4().hex}"
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
        with contextlib.suppress(leases.Taken), _building(root, half_built.name.split(".tmp-")[0], wait=False):
            shutil.rmtree(half_built, ignore_errors=True)


def _building(root: Path, name: str, wait: bool = True) -> Any:
    """The right to make a cache: of hosts that share the folder, one makes it."""
    return leases.held(root / ".locks" / f"{name}.lease", (lambda holder: None) if wait else None, name)


def folder_below(storage: str, rows: Rows) -> str:
    """Where a cache lies below the storage folder: what the ledger and records hold."""
    return str(rows.folder.relative_to(storage))


def joined(root: str | Path, kind: str, made_from: Mapping[str, Any], parts: Sequence[Rows]) -> Rows:
    """Tables one after the other as one: a manifest that names their folders; no row is copied."""
    root, made_from = Path(root), _with_format(made_from)
    folder = root / f"{kind}-{digest(made_from)[:32]}"
    with _building(root, folder.name):
        if not folder.exists():
            building = root / f"{folder.name}.tmp-{uuid.uuid4().hex}"
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


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's state; the fingerprint of a teacher."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


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
            waiting_bytes += sum(
                sum(map(len, v)) + 8 * len(v) if isinstance(v, list) else v.nbytes for v in block.values()
            )
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
        return {"shape": [], "dtype": "bytes" if isinstance(values[0], bytes) else "text"}
    return {"shape": values.shape[1:], "dtype": str(values.dtype)}


def _list_type(values: Any) -> pa.DataType:
    if isinstance(values, list):
        return _LISTED[_column(values)["dtype"]]
    return pa.list_(pa.from_numpy_dtype(values.dtype), int(np.prod(values.shape[1:])))


def _record_batch(blocks: list[Block]) -> pa.RecordBatch:
    arrays = []
    for name, first in blocks[0].items():
        if isinstance(first, list):
            arrays.append(pa.array([value for b in blocks for value in b[name]], _list_type(first)))
        else:
            values = np.concatenate([b[name] for b in blocks])
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=_list_type(values)))
    return pa.record_batch(arrays, names=list(blocks[0]))


def ranges(count: int, step: int) -> list[range]:
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
