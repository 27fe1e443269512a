"""The embedded demo of person search: frames of three cameras with one to four drawn people. Nothing is downloaded.

People are those of ``demo_people``, a quarter of them without identity. One camera holds its frames upright. Training
and gallery share no identity. Of every identity of the gallery two boxes are searched in all frames but their own;
smaller galleries hold the frames of the person and others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from orchestrator.datasets import composed, layout
from orchestrator.datasets.demo_people import stand
from orchestrator.datasets.scenes import SearchData

_VERSION = 1  # change it whenever rendering changes, so that caches do not outlive their images
_SIZES = ((96, 128), (96, 128), (128, 96))
_PLANS = {
    "train": composed.Plan(0, 150, range(1, 61), range(20_000, 20_400), _SIZES),
    "gallery": composed.Plan(1, 150, range(301, 361), range(21_000, 21_400), _SIZES),
    "held_out": composed.Plan(2, 75, range(201, 231), range(22_000, 22_400), _SIZES),
}
_GALLERIES = (20, 50)


@dataclass(frozen=True)
class Renderer:
    """Renders the frame its key names: ``part/frame``."""

    def read(self, key: str) -> bytes:
        part, frame = key.split("/")
        return composed.encoded(composed.compose(_PLANS[part], int(frame), cut)[0])

    def stamp(self, keys: Sequence[str]) -> str:
        return f"demo-scenes-{_VERSION}"


@cache  # renders all frames once
def load(data_root: str, evaluate_on: str = "test") -> SearchData:
    """``data_root`` is not used."""
    layout.check_part("demo_scenes", evaluate_on)
    searched = "gallery" if evaluate_on == "test" else "held_out"
    sides = {
        part: composed.Side(f"demo-scenes/{part}", _PLANS[part], cut, Renderer(), f"{part}/{{}}")
        for part in ("train", searched)
    }
    train, gallery = sides["train"].listed(True), sides[searched].listed(False)
    return composed.benchmark(train, gallery, each=2, sizes=_GALLERIES)


def cut(who: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A person of a height in pixels, cut out."""
    layer = Image.new("RGBA", (height * 2, round(height * 2.4)))  # drawn at twice the size, so that edges are smooth
    stand(layer, who, rng, 0.92, 0.5)
    person = layer.crop(layer.getbbox())
    width = max(4, round(person.width * height / person.height))
    return person.resize((width, height), Image.Resampling.LANCZOS)
