"""Crops of people, cut once from the original frames and kept as uint8: what the instance path looks at."""

# Shape legend: N = people of the training set.

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

from orchestrator import cache
from orchestrator.cache import Rows
from orchestrator.datasets.images import ImageSet, fetch
from orchestrator.datasets.scenes import SceneSet
from orchestrator.families.person_search import data
from orchestrator.needs import Need, Place, Prepared, Ready, Report

SMALLEST = 2  # pixels of a side inside the frame; a smaller box is detected, but nobody is recognised in it


def crops_need(size: tuple[int, int], needs: Mapping[str, Need], loader_workers: int) -> Need:
    """Crops of the training frames at one size."""
    return Need(
        "crops", {"size": list(size)}, {"images": needs["train"], "scenes": needs["train scenes"]},
        how={"loader_workers": loader_workers}, title=f"crops of people at {size[0]}×{size[1]}",
    )  # fmt: skip


def make_crops(need: Need, after: Mapping[str, Ready], place: Place, progress: Report) -> Ready:
    """Raises OSError where a frame cannot be decoded."""
    prepared = Prepared(place, {"train": after["images"], "train scenes": after["scenes"]})
    images = data.open_index(place, after["images"])
    scenes, size = data.open_scenes(prepared, "train", images), tuple(need.made_from["size"])
    made_from = {"images": images.fingerprint, "scenes": after["scenes"].fingerprint, "size": list(size)}

    def blocks() -> Iterator[cache.Block]:
        done = 0
        load = _Cut(images, scenes, size)
        for block in fetch(load, cache.ranges(len(scenes), 64), need.how["loader_workers"]):
            done = min(len(scenes), done + 64)
            progress(f"cutting people of {images.name}", done, len(scenes))
            if len(block["crop"]):
                yield block

    rows = cache.ensure(place.folder("cache"), "crops", made_from, blocks, verify=True)
    return Ready(need.key, need.kind, cache.folder_below(place.storage, rows), rows.manifest["fingerprint"])


def open_crops(prepared: Prepared) -> Rows:
    """Column "crop" of every person, uint8 (3, h, w); zeros where there is none."""
    return cache.open_rows(prepared.path("crops"))


@dataclass(frozen=True)
class _Cut:
    """Frame numbers -> crops of their people, in order; picklable for loader processes."""

    images: ImageSet
    scenes: SceneSet
    size: tuple[int, int]

    def __call__(self, frames: range) -> dict[str, Any]:
        crops = []
        for number in frames:
            boxes_n4 = self.scenes.boxes(number)
            if len(boxes_n4):
                frame_3HW = data.frame_pixels(self.images, number)
                crops += [cut(frame_3HW, box_4, self.size) for box_4 in boxes_n4]
        return {"crop": torch.stack(crops).numpy() if crops else np.zeros((0, 3, *self.size), np.uint8)}


def inside(box_N4: np.ndarray, size_N2: np.ndarray) -> np.ndarray:
    """The part of every box in its frame of (height, width)."""
    return box_N4.clip(0, np.concatenate([size_N2[:, ::-1]] * 2, axis=1))


def is_usable(box_N4: np.ndarray, size_N2: np.ndarray) -> np.ndarray:
    """Whether enough of a box is in its frame of (height, width) for a crop, (N,) bool."""
    clipped_N4 = inside(box_N4, size_N2)
    return (clipped_N4[:, 2:] - clipped_N4[:, :2] >= SMALLEST).all(1)


def cut(frame_3HW: Tensor, box_4: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The part of a frame inside a box, uint8 (3, h, w), aspect not kept; zeros where too little of it is there.

    >>> cut(torch.ones(3, 20, 20, dtype=torch.uint8), np.array([-5, 0, 10, 20]), (8, 4)).shape
    torch.Size([3, 8, 4])
    """
    frame_12 = np.array([frame_3HW.shape[1:]])
    if not is_usable(box_4[None], frame_12)[0]:
        return torch.zeros(3, *size, dtype=torch.uint8)
    left, top, right, bottom = inside(box_4[None], frame_12)[0].tolist()
    part = frame_3HW[:, top:bottom, left:right]
    return transform.resize(part, list(size), transform.InterpolationMode.BILINEAR, antialias=True)
