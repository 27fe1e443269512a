"""The embedded demo: rendered objects seen by four cameras. Nothing is downloaded, nothing is stored.

An identity is a shape, two colours, a pattern and an emblem. A camera is a background, a light, a blur and a
viewpoint. Query and gallery hold the same unseen identities; gallery images of the query's identity and camera
are removed, as in re-identification. Some images are partly covered.

Identities resemble each other on purpose (neighbours share a shape and a similar colour), so that a trained
network is far above an untrained one and still makes mistakes.
"""

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from orchestrator.datasets.images import ImageSet, RetrievalData

_VERSION = 1  # change it whenever rendering changes, so that caches do not outlive their images
_SIZE = 64  # pixels of a rendered image
_CAMERAS = 4
_SHOTS = {"train": 3, "query": 1, "gallery": 3}  # images per identity and camera
_IDENTITIES = {"train": range(0, 100), "validation": range(100, 150), "test": range(150, 230)}


@dataclass(frozen=True)
class Renderer:
    """Renders the image its key names: ``identity/camera/shot``."""

    def read(self, key: str) -> bytes:
        identity, camera, shot = (int(part) for part in key.split("/"))
        stored = io.BytesIO()
        render(identity, camera, shot).save(stored, "PNG", compress_level=1)
        return stored.getvalue()

    def stamp(self, keys: Sequence[str]) -> str:
        return f"demo-{_VERSION}"


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """``data_root`` is not used; query, gallery and training identities are disjoint sets of images."""
    return RetrievalData(
        train=_image_set("train", "train", first_shot=0),
        query=_image_set(evaluate_on, "query", first_shot=0),
        gallery=_image_set(evaluate_on, "gallery", first_shot=_SHOTS["query"]),
        camera_filter=True,
    )


def render(identity: int, camera: int, shot: int) -> Image.Image:
    """One image, RGB, 64 × 64; the same arguments always give the same pixels."""
    rng = np.random.default_rng([_VERSION, identity, camera, shot])
    scale = 2  # drawn at twice the size, so that edges are smooth
    side = _SIZE * scale
    image = background(camera, side, rng)
    thing = _object(identity, int(side * 0.72))
    lens = np.random.default_rng([_VERSION, 10_000 + camera])
    thing = thing.rotate(lens.uniform(-15, 15) + rng.normal(0, 10), Image.Resampling.BICUBIC, expand=True)
    zoom = lens.uniform(0.8, 1.0) * rng.uniform(0.85, 1.1)
    squeeze = lens.uniform(0.8, 1.0)
    thing = thing.resize((max(8, int(thing.width * zoom * squeeze)), max(8, int(thing.height * zoom))))
    x = (side - thing.width) // 2 + int(rng.normal(0, side * 0.05))
    y = (side - thing.height) // 2 + int(rng.normal(0, side * 0.05))
    image.paste(thing, (x, y), thing)
    if rng.random() < 0.25:
        _occlude(image, rng)
    image = image.resize((_SIZE, _SIZE), Image.Resampling.LANCZOS)
    image = image.filter(ImageFilter.GaussianBlur(lens.uniform(0.0, 0.9)))
    return light(image, lens, rng)


def _image_set(part: str, role: str, first_shot: int) -> ImageSet:
    if part not in _IDENTITIES:
        raise ValueError(f"demo has the parts {', '.join(_IDENTITIES)}, not {part!r}")
    shots = range(first_shot, first_shot + _SHOTS[role])
    rows = [(i, c, s) for i in _IDENTITIES[part] for c in range(_CAMERAS) for s in shots]
    identity, camera, _ = np.array(rows, dtype=np.int64).T
    return ImageSet(f"demo/{role}-{part}", tuple(f"{i}/{c}/{s}" for i, c, s in rows), identity, Renderer(), camera)


def _object(identity: int, side: int) -> Image.Image:
    rng = np.random.default_rng([_VERSION, 20_000 + identity])
    corners = int(rng.integers(3, 9))
    inner = rng.choice([1.0, 0.8, 0.55])
    hue = rng.random()
    second = (hue + rng.choice([0.08, 0.2, 0.5])) % 1
    fill, other = colour(hue, rng.uniform(0.4, 0.9)), colour(second, rng.uniform(0.4, 0.9))
    body = Image.new("RGB", (side, side), fill)
    _pattern(ImageDraw.Draw(body), str(rng.choice(["stripes", "rings", "dots", "half", "plain"])), other, side, rng)
    emblem = [int(side * v) for v in rng.uniform(0.3, 0.55, 2)]
    size = int(side * rng.uniform(0.12, 0.22))
    ImageDraw.Draw(body).ellipse((*emblem, emblem[0] + size, emblem[1] + size), fill=colour(rng.random(), 0.9))
    mask = Image.new("L", (side, side))
    points = []
    for corner in range(2 * corners):
        radius = side / 2 * (1 if corner % 2 == 0 else inner * math.cos(math.pi / corners) ** (inner == 1.0))
        angle = math.pi * corner / corners
        points.append((side / 2 + radius * math.sin(angle), side / 2 - radius * math.cos(angle)))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    body.putalpha(mask)
    return body


def _pattern(draw: ImageDraw.ImageDraw, kind: str, colour: tuple[int, int, int], side: int, rng) -> None:
    period = int(side * rng.choice([0.14, 0.22, 0.3]))
    if kind == "stripes":
        slant = int(rng.choice([0, side]))
        for x in range(-side, 2 * side, period):
            draw.line((x, 0, x + slant, side), fill=colour, width=period // 2)
    elif kind == "rings":
        for radius in range(period, side, period):
            box = (side // 2 - radius, side // 2 - radius, side // 2 + radius, side // 2 + radius)
            draw.ellipse(box, outline=colour, width=period // 3)
    elif kind == "dots":
        for x in range(0, side, period):
            for y in range(0, side, period):
                draw.ellipse((x, y, x + period // 2, y + period // 2), fill=colour)
    elif kind == "half":
        draw.rectangle((0, side // 2, side, side), fill=colour)


def background(camera: int, side: int, rng: np.random.Generator) -> Image.Image:
    scene = np.random.default_rng([_VERSION, 30_000 + camera])
    top, bottom = scene.uniform(40, 215, (2, 3))
    rows = np.linspace(0, 1, side)[:, None, None]
    pixels = top * (1 - rows) + bottom * rows + np.zeros((side, side, 3))
    coarse = rng.normal(0, 25, (8, 8, 3)).repeat(side // 8, axis=0).repeat(side // 8, axis=1)
    return Image.fromarray(np.clip(pixels + coarse, 0, 255).astype(np.uint8))


def _occlude(image: Image.Image, rng: np.random.Generator) -> None:
    side = image.width
    width, height = rng.uniform(0.2, 0.5, 2) * side
    x, y = rng.uniform(0, 1, 2) * (side - width, side - height)
    grey = int(rng.integers(30, 220))
    ImageDraw.Draw(image).rectangle((x, y, x + width, y + height), fill=(grey, grey, grey))


def light(image: Image.Image, lens: np.random.Generator, rng: np.random.Generator) -> Image.Image:
    tint = lens.uniform(0.6, 1.25, 3) * rng.uniform(0.75, 1.2)
    pixels = np.asarray(image, dtype=np.float64) * tint + rng.normal(0, 5, (image.height, image.width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def colour(hue: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, value)
    return int(red * 255), int(green * 255), int(blue * 255)
