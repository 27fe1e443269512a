"""Task losses of one-stage detectors: FCOS (Tian et al., ICCV 2019) and RetinaNet (Lin et al., ICCV 2017), one class.

Both score every place of every image by the focal loss, FL = -α_t (1 - p_t)^γ log p_t with α = 0.25 and γ = 2; FCOS
adds GIoU of its boxes and the cross-entropy of their centre-ness, RetinaNet the L1 distance of offsets. As torchvision
has them; nothing here asks the device how many places are on a person.
"""

# Shape legend: B = images, A = places (points of FCOS, anchors of RetinaNet) of an image.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.similarity import at_least_float32, full_precision

_ALPHA, _GAMMA = 0.25, 2.0
_EPSILON = 1e-7  # of areas, which are divided by


class FCOSTerms(NamedTuple):
    """Unweighted scalars; their sum is the detector's loss."""

    score: Tensor
    box: Tensor
    centre: Tensor


def fcos_losses(
    logit_BA: Tensor,
    box_BA4: Tensor,
    centre_BA: Tensor,
    point_A2: Tensor,
    is_person_BA: Tensor,
    target_BA4: Tensor,
    positives: Tensor | None = None,
) -> FCOSTerms:
    """Focal loss of all points, GIoU loss and centre-ness of those on a person; sums divided by their number.

    Args:
        logit_BA: whether a point is on a person; gradient flows.
        box_BA4: predicted boxes, pixels; gradient flows.
        centre_BA: logits of centre-ness; gradient flows.
        point_A2: x and y of every point, pixels.
        is_person_BA: bool.
        target_BA4: the person's box; those of other points are not looked at.
        positives: what sums are divided by, at least 1: points on a person in all parts of a batch, where this is one.

    Returns:
        Scalars >= 0, at least float32.

    Raises:
        ValueError: not as many points of each.

    >>> box = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]])
    >>> terms = fcos_losses(torch.zeros(1, 1), box, torch.zeros(1, 1), torch.tensor([[2.0, 2.0]]),
    ...                     torch.ones(1, 1, dtype=torch.bool), box)
    >>> [round(t.item(), 4) for t in terms]
    [0.0433, 0.0, 0.6931]
    """
    _check(logit_BA, is_person_BA, box_BA4, target_BA4)
    if centre_BA.shape != logit_BA.shape or point_A2.shape != (logit_BA.shape[1], 2):
        raise ValueError(
            f"scores {tuple(logit_BA.shape)} need as many centre-nesses and points (A, 2), "
            f"got {tuple(centre_BA.shape)} and {tuple(point_A2.shape)}"
        )
    with full_precision(logit_BA):
        logit_BA, box_BA4, centre_BA = (at_least_float32(x) for x in (logit_BA, box_BA4, centre_BA))
        divisor = (is_person_BA.sum() if positives is None else positives).clamp(min=1)
        # Elsewhere any box in the place of a real one, so that nothing is infinite and no gradient flows.
        some_BA4 = torch.zeros_like(box_BA4)
        some_BA4[..., 2:].fill_(1)
        wanted_BA4, found_BA4 = (torch.where(is_person_BA[..., None], x, some_BA4) for x in (target_BA4, box_BA4))
        centre_target_BA = torch.where(is_person_BA, centreness(point_A2, target_BA4.to(box_BA4)), 0.0)
        distance_BA = F.binary_cross_entropy_with_logits(centre_BA, centre_target_BA, reduction="none")
        return FCOSTerms(
            focal(logit_BA, is_person_BA).sum() / divisor,
            torch.where(is_person_BA, 1 - giou(found_BA4, wanted_BA4), 0.0).sum() / divisor,
            torch.where(is_person_BA, distance_BA, 0.0).sum() / divisor,
        )


def retinanet_losses(
    logit_BA: Tensor, delta_BA4: Tensor, label_BA: Tensor, target_BA4: Tensor
) -> tuple[Tensor, Tensor]:
    """Focal loss of all anchors but those in between, L1 of the offsets of those on a person.

    Sums are divided by the number of anchors on a person, image by image; then the mean over images.

    Args:
        logit_BA: gradient flows.
        delta_BA4: predicted offsets; gradient flows.
        label_BA: 1 person, 0 background, -1 neither.
        target_BA4: offsets of the matched boxes.

    Returns:
        Two scalars >= 0, unweighted, at least float32; 0 without images.

    Raises:
        ValueError: not as many anchors of each.

    >>> label, zero, one = torch.tensor([[1, -1]]), torch.zeros(1, 2), torch.ones(1, 2, 4)
    >>> [round(t.item(), 4) for t in retinanet_losses(zero, one, label, one * 2)]
    [0.0433, 4.0]
    """
    _check(logit_BA, label_BA, delta_BA4, target_BA4)
    with full_precision(logit_BA):
        logit_BA, delta_BA4 = at_least_float32(logit_BA), at_least_float32(delta_BA4)
        is_person_BA = label_BA > 0
        divisor_B = is_person_BA.sum(1).clamp(min=1) * max(len(label_BA), 1)
        score_BA = torch.where(label_BA >= 0, focal(logit_BA, is_person_BA), 0.0)
        distance_BA = torch.where(is_person_BA[..., None], (delta_BA4 - target_BA4).abs(), 0.0).sum(2)
        return (score_BA.sum(1) / divisor_B).sum(), (distance_BA.sum(1) / divisor_B).sum()


def focal(logit: Tensor, is_person: Tensor) -> Tensor:
    """-α_t (1 - p_t)^γ log p_t of every value.

    >>> round(focal(torch.zeros(1), torch.ones(1, dtype=torch.bool)).item(), 4)  # 0.25 · 0.5² · ln 2
    0.0433
    """
    target = is_person.to(logit)
    wrong = (logit.sigmoid() - target).abs()  # 1 - p_t
    cross_entropy = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
    return torch.where(is_person, _ALPHA, 1 - _ALPHA) * wrong**_GAMMA * cross_entropy


def giou(box_N4: Tensor, other_N4: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of pairs of boxes (…, 4), in [-1, 1]; gradient flows.

    >>> a, b = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 2.0, 1.0])
    >>> round(giou(a, a).item(), 4), round(giou(a, b).item(), 4)
    (1.0, 0.0)
    """
    low, high = torch.maximum(box_N4, other_N4), torch.minimum(box_N4, other_N4)
    shared = _area(torch.cat([low[..., :2], high[..., 2:]], -1))
    union = _area(box_N4) + _area(other_N4) - shared
    hull = _area(torch.cat([high[..., :2], low[..., 2:]], -1))
    return shared / (union + _EPSILON) - (hull - union) / (hull + _EPSILON)


def centreness(point_A2: Tensor, box_BA4: Tensor) -> Tensor:
    """√(min(l, r) / max(l, r) · min(t, b) / max(t, b)), distances of a point from its box's sides; 0 outside."""
    low, high = (point_A2 - box_BA4[..., :2]).clamp(min=0), (box_BA4[..., 2:] - point_A2).clamp(min=0)
    ratio = torch.minimum(low, high) / torch.maximum(low, high).clamp(min=_EPSILON)
    return ratio.prod(-1).sqrt()


def _area(box: Tensor) -> Tensor:
    side = (box[..., 2:] - box[..., :2]).clamp(min=0)
    return side[..., 0] * side[..., 1]


def _check(logit_BA: Tensor, label_BA: Tensor, found_BA4: Tensor, target_BA4: Tensor) -> None:
    expected = (*logit_BA.shape, 4)
    if label_BA.shape != logit_BA.shape or found_BA4.shape != expected or target_BA4.shape != expected:
        raise ValueError(
            f"scores {tuple(logit_BA.shape)} need as many labels, boxes and targets, got {tuple(label_BA.shape)}, "
            f"{tuple(found_BA4.shape)} and {tuple(target_BA4.shape)}"
        )
