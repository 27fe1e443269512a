"""ORL, also AT&T or Olivetti faces (Samaria and Harter, WACV 1994): 40 people, ten grey portraits of each.

    <data-root>/orl_faces.zip                       orl_faces/s<1 … 40>/<1 … 10>.pgm, read in place
    <data-root>/orl_faces/s1/1.pgm … or <data-root>/s1/1.pgm …          the same unpacked

Trained on people 1 to 20; every two of the 200 images of people 21 to 40 are compared: 900 genuine and 19,000 impostor
pairs, no folds. ``evaluate_on="validation"`` holds people 17 to 20 out instead. Portraits of 92 × 112 are widened to
112 × 112, their outermost columns repeated ten times on either side, so that no face is stretched.

Too small to rank methods: a check of the verification on real faces. Floor without learning, 23 × 28 means of 4 × 4
pixels, less their mean, cosine: TAR 52.9 % at FAR 1e-2, 26.7 % at 1e-3.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from orchestrator.datasets import layout
from orchestrator.datasets.alignment import SIZE
from orchestrator.datasets.faces import FaceData, all_pairs
from orchestrator.datasets.images import Folder, ImageSet, Zip, decode

_PEOPLE, _SHOTS = range(1, 41), range(1, 11)
_TRAINED, _HELD_OUT = 20, 4  # people that are trained on, the last of them for evaluate_on="validation"
_LAYOUT = "orl_faces.zip, or orl_faces/s1/1.pgm … s40/10.pgm"
_NOTICE = (
    "ORL faces are of real people: use them for matching faces alone, and give credit to Olivetti Research Laboratory "
    "(F. Samaria, A. Harter, WACV 1994)"
)


@dataclass(frozen=True)
class Widened:
    """Images of another reader, widened to a square by their outermost columns."""

    inner: Folder | Zip

    def read(self, key: str) -> bytes:
        """PNG. Raises ValueError for an image that is wider than high."""
        pixels = np.asarray(decode(self.inner.read(key)))
        missing = pixels.shape[0] - pixels.shape[1]
        if missing < 0:
            raise ValueError(f"{key} is {pixels.shape[1]} × {pixels.shape[0]}, expected a portrait of 92 × {SIZE}")
        sides = (missing // 2, missing - missing // 2)
        stored = io.BytesIO()
        Image.fromarray(np.pad(pixels, ((0, 0), sides, (0, 0)), mode="edge")).save(stored, "PNG", compress_level=1)
        return stored.getvalue()

    def stamp(self, keys: Sequence[str]) -> str:
        return f"widened-{self.inner.stamp(keys)}"


def load(data_root: str, evaluate_on: str = "test") -> FaceData:
    """Raises FileNotFoundError (what is missing where) and ValueError (a damaged archive)."""
    layout.check_part("orl", evaluate_on)
    reader, prefix = _source(layout.data_folder("orl", data_root, _LAYOUT))
    first_out = _TRAINED + 1 if evaluate_on == "test" else _TRAINED - _HELD_OUT + 1
    last_out = _PEOPLE[-1] if evaluate_on == "test" else _TRAINED
    train = _people("train" if evaluate_on == "test" else "train-part", reader, prefix, range(1, first_out))
    verified = _people(evaluate_on, reader, prefix, range(first_out, last_out + 1))
    return FaceData(train, {"val": all_pairs(verified)}, _NOTICE)


def _people(part: str, reader: Widened, prefix: str, people: range) -> ImageSet:
    keys = tuple(f"{prefix}s{person}/{shot}.pgm" for person in people for shot in _SHOTS)
    return ImageSet(f"orl/{part}", keys, np.repeat(np.array(people), len(_SHOTS)), reader)


def _source(root: Path) -> tuple[Widened, str]:
    """Where all 400 images are, and what their keys begin with."""
    archive, wanted = root / "orl_faces.zip", [f"s{person}/{shot}.pgm" for person in _PEOPLE for shot in _SHOTS]
    if archive.is_file():
        try:
            with zipfile.ZipFile(archive) as opened:
                present, prefix = set(opened.namelist()), "orl_faces/"
        except zipfile.BadZipFile as error:
            raise ValueError(f"orl: {archive} is no complete zip file ({error}); download it again") from error
        missing, place = [name for name in wanted if f"{prefix}{name}" not in present], str(archive)
    else:
        prefix = "orl_faces/" if (root / "orl_faces").is_dir() else ""
        missing, place = [name for name in wanted if not (root / prefix / name).is_file()], str(root)
    if missing:
        raise FileNotFoundError(
            f"orl: {len(missing)} of {len(wanted)} images are missing in {place}, first {prefix}{missing[0]}; "
            f"--data-root must hold {_LAYOUT}"
        )
    return Widened(Zip(str(archive)) if archive.is_file() else Folder(str(root))), prefix
