"""The embedded demo of person search: drawn people, four cameras, things in front of them. Nothing is downloaded.

An identity is a build, a skin, a hair, a top with a pattern, trousers or a skirt, shoes, and sometimes a bag. A camera
is a background, a light, a blur and a distance. As in Occluded-Duke every query is occluded, a few of the training
and gallery images are; gallery images of the query's identity and camera are removed.

The occluders (posts, crates, other people) are drawn here and are not those of orchestrator.datasets.occlusion, so
that what training pastes and what the test shows are different things.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from orchestrator.datasets import layout
from orchestrator.datasets.demo import background, colour, light
from orchestrator.datasets.images import ImageSet, RetrievalData

_VERSION = 1  # change it whenever rendering changes, so that caches do not outlive their images
_SIZE = (128, 64)  # height and width in pixels of a rendered image
_CAMERAS = 4
_SHOTS = {"train": 3, "query": 1, "gallery": 2}  # images per identity and camera
_OCCLUDED = {"train": 0.15, "query": 1.0, "gallery": 0.15}
_FIRST_SHOT = {"train": 0, "query": 0, "gallery": 10}
_IDENTITIES = {"train": range(0, 100), "validation": range(100, 130), "test": range(200, 260)}


@dataclass(frozen=True)
class Renderer:
    """Renders the image its key names: ``identity/camera/shot/occluded``."""

    def read(self, key: str) -> bytes:
        identity, camera, shot, occluded = (int(part) for part in key.split("/"))
        stored = io.BytesIO()
        render(identity, camera, shot, bool(occluded)).save(stored, "PNG", compress_level=1)
        return stored.getvalue()

    def stamp(self, keys: Sequence[str]) -> str:
        return f"demo-people-{_VERSION}"


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """``data_root`` is not used; query, gallery and training identities are disjoint sets of images."""
    layout.check_part("demo_people", evaluate_on)
    return RetrievalData(
        train=_image_set("train", "train"),
        query=_image_set(evaluate_on, "query"),
        gallery=_image_set(evaluate_on, "gallery"),
        camera_filter=True,
    )


def render(identity: int, camera: int, shot: int, occluded: bool = False) -> Image.Image:
    """One image, RGB, 128 × 64; the same arguments always give the same pixels."""
    rng = np.random.default_rng([_VERSION, 50, identity, camera, shot])
    scale = 2  # drawn at twice the size, so that edges are smooth
    height, width = (scale * side for side in _SIZE)
    lens = np.random.default_rng([_VERSION, 51, camera])
    scene = background(camera + 100, height, rng).crop((0, 0, width, height))
    distance = lens.uniform(0.82, 1.0) * rng.uniform(0.92, 1.05)
    stand(scene, identity, rng, distance, rng.normal(0.5, 0.04))
    if occluded:
        _occlude(scene, identity, rng)
    image = light(scene, lens, rng).resize((_SIZE[1], _SIZE[0]), Image.Resampling.LANCZOS)
    return image.filter(ImageFilter.GaussianBlur(lens.uniform(0.0, 0.8)))


def _image_set(part: str, side: str) -> ImageSet:
    rng = np.random.default_rng([_VERSION, 52, len(part), len(side)])
    rows = [
        (identity, camera, _FIRST_SHOT[side] + shot, int(rng.random() < _OCCLUDED[side]))
        for identity in _IDENTITIES[part]
        for camera in range(_CAMERAS)
        for shot in range(_SHOTS[side])
    ]
    identity, camera = np.array(rows)[:, :2].T
    return ImageSet(f"demo-people/{side}-{part}", tuple("/".join(map(str, row)) for row in rows), identity, Renderer(),
                    camera)  # fmt: skip


def stand(scene: Image.Image, identity: int, rng: np.random.Generator, distance: float, at: float) -> None:
    """Draws one person, feet near the bottom; ``at`` is the middle as a fraction of the width."""
    person = np.random.default_rng([_VERSION, 53, identity])
    draw = ImageDraw.Draw(scene)
    height, width = scene.height * 0.92 * distance, scene.width
    build, middle, floor = person.uniform(0.85, 1.2), at * width, scene.height * 0.97
    hue, second = person.random(), person.random()
    top, trousers = colour(hue, person.uniform(0.35, 0.9)), colour(second, person.uniform(0.2, 0.7))
    skin = tuple(int(v * person.uniform(0.55, 1.0)) for v in (245, 205, 175))
    hair, shoes = colour(person.random() * 0.12, person.uniform(0.05, 0.5)), colour(person.random(), 0.25)
    pattern, skirt, bag, hat = (
        person.integers(0, 4),
        person.random() < 0.25,
        person.integers(0, 3),
        person.random() < 0.2,
    )
    stride = rng.uniform(-0.06, 0.06) * height

    def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        """Corners from the middle, the height above the floor, and the sizes, as fractions of the person's height."""
        left = middle + (x - w / 2) * height * build
        return left, floor - (y + h) * height, left + w * height * build, floor - y * height

    for side in (-1, 1):  # legs and shoes
        x = middle + side * 0.05 * height * build
        draw.line((x, floor - 0.48 * height, x + side * stride, floor - 0.03 * height), fill=trousers,
                  width=int(0.075 * height * build))  # fmt: skip
        draw.ellipse((x + side * stride - 0.05 * height, floor - 0.045 * height, x + side * stride + 0.05 * height,
                      floor), fill=shoes)  # fmt: skip
    if skirt:
        left, upper, right, lower = box(0, 0.28, 0.26, 0.24)
        draw.polygon(((left + 0.05 * height, upper), (right - 0.05 * height, upper), (right, lower), (left, lower)),
                     fill=trousers)  # fmt: skip
    swing = rng.uniform(-0.05, 0.05)
    for side in (-1, 1):  # arms behind the torso
        x = middle + side * 0.125 * height * build
        draw.line((x, floor - 0.78 * height, x + side * (0.03 + swing) * height, floor - 0.47 * height), fill=top,
                  width=int(0.06 * height))  # fmt: skip
    torso = box(0, 0.46, 0.25, 0.36)
    draw.rounded_rectangle(torso, radius=0.05 * height, fill=top)
    other = colour((hue + person.choice([0.15, 0.4, 0.6])) % 1, person.uniform(0.4, 0.95))
    left, upper, right, lower = torso
    if pattern == 1:
        for y in np.arange(upper + 0.03 * height, lower - 0.01 * height, 0.06 * height):
            draw.rectangle((left, y, right, y + 0.025 * height), fill=other)
    elif pattern == 2:
        draw.rectangle((left, (upper + lower) / 2, right, lower), fill=other)
    elif pattern == 3:
        draw.ellipse(box(0, 0.6, 0.12, 0.12), fill=other)
    bag_colour = colour(person.random(), person.uniform(0.2, 0.8))
    if bag == 1:
        draw.rectangle(box(0.16, 0.42, 0.1, 0.14), fill=bag_colour)
    elif bag == 2:
        draw.line((left, upper, right, lower), fill=bag_colour, width=int(0.03 * height))
    draw.rectangle(box(0, 0.8, 0.06, 0.06), fill=skin)
    draw.ellipse(box(0, 0.84, 0.125, 0.155), fill=skin)
    draw.pieslice(box(0, 0.84, 0.14, 0.165), 180, 360, fill=hair)
    if hat:
        draw.rectangle(box(0, 0.955, 0.2, 0.03), fill=bag_colour)


def _occlude(scene: Image.Image, identity: int, rng: np.random.Generator) -> None:
    draw, (width, height) = ImageDraw.Draw(scene), scene.size
    kind = rng.integers(0, 3)
    if kind == 0:  # another person in front, to one side
        stranger = 10_000 + int(rng.integers(0, 500))
        stand(scene, stranger, rng, rng.uniform(0.95, 1.15), rng.choice([0.12, 0.88]))
        return
    fill, edge = (tuple(int(v) for v in rng.uniform(30, 200, 3)) for _ in range(2))
    share = rng.uniform(0.33, 0.5)
    if kind == 1:  # a post
        left = 0 if rng.random() < 0.5 else width * (1 - share)
        draw.rectangle((left, 0, left + width * share, height), fill=fill)
        for y in range(0, height, 24):
            draw.line((left, y, left + width * share, y + 12), fill=edge, width=5)
    else:  # a crate
        draw.rectangle((0, height * (1 - share), width, height), fill=fill)
        for x in range(0, width, 20):
            draw.rectangle((x, height * (1 - share), x + 3, height), fill=edge)
