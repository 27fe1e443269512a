"""Scenes of two sizes with up to three boxes each, drawn by rule; a table has one row for each box."""

# Shape legend: S = scenes, K = boxes of a scene with padding, N = boxes.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orchestrator.cache import Block, Rows
from orchestrator.method import Batch

SIZES = ((24, 32), (32, 28))  # height × width; scenes take turns
BOXES = 3  # of a scene at most
IDENTITIES = 5


def rows(seed: int, counts: Sequence[int]) -> Iterator[Block]:
    """One row for each box: part and scene, corners, where a search for it begins, identity, is it told."""
    for part, count in enumerate(counts):
        for scene in range(count):
            draw = np.random.default_rng((seed, part, scene))
            height, width = SIZES[scene % 2]
            number = int(draw.integers(1, BOXES + 1))
            corner_N2 = draw.uniform(0, (width - 12, height - 12), (number, 2))
            box_N4 = np.concatenate([corner_N2, corner_N2 + draw.uniform(8, 12, (number, 2))], axis=1)
            yield {
                "scene": np.full((number, 2), (part, scene)),
                "box": box_N4.astype(np.float32),
                "start": (box_N4 + draw.uniform(-4, 4, (number, 4))).astype(np.float32),
                "identity": draw.integers(0, IDENTITIES, (number, 1)),
                "told": np.full((number, 1), part == 0 and scene % 8 == 0, np.uint8),
            }


@dataclass(frozen=True)
class Scenes:
    """One part of a table; boxes of a scene are its rows."""

    table: Rows
    part: int
    seed: int

    @property
    def rows_N(self) -> np.ndarray:
        return np.flatnonzero(self.table.all("scene")[:, 0] == self.part)

    @property
    def identity_N(self) -> np.ndarray:
        return self.table(self.rows_N, "identity")[:, 0]

    def __len__(self) -> int:
        return 1 + int(self.table(self.rows_N, "scene")[:, 1].max())

    def batch(self, scenes: Sequence[int], whole: Sequence[int] | None = None) -> Batch:
        """Scenes padded to the same number of boxes; ``whole`` are those of all ranks.

        Whether anybody's identity is told is known here, so no step waits for the device and all ranks agree.
        """
        first, scene_N = self.rows_N[0], self.table(self.rows_N, "scene")[:, 1]
        row_SK = np.full((len(scenes), BOXES), -1)
        for place, scene in enumerate(scenes):
            own = np.flatnonzero(scene_N == scene)
            row_SK[place, : len(own)] = own
        values = {
            name: self.table(row_SK.ravel().clip(0) + first, name) for name in ("box", "start", "identity", "told")
        }
        return {
            "images": [self.image(scene) for scene in scenes],
            "row": torch.from_numpy(row_SK.ravel()),
            "told": torch.from_numpy(values.pop("told")[:, 0].astype(bool) & (row_SK.ravel() >= 0)),
            "any_told": bool(
                self.table(self.rows_N, "told")[np.isin(scene_N, scenes if whole is None else whole)].any()
            ),
            "identity": torch.from_numpy(values.pop("identity")[:, 0]),
            **{name: list(torch.from_numpy(value).view(len(scenes), BOXES, 4)) for name, value in values.items()},
            "names": [f"scene {scene}" for scene in scenes],
        }

    def image(self, scene: int) -> Tensor:
        """(3, H, W) in [0, 1]: every identity has its colour, on noise."""
        draw = np.random.default_rng((self.seed, self.part, scene, 1))
        height, width = SIZES[scene % 2]
        image = draw.uniform(0.3, 0.7, (3, height, width)).astype(np.float32)
        own_N = self.rows_N[self.table(self.rows_N, "scene")[:, 1] == scene]
        for (x0, y0, x1, y1), (identity,) in zip(
            self.table(own_N, "box").astype(int), self.table(own_N, "identity"), strict=True
        ):
            colour = np.array([[[identity % 2]], [[identity // 2 % 2]], [[identity // 4]]])
            image[:, y0:y1, x0:x1] = 0.7 * colour + 0.3 * draw.uniform(0, 1, (3, 1, 1))
        return torch.from_numpy(image)
