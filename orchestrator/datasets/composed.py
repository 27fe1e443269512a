"""Scenes composed of cut-out pictures on drawn backgrounds, with exact boxes and identities: no file is needed.

A frame is decided by its number alone: camera, background, who stands where. ``demo_scenes`` and ``emoji_scenes`` say
what is cut out.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from losses.oim import UNLABELLED
from orchestrator.datasets.demo import background, light
from orchestrator.datasets.images import ImageSet, Reader
from orchestrator.datasets.scenes import SceneSet, SearchData, full_gallery, numbered, queries_of, sized_gallery

Cut = Callable[[int, int, np.random.Generator], Image.Image]  # who, height in pixels, draws -> RGBA, cut to its edges
_STREAM = 60  # of the draws, apart from those of other demo data


@dataclass(frozen=True)
class Plan:
    """What a set of frames is like."""

    part: int  # of the draws: parts with other numbers share no frame
    frames: int
    identities: range  # who has one
    strangers: range  # who has none
    sizes: tuple[tuple[int, int], ...]  # height and width of the frames of each camera
    most: int = 4  # people in a frame
    stranger_share: float = 0.25
    height: tuple[float, float] = (0.38, 0.72)  # of a person, in shares of the frame's shorter side

    def camera(self, frame: int) -> int:
        return frame % len(self.sizes)

    def draws(self, frame: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([_STREAM, self.part, frame, stream])

    def people(self, frame: int) -> list[int]:
        """Who is in a frame, from left to right; people with an identity take turns."""
        rng = self.draws(frame, 0)
        number = int(rng.integers(1, self.most + 1))
        known = list(self.identities)
        start = frame * self.most
        found = []
        for place in range(number):
            turn, at = divmod(start + place, len(known))
            order = np.random.default_rng([_STREAM, self.part, 1_000_000 + turn]).permutation(len(known))
            stranger = rng.random() < self.stranger_share
            found.append(int(rng.choice(self.strangers)) if stranger else known[order[at]])
        return list(dict.fromkeys(found))


def compose(plan: Plan, frame: int, cut: Cut) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A frame, the boxes (n, 4) of its people, and who they are."""
    camera, people, rng = plan.camera(frame), plan.people(frame), plan.draws(frame, 1)
    height, width = plan.sizes[camera]
    lens = np.random.default_rng([_STREAM, 3, camera])
    scene = background(camera + 200, max(height, width), rng).crop((0, 0, width, height))
    column, boxes = width / len(people), []
    layers = []
    for place, who in enumerate(people):
        picture = cut(who, int(min(height, width) * rng.uniform(*plan.height)), rng)
        centre = (place + 0.5 + rng.uniform(-0.2, 0.2)) * column
        left = round(min(max(centre - picture.width / 2, 0), max(0, width - picture.width)))
        top = round(rng.uniform(0.15, 1.0) * (height - picture.height))
        boxes.append([left, top, min(width, left + picture.width), min(height, top + picture.height)])
        layers.append((top + picture.height, picture, (left, top)))
    for _, picture, corner in sorted(layers, key=lambda layer: layer[0]):  # who stands nearer hides who is behind
        scene.paste(picture, corner, picture)
    return light(scene, lens, rng), np.array(boxes), np.array(people)


def encoded(image: Image.Image) -> bytes:
    """PNG"""
    stored = io.BytesIO()
    image.save(stored, "PNG", compress_level=1)
    return stored.getvalue()


@dataclass(frozen=True)
class Side:
    """One side of a benchmark before it is listed."""

    name: str
    plan: Plan
    cut: Cut
    reader: Reader
    key: str = field(default="{}")  # of a frame's number

    def listed(self, renumber: bool) -> SceneSet:
        """The set; training identities are numbered 1 … K."""
        found = [compose(self.plan, frame, self.cut)[1:] for frame in range(self.plan.frames)]
        who_N = np.concatenate([people for _, people in found])
        identity_N = np.where(np.isin(who_N, self.plan.identities), who_N, UNLABELLED)
        if renumber:
            identity_N = numbered(identity_N, np.setdiff1d(identity_N, [UNLABELLED]))
        camera_F = np.array([self.plan.camera(frame) for frame in range(self.plan.frames)])
        keys = tuple(self.key.format(frame) for frame in range(self.plan.frames))
        frames = ImageSet(self.name, keys, np.full(len(keys), -1), self.reader, camera_F)
        box_N4 = np.concatenate([boxes for boxes, _ in found]).astype(np.int32)
        return SceneSet(frames, box_N4, identity_N.astype(np.int64), np.array([len(p) for _, p in found]))


def benchmark(train: SceneSet, gallery: SceneSet, each: int, sizes: Sequence[int]) -> SearchData:
    """``each`` queries of every identity of the gallery, searched in all frames but their own, and in fewer."""
    queries, identity_Q = queries_of(gallery, each)
    whole = full_gallery(gallery, queries, identity_Q)
    smaller = {str(size): sized_gallery(gallery, whole, queries, size) for size in sizes}
    return SearchData(train, gallery, queries, {"all": whole, **smaller})
