"""Two views of a person image: random patch and erasing, or an occluder pasted on it (SUReID's NODA).

    view 1   flip, pad, crop, random patch, [colour jitter], normalisation, random erasing with noise
    view 2   flip, pad, crop, [colour jitter], occluder, normalisation

Every random number of a view is one row of draws that depends on the seed, the epoch and the position in the epoch
alone: not on worker processes, ranks or an interruption. What needs other images (patches, occluders) is made by the
loader as an RGBA overlay; everything else happens on the device of the batch.
"""

# Shape legend: B = images, V = draws of one view, H and W = pixels.

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from orchestrator.datasets.augmentation import box_sizes, erased_area, flipped_and_cropped, standardised
from orchestrator.datasets.occlusion import OCCLUDER_DRAWS, colour_jitter

_ERASE, _NOISE, _PATCH, _JITTER, _OCCLUDER = slice(3, 7), slice(7, 9), slice(9, 16), slice(16, 19), slice(19, 30)
DRAWS = _OCCLUDER.start + OCCLUDER_DRAWS


@dataclass(frozen=True)
class PersonAugmentation:
    """Probabilities and strengths of one kind of view."""

    flip: float = 0.5
    pad: int = 10  # zeros around the image before the random crop, pixels
    patch: float = 0.5  # probability of a random patch
    erase: float = 0.5  # probability of random erasing
    jitter: float = 0.0  # brightness, contrast and saturation are multiplied by 1 ± this
    occlude: bool = False  # an occluder on every image

    def draw(self, count: int, aspect: float, key: tuple[int, ...]) -> np.ndarray:
        """Draws of ``count`` views: (count, DRAWS) float32. ``aspect`` = width / height of the image."""
        rng = np.random.default_rng(np.random.SeedSequence(key))
        draws = rng.random((count, DRAWS), dtype=np.float32)
        draws[:, 0] = draws[:, 0] < self.flip
        boxes = (
            (_ERASE, self.erase, box_sizes(rng, count, aspect, (0.02, 1 / 3), (0.3, 3.3))),
            (_PATCH, self.patch, box_sizes(rng, count, aspect, (0.01, 0.5), (0.1, 10.0), logarithmic=False)),
        )
        for part, probability, sizes in boxes:
            happens = rng.random(count) < probability
            for column, size in zip((part.start, part.start + 1), sizes, strict=True):
                draws[:, column] = np.where(happens, size, 0)
        draws[:, _JITTER] = 1 + self.jitter * (2 * draws[:, _JITTER] - 1)
        return draws

    def __call__(self, frames_BCHW: Tensor, draws_BV: Tensor, overlay_B4HW: Tensor, pixels: str) -> Tensor:
        """Normalised float32 views of uint8 frames, on their device; the overlay is a patch or an occluder."""
        draws_BV = draws_BV.to(frames_BCHW.device)
        images_BCHW = flipped_and_cropped(frames_BCHW, draws_BV[:, :3], self.pad).float() / 255
        if not self.occlude:
            images_BCHW = laid_over(images_BCHW, overlay_B4HW)
        if self.jitter:
            images_BCHW = colour_jitter(images_BCHW, draws_BV[:, _JITTER])
        if self.occlude:
            images_BCHW = laid_over(images_BCHW, overlay_B4HW)
        images_BCHW = standardised(images_BCHW, pixels)
        if not self.erase:
            return images_BCHW
        height, width = images_BCHW.shape[2:]
        noise_BCHW = _noise(draws_BV[:, _NOISE], height, width)
        return torch.where(erased_area(images_BCHW, draws_BV[:, _ERASE]), noise_BCHW, images_BCHW)


def has_patch(draws_BV: np.ndarray) -> np.ndarray:
    """(B,) which views get a random patch."""
    return (draws_BV[:, _PATCH.start] > 0) & (draws_BV[:, _PATCH.start + 1] > 0)


def patch_source(draws_BV: np.ndarray, count: int) -> np.ndarray:
    """(B,) which of ``count`` training images the patch is cut from.

    Departs from the public random patch, which cuts from a pool of earlier crops: that pool is the training set with
    a delay, differs between workers, and is lost when a run is interrupted. Nor is the patch rotated.
    """
    return (draws_BV[:, _PATCH.start + 2] * count).astype(np.int64).clip(max=count - 1)


def patch_overlay(source_B3HW: Tensor, draws_BV: Tensor) -> Tensor:
    """uint8 (B, 4, H, W): a box of each source image, moved to another place, opaque; transparent elsewhere."""
    batch, _, height, width = source_B3HW.shape
    overlay = torch.zeros(batch, 4, height, width, dtype=torch.uint8)
    for row, draw in enumerate(draws_BV[:, _PATCH].tolist()):
        box_height, box_width = (max(1, min(s, round(f * s))) for f, s in zip(draw[:2], (height, width), strict=True))
        spare = height - box_height + 1, width - box_width + 1
        (y0, x0), (y1, x1) = ([int(f * s) for f, s in zip(at, spare, strict=True)] for at in (draw[3:5], draw[5:7]))
        patch = source_B3HW[row, :, y0 : y0 + box_height, x0 : x0 + box_width]
        overlay[row, :3, y1 : y1 + box_height, x1 : x1 + box_width] = patch
        overlay[row, 3, y1 : y1 + box_height, x1 : x1 + box_width] = 255
    return overlay


def occluder_draws(draws_BV: np.ndarray) -> np.ndarray:
    """The part of the draws that :meth:`orchestrator.datasets.occlusion.Occluders.overlay` reads."""
    return draws_BV[:, _OCCLUDER]


def laid_over(images_BCHW: Tensor, overlay_B4HW: Tensor) -> Tensor:
    """Images in [0, 1] under uint8 overlays, where these are opaque."""
    overlay = overlay_B4HW.to(images_BCHW.device).float() / 255
    return torch.lerp(images_BCHW, overlay[:, :3], overlay[:, 3:])


@cache
@torch.compiler.assume_constant_result  # what a compiled step captures has no place for the generator
def _canvas(height: int, width: int, device: torch.device) -> Tensor:
    return torch.randn(3, 2 * height, 2 * width, generator=torch.Generator().manual_seed(0)).to(device)


def _noise(offset_B2: Tensor, height: int, width: int) -> Tensor:
    """Normal noise for every pixel: a window, at the drawn offset, of one fixed canvas four times as large."""
    canvas = _canvas(height, width, offset_B2.device)
    row_BH = (offset_B2[:, 0, None] * height).long() + torch.arange(height, device=offset_B2.device)
    column_BW = (offset_B2[:, 1, None] * width).long() + torch.arange(width, device=offset_B2.device)
    return canvas[:, row_BH[:, :, None], column_BW[:, None, :]].transpose(0, 1)
