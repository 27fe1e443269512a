"""Training augmentation with explicit draws (D3still, section 4.2, and its authors' code).

Every image is resized first; then: horizontal flip, zero padding, random crop back to size, normalisation,
random erasing. The random numbers of a view are one row of fractions that holds at any resolution, so a view
can be recorded, replayed, and shared between a 64-pixel student and a 256-pixel teacher. Draws depend only on
the seed, the epoch and the position in the epoch: not on worker processes, ranks or an interruption.
"""

# Shape legend: B = batch, V = draws of one view, H and W = pixels.

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from models.network import PIXELS, Pixels

MEAN, STD = PIXELS["imagenet"]
DRAWS = 7  # flip, crop y, crop x, erased height, erased width, erased y, erased x

_ERASED_AREA, _ERASED_RATIO, _ATTEMPTS = (0.02, 0.33), (0.3, 3.3), 10


@dataclass(frozen=True)
class Augmentation:
    """Probabilities of one recipe; ``erase_fill`` is what erased pixels become after normalisation."""

    flip: float = 0.5
    erase: float = 0.5
    erase_fill: str = "mean"  # "mean": the raw mean (.485, .456, .406) as the authors' code; "zero": neutral
    pixels: str | Pixels = "imagenet"  # mean and deviation that the network wants

    def draw(self, count: int, aspect: float, key: tuple[int, ...]) -> np.ndarray:
        """Draws of ``count`` views: (count, DRAWS) float32 in [0, 1]. ``aspect`` = width / height."""
        rng = np.random.default_rng(np.random.SeedSequence(key))
        uniform = rng.random((count, 6), dtype=np.float32)
        height, width = box_sizes(rng, count, aspect, _ERASED_AREA, _ERASED_RATIO)
        erased = uniform[:, 3] < self.erase
        draws = np.empty((count, DRAWS), np.float32)
        draws[:, 0] = uniform[:, 0] < self.flip
        draws[:, 1:3] = uniform[:, 1:3]
        draws[:, 3] = np.where(erased, height, 0)
        draws[:, 4] = np.where(erased, width, 0)
        draws[:, 5:7] = uniform[:, 4:6]
        return draws

    def __call__(self, frames_BCHW: Tensor, draws_BV: Tensor, pad: int) -> Tensor:
        """Augmented, normalised float32 views of uint8 frames, on the device of the frames."""
        draws_BV = draws_BV.to(frames_BCHW.device)
        views_BCHW = normalised(flipped_and_cropped(frames_BCHW, draws_BV[:, :3], pad), self.pixels)
        if self.erase == 0:
            return views_BCHW
        fill = _fill(self.erase_fill, views_BCHW.device)
        return torch.where(erased_area(views_BCHW, draws_BV[:, 3:7]), fill, views_BCHW)


def flipped_and_cropped(frames_BCHW: Tensor, draws_B3: Tensor, pad: int) -> Tensor:
    """Mirrored where the first draw is above 1/2, padded with zeros, cropped back at the fractions of the others."""
    batch, _, height, width = frames_BCHW.shape
    device = frames_BCHW.device
    padded = torch.nn.functional.pad(frames_BCHW, (pad, pad, pad, pad))
    row_BH = (draws_B3[:, 1, None] * (2 * pad + 1)).long() + torch.arange(height, device=device)
    column_BW = (draws_B3[:, 2, None] * (2 * pad + 1)).long() + torch.arange(width, device=device)
    column_BW = torch.where(draws_B3[:, 0, None] > 0.5, width + 2 * pad - 1 - column_BW, column_BW)
    image_B = torch.arange(batch, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image_B, row_BH[:, :, None], column_BW[:, None, :]].permute(0, 3, 1, 2)


def erased_area(views_BCHW: Tensor, draws_B4: Tensor) -> Tensor:
    """(B, 1, H, W) mask of boxes given by fractional height, width and position; nothing where the size is 0."""
    height, width = views_BCHW.shape[2:]
    rows_BH, columns_BW = (
        _inside(draws_B4[:, 0], draws_B4[:, 2], height),
        _inside(draws_B4[:, 1], draws_B4[:, 3], width),
    )
    return (rows_BH[:, :, None] & columns_BW[:, None, :])[:, None]


def box_sizes(
    rng: np.random.Generator, count: int, aspect: float, area: tuple[float, float], ratio: tuple[float, float],
    logarithmic: bool = True,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Height and width of random boxes as fractions of the image, the first of ten attempts that fits; else 0.

    Args:
        rng: the draws.
        count: how many boxes.
        aspect: width / height of the image in pixels.
        area: smallest and largest share of the image.
        ratio: smallest and largest height / width of the box in pixels.
        logarithmic: whether the ratio is uniform on a logarithmic scale.
    """
    shares = rng.uniform(*area, (count, _ATTEMPTS))
    low, high = np.log(ratio) if logarithmic else ratio
    ratios = rng.uniform(low, high, (count, _ATTEMPTS))
    ratios = np.exp(ratios) if logarithmic else ratios
    height, width = np.sqrt(shares * ratios * aspect), np.sqrt(shares / ratios / aspect)
    fits = (height < 1) & (width < 1)
    first, row = fits.argmax(axis=1), np.arange(count)
    found = fits.any(axis=1)
    return np.where(found, height[row, first], 0), np.where(found, width[row, first], 0)


def normalised(frames_BCHW: Tensor, pixels: str | Pixels = "imagenet") -> Tensor:
    """uint8 frames to float32 with a mean and deviation, or those of that name; memory format is kept."""
    return standardised(frames_BCHW.float() / 255, pixels)


def standardised(images_BCHW: Tensor, pixels: str | Pixels = "imagenet") -> Tensor:
    """The same for images in [0, 1]."""
    mean, std = _statistics(pixels, images_BCHW.device)
    return (images_BCHW - mean) / std


@cache  # a copy to the device in every step would make a GPU wait
def _statistics(pixels: str | Pixels, device: torch.device) -> tuple[Tensor, Tensor]:
    values = PIXELS[pixels] if isinstance(pixels, str) else pixels
    mean, std = (torch.tensor(three, device=device).view(1, 3, 1, 1) for three in values)
    return mean, std


@cache
def _fill(erase_fill: str, device: torch.device) -> Tensor:
    return torch.tensor(MEAN if erase_fill == "mean" else (0.0, 0.0, 0.0), device=device).view(1, 3, 1, 1)


def _inside(length_B: Tensor, position_B: Tensor, pixels: int) -> Tensor:
    """(B, pixels) mask of a box side of fractional length placed uniformly where it fits."""
    size_B = (length_B * pixels).round()
    start_B = (position_B * (pixels - size_B + 1)).floor()
    at = torch.arange(pixels, device=length_B.device)[None, :]
    return (at >= start_B[:, None]) & (at < (start_B + size_B)[:, None])
