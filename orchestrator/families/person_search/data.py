"""Data of a person search: tables of frames and of what is in them, and how a trial opens them.

A trial opens tables by their path: it lists no folder, and reads no image that the frames' table holds.
"""

import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

from losses.oim import UNLABELLED
from orchestrator import cache, find, indexing
from orchestrator.cache import Rows
from orchestrator.datasets.images import ImageSet, decode, described, fetch, printable, rebuilt, size_of
from orchestrator.datasets.scenes import AllBut, Gallery, Queries, SceneSet, SearchData
from orchestrator.datasets.unions import renumbered, union
from orchestrator.needs import Need, Place, Prepared, Ready, Report, digest
from orchestrator.recipe import Data, Run

SIDES = ("gallery", "train")  # what both tell, such as counts, is the last one's: it knows what is trained on
_QUALITY = 95  # of stored JPEGs, without chroma subsampling
_ORIGINAL, _RESIZED = slice(0, 2), slice(2, 4)  # of the column "size": height and width


def listed(data: Data, place: Place) -> SearchData:
    """What the readers list, with the asked fraction of the training frames; a+b has the training frames of both.

    Raises:
        ValueError: a data set holds no scenes, or the first one nobody to search.
    """
    parts = {name: find.listed(name, place.data_root, data.part) for name in parts_of(data.name)}
    for name, found in parts.items():
        if not isinstance(found, SearchData):
            raise ValueError(f"{name} holds no scenes with boxes of people, which this method needs")
    found = union(parts)
    return found if data.fraction == 1.0 else replace(found, train=_fraction(found.train, data.fraction))


def parts_of(name: str) -> list[str]:
    """The data sets of a union, which are named with + between them.

    Raises:
        ValueError: one is named twice.

    >>> parts_of("prw+inria_person")
    ['prw', 'inria_person']
    """
    parts = name.split("+")
    if len(set(parts)) < len(parts):
        raise ValueError(f"{name} names a data set twice")
    return parts


def _fraction(train: SceneSet, fraction: float) -> SceneSet:
    """Some frames by a fixed order, so that a smaller fraction is inside every larger one; identities 1 … K anew."""
    count = max(1, round(fraction * len(train)))
    mask_F = np.zeros(len(train), bool)
    mask_F[np.random.default_rng(0).permutation(len(train))[:count]] = True
    rows = np.repeat(mask_F, train.count_F)
    identity_N = renumbered([train.identity_N[rows]])
    frames = train.frames.part(mask_F, f"{train.frames.name}-{fraction:g}")
    return SceneSet(frames, train.box_N4[rows], identity_N, train.count_F[mask_F])


# --- needs ------------------------------------------------------------------------------------------------------------


def side_needs(data: Data, run: Run, size: tuple[int, int], place: Place, *sides: str) -> dict[str, Need]:
    """Of each side its index, its frames at one size, and what is in them: "train", "train frames", "train scenes"."""
    found: dict[str, Need] = {}
    for side in sides:
        told = {"name": data.name, "part": data.part, "fraction": data.fraction}
        if side == "gallery":  # the first one's, and whole: trials on other training frames share it
            told |= {"name": parts_of(data.name)[0], "fraction": 1.0}
        scenes, annotation, stamp = _described(data, place, side)
        made_from = {"data": told, "side": side, "reader": described(scenes.frames.reader), "stamp": stamp,
                     "listing": annotation["listing"]}  # fmt: skip
        frames = scenes.frames
        how = {"images": len(frames), "identities": scenes.num_identities}
        index = Need("index", made_from, title=f"index of {frames.name} ({len(frames):,} frames)", how=how)
        kept = is_cached(run, size)
        pixels = Need(
            "frames", {"size": list(size), "jpeg": _QUALITY if kept else 0}, {"images": index},
            how={"loader_workers": run.loader_workers},
            title=f"{'frames' if kept else 'sizes of the frames'} of {frames.name} at {size[0]}×{size[1]}",
        )  # fmt: skip
        found |= {side: index, f"{side} frames": pixels}
        found[f"{side} scenes"] = Need(
            "scenes", {"data": told, "side": side, "annotation": annotation["scenes"]},
            {"images": index, "frames": pixels},
            how={"identities": scenes.num_identities, "people": len(scenes.box_N4)},
            title=f"boxes of {frames.name} ({len(scenes.box_N4):,})",
        )  # fmt: skip
    return found


@lru_cache(maxsize=16)  # every variant of a sweep asks, and each answer looks at every file
def _described(data: Data, place: Place, side: str) -> tuple[SceneSet, dict[str, str], str]:
    found = listed(data, place)
    scenes: SceneSet = getattr(found, side)
    frames = scenes.frames
    arrays = _arrays(found, side)
    content = {name: [list(a.shape), str(a.dtype), digest(a.tobytes().hex())] for name, a in arrays.items()}
    listing = indexing.listing_digest(frames.keys, frames.identity, frames.cameras)
    return scenes, {"scenes": digest(content), "listing": listing}, frames.reader.stamp(frames.keys)


def check_identities(need: Need, why: str) -> None:
    """Raises ValueError where training people have no identities, or more than an identity memory can hold."""
    identities = need.how["identities"]
    if not 1 <= identities < UNLABELLED:
        raise ValueError(
            f"{need.title}: {identities:,} identities, {why}; expected 1 to {UNLABELLED - 1:,}, as label {UNLABELLED} "
            f"stands for a person without one"
        )


def is_cached(run: Run, size: tuple[int, int]) -> bool:
    """Whether frames are kept as JPEG at training size, decoded once: where it is asked for, or where they are small.

    JPEG of quality 95 changes pixels a little, so what is trained on such frames has a key of its own.
    """
    return run.pixel_cache == "on" or (run.pixel_cache == "auto" and size[0] * size[1] <= 128 * 128)


# --- making -----------------------------------------------------------------------------------------------------------


def make(need: Need, after: Mapping[str, Ready], place: Place, progress: Report) -> Ready:
    """Meets the needs that every person search has.

    Raises:
        OSError: frames cannot be decoded.
        ValueError: boxes that no frame can have, data that changed since they were listed, or a kind that is none.
    """
    if need.kind == "index":
        return _make_index(need, place, progress)
    if need.kind == "frames":
        return _make_frames(need, after, place, progress)
    if need.kind == "scenes":
        return _make_scenes(need, after, place)
    raise ValueError(f"nobody makes {need.kind!r} for this method")


def _make_index(need: Need, place: Place, progress: Report) -> Ready:
    asked = need.made_from
    found = listed(Data(**asked["data"]), place)
    frames = getattr(found, asked["side"]).frames
    if frames.reader.stamp(frames.keys) != asked["stamp"]:
        raise ValueError(f"{frames.name} has changed while it was being prepared; run the command again")
    table = indexing.index(frames, place.folder("cache"), progress)
    indexed = indexing.checked(frames, table, remedy="repair them, or take them out of the lists too")
    told = {
        "index": {"name": indexed.name, "reader": described(indexed.reader), "cameras": indexed.camera is not None},
        "protocol": found.protocol,
        "notice": found.notice,
        f"{asked['side']}_fingerprint": indexed.fingerprint,
    }
    return Ready(need.key, need.kind, cache.folder_below(place.storage, table), indexed.fingerprint, told)


def open_index(place: Place, ready: Ready) -> ImageSet:
    told = ready.told["index"]
    return indexing.open_index(
        place.folder(ready.path), told["name"], rebuilt(told["reader"]), told["cameras"], ready.fingerprint
    )


def _make_frames(need: Need, after: Mapping[str, Ready], place: Place, progress: Report) -> Ready:
    images, size, quality = open_index(place, after["images"]), tuple(need.made_from["size"]), need.made_from["jpeg"]
    made_from = {"images": images.fingerprint, "size": list(size), "jpeg": quality}

    def blocks() -> Iterator[cache.Block]:
        done = 0
        load = _Stored(images, size, quality)
        for block in fetch(load, cache.ranges(len(images), 64), need.how["loader_workers"] if quality else 0):
            done += len(block["size"])
            progress(f"{'storing' if quality else 'measuring'} {images.name}", done, len(images))
            yield block

    rows = cache.ensure(place.folder("cache"), "frames", made_from, blocks, verify=True)
    path = cache.folder_below(place.storage, rows)
    return Ready(need.key, need.kind, path, rows.manifest["fingerprint"])


@dataclass(frozen=True)
class _Stored:
    """Row numbers -> original and resized size of the frames, and their JPEGs; picklable for loader processes."""

    images: ImageSet
    size: tuple[int, int]
    quality: int

    def __call__(self, rows: range) -> dict[str, Any]:
        sizes, stored = [], []
        for row in rows:
            data = self.images.reader.read(self.images.keys[row])
            if not self.quality:
                original = size_of(data)
                sizes.append((*original, *resized_size(*original, self.size)))
                continue
            frame = transform.pil_to_tensor(decode(data))
            small = resize(frame, resized_size(*frame.shape[1:], self.size))
            sizes.append((*frame.shape[1:], *small.shape[1:]))
            file = io.BytesIO()
            picture = Image.fromarray(small.permute(1, 2, 0).numpy())
            picture.save(file, "JPEG", quality=self.quality, subsampling=0)
            stored.append(file.getvalue())
        return {"size": np.array(sizes, np.int64)} | ({"jpeg": stored} if self.quality else {})


def _make_scenes(need: Need, after: Mapping[str, Ready], place: Place) -> Ready:
    asked = need.made_from
    found, side = listed(Data(**asked["data"]), place), asked["side"]
    scenes: SceneSet = getattr(found, side)
    frames = cache.open_rows(place.folder(after["frames"].path))
    size_F2 = frames.all("size")[:, _ORIGINAL]
    check_boxes(scenes, size_F2)
    if side == "gallery":
        _check_inside("query box", scenes.frames, found.queries.box_Q4, found.queries.frame_Q, size_F2)
    path = f"scenes/{need.key}.safetensors"
    file = Path(place.folder(path))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    save_file(_arrays(found, side), partial)
    os.replace(partial, file)
    told = {"classes_fingerprint": need.key} if side == "train" else {}
    return Ready(
        need.key, need.kind, path, cache.file_hash(file), {**told, f"{side}_identities": scenes.num_identities}
    )


def check_boxes(scenes: SceneSet, size_F2: np.ndarray) -> None:
    """Raises ValueError, which names the first frame, for boxes without area or without any pixel of their frame."""
    frame_N = np.repeat(np.arange(len(scenes)), scenes.count_F)
    _check_inside("box", scenes.frames, scenes.box_N4, frame_N, size_F2)


def _check_inside(what: str, frames: ImageSet, box_N4: np.ndarray, frame_N: np.ndarray, size_F2: np.ndarray) -> None:
    low_N2, high_N2 = box_N4[:, :2], box_N4[:, 2:]
    flat_N = (high_N2 <= low_N2).any(1)
    outside_N = (high_N2 <= 0).any(1) | (low_N2 >= size_F2[frame_N][:, ::-1]).any(1)
    for wrong_N, why in ((flat_N, "has no area"), (outside_N, "lies outside its frame")):
        if wrong_N.any():
            row = int(wrong_N.argmax())
            height, width = size_F2[frame_N[row]]
            of = f"{printable(frames.keys[frame_N[row]])} ({width}×{height} pixels)"
            more = f", and {wrong_N.sum() - 1:,} more" if wrong_N.sum() > 1 else ""
            raise ValueError(
                f"{frames.name}: {what} {box_N4[row].tolist()} of {of} {why}{more}; boxes are x1 y1 x2 y2 in pixels "
                f"with x2 > x1 and y2 > y1; mend or remove them"
            )


# --- opening ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frames:
    """Frames of one side at training size; picklable for loader processes."""

    images: ImageSet
    table: Rows
    size: tuple[int, int]

    @property
    def decodes(self) -> bool:
        """Whether a frame is read from its own file."""
        return "jpeg" not in self.table.manifest["columns"]

    def sizes(self) -> np.ndarray:
        """(F, 2) height and width at training size."""
        return self.table.all("size")[:, _RESIZED]

    def scale(self, frame: int) -> np.ndarray:
        """(4,) what boxes of the original frame are multiplied by: x, y, x, y."""
        size_4 = self.table(np.array([frame]), "size")[0]
        (height, width), (new_height, new_width) = size_4[_ORIGINAL], size_4[_RESIZED]
        return np.array([new_width / width, new_height / height] * 2)

    def __call__(self, frame: int) -> Tensor:
        """uint8 (3, H, W). Raises OSError that names the frame."""
        if not self.decodes:
            stored = Image.open(io.BytesIO(self.table.text("jpeg")[frame]))
            return transform.pil_to_tensor(stored.convert("RGB"))
        pixels = frame_pixels(self.images, frame)
        return resize(pixels, resized_size(*pixels.shape[1:], self.size))


def frame_pixels(images: ImageSet, frame: int) -> Tensor:
    """uint8 (3, H, W) of a frame's own file. Raises OSError that names it."""
    key = images.keys[frame]
    try:
        return transform.pil_to_tensor(decode(images.reader.read(key)))
    except Exception as error:  # whatever a damaged file makes the decoder raise, the file's name matters
        raise OSError(f"{images.name}: cannot read frame {key!r}: {error}") from error


def open_frames(prepared: Prepared, side: str, size: tuple[int, int]) -> Frames:
    images = open_index(prepared.place, prepared[side])
    return Frames(images, cache.open_rows(prepared.path(f"{side} frames")), size)


def open_scenes(prepared: Prepared, side: str, images: ImageSet) -> SceneSet:
    stored = load_file(prepared.path(f"{side} scenes"))
    return SceneSet(images, stored["box"], stored["identity"], stored["count"])


@dataclass(frozen=True)
class Searched:
    """A gallery with its queries, from its tables."""

    frames: Frames
    scenes: SceneSet
    queries: Queries
    galleries: Mapping[str, Gallery]


def open_gallery(prepared: Prepared, size: tuple[int, int]) -> Searched:
    frames = open_frames(prepared, "gallery", size)
    stored = load_file(prepared.path("gallery scenes"))
    names = sorted({name.split("/")[1:3][0] for name in stored if name.startswith("search/")},
                   key=lambda name: int(stored[f"search/{name}/place"][0]))  # fmt: skip
    queries = Queries(stored["query_frame"], stored["query_box"])
    galleries = {name: _gallery(stored, f"search/{name}", len(queries), len(frames.images)) for name in names}
    return Searched(frames, open_scenes(prepared, "gallery", frames.images), queries, galleries)


def _arrays(found: SearchData, side: str) -> dict[str, np.ndarray]:
    """What a side is, as named arrays; of the gallery also who is searched where."""
    scenes: SceneSet = getattr(found, side)
    arrays = {"box": scenes.box_N4, "identity": scenes.identity_N, "count": scenes.count_F}
    if side == "gallery":
        arrays |= {"query_frame": found.queries.frame_Q, "query_box": found.queries.box_Q4}
        for place, (name, gallery) in enumerate(found.galleries.items()):
            all_but = isinstance(gallery.frames, AllBut)
            frames = gallery.frames.left_out if all_but else gallery.frames
            at = [(query, frame) for query, own in enumerate(gallery.targets) for frame in own]
            boxes = [box for own in gallery.targets for box in own.values()]
            arrays |= {
                f"search/{name}/place": np.array([place, all_but]),
                f"search/{name}/frames": np.concatenate([np.asarray(f, np.int32) for f in frames]),
                f"search/{name}/count": np.array([len(f) for f in frames], np.int64),
                f"search/{name}/target": np.array(at, np.int64).reshape(-1, 2),
                f"search/{name}/box": np.array(boxes, np.int32).reshape(-1, 4),
            }
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _gallery(stored: Mapping[str, np.ndarray], name: str, queries: int, frames: int) -> Gallery:
    lists = np.split(stored[f"{name}/frames"].astype(np.int64), np.cumsum(stored[f"{name}/count"])[:-1])
    targets: list[dict[int, np.ndarray]] = [{} for _ in range(queries)]
    for (query, frame), box in zip(stored[f"{name}/target"].tolist(), stored[f"{name}/box"], strict=True):
        targets[query][frame] = box
    return Gallery(AllBut(frames, lists) if stored[f"{name}/place"][1] else lists, targets)


# --- pixels -----------------------------------------------------------------------------------------------------------


def resized_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a frame whose shorter side becomes ``size[0]``, the longer ``size[1]`` at most.

    >>> resized_size(600, 800, (900, 1500)), resized_size(1080, 1920, (900, 1500))
    ((900, 1200), (843, 1500))
    """
    scale = min(size[0] / min(height, width), size[1] / max(height, width))
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


def resize(frame_3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear without anti-aliasing, as torchvision's detection transform, to 8 bits again."""
    if frame_3HW.shape[1:] == size:
        return frame_3HW
    small = F.interpolate(frame_3HW[None].float(), size, mode="bilinear", align_corners=False)[0]
    return small.round_().clamp_(0, 255).to(torch.uint8)
