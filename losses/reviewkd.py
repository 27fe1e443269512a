"""ReviewKD, distillation through knowledge review (Chen et al., CVPR 2021): a loss compared with in DDPS.

The student's levels are fused from coarse to fine by trained blocks, each fused level is compared with the teacher's
of the same size, whole and pooled. Its weight in DDPS is 1.2, on five levels of 256 channels.
"""

# Shape legend: B = images, C = channels, H and W = cells of a level, M = channels inside a block.

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.similarity import at_least_float32, full_precision

_POOLED = (4, 2, 1)


def hierarchical_context(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Σ over levels of the mean squared error, whole and of maps pooled to 4 × 4, 2 × 2 and 1 × 1 (HCL).

    The parts of a level weigh 1, 1/2, 1/4, 1/8, divided by their sum; sizes that are not below the map's height are
    left out.

    Args:
        students: fused maps (B, C, H, W) of every level; gradient flows.
        teachers: maps of the same shapes; no gradient.

    Returns:
        Scalar >= 0, unweighted, at least float32.

    Raises:
        ValueError: no level, or shapes that differ.

    >>> hierarchical_context([torch.zeros(1, 1, 2, 2)], [torch.ones(1, 1, 2, 2)]).item()
    1.0
    """
    if not students or [s.shape for s in students] != [t.shape for t in teachers]:
        raise ValueError(
            f"need maps of the same shapes at every level, got {[tuple(s.shape) for s in students]} "
            f"and {[tuple(t.shape) for t in teachers]}"
        )
    with full_precision(students[0]):
        pairs = zip(students, teachers, strict=True)
        return torch.stack([_level(at_least_float32(s), at_least_float32(t.detach())) for s, t in pairs]).sum()


def _level(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    total, weight, weights = F.mse_loss(student_BCHW, teacher_BCHW), 1.0, 1.0
    for size in _POOLED:
        if size < student_BCHW.shape[2]:
            weight /= 2
            pooled = (F.adaptive_avg_pool2d(x, size) for x in (student_BCHW, teacher_BCHW))
            total = total + weight * F.mse_loss(*pooled)
            weights += weight
    return total / weights


class ReviewFusion(nn.Module):
    """The student's levels fused with what is coarser (attention-based fusion, ABF).

    The published code of DDPS gives these blocks to no optimiser, so they stay as they begin.

    Args:
        student_channels: of every level, fine to coarse.
        teacher_channels: likewise: what the fused levels have.
        channels: M, inside the blocks.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        pairs = list(zip(student_channels, teacher_channels, strict=True))
        self.blocks = nn.ModuleList(
            _Block(own, channels, taught, coarsest=level == len(pairs) - 1) for level, (own, taught) in enumerate(pairs)
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels (B, C, H, W), fine to coarse, in and out; raises ValueError for another number of them."""
        if len(levels) != len(self.blocks):
            raise ValueError(f"expected {len(self.blocks)} levels, got {len(levels)}")
        found: list[Tensor] = []
        residual: Tensor | None = None
        for level_BCHW, block in zip(reversed(levels), reversed(self.blocks), strict=True):
            fused_BCHW, residual = block(level_BCHW, residual)
            found.insert(0, fused_BCHW)
        return found


class _Block(nn.Module):
    """One level: 1×1 to M channels, two attention maps that mix it with the coarser residual, 3×3 to the teacher's."""

    def __init__(self, own: int, channels: int, taught: int, coarsest: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(own, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.attend = None if coarsest else nn.Sequential(nn.Conv2d(2 * channels, 2, 1), nn.Sigmoid())
        self.widen = nn.Sequential(nn.Conv2d(channels, taught, 3, padding=1, bias=False), nn.BatchNorm2d(taught))
        for convolution in (self.narrow[0], self.widen[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, level_BCHW: Tensor, residual_BMHW: Tensor | None) -> tuple[Tensor, Tensor]:
        mixed_BMHW = self.narrow(level_BCHW)
        if self.attend is not None and residual_BMHW is not None:
            coarser_BMHW = F.interpolate(residual_BMHW, mixed_BMHW.shape[2:], mode="nearest")
            own_B1HW, coarser_B1HW = self.attend(torch.cat([mixed_BMHW, coarser_BMHW], 1)).split(1, 1)
            mixed_BMHW = mixed_BMHW * own_B1HW + coarser_BMHW * coarser_B1HW
        return self.widen(mixed_BMHW), mixed_BMHW
