"""Tables that are computed once for all trials: pixels, teacher embeddings, nearest neighbours."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator import cache
from orchestrator.datasets.images import Frames, ImageSet, fetch
from orchestrator.evaluation import retrieval
from orchestrator.method import Where
from orchestrator.needs import Report, silent

_RESIDENT_SHARE = 0.5  # of the free memory of a device
_COPIED_AT_ONCE = 64 * 2**20  # bytes
Embed = Callable[[np.ndarray], Iterator[Mapping[str, Tensor | np.ndarray]]]  # row numbers -> blocks of columns


def pixels(
    images: ImageSet,
    size: tuple[int, int],
    root: str | Path,
    progress: Report = silent,
    workers: int = 0,
    verify: bool = False,
    resize: str = "bilinear",
) -> cache.Rows:
    """uint8 frames (3, H, W) of all images, decoded and resized once for all trials."""
    made_from = {"images": images.fingerprint, "size": list(size), "resize": f"{resize} antialias"}

    def blocks() -> Iterator[cache.Block]:
        done = 0
        for frames in fetch(Frames(images, size, resize), cache.ranges(len(images), 256), workers):
            done += len(frames)
            progress(f"decoding {images.name} at {size[0]}×{size[1]}", done, len(images))
            yield {"value": frames.numpy()}

    return cache.ensure(root, "pixels", made_from, blocks, verify)


def embeddings(
    made_from: Mapping[str, Any],
    embed: Embed,
    rows: range,
    root: str | Path,
    title: str,
    progress: Report = silent,
    verify: bool = False,
) -> cache.Rows:
    """Raw float32 embeddings of some rows of a table (row = image · views + view).

    Args:
        made_from: what the whole table is made from, see :func:`embeddings_made_from`; with "shard" where it is a part.
        embed: maps row numbers to blocks of columns in order: "value", the embedding, and whatever else belongs
            to the row, such as the "draws" of its view.
        rows: which.
        root: folder of all caches.
        title: for people.
    """

    def blocks() -> Iterator[cache.Block]:
        done = 0
        for columns in embed(np.arange(rows.start, rows.stop)):
            done += len(columns["value"])
            progress(f"teacher embeddings of {title}", done, len(rows))
            yield {name: v.cpu().numpy() if isinstance(v, Tensor) else v for name, v in columns.items()}

    return cache.ensure(root, "embeddings", made_from, blocks, verify)


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


class Resident:
    """Columns of a table on a device. Rows are gathered there, so that a step sends their numbers alone.

    Called as the table is: the same rows, as tensors on the device.

    Args:
        rows: the table.
        device: where to.
        beside: more columns, of which the table knows nothing, such as labels.
    """

    def __init__(self, rows: cache.Rows, device: torch.device, **beside: np.ndarray):
        self.manifest, self._device, self._columns = rows.manifest, device, {}
        for name, values in (_numbers(rows) | beside).items():
            whole = torch.empty(values.shape, dtype=torch.from_numpy(values[:0].copy()).dtype, device=device)
            step = max(1, _COPIED_AT_ONCE // max(1, values[:1].nbytes))
            for part in cache.ranges(len(values), step):  # of a memory map, so that the host never holds it whole
                whole[part.start : part.stop] = torch.from_numpy(values[part.start : part.stop].copy())
            self._columns[name] = whole

    def __len__(self) -> int:
        return self.manifest["rows"]

    def __call__(self, indices: Sequence[int] | np.ndarray, column: str = "value") -> Tensor:
        index = torch.from_numpy(np.asarray(indices, np.int64))
        if self._device.type == "cuda":
            index = index.pin_memory().to(self._device, non_blocking=True)
        return self._columns[column].index_select(0, index)


def placed(choice: str, where: Where, *sources: Any, **beside: np.ndarray) -> list[Any]:
    """Tables where a step reads them: on the device, or as they are; what is no table stays as it is.

    Args:
        choice: ``run.pixel_cache``: "device", or "auto" for a GPU of whose free memory they take half at most, of the
            job's share of it where several jobs have the GPU. With "auto" nothing moves where a source is no table.
        where: the step runs.
        sources: tables, decoders of images, None.
        beside: columns that the first of them takes with it to the device.
    """
    device = where.device
    found = [source for source in sources if isinstance(source, cache.Rows)]
    wanted = choice == "device"
    if choice == "auto" and device.type == "cuda" and len(found) == len([s for s in sources if s is not None]):
        columns = [*beside.values(), *(values for rows in found for values in _numbers(rows).values())]
        size = sum(values.nbytes for values in columns)
        wanted = size <= _RESIDENT_SHARE * where.share * torch.cuda.mem_get_info(device)[0]
    return [
        Resident(source, device, **({} if number else beside)) if wanted and isinstance(source, cache.Rows) else source
        for number, source in enumerate(sources)
    ]


def column(source: Any, name: str, values: np.ndarray, rows: np.ndarray) -> Tensor:
    """Rows of a column that is beside a table: of the device where the table is there, else of the host's values."""
    return source(rows, name) if isinstance(source, Resident) else torch.from_numpy(values[rows])


def _numbers(rows: cache.Rows) -> dict[str, np.ndarray]:
    """Columns of numbers."""
    return {
        name: rows.all(name)
        for name, column in rows.manifest["columns"].items()
        if column["dtype"] not in ("text", "bytes")
    }


def neighbour_count(top_k: int, images: int) -> int:
    """How many neighbours a table holds: a power of two, at least 256, so that a sweep over top_k shares one."""
    return min(images, max(256, 1 << (top_k - 1).bit_length()))


def neighbours(
    embedded: cache.Rows, count: int, root: str | Path, progress: Report = silent, verify: bool = False
) -> cache.Rows:
    """Every image's nearest images of the whole set by the teacher: columns "index" (K,) int32, "cosine" (K,).

    K is ``count``, see :func:`neighbour_count`; a loss reads the first columns.

    Args:
        embedded: the teacher's clean embeddings of the set; its fingerprint is part of the cache's.
    """
    count = min(count, len(embedded))
    made_from = {"embeddings": embedded.manifest["fingerprint"], "neighbours": count}

    def blocks() -> Iterator[cache.Block]:
        done, rows = 0, np.arange(len(embedded))
        for index, cosine in retrieval.neighbours(embedded(rows), count):
            done += len(index)
            progress(f"{count} nearest of the training set", done, len(embedded))
            yield {"index": index, "cosine": cosine}

    return cache.ensure(root, "neighbours", made_from, blocks, verify)
