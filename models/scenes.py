"""What networks that look at whole scenes answer alike: how they are fed, an example, how far an export is off."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.network import Pixels


def scene_feeding(size: tuple[int, int], pixels: Pixels) -> dict[str, Any]:
    """How a network that looks at whole scenes is fed."""
    (mean, std), (shorter, longer) = pixels, size
    return {
        "size": [shorter, longer],
        "resize": f"the shorter side to {shorter}, the longer to {longer} at most, bilinear; one image at a time",
        "range": "RGB in [0, 1], then (x - mean) / std",
        "mean": list(mean),
        "std": list(std),
    }


def scene_example(size: tuple[int, int], count: int) -> tuple[Tensor, ...]:
    """Images of one size for such a network, the same on every call."""
    shorter, longer = size
    shape = (count, 3, shorter, min(longer, round(shorter * 4 / 3)))
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


def largest_difference(shorter: int, ours: Sequence[Tensor], exported: Sequence[Tensor]) -> float:
    """Of boxes (in shares of the shorter side), scores and embeddings, or of embeddings alone; infinite for another
    number of boxes."""
    if any(a.shape != b.shape for a, b in zip(ours, exported, strict=True)):
        return float("inf")
    scales = (shorter, 1.0, 1.0)[-len(ours) :]
    differences = [
        (a - b).abs().max().item() / scale for a, b, scale in zip(ours, exported, scales, strict=True) if a.numel()
    ]
    return max(differences, default=0.0)
