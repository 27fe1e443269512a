"""PKD, Pearson knowledge distillation of feature maps (Cao et al., NeurIPS 2022): a loss compared with in DDPS.

Its weight there is 6.0, on the four levels that DFD distils.
"""

# Shape legend: B = images, C = channels, H and W = cells.

from torch import Tensor

from losses.similarity import at_least_float32, full_precision

_SMALL = 1e-6


def pkd(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Half the mean square of the difference of standardised maps: 1 − Pearson's correlation, but for a factor.

    Every channel is standardised over images and cells, x ← (x − mean) / (std + 1e-6) with the unbiased std.

    Args:
        student_BCHW: one level; gradient flows.
        teacher_BCHW: the same level and shape; no gradient.

    Returns:
        Scalar in [0, 2], unweighted, at least float32.

    Raises:
        ValueError: shapes differ, or fewer than two values in a channel.

    >>> import torch
    >>> rising = torch.arange(4.0).view(1, 1, 2, 2)
    >>> pkd(rising, 3 * rising + 1).item() < 1e-9, round(pkd(rising, -rising).item(), 3)  # a scale does not matter
    (True, 1.5)
    """
    if student_BCHW.ndim != 4 or student_BCHW.shape != teacher_BCHW.shape:
        raise ValueError(
            f"student and teacher maps must have one shape (images, channels, height, width), "
            f"got {tuple(student_BCHW.shape)} and {tuple(teacher_BCHW.shape)}"
        )
    if student_BCHW[:, :1].numel() < 2:
        raise ValueError(f"a channel needs at least two values to be standardised, got {tuple(student_BCHW.shape)}")
    with full_precision(student_BCHW):
        student_BCHW, teacher_BCHW = at_least_float32(student_BCHW), at_least_float32(teacher_BCHW.detach())
        return (_standardised(student_BCHW) - _standardised(teacher_BCHW)).square().mean() / 2


def _standardised(x_BCHW: Tensor) -> Tensor:
    mean_C11, std_C11 = (f(dim=(0, 2, 3), keepdim=True) for f in (x_BCHW.mean, x_BCHW.std))
    return (x_BCHW - mean_C11) / (std_C11 + _SMALL)
