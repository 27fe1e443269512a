"""Data of retrieval: what of it must be prepared, how that is made, and how a trial opens it.

A trial opens tables by their path. It lists no folder, looks at no file's time and reads no image that the pixel
cache holds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from orchestrator import cache, find, indexing, tables
from orchestrator.cache import Rows
from orchestrator.datasets.augmentation import DRAWS, Augmentation
from orchestrator.datasets.images import Frames, ImageSet, RetrievalData, described, rebuilt
from orchestrator.datasets.sampling import identity_batches, own_part
from orchestrator.families.retrieval.recipe import EmbedderRecipe, Labelled
from orchestrator.method import Batch, Where
from orchestrator.needs import Need, Place, Prepared, Ready, Report, digest
from orchestrator.recipe import Data, Run

Source = Rows | tables.Resident | Frames
_STAMPED: WeakKeyDictionary[ImageSet, tuple[str, str]] = WeakKeyDictionary()  # forgotten with the listing
SHARD_ROWS = 32_768  # embeddings that are one unit of work


def listed(data: Data, place: Place) -> RetrievalData:
    """What the reader lists, with the asked fraction of the training images.

    A fraction is taken by a fixed order, so that a smaller one is inside every larger one.
    """
    found = find.listed(data.name, place.data_root, data.part)
    if not isinstance(found, RetrievalData):
        raise ValueError(f"{data.name} holds no images of one object each, which this method needs")
    return found if data.fraction == 1.0 else replace(found, train=fraction_of(found.train, data.fraction))


def fraction_of(images: ImageSet, fraction: float) -> ImageSet:
    """Some images by a fixed order, so that a smaller fraction is inside every larger one."""
    if fraction == 1.0:
        return images
    count = max(1, round(fraction * len(images)))
    mask = np.zeros(len(images), bool)
    mask[np.random.default_rng(0).permutation(len(images))[:count]] = True
    return images.part(mask, f"{images.name}-{fraction:g}")


def index_needs(data: Data, place: Place) -> dict[str, Need]:
    """A table of every side of the benchmark: roles "train", "query", "gallery" (none for leave-one-out)."""
    found = listed(data, place)
    rule = {"leave_one_out": found.leave_one_out, "camera_filter": found.camera_filter}
    return {side: _index_need(data, found, side, images, rule) for side, images in found.sets().items()}


def _index_need(data: Data, found: RetrievalData, side: str, images: ImageSet, rule: dict[str, bool]) -> Need:
    stamp, listing = _stamp_and_listing(images)
    return Need(
        kind="index",
        made_from={
            "data": {"name": data.name, "part": data.part, "fraction": data.fraction},
            "side": side,
            "skip_unreadable": data.skip_unreadable,
            "reader": described(images.reader),
            "stamp": stamp,
            "listing": listing,
            "rule": rule,
        },
        title=f"index of {images.name} ({len(images):,} images)",
        how={"images": len(images), "identities": images.num_identities},
    )


def check_identities(field: str, asked: int, known: int, name: str = "the training set") -> None:
    """Raises ValueError where a batch would hold more identities than are known."""
    if asked > known:
        raise ValueError(f"{field} ({asked}) is more than the {known} identities of {name}; lower it")


def _stamp_and_listing(images: ImageSet) -> tuple[str, str]:
    """Of a listed set, once: every variant of a sweep asks, and each answer looks at every file."""
    if images not in _STAMPED:
        listing = indexing.listing_digest(images.keys, images.identity, images.cameras)
        _STAMPED[images] = images.reader.stamp(images.keys), listing
    return _STAMPED[images]


def make_index(need: Need, where: Where, progress: Report) -> Ready:
    """Reads every image once.

    Raises:
        OSError: images cannot be decoded.
        ValueError: the data are not those that were listed when the need was said.
    """
    asked = need.made_from
    data = Data(**asked["data"], skip_unreadable=asked["skip_unreadable"])
    found = listed(data, where.place)
    images = found.sets()[asked["side"]]
    if images.reader.stamp(images.keys) != asked["stamp"]:
        raise ValueError(f"{images.name} has changed while it was being prepared; run the command again")
    table = indexing.index(images, where.place.folder("cache"), progress)
    indexed = indexing.checked(images, table, data.skip_unreadable)
    told = {
        "index": {
            "name": indexed.name,
            "count": len(indexed),
            "reader": described(indexed.reader),
            "cameras": indexed.camera is not None,
            **asked["rule"],
        },
        "protocol": found.protocol + (" (before unreadable images were left out)" if data.skip_unreadable else ""),
        "notice": found.notice,
        f"{asked['side']}_fingerprint": indexed.fingerprint,
    }
    if asked["side"] == "train":
        told["classes_fingerprint"] = classes_fingerprint(indexed)
    return Ready(need.key, need.kind, cache.folder_below(where.place.storage, table), indexed.fingerprint, told)


def open_images(place: Place, ready: Ready) -> ImageSet:
    """One side from its table alone."""
    told = ready.told["index"]
    return indexing.open_index(
        place.folder(ready.path), told["name"], rebuilt(told["reader"]), told["cameras"], ready.fingerprint
    )


def open_data(prepared: Prepared) -> RetrievalData:
    """The whole benchmark from its tables."""
    rule = prepared["query"].told["index"]
    sides = [side for side in ("train", "query", "gallery") if side in prepared]
    sets = {side: open_images(prepared.place, prepared[side]) for side in sides}
    if rule["leave_one_out"]:
        sets["gallery"] = sets["query"]
    sets.setdefault("train", sets["query"])  # scoring looks at no training image
    return RetrievalData(
        **sets, leave_one_out=rule["leave_one_out"], camera_filter=rule["camera_filter"],
        notice=prepared["query"].told["notice"],
    )  # fmt: skip


def is_cached(run: Run, size: tuple[int, int]) -> bool:
    return run.pixel_cache in ("on", "device") or (run.pixel_cache == "auto" and size[0] * size[1] <= 128 * 128)


def pixel_need(run: Run, images: Need, size: tuple[int, int], resize: str = "bilinear") -> dict[str, Need]:
    """The frames of one side at one size, as a mapping "pixels" -> need; empty where they are decoded every time."""
    if not is_cached(run, size):
        return {}
    need = Need(
        kind="pixels",
        made_from={"size": list(size), "resize": resize},
        after={"images": images},
        how={"loader_workers": run.loader_workers},
        title=f"pixels {size[0]}×{size[1]} of {images.made_from['side']}",
    )
    return {"pixels": need}


def make_pixels(need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
    """Decodes and resizes every image once."""
    images, size = open_images(where.place, after["images"]), tuple(need.made_from["size"])
    rows = tables.pixels(
        images, size, where.place.folder("cache"), progress, need.how["loader_workers"], True, need.made_from["resize"]
    )
    return ready_rows(need, rows, where.place)


def make(need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
    """Meets the needs that every retrieval method has.

    Raises:
        ValueError: a kind that is not one of them.
    """
    if need.kind == "index":
        return make_index(need, where, progress)
    if need.kind == "pixels":
        return make_pixels(need, after, where, progress)
    raise ValueError(f"nobody makes {need.kind!r} for this method")


def ready_rows(need: Need, rows: Rows, place: Place, told: Mapping[str, Any] | None = None) -> Ready:
    """What a cache is to the ledger."""
    path = cache.folder_below(place.storage, rows)
    return Ready(need.key, need.kind, path, rows.manifest["fingerprint"], dict(told or {}))


def open_frames(
    prepared: Prepared, role: str, images: ImageSet, size: tuple[int, int], resize: str = "bilinear"
) -> Source:
    """Source of uint8 frames of one size: the pixel cache where the role is prepared, else decoding."""
    if role in prepared:
        return cache.open_rows(prepared.path(role))
    return Frames(images, size, resize)


def open_sides(
    prepared: Prepared, found: RetrievalData, size: tuple[int, int], resize: str = "bilinear"
) -> dict[str, Source]:
    """Frames of "query" and "gallery", which are the same ones where every query searches all others."""
    query = open_frames(prepared, "query pixels", found.query, size, resize)
    if found.leave_one_out:
        return {"query": query, "gallery": query}
    return {"query": query, "gallery": open_frames(prepared, "gallery pixels", found.gallery, size, resize)}


def open_after(place: Place, after: Mapping[str, Ready], size: tuple[int, int], resize: str = "bilinear") -> Source:
    """The same for the maker of a need that has "images" and perhaps "pixels"."""
    return open_frames(Prepared(place, after), "pixels", open_images(place, after["images"]), size, resize)


def shards(table: Need) -> Need:
    """The same table, made of shards that are units of work of their own, where it has many rows.

    The rows of a shard are a share of the table, so that images that turn out to be unreadable do no harm.
    """
    rows = table.after["images"].how["images"] * table.made_from.get("views", 1)
    count = -(-rows // SHARD_ROWS)
    if count <= 1:
        return table
    parts = {
        f"shard {number}": replace(
            table, kind="embedding shard", made_from={**table.made_from, "shard": [number, count]},
            title=f"{table.title}, part {number + 1} of {count}", piece=True,
        )
        for number in range(count)
    }  # fmt: skip
    return replace(table, after={**table.after, **parts}, network=False)


def shard_rows(need: Need, count: int) -> range:
    """Which rows of a table of ``count`` rows belong to a need: all, or those of its shard."""
    number, shards_ = need.made_from.get("shard", (0, 1))
    return range(number * count // shards_, (number + 1) * count // shards_)


def make_embeddings(
    need: Need, after: Mapping[str, Ready], transform: Mapping[str, Any], place: Place,
    embedder: Callable[[ImageSet], tables.Embed], progress: Report,
) -> Ready:  # fmt: skip
    """A table of a teacher's embeddings, or a shard of one: found whole, joined of its shards, or computed.

    Args:
        need: made by :func:`shards`; says how many "views".
        after: what it is made with: "images", "teacher", and its shards.
        transform: see :func:`tables.embeddings_made_from`.
        place: where caches lie.
        embedder: opens what embeds the images, where any are to be embedded.
        progress: what is done.
    """
    root, views = place.folder("cache"), need.made_from["views"]
    made_from = tables.embeddings_made_from(after["images"].fingerprint, after["teacher"].fingerprint, transform, views)
    table = cache.there(root, "embeddings", made_from)
    parts = [ready for role, ready in after.items() if role.startswith("shard ")]
    if table is None and parts:
        table = cache.joined(root, "embeddings", made_from, [cache.open_rows(place.folder(p.path)) for p in parts])
    # A whole table serves as any shard of it. One that was asked for itself is verified, and made again if damaged.
    if table is None or (not parts and need.kind != "embedding shard"):
        images = open_images(place, after["images"])
        if "shard" in need.made_from:
            made_from |= {"shard": need.made_from["shard"]}
        rows = shard_rows(need, len(images) * views)
        title = images.name + (f", {views} views" if views > 1 else "")
        table = tables.embeddings(made_from, embedder(images), rows, root, title, progress, verify=True)
    return ready_rows(need, table, place)


def augmentation(recipe: EmbedderRecipe, pixels: Any = "imagenet") -> Augmentation:
    own = recipe.augment
    return Augmentation(flip=own.flip, erase=own.erase, erase_fill=own.erase_fill, pixels=pixels)


@dataclass(frozen=True)
class LabelledRequests:
    """(image numbers, draws) of one rank's P × K batches; every slot of an epoch has its own draws."""

    identity: np.ndarray
    labelled: Labelled
    augment: Augmentation
    aspect: float
    seed: int
    draw_steps: int = 0

    def __call__(self, epoch: int, rank: int, world: int) -> "Drawn":
        batches = identity_batches(
            self.identity, self.labelled.identities_per_batch, self.labelled.images_per_identity, (self.seed, epoch, 1)
        )
        return Drawn(batches, self.augment, self.aspect, (self.seed, epoch, 2), self.draw_steps, rank, world)


@dataclass(frozen=True)
class Drawn:
    """An epoch's batches with the random numbers of every slot, of one rank: iterates (image numbers, draws).

    With ``draw_steps`` = 0 the draws of the epoch are made at once, as 0.3 did; else those of so many steps, under a
    key of their own, so that an epoch of millions of images needs little memory.
    """

    batches: np.ndarray
    augment: Augmentation
    aspect: float
    key: tuple[int, ...]
    draw_steps: int
    rank: int
    world: int

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        size = self.batches.shape[1]
        slots = own_part(np.arange(size), self.rank, self.world)
        steps = self.draw_steps or len(self.batches)
        for start in range(0, len(self.batches), steps):
            block = self.batches[start : start + steps]
            key = (*self.key, start // steps) if self.draw_steps else self.key
            draws = self.augment.draw(block.size, self.aspect, key).reshape(*block.shape, DRAWS)
            for step in range(len(block)):
                yield block[step, slots], draws[step, slots]


@dataclass(frozen=True)
class LoadLabelled:
    """Turns a labelled request into what :func:`supervised_losses` is given; picklable for loader processes."""

    pixels: Source
    images: ImageSet

    def __call__(self, request: tuple[np.ndarray, np.ndarray]) -> Batch:
        indices, draws = request
        return {
            "frames": torch.as_tensor(self.pixels(indices)),
            "draws": torch.from_numpy(draws),
            "label": tables.column(self.pixels, "label", self.images.labels, indices),
            "names": names_of(self.images, indices),
        }


def decodes(*sources: Source | None) -> bool:
    """Whether any source decodes images, which takes processes of its own."""
    return any(isinstance(source, Frames) for source in sources)


def classes_fingerprint(train: ImageSet) -> str:
    """Which identity is which class: classifiers of equal fingerprint have equal columns."""
    return digest(np.unique(train.identity).tolist())


def names_of(images: ImageSet, indices: np.ndarray) -> list[str]:
    return [images.keys[int(i)] for i in indices]
