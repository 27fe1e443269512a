"""Training augmentation with explicit draws (D3still, section 4.2, and its authors' code).

Every image is resized first; then: horizontal flip, zero padding, random crop back to size, normalisation,
random erasing. The random numbers of a view are one row of fractions that holds at any resolution, so a view
can be recorded, replayed, and shared between a 64-pixel student and a 256-pixel teacher. Draws depend only on
the seed, the epoch and the position in the epoch: not on worker processes, ranks or an interruption.
"""

# Shape legend: B = batch, V = draws of one view, H and W = pixels.

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
DRAWS = 7  # flip, crop y, crop x, erased height, erased width, erased y, erased x

_ERASED_AREA, _ERASED_RATIO, _ATTEMPTS = (0.02, 0.33), (0.3, 3.3), 10


@dataclass(frozen=True)
class Augmentation:
    """Probabilities of one recipe; ``erase_fill`` is what erased pixels become after normalisation."""

    flip: float = 0.5
    erase: float = 0.5
    erase_fill: str = "mean"  # "mean": the raw mean (.485, .456, .406) as the authors' code; "zero": neutral

    def draw(self, count: int, aspect: float, key: tuple[int, ...]) -> np.ndarray:
        """Draws of ``count`` views: (count, DRAWS) float32 in [0, 1]. ``aspect`` = width / height."""
        rng = np.random.default_rng(np.random.SeedSequence(key))
        uniform = rng.random((count, 6), dtype=np.float32)
        area = rng.uniform(*_ERASED_AREA, (count, _ATTEMPTS))
        ratio = np.exp(rng.uniform(*np.log(_ERASED_RATIO), (count, _ATTEMPTS)))  # height / width in pixels
        height, width = np.sqrt(area * ratio * aspect), np.sqrt(area / ratio / aspect)
        fits = (height < 1) & (width < 1)
        first, row = fits.argmax(axis=1), np.arange(count)
        erased = (uniform[:, 3] < self.erase) & fits.any(axis=1)
        draws = np.empty((count, DRAWS), np.float32)
        draws[:, 0] = uniform[:, 0] < self.flip
        draws[:, 1:3] = uniform[:, 1:3]
        draws[:, 3] = np.where(erased, height[row, first], 0)
        draws[:, 4] = np.where(erased, width[row, first], 0)
        draws[:, 5:7] = uniform[:, 4:6]
        return draws

    def __call__(self, frames_BCHW: Tensor, draws_BV: Tensor, pad: int) -> Tensor:
        """Augmented, normalised float32 views of uint8 frames, on the device of the frames."""
        batch, _, height, width = frames_BCHW.shape
        device = frames_BCHW.device
        draws_BV = draws_BV.to(device)
        padded = torch.nn.functional.pad(frames_BCHW, (pad, pad, pad, pad))
        row_BH = (draws_BV[:, 1, None] * (2 * pad + 1)).long() + torch.arange(height, device=device)
        column_BW = (draws_BV[:, 2, None] * (2 * pad + 1)).long() + torch.arange(width, device=device)
        column_BW = torch.where(draws_BV[:, 0, None] > 0.5, width + 2 * pad - 1 - column_BW, column_BW)
        image_B = torch.arange(batch, device=device)[:, None, None]
        views_BHWC = padded.permute(0, 2, 3, 1)[image_B, row_BH[:, :, None], column_BW[:, None, :]]
        views_BCHW = normalised(views_BHWC.permute(0, 3, 1, 2))
        if self.erase == 0:
            return views_BCHW
        erased_BHW = _inside(draws_BV[:, 3], draws_BV[:, 5], height)[:, :, None]
        erased_BHW = erased_BHW & _inside(draws_BV[:, 4], draws_BV[:, 6], width)[:, None, :]
        fill = torch.tensor(MEAN if self.erase_fill == "mean" else (0.0, 0.0, 0.0), device=device).view(1, 3, 1, 1)
        return torch.where(erased_BHW[:, None], fill, views_BCHW)


def normalised(frames_BCHW: Tensor) -> Tensor:
    """uint8 frames to float32 with the ImageNet mean and deviation; memory format is kept."""
    mean = torch.tensor(MEAN, device=frames_BCHW.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=frames_BCHW.device).view(1, 3, 1, 1)
    return (frames_BCHW.float() / 255 - mean) / std


def _inside(length_B: Tensor, position_B: Tensor, pixels: int) -> Tensor:
    """(B, pixels) mask of a box side of fractional length placed uniformly where it fits."""
    size_B = (length_B * pixels).round()
    start_B = (position_B * (pixels - size_B + 1)).floor()
    at = torch.arange(pixels, device=length_B.device)[None, :]
    return (at >= start_B[:, None]) & (at < (start_B + size_B)[:, None])
