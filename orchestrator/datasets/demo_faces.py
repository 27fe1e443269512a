"""The embedded demo of face recognition: drawn faces, aligned. Nothing is downloaded, nobody is shown.

An identity is a geometry (width and jaw of the face, distance, size and slant of the eyes, brows, nose, mouth, hair)
and colours (skin, hair, eyes, lips). An image adds a pose, a light, an expression, sometimes glasses, a background and
noise, none of which says who it is.

People come in families of four who resemble each other, so that a trained network is far above an untrained one and
still makes mistakes. Pixels alone do not tell people apart: the light changes them more than the person does.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from orchestrator.datasets import layout
from orchestrator.datasets.faces import FaceData, drawn_pairs
from orchestrator.datasets.images import ImageSet

_VERSION = 1  # change it whenever rendering changes, so that caches do not outlive their images
_SIZE = 112  # pixels of a rendered image
_SCALE = 2  # drawn at twice the size, so that edges are smooth
_IDENTITIES = {"train": range(0, 64), "validation": range(64, 94), "test": range(100, 160)}
_SHOTS = {"train": 20, "validation": 8, "test": 8}
_PAIRS = 1500  # of each kind
_FAMILY = 4  # people who resemble each other
_ALIKE = 0.45  # how far a person may be from the family, of the range of everything
_SKIN = np.array([[246, 214, 190], [232, 184, 148], [205, 150, 110], [160, 108, 74], [105, 68, 46]], float)
_HAIR = np.array(
    [[28, 22, 20], [78, 48, 28], [140, 88, 44], [206, 164, 96], [158, 60, 34], [150, 148, 146]], np.float64
)
_EYES = np.array([[70, 42, 22], [112, 84, 40], [74, 110, 62], [78, 116, 158], [120, 128, 134]], float)

Point = tuple[float, float]
Place = Callable[[float, float, float], Point]  # x, y and depth of the face -> pixels of the drawing


@dataclass(frozen=True)
class Renderer:
    """Renders the image its key names: ``identity/shot``."""

    def read(self, key: str) -> bytes:
        identity, shot = (int(part) for part in key.split("/"))
        stored = io.BytesIO()
        render(identity, shot).save(stored, "PNG", compress_level=0)  # noise takes long and gets no smaller
        return stored.getvalue()

    def stamp(self, keys: Sequence[str]) -> str:
        return f"demo-faces-{_VERSION}"


def load(data_root: str, evaluate_on: str = "test") -> FaceData:
    """``data_root`` is not used; the people of the training, validation and test part are all different."""
    layout.check_part("demo_faces", evaluate_on)
    pairs = drawn_pairs(_image_set(evaluate_on), _PAIRS, (_VERSION, 0))
    return FaceData(_image_set("train"), {"val": pairs})


def _image_set(part: str) -> ImageSet:
    keys = tuple(f"{identity}/{shot}" for identity in _IDENTITIES[part] for shot in range(_SHOTS[part]))
    identity = np.repeat(np.array(_IDENTITIES[part]), _SHOTS[part])
    return ImageSet(f"demo-faces/{part}", keys, identity, Renderer())


@dataclass(frozen=True)
class Person:
    """What says who it is. Lengths are pixels of the aligned image."""

    skin: np.ndarray
    hair: np.ndarray
    eyes: np.ndarray
    lips: np.ndarray
    width: float  # of the face, half
    chin: float  # its height below the eyes
    jaw: float  # 0 = round, 1 = pointed
    eye_gap: float  # from the middle to the middle of an eye
    eye_size: Point  # half width and height
    eye_slant: float
    brow: tuple[float, float, float]  # height above the eye, thickness, slant
    nose: Point  # length below the eyes, half width
    mouth: tuple[float, float, float]  # height in the face below the nose, half width, thickness of the lips
    hairline: float  # height of the forehead above the eyes
    style: int  # of the hair: 0 shaven, 1, 5 short, 2, 3 long, 4 curls
    beard: int  # 0 to 2 none, 3 moustache, 4 full
    freckles: bool


def person(identity: int) -> Person:
    """The looks of an identity: those of its family, and its own way of differing from them."""
    family = np.random.default_rng([_VERSION, 60, identity // _FAMILY]).random(19)
    own = np.random.default_rng([_VERSION, 61, identity]).random(22)
    # What lies beyond the range is folded back, so that all of it is used alike.
    value = np.abs(family + _ALIKE * (2 * own[:19] - 1))
    value = np.minimum(value, 2 - value)
    hair_style, beard, freckles = own[19:]  # not of the family
    shares = iter(value[3:].tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(shares)

    skin = _blend(_SKIN, value[0])
    return Person(
        skin=skin,
        hair=_blend(_HAIR, value[1]),
        eyes=_blend(_EYES, value[2]),
        lips=skin * [0.82, 0.52, 0.52] + [20, 0, 4],
        width=between(33, 43),
        chin=between(52, 64),
        jaw=between(0.0, 0.55),
        eye_gap=between(14.5, 20.5),
        eye_size=(between(5.2, 8.6), between(2.4, 5.4)),
        eye_slant=between(-0.22, 0.22),
        brow=(between(6.5, 11.5), between(1.0, 3.6), between(-0.3, 0.3)),
        nose=(between(14, 24), between(3.6, 8.0)),
        mouth=(between(16, 23), between(9.5, 17.5), between(1.6, 4.6)),
        hairline=between(16, 28),
        style=int(hair_style * 6),
        beard=int(beard * 5),
        freckles=bool(freckles < 0.25),
    )


def _blend(colours: np.ndarray, place: float) -> np.ndarray:
    """The colour at a place from 0 to 1 along a row of colours."""
    at = place * (len(colours) - 1)
    low = min(int(at), len(colours) - 2)
    return colours[low] + (at - low) * (colours[low + 1] - colours[low])


def render(identity: int, shot: int) -> Image.Image:
    """One image, RGB, 112 × 112; the same arguments always give the same pixels."""
    rng = np.random.default_rng([_VERSION, 62, identity, shot])
    side = _SIZE * _SCALE
    back = rng.uniform(20, 235, 3)
    image = Image.new("RGB", (side, side), _whole(back))
    draw = ImageDraw.Draw(image)
    for x, y, radius in rng.uniform((0, 0, 10), (_SIZE, _SIZE, 45), (3, 3)).tolist():
        _ellipse(draw, (x * _SCALE, y * _SCALE), radius, radius, _whole(back + rng.normal(0, 35, 3)))
    _draw(draw, person(identity), rng)
    # Alignment by five points is never exact: a little turn, size and shift are left.
    turn, zoom, (right, down) = math.radians(rng.normal(0, 4)), rng.normal(1, 0.035), rng.normal(0, 1.6, 2)
    cos, sin, middle = math.cos(turn) / zoom, math.sin(turn) / zoom, _SIZE / 2
    x, y = middle + right, middle + down
    data = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    image = image.reduce(_SCALE)
    image = image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=_whole(back))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.7)))
    return _light(image, rng)


def _light(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A light from one side, its strength and colour, and the noise of a camera."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, _SIZE, dtype=np.float32)] * 2)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.65)
    gain = rng.uniform(0.5, 1.25) * (1 + strength * (x * math.cos(angle) + y * math.sin(angle)))
    tint = rng.uniform(0.82, 1.18, 3).astype(np.float32)
    noise = rng.standard_normal((_SIZE, _SIZE, 3), np.float32) * np.float32(rng.uniform(1, 8))
    pixels = np.asarray(image, np.float32) * gain[..., None].astype(np.float32) * tint + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw(draw: ImageDraw.ImageDraw, who: Person, rng: np.random.Generator) -> None:
    yaw, nod = float(np.clip(rng.normal(0, 0.3), -0.65, 0.65)), rng.normal(0, 2.0)
    cos, sin = math.cos(yaw), math.sin(yaw)
    cx, cy = 56.0, 51.6  # between the eyes

    def at(x: float, y: float, depth: float) -> Point:
        """A point of the face after it has turned; ``depth`` 1 is the tip of the nose, 0 the ears."""
        return (cx + x * cos + depth * 26 * sin) * _SCALE, (cy + y + nod * depth) * _SCALE

    _head(draw, who, at)
    _eyes(draw, who, at, rng)
    _nose_and_mouth(draw, who, at, rng)
    if rng.random() < 0.2:
        _glasses(draw, who, at, rng)


def _head(draw: ImageDraw.ImageDraw, who: Person, at: Place) -> None:
    skin, hair = _whole(who.skin), _whole(who.hair)
    top, wide = -who.hairline - 14, who.width
    if who.style in (2, 3):  # long hair falls behind the face
        low = 62 if who.style == 2 else 40
        outline = [
            (-wide - 7, -10),
            (-wide, top),
            (0, top - 9),
            (wide, top),
            (wide + 7, -10),
            (wide + 8, low),
            (-wide - 8, low),
        ]
        draw.polygon([at(x, y, -0.2) for x, y in outline], fill=hair)
    if who.style == 4:  # a round head of curls
        _ellipse(draw, at(0, -24, 0), wide + 13, 36, hair)
    _ellipse(draw, at(0, who.chin + 14, -0.1), wide * 0.55, 26, _whole(who.skin * 0.82))  # neck
    for side in (-1, 1):
        _ellipse(draw, at(side * wide, 8, -0.15), 5, 9, _whole(who.skin * 0.9))
    outline = []
    for step in range(40):
        angle = 2 * math.pi * step / 40
        x, y = math.cos(angle), math.sin(angle)
        height = who.chin if y > 0 else who.hairline + 16
        narrow = 1 - who.jaw * max(y, 0) ** 2
        outline.append(at(wide * math.copysign(abs(x) ** 0.8, x) * narrow, height * y, 0.1))
    draw.polygon(outline, fill=skin)
    if who.beard == 4:
        low = [at(x, y, 0.2) for x, y in ((-wide + 1, 22), (-wide * 0.5, 30), (wide * 0.5, 30), (wide - 1, 22))]
        under = [p for p in outline if p[1] > at(0, 20, 0.1)[1]]
        draw.polygon([*low[2:], *under, *low[:2]], fill=_whole(0.75 * who.hair + 0.25 * who.skin))
    line = -who.hairline
    if who.style != 0:  # 0 is shaven
        fringe = {1: (0, 0), 2: (6, -6), 3: (-10, 8), 4: (0, 0), 5: (-8, -8)}[who.style]
        cap = [(-wide - 2, 2), (-wide - 2, line), (-wide * 0.6, top - 6), (0, top - 10), (wide * 0.6, top - 6),
               (wide + 2, line), (wide + 2, 2), (wide - 4, line + 4), (wide * 0.4, line + fringe[1]),
               (0, line + (6 if who.style == 1 else 0)), (-wide * 0.4, line + fringe[0]),
               (-wide + 4, line + 4)]  # fmt: skip
        draw.polygon([at(x, y, 0.1) for x, y in cap], fill=hair)


def _eyes(draw: ImageDraw.ImageDraw, who: Person, at: Place, rng: np.random.Generator) -> None:
    half, high = who.eye_size
    closed, gaze = rng.random() < 0.08, rng.normal(0, 1.0)
    high = 0.8 if closed else high * rng.uniform(0.75, 1.1)
    raised, dark = rng.normal(0, 1.2), _whole(who.skin * 0.45)
    for side in (-1, 1):
        x = side * who.eye_gap
        rim = []
        for step in range(16):
            angle = 2 * math.pi * step / 16
            dx, dy = half * math.cos(angle), high * math.sin(angle)
            rim.append(at(x + dx, dy + side * dx * who.eye_slant, 0.5))
        draw.polygon(rim, fill=dark if closed else (240, 238, 234), outline=dark)
        if not closed:
            middle, iris = at(x + gaze, 0, 0.55), min(high * 0.95, half * 0.62)
            _ellipse(draw, middle, iris, iris, _whole(who.eyes))
            _ellipse(draw, middle, iris * 0.5, iris * 0.5, (12, 10, 10))
        up, thick, slant = who.brow
        brow = [at(x + dx, -high - up + raised + side * dx * slant, 0.5) for dx in (-half - 2, 0, half + 2)]
        draw.line(brow, fill=_whole(who.hair * 0.8), width=max(2, round(thick * _SCALE)), joint="curve")


def _nose_and_mouth(draw: ImageDraw.ImageDraw, who: Person, at: Place, rng: np.random.Generator) -> None:
    length, wide = who.nose
    shade = _whole(who.skin * 0.72)
    draw.polygon([at(0, 2, 0.6), at(-wide, length, 0.75), at(0, length + 2, 1.0), at(wide, length, 0.75)],
                 fill=_whole(who.skin * 0.9))  # fmt: skip
    draw.line([at(-wide, length, 0.75), at(0, length + 3, 0.95), at(wide, length, 0.75)], fill=shade, width=3)
    below, half, thick = who.mouth
    y, smile, opened = length + below, rng.normal(1.0, 2.2), max(0.0, rng.normal(-1.0, 3.0))
    half *= 1 + 0.03 * smile
    if who.beard >= 3:
        draw.line([at(-half * 0.9, y - thick - 2, 0.7), at(0, y - thick - 5, 0.85), at(half * 0.9, y - thick - 2, 0.7)],
                  fill=_whole(who.hair * 0.9), width=8)  # fmt: skip
    corners = at(-half, y - smile, 0.6), at(half, y - smile, 0.6)
    upper = [at(-half * 0.3, y - thick, 0.75), at(0, y - thick * 0.7, 0.78), at(half * 0.3, y - thick, 0.75)]
    lower = [at(half * 0.4, y + thick + opened, 0.72), at(-half * 0.4, y + thick + opened, 0.72)]
    lips = [corners[0], *upper, corners[1], *lower]
    draw.polygon(lips, fill=_whole(who.lips))
    gap = [corners[0], at(0, y + smile * 0.2, 0.75), corners[1], at(0, y + opened * 1.2 + smile * 0.3 + 0.6, 0.75)]
    draw.polygon(gap, fill=(70, 22, 24))
    if who.freckles:
        spots = np.random.default_rng([_VERSION, 63, int(who.width * 1e6)]).uniform(-1, 1, (14, 2))
        for x, down in spots.tolist():
            _ellipse(draw, at(x * who.width * 0.7, 14 + 6 * down, 0.5), 0.9, 0.9, _whole(who.skin * 0.66))


def _glasses(draw: ImageDraw.ImageDraw, who: Person, at: Place, rng: np.random.Generator) -> None:
    frame, dark = _whole(rng.uniform(10, 150, 3)), rng.random() < 0.25
    half, high = rng.uniform(10, 12.5), rng.uniform(7, 10)
    for side in (-1, 1):
        (x0, y0), (x1, y1) = at(side * who.eye_gap - half, -high, 0.6), at(side * who.eye_gap + half, high, 0.6)
        draw.rounded_rectangle((x0, y0, x1, y1), 8, fill=frame if dark else None, outline=frame, width=4)
        draw.line([at(side * (who.eye_gap + half), -2, 0.6), at(side * who.width, 0, 0)], fill=frame, width=4)
    draw.line([at(half - who.eye_gap, -2, 0.7), at(who.eye_gap - half, -2, 0.7)], fill=frame, width=4)


def _ellipse(draw: ImageDraw.ImageDraw, middle: Point, half: float, high: float, fill: tuple[int, int, int]) -> None:
    x, y = middle
    draw.ellipse((x - half * _SCALE, y - high * _SCALE, x + half * _SCALE, y + high * _SCALE), fill=fill)


def _whole(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in np.clip(values, 0, 255))
    return red, green, blue
