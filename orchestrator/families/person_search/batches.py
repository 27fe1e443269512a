"""What training sees: batches of scenes of similar shape, mirrored or not, padded to the largest of the whole batch."""

# Shape legend: B = scenes of one rank's batch, F = training frames, n = boxes of one scene.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from orchestrator.datasets.sampling import grouped_batches, own_part, shuffled_batches
from orchestrator.datasets.scenes import SceneSet
from orchestrator.families.person_search.data import Frames
from orchestrator.families.person_search.recipe import Batches
from orchestrator.method import Batch

STRIDE = 32  # sides of a padded batch are multiples of it


@dataclass(frozen=True)
class Request:
    """One rank's part of a batch."""

    frames: np.ndarray  # numbers
    mirrored: np.ndarray  # bool
    draws: list[int]  # seeds of what is sampled, of each scene
    padded: tuple[int, int]  # height and width of the whole batch


@dataclass(frozen=True)
class SceneRequests:
    """Epoch -> requests. Draws depend on seed, epoch and place in the epoch alone."""

    size_F2: np.ndarray
    own: Batches
    seed: int

    @property
    def steps(self) -> int:
        return len(self.size_F2) // self.own.scenes

    def __call__(self, epoch: int, rank: int, world: int) -> Iterator[Request]:
        if self.own.by_aspect:
            group_F = np.floor(2 * np.log2(self.size_F2[:, 1] / self.size_F2[:, 0])).astype(int)  # half octaves
            batches = grouped_batches(group_F, self.own.scenes, (self.seed, epoch, 1))
        else:
            batches = shuffled_batches(len(self.size_F2), self.own.scenes, (self.seed, epoch, 1))
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, epoch, 2)))
        mirrored, draws = rng.random(batches.shape) < self.own.flip, rng.integers(0, 2**62, batches.shape)
        for frames, flips, seeds in zip(batches, mirrored, draws, strict=True):
            padded = -(-self.size_F2[frames].max(0) // STRIDE) * STRIDE
            own = own_part(np.arange(len(frames)), rank, world)
            yield Request(frames[own], flips[own], seeds[own].tolist(), (int(padded[0]), int(padded[1])))


@dataclass(frozen=True)
class LoadScenes:
    """Turns a request into what a task is given; picklable for loader processes.

    "frames": uint8 (B, 3, H, W), zeros at the right and below; "sizes": height and width of each before padding;
    "boxes": (n, 4) of each, pixels of the resized frame; "identity": (n,) of each; "draws": a seed of each.
    """

    frames: Frames
    scenes: SceneSet

    def __call__(self, request: Request) -> Batch:
        pixels_BCHW = torch.zeros(len(request.frames), 3, *request.padded, dtype=torch.uint8)
        sizes, boxes, identities = [], [], []
        for place, (number, mirrored) in enumerate(zip(request.frames.tolist(), request.mirrored, strict=True)):
            frame_3HW = self.frames(number)
            height, width = frame_3HW.shape[1:]
            box_n4 = (self.scenes.boxes(number) * self.frames.scale(number)).astype(np.float32)
            if mirrored:
                frame_3HW = frame_3HW.flip(2)
                box_n4 = np.stack([width - box_n4[:, 2], box_n4[:, 1], width - box_n4[:, 0], box_n4[:, 3]], axis=1)
            pixels_BCHW[place, :, :height, :width] = frame_3HW
            sizes.append((height, width))
            boxes.append(torch.from_numpy(box_n4))
            identities.append(torch.from_numpy(self.scenes.identity_N[self.scenes.rows(number)]))
        return {
            "frames": pixels_BCHW,
            "sizes": sizes,
            "boxes": boxes,
            "identity": identities,
            "draws": request.draws,
            "names": names_of(self.scenes, request.frames),
        }


def names_of(scenes: SceneSet, frames: Sequence[int] | np.ndarray) -> list[str]:
    return [scenes.frames.keys[int(frame)] for frame in frames]
