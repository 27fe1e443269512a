"""Pictures as plain data: what methods show, what ``orchestrator.figures`` draws."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Panel:
    """Pictures of a few queries with what was found for them."""

    title: str
    query: np.ndarray  # (Q, H, W, 3) uint8
    results: np.ndarray  # (Q, R, H, W, 3) uint8, best first; white where there is none
    correct: np.ndarray  # (Q, R) bool


@dataclass(frozen=True)
class Sheet:
    """A table of pictures with names of rows and columns."""

    title: str
    images: np.ndarray  # (R, C, H, W, 3) uint8
    columns: tuple[str, ...]
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Points:
    """Maps of the same points in the plane, side by side."""

    title: str
    maps: Mapping[str, np.ndarray]  # name -> (N, 2)
    label: np.ndarray  # (N,) whole numbers; one colour each
    marked: np.ndarray  # (N,) bool: drawn with another mark
    marks: tuple[str, str]  # what unmarked and marked points are


@dataclass(frozen=True)
class Lines:
    """Curves over one axis."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, tuple[tuple[float, float], ...]]  # name -> (x, y), by rising x


Picture = Panel | Sheet | Points | Lines
