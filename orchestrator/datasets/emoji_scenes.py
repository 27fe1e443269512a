"""Scenes with emoji of five vendors on drawn backgrounds: real artwork, exact boxes and identities.

    <data-root>/manifest.csv, images.zip        as in orchestrator.datasets.emoji

One motif, in the drawing of one vendor, is an identity; each of its appearances is turned a little, by lot. 100 motifs
of the training split are trained on, 80 of the test split are searched; others stand in the frames without identity.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from PIL import Image

from orchestrator.datasets import composed, emoji
from orchestrator.datasets.images import Reader
from orchestrator.datasets.scenes import SearchData, check_test
from orchestrator.needs import digest

_VERSION = 1  # change it whenever composing changes, so that caches do not outlive their images
_SIZES = ((120, 160), (120, 160), (160, 120))
_SHAPE = {"most": 5, "height": (0.22, 0.42)}
_PLANS = {
    "train": composed.Plan(10, 200, range(1, 101), range(101, 400), _SIZES, **_SHAPE),
    "gallery": composed.Plan(11, 150, range(1, 81), range(81, 400), _SIZES, **_SHAPE),
}
_GALLERIES = (25, 75)
_TURN = 20.0  # degrees, to either side


@dataclass(frozen=True)
class Composer:
    """Composes the frame its key names, ``part/frame``, of the drawings in an archive."""

    archive: Reader
    data_root: str

    def read(self, key: str) -> bytes:
        part, frame = key.split("/")
        return composed.encoded(composed.compose(_PLANS[part], int(frame), _cut(self.data_root, part))[0])

    def stamp(self, keys: Sequence[str]) -> str:
        return digest([self.archive.stamp(()), _VERSION])


@cache  # composes all frames once
def load(data_root: str, evaluate_on: str = "test") -> SearchData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts, columns or a damaged archive)."""
    check_test("emoji_scenes", evaluate_on)
    reader = Composer(emoji.load(data_root).train.reader, data_root)
    train, gallery = (
        composed.Side(f"emoji-scenes/{part}", _PLANS[part], _cut(data_root, part), reader, f"{part}/{{}}").listed(
            part == "train"
        )
        for part in _PLANS
    )
    return composed.benchmark(train, gallery, each=2, sizes=_GALLERIES)


@cache
def _cut(data_root: str, part: str) -> composed.Cut:
    """Who is the n-th motif of the part's split."""
    data = emoji.load(data_root)
    images = data.train if part == "train" else data.gallery
    files: dict[int, list[str]] = {}
    for key, motif in zip(images.keys, images.labels.tolist(), strict=True):
        files.setdefault(motif + 1, []).append(key)
    return partial(_drawing, images.reader, files)


def _drawing(archive: Reader, files: dict[int, list[str]], who: int, height: int, rng: np.random.Generator) -> Image:
    picture = _cut_out(archive, files[who][who % len(files[who])])
    picture = picture.rotate(rng.uniform(-_TURN, _TURN), Image.Resampling.BICUBIC, expand=True)
    picture = picture.crop(picture.getbbox())
    width = max(4, round(picture.width * height / picture.height))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


@cache
def _cut_out(archive: Reader, key: str) -> Image.Image:
    picture = Image.open(io.BytesIO(archive.read(key))).convert("RGBA")
    return picture.crop(picture.getbbox())
