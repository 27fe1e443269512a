"""The task losses of a two-stage detector, as torchvision's Faster R-CNN and SeqNet's first head have them.

    L = L_rpn_cls + L_rpn_reg + L_cls1 + 10 L_reg1          (DDPS adds OIM and its distillation)

Every term is a mean over the sampled rows, also that of the boxes, which only positive rows have.
"""

# Shape legend: A = sampled anchors, R = sampled proposals.

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.similarity import at_least_float32, full_precision

_RPN_BETA, _HEAD_BETA = 1 / 9, 1.0  # where smooth L1 turns from a square to a line


def proposal_losses(logit_A: Tensor, delta_A4: Tensor, label_A: Tensor, target_A4: Tensor) -> tuple[Tensor, Tensor]:
    """L_rpn_cls and L_rpn_reg: is it an object, and where is its box?

    Args:
        logit_A: objectness; gradient flows.
        delta_A4: predicted offsets from the anchors; gradient flows.
        label_A: 1 object, 0 background.
        target_A4: offsets of the matched boxes; those of background rows are not looked at.

    Returns:
        Two scalars >= 0, unweighted, at least float32; 0 without rows.

    Raises:
        ValueError: not as many rows of each.

    >>> one, zero = torch.ones(1, 4), torch.zeros(1, 4)
    >>> [round(v.item(), 4) for v in proposal_losses(torch.zeros(1), one, torch.tensor([1]), zero)]
    [0.6931, 3.7778]
    """
    _check(logit_A[:, None], 1, delta_A4, 4, label_A, target_A4)
    with full_precision(logit_A):
        logit_A = at_least_float32(logit_A)
        objectness = F.binary_cross_entropy_with_logits(logit_A, label_A.to(logit_A), reduction="sum")
        boxes = _of_positives(delta_A4, target_A4, label_A, _RPN_BETA)
        return objectness / max(len(label_A), 1), boxes / max(len(label_A), 1)


def head_losses(logit_R2: Tensor, delta_R8: Tensor, label_R: Tensor, target_R4: Tensor) -> tuple[Tensor, Tensor]:
    """L_cls1 and L_reg1 of the first head: background or person, and where is the person?

    Args:
        logit_R2: gradient flows.
        delta_R8: predicted offsets from the proposals of both classes, background first; gradient flows.
        label_R: 0 background, anything above is a person.
        target_R4: offsets of the matched boxes.

    Returns:
        Two scalars >= 0, unweighted (the second weighs 10), at least float32; 0 without rows.

    Raises:
        ValueError: not as many rows of each.

    >>> deltas, targets = torch.cat([torch.zeros(1, 4), torch.ones(1, 4)], 1), torch.zeros(1, 4)
    >>> [round(v.item(), 4) for v in head_losses(torch.zeros(1, 2), deltas, torch.tensor([7]), targets)]
    [0.6931, 2.0]
    """
    _check(logit_R2, 2, delta_R8, 8, label_R, target_R4)
    with full_precision(logit_R2):
        person_R = (label_R > 0).long()
        classes = F.cross_entropy(at_least_float32(logit_R2), person_R, reduction="sum")
        boxes = _of_positives(delta_R8[:, 4:], target_R4, label_R, _HEAD_BETA)
        return classes / max(len(label_R), 1), boxes / max(len(label_R), 1)


def _of_positives(delta_N4: Tensor, target_N4: Tensor, label_N: Tensor, beta: float) -> Tensor:
    delta_N4 = at_least_float32(delta_N4)
    each_N = F.smooth_l1_loss(delta_N4, target_N4.to(delta_N4), reduction="none", beta=beta).sum(1)
    return torch.where(label_N > 0, each_N, 0).sum()


def _check(logit: Tensor, logits: int, delta: Tensor, deltas: int, label_N: Tensor, target_N4: Tensor) -> None:
    rows = len(label_N)
    found = tuple(logit.shape), tuple(delta.shape), tuple(target_N4.shape)
    expected = (rows, logits), (rows, deltas), (rows, 4)
    if found != expected:
        raise ValueError(f"logits, offsets and targets of {rows} labels must be {expected}, got {found}")
