"""The emoji set with something in front of every query: small real images for occluded re-identification.

    <data-root>/manifest.csv, images.zip        as in orchestrator.datasets.emoji, with its identities and counts

A query is a drawing under one pasted occluder that covers a
third to a half of it; the gallery and the training images are whole. Which occluder, and where, depends on the file's
name alone. The occluders are drawn by the generator of NODA's default set: other patches, whatever its seed, but of the
same kinds.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image

from orchestrator.datasets import emoji
from orchestrator.datasets.images import Reader, RetrievalData, decode, digest
from orchestrator.datasets.occlusion import OCCLUDER_DRAWS, Occluders, procedural

_VERSION = 1  # change it whenever pasting changes, so that caches do not outlive their images
_COUNT, _STREAM = 60, 11


@dataclass(frozen=True)
class Occluding:
    """Images of another reader, each under an occluder."""

    reader: Reader

    def read(self, key: str) -> bytes:
        image = decode(self.reader.read(key))
        name = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        draws = np.random.default_rng([_VERSION, name]).random((1, OCCLUDER_DRAWS))
        overlay = _occluders().overlay(draws, (image.height, image.width))[0]
        pasted = Image.fromarray(overlay.permute(1, 2, 0).numpy(), "RGBA")
        image.paste(pasted, (0, 0), pasted)
        stored = io.BytesIO()
        image.save(stored, "PNG", compress_level=1)
        return stored.getvalue()

    def stamp(self, keys: Sequence[str]) -> str:
        return digest([self.reader.stamp(keys), _occluders().fingerprint, _VERSION])


@cache  # drawn once in every process
def _occluders() -> Occluders:
    return procedural(_COUNT, stream=_STREAM)


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts, columns or a damaged archive)."""
    data = emoji.load(data_root, evaluate_on)
    reader = Occluding(data.query.reader)
    query = replace(data.query, name=f"{data.query.name}-occluded", reader=reader)
    return replace(data, query=query)
