"""Tables that are computed once for all trials: pixels, teacher embeddings, nearest neighbours."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from orchestrator import cache
from orchestrator.datasets.images import Frames, ImageSet, fetch
from orchestrator.evaluation import retrieval
from orchestrator.needs import Report, silent

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
