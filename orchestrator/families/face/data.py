"""Data of face recognition: tables of faces and of who is compared with whom, and how a trial opens them.

A trial opens tables by their path: it lists no folder, and reads no image that the pixel cache holds.
"""

# Shape legend: P = pairs, N = images.

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from orchestrator import cache, find, indexing
from orchestrator.datasets.faces import FaceData, Pairs, Search, Templates, VerificationSet
from orchestrator.datasets.images import ImageSet, described
from orchestrator.families.face.recipe import FaceRecipe
from orchestrator.families.retrieval.data import (
    Source,
    classes_fingerprint,
    fraction_of,
    make_pixels,
    open_frames,
    open_images,
    pixel_need,
    ready_rows,
)
from orchestrator.method import Where
from orchestrator.needs import Need, Place, Prepared, Ready, Report
from orchestrator.recipe import Data

OWN = "val"  # what the data set's own verification set is called, in metrics
TRAIN = "train"
_ROWS = 2**20  # of a table that are made at once
_Asked = tuple[tuple[str, Any], ...]  # which images: names and values, as made_from has them


def parts_of(verify: str) -> list[str]:
    """The data sets that are verified on too.

    Raises:
        ValueError: one is named twice, or is none.

    >>> parts_of("orl+lfw"), parts_of("")
    (['orl', 'lfw'], [])
    """
    parts = verify.split("+") if verify else []
    if len(set(parts)) < len(parts):
        raise ValueError(f"verify={verify} names a data set twice")
    for name in parts:
        find.dataset(name)
    return parts


def face_data(name: str, place: Place, part: str = "test") -> FaceData:
    """What a reader lists.

    Raises:
        ValueError: a data set that holds no faces.
    """
    found = find.listed(name, place.data_root, part)
    if not isinstance(found, FaceData):
        raise ValueError(f"{name} holds no faces that are verified, which this method needs")
    return found


def listed_train(data: Data, place: Place) -> ImageSet:
    """The training faces, or a fraction of them; a smaller one is inside every larger one.

    Raises:
        ValueError: the data set is only verified on.
    """
    train = face_data(data.name, place, data.part).train
    if train is None:
        raise ValueError(f"{data.name} is only verified on; train on another data set, with --set verify={data.name}")
    return fraction_of(train, data.fraction)


def verification(data: Data, verify: str, place: Place) -> dict[str, tuple[dict[str, Any], VerificationSet]]:
    """Every verification set by the first part of its metrics' names, and where it comes from.

    A further data set's own set takes the data set's name.

    Raises:
        ValueError: two sets would have one name.
    """
    found = {}
    for name, part in [(data.name, data.part), *((name, "test") for name in parts_of(verify))]:
        for key, one in face_data(name, place, part).verification.items():
            shown = name if key == OWN and name != data.name else key
            if shown in found:
                raise ValueError(f"two verification sets are called {shown}; leave one out of verify={verify}")
            found[shown] = {"name": name, "part": part, "set": key}, one
    return found


# --- needs ------------------------------------------------------------------------------------------------------------


def train_needs(recipe: FaceRecipe, place: Place) -> dict[str, Need]:
    """Index and pixels of the training faces: roles "train", "train pixels"."""
    own = recipe.data
    index = _index_need({"name": own.name, "part": own.part, "fraction": own.fraction}, place, own.skip_unreadable)
    pixels = pixel_need(recipe.run, index, recipe.student.size)
    return {TRAIN: index} | {f"{TRAIN} pixels": need for need in pixels.values()}


def verification_needs(recipe: FaceRecipe, place: Place) -> dict[str, Need]:
    """Of each set its index, its pixels, who is compared with whom: roles "val", "val pixels", "val pairs", …

    The data set's own sets come last: of what several tell the record, the last one's stays.
    """
    found: dict[str, Need] = {}
    listed = verification(recipe.data, recipe.verify, place).items()
    for shown, (asked, one) in sorted(listed, key=lambda entry: entry[1][0]["name"] == recipe.data.name):
        index = _index_need(asked, place)
        found[shown] = index
        found |= {f"{shown} pixels": need for need in pixel_need(recipe.run, index, recipe.student.size).values()}
        for part, (content, rows) in _contents(tuple(asked.items()), place).items():
            made_from = {"data": asked, "part": part, "content": content}
            found[f"{shown} {part}"] = Need(
                "columns", made_from, {"images": index}, {"folds": getattr(one, "folds", 0)},
                f"{part} of {one.images.name} ({rows:,})",
            )  # fmt: skip
    return found


def set_names(needs: Mapping[str, Any]) -> list[str]:
    """The verification sets among roles.

    >>> set_names({"train": 0, "val": 0, "val pairs": 0, "lfw": 0, "lfw pairs": 0})
    ['val', 'lfw']
    """
    return [role.removesuffix(" pairs") for role in needs if role.endswith(" pairs")]


def _index_need(asked: Mapping[str, Any], place: Place, skip_unreadable: bool = False) -> Need:
    images, listing, stamp = _described(tuple(asked.items()), place)
    side = asked.get("set", TRAIN)
    made_from = {
        "data": dict(asked), "side": side, "skip_unreadable": skip_unreadable, "reader": described(images.reader),
        "stamp": stamp, "listing": listing,
    }  # fmt: skip
    how = {"images": len(images), "identities": images.num_identities}
    return Need("index", made_from, title=f"index of {images.name} ({len(images):,} images)", how=how)


@lru_cache(maxsize=32)  # every variant of a sweep asks, and each answer looks at every file
def _described(asked: _Asked, place: Place) -> tuple[ImageSet, str, str]:
    images = _images(dict(asked), place)
    listing = indexing.listing_digest(images.keys, images.identity, images.cameras)
    return images, listing, images.reader.stamp(images.keys)


@lru_cache(maxsize=32)  # as often, and IJB-C has 15.7 million pairs
def _contents(asked: _Asked, place: Place) -> dict[str, tuple[str, int]]:
    """Of every table of a verification set a digest of what it holds, and its rows."""
    tables_ = _columns(_set(dict(asked), place))
    return {part: (_digest(columns), len(next(iter(columns.values())))) for part, columns in tables_.items()}


def _images(asked: Mapping[str, Any], place: Place) -> ImageSet:
    if "set" in asked:
        return _set(asked, place).images
    return listed_train(Data(**asked), place)


def _set(asked: Mapping[str, Any], place: Place) -> VerificationSet:
    return face_data(asked["name"], place, asked["part"]).verification[asked["set"]]


def _columns(one: VerificationSet) -> dict[str, dict[str, np.ndarray]]:
    """Tables of who is compared with whom: "pairs" always, of templates "members" and "search <gallery>"."""
    pairs = {"first": one.first_P, "second": one.second_P, "same": one.same_P}
    if isinstance(one, Pairs):
        return {"pairs": pairs}
    found = {"pairs": pairs, "members": {"template": one.template_N, "medium": one.medium_N, "score": one.score_N}}
    for gallery, own in one.searches.items():
        found[f"search {gallery}"] = {
            "template": np.concatenate([own.gallery_T, own.probe_T]),
            "subject": np.concatenate([own.gallery_subject_T, own.probe_subject_T]),
            "probe": np.repeat([False, True], [len(own.gallery_T), len(own.probe_T)]),
        }
    return found


def _digest(columns: Mapping[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name, values in columns.items():
        sha.update(f"{name} {values.dtype} {len(values)}\n".encode())
        sha.update(np.ascontiguousarray(values).data)
    return sha.hexdigest()


# --- making -----------------------------------------------------------------------------------------------------------


def make(need: Need, after: Mapping[str, Ready], where: Where, progress: Report) -> Ready:
    """Meets the needs that every face recognition has.

    Raises:
        OSError: images cannot be decoded.
        ValueError: data that changed since they were listed, or a kind that is none.
    """
    if need.kind == "index":
        return _make_index(need, where.place, progress)
    if need.kind == "pixels":
        return make_pixels(need, after, where, progress)
    if need.kind == "columns":
        return _make_columns(need, where.place, progress)
    raise ValueError(f"nobody makes {need.kind!r} for this method")


def _make_index(need: Need, place: Place, progress: Report) -> Ready:
    asked = need.made_from
    images = _images(asked["data"], place)
    if images.reader.stamp(images.keys) != asked["stamp"]:
        raise ValueError(f"{images.name} has changed while it was being prepared; run the command again")
    table = indexing.index(images, place.folder("cache"), progress)
    remedy = {} if asked["side"] == TRAIN else {"remedy": "repair them: a pair cannot be left out of a protocol"}
    indexed = indexing.checked(images, table, asked["skip_unreadable"], **remedy)
    found = face_data(asked["data"]["name"], place, asked["data"]["part"])
    told: dict[str, Any] = {
        "index": {"name": indexed.name, "reader": described(indexed.reader), "cameras": False},
        "protocol": found.protocol,
    }
    if asked["side"] == TRAIN:
        told |= {"train_fingerprint": indexed.fingerprint, "classes_fingerprint": classes_fingerprint(indexed),
                 "classes": indexed.num_identities}  # fmt: skip
    else:
        told["notice"] = found.notice
    return Ready(need.key, need.kind, cache.folder_below(place.storage, table), indexed.fingerprint, told)


def _make_columns(need: Need, place: Place, progress: Report) -> Ready:
    asked = need.made_from
    columns = _columns(_set(asked["data"], place))[asked["part"]]
    if _digest(columns) != asked["content"]:
        raise ValueError(f"{need.title} have changed while they were being prepared; run the command again")
    count = len(next(iter(columns.values())))

    def blocks() -> Iterator[cache.Block]:
        for part in cache.ranges(count, _ROWS):
            rows = slice(part.start, part.stop)
            yield {name: _stored(values[rows])[:, None] for name, values in columns.items()}
            progress(need.title, part.stop, count)

    rows = cache.ensure(place.folder("cache"), "columns", {"content": asked["content"]}, blocks, verify=True)
    return ready_rows(need, rows, place, {asked["part"]: {"folds": need.how["folds"]}})


def _stored(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint8) if values.dtype == bool else values


# --- opening ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verified:
    """What a trial scores on, by the first part of the metrics' names: opened once."""

    sets: Mapping[str, VerificationSet]
    frames: Mapping[str, Source]


def open_verification(prepared: Prepared, size: tuple[int, int]) -> Verified:
    """All verification sets from their tables alone."""
    names = set_names(prepared)
    sets = {name: _open_set(prepared, name) for name in names}
    frames = {name: open_frames(prepared, f"{name} pixels", sets[name].images, size) for name in names}
    return Verified(sets, frames)


def _open_set(prepared: Prepared, name: str) -> VerificationSet:
    images = open_images(prepared.place, prepared[name])

    def column(part: str, key: str) -> np.ndarray:
        return cache.open_rows(prepared.path(f"{name} {part}")).all(key)[:, 0]

    pairs = {"first_P": column("pairs", "first"), "second_P": column("pairs", "second"),
             "same_P": column("pairs", "same").astype(bool)}  # fmt: skip
    if f"{name} members" not in prepared:
        return Pairs(images, **pairs, folds=prepared[f"{name} pairs"].told["pairs"]["folds"])
    searches = {}
    for role in prepared:
        if role.startswith(f"{name} search "):
            part = role.removeprefix(f"{name} ")
            is_probe = column(part, "probe").astype(bool)
            template, subject = column(part, "template"), column(part, "subject")
            searches[part.removeprefix("search ")] = Search(
                template[~is_probe], subject[~is_probe], template[is_probe], subject[is_probe]
            )
    members = [column("members", key) for key in ("template", "medium", "score")]
    return Templates(images, *members, **pairs, searches=searches)
