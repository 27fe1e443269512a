"""Emoji of five vendors: one motif is an identity, a vendor's drawing style a camera.

    <data-root>/manifest.csv          file, pid, camid, …, stem, core, split
    <data-root>/images.zip            <vendor>/<code point>.png, RGBA, read in place and laid on white

Small real re-identification data in colour: 4,263 training images of 931 motifs, 3,936 test images of 853 others.
Every test image is a query; its own vendor's drawing of the motif, which is itself, is removed.

``evaluate_on="validation"`` holds out the last fifth of the training motifs, variants of one motif together.
"""

import csv
import io
import zipfile
from pathlib import Path

import numpy as np

from orchestrator.datasets import layout
from orchestrator.datasets.images import ImageSet, RetrievalData, Zip

_COUNTS = {"train": (4_263, 931), "test": (3_936, 853)}
_HELD_OUT = 0.2
_COLUMNS = ("file", "pid", "camid", "stem", "split")


def load(data_root: str, evaluate_on: str = "test") -> RetrievalData:
    """Raises FileNotFoundError (what is missing where) and ValueError (counts, columns or a damaged archive)."""
    layout.check_part("emoji", evaluate_on)
    root = layout.data_folder("emoji", data_root, "manifest.csv and images.zip")
    manifest, archive = root / "manifest.csv", root / "images.zip"
    for path in (manifest, archive):
        if not path.is_file():
            raise FileNotFoundError(f"emoji: no {path.name} in {root}; it must hold manifest.csv and images.zip")
    rows = _rows(manifest)
    try:
        with zipfile.ZipFile(archive) as opened:
            absent = sorted({row["file"] for row in rows} - set(opened.namelist()))
    except zipfile.BadZipFile as error:
        raise ValueError(f"emoji: {archive} is no complete zip file ({error})") from error
    if absent:
        raise FileNotFoundError(f"emoji: {len(absent)} images of the manifest are not in {archive}, first {absent[0]}")
    sets = {part: layout.check_counts(_part(rows, part, str(archive)), _COUNTS[part]) for part in _COUNTS}
    if evaluate_on == "test":
        return RetrievalData(train=sets["train"], query=sets["test"], gallery=sets["test"], camera_filter=True)
    stem = np.array([row["stem"] for row in rows if row["split"] == "train"])
    stems = np.unique(stem)
    return layout.held_out(sets["train"], np.isin(stem, stems[-round(_HELD_OUT * len(stems)) :]))


def _rows(manifest: Path) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(layout.text("emoji", manifest), newline=""))
    rows = list(reader)
    lacking = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(f"emoji: {manifest} has no column {', '.join(lacking)}")
    seen: set[str] = set()
    for line, row in enumerate(rows, 2):
        if None in (row[column] for column in _COLUMNS):
            raise ValueError(f"emoji: {manifest} line {line} has too few fields")
        if row["split"] not in _COUNTS:
            raise ValueError(f"emoji: {manifest} line {line}: split must be train or test, got {row['split']!r}")
        if row["file"] in seen:
            raise ValueError(f"emoji: {manifest} line {line}: {row['file']} is listed twice")
        seen.add(row["file"])
    return rows


def _part(rows: list[dict[str, str]], part: str, archive: str) -> ImageSet:
    own = [row for row in rows if row["split"] == part]
    identity, camera = (
        np.array([layout.number(f"emoji: {c} of {row['file']}", row[c]) for row in own]) for c in ("pid", "camid")
    )
    return ImageSet(f"emoji/{part}", tuple(row["file"] for row in own), identity, Zip(archive), camera)
