"""SUReID's own losses: keep-ratio regression of token pruning, and NPKD (Song and Liu, arXiv 2401.07469).

    L = α (λ L_KL + L_feat + λ_ratio L_ratio) + β (L_cls + L_tri)          (eq. 14)

The functions here return unweighted terms; the method file weighs them.
"""

# Shape legend: B = images, S = stages of pruning, N = image tokens before any pruning, C = classes,
# D and E = widths of student and teacher.

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.logit_kd import logit_kd
from losses.similarity import at_least_float32, full_precision

Alignment = Literal["ts_interpolation", "st_interpolation", "ts_linear", "st_linear"]


def ratio_loss(masks_BSN: Tensor, keep_ratios_S: Sequence[float] | Tensor) -> Tensor:
    """Mean over stages and images of (target − kept share)² (eq. 9).

    Args:
        masks_BSN: cumulative keep decisions of the image tokens, 0 or 1, the class token left out; gradient flows,
            in training through the straight-through decisions.
        keep_ratios_S: p, p², p³: the targets as shares of the N tokens before any pruning.

    Returns:
        Scalar in [0, 1], unweighted, at least float32.

    Raises:
        ValueError: no images or tokens, or not one target for every stage, each in [0, 1].

    >>> ratio_loss(torch.tensor([[[1.0, 1.0, 1.0, 0.0]]]), [0.5]).item()  # three of four kept, half wanted
    0.0625
    """
    if masks_BSN.ndim != 3 or not masks_BSN.numel():
        raise ValueError(f"masks must be (images, stages, tokens) and not empty, got {tuple(masks_BSN.shape)}")
    targets = [float(target) for target in keep_ratios_S]
    if len(targets) != masks_BSN.shape[1] or not all(0 <= target <= 1 for target in targets):
        raise ValueError(f"need one keep ratio in [0, 1] for each of {masks_BSN.shape[1]} stages, got {targets}")
    kept_BS = at_least_float32(masks_BSN).mean(dim=2)
    # A stage at a time: a tensor of targets would have to be copied to the device in every step.
    return torch.stack(
        [(kept_B - p).square().mean() for kept_B, p in zip(kept_BS.unbind(1), targets, strict=True)]
    ).mean()


def logit_term(
    student_logits_BC: Tensor,
    teacher_logits_BC: Tensor,
    temperature: float = 1.0,
    direction: Literal["ts", "st"] = "ts",
) -> Tensor:
    """T² · mean over images of KL(teacher ‖ student) of the tempered class predictions (eq. 11, 12).

    Departs from eq. 11 as printed, whose order of arguments is KL(student, teacher): ``ts`` is the usual order of
    distillation; ``st`` is the printed one. Both agree with the paper's T = 1, where the factor T² has no effect.

    Args:
        student_logits_BC: after the batch-norm neck; gradient flows. Column c is the same class on both sides.
        teacher_logits_BC: without neck in the paper; no gradient.
        temperature: T > 0.
        direction: ``ts`` = KL(teacher ‖ student), ``st`` = KL(student ‖ teacher).

    Returns:
        Scalar >= 0, unweighted, at least float32; 0 where both predict the same.

    Raises:
        ValueError: shapes differ, no rows, temperature <= 0, or an unknown direction.

    >>> logit_term(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 5.0]])).item()  # one distribution, shifted
    0.0
    """
    if direction not in ("ts", "st"):
        raise ValueError(f"direction must be ts or st, got {direction!r}")
    return logit_kd(student_logits_BC, teacher_logits_BC, temperature, reverse=direction == "st")


def feature_term(
    student_BD: Tensor,
    teacher_BE: Tensor,
    align: Alignment = "ts_interpolation",
    reduction: Literal["sum", "mean"] = "sum",
    projection: nn.Module | None = None,
) -> Tensor:
    """Mean over images of ‖student − I(teacher)‖² (eq. 13), the widths made equal by ``align``.

    Interpolation is linear along the channels (align_corners False): from 768 to 384 channels it is the mean of
    channels 2i and 2i + 1; between equal widths it is the identity. ``ts`` brings the teacher to the student's
    width, ``st`` the student to the teacher's; ``linear`` uses a trained projection instead.

    Args:
        student_BD: class token before the neck, not normalised; gradient flows.
        teacher_BE: likewise of the teacher; no gradient into it.
        align: how the widths are made equal.
        reduction: over channels. ``sum`` is the squared norm as printed; ``mean`` divides it by the width, which
            changes the weight of the term by a factor of several hundred.
        projection: for ``*_linear``: maps E to D (ts) or D to E (st); gradient flows into it.

    Returns:
        Scalar >= 0, unweighted, at least float32; 0 where the aligned features are equal.

    Raises:
        ValueError: not two matrices with as many rows, no rows, an unknown variant, or a projection that is
            missing or not needed.

    >>> feature_term(torch.tensor([[1.0, 5.0]]), torch.tensor([[0.0, 2.0, 4.0, 8.0]])).item()  # to [1, 6]
    1.0
    """
    if student_BD.ndim != 2 or teacher_BE.ndim != 2 or len(student_BD) != len(teacher_BE) or not len(student_BD):
        raise ValueError(
            f"student and teacher features must be two matrices with as many rows, at least one, "
            f"got {tuple(student_BD.shape)} and {tuple(teacher_BE.shape)}"
        )
    if align not in ("ts_interpolation", "st_interpolation", "ts_linear", "st_linear"):
        raise ValueError(f"align must be ts_ or st_ with interpolation or linear, got {align!r}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be sum or mean, got {reduction!r}")
    if (projection is not None) != align.endswith("linear"):
        raise ValueError(f"{align} {'needs a' if projection is None else 'has no'} projection")
    with full_precision(student_BD):
        student_BD, teacher_BE = at_least_float32(student_BD), at_least_float32(teacher_BE.detach())
        towards_student = align.startswith("ts")
        moved, fixed = (teacher_BE, student_BD) if towards_student else (student_BD, teacher_BE)
        if projection is not None:
            moved = projection(moved)
            if moved.shape != fixed.shape:
                raise ValueError(f"the projection must map to {fixed.shape[1]} channels, got {tuple(moved.shape)}")
        else:
            # Channels are the last axis of (B, 1, C): the single row must not be taken for them.
            moved = F.interpolate(moved[:, None], size=fixed.shape[1], mode="linear", align_corners=False)[:, 0]
        square_BC = (fixed - moved).square()
        return (square_BC.sum(dim=1) if reduction == "sum" else square_BC.mean(dim=1)).mean()
