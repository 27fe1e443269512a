"""DDPS, disaggregation distillation for person search (Jia et al., IEEE TMM 2025): LD, CD and DFD.

    L = task + L_LD + 0.01 L_CD + Σ over FPN levels (5e-5 L_fg + 2.5e-5 L_bg + 5e-5 L_at + 5e-7 L_gl)

The functions here return unweighted terms; the method file weighs them. The formulas are those of the public code:
the paper's text was not available.
"""

# Shape legend: B = images, R = proposals, C = classes or channels, H and W = cells of a map, P = persons,
# D = embedding width, n = boxes of one image, M = K + Q columns of an OIM memory.

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losses.oim import UNLABELLED
from losses.similarity import at_least_float32, full_precision

# --- LD: logits of the detector ---------------------------------------------------------------------------------------


def logit_distillation(
    student_logits_RC: Tensor,
    teacher_logits_RC: Tensor,
    label_R: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022) of the first head's class logits.

        L = α · T² · mean KL(b_t ‖ b_s) + β · T² · mean KL(q_t ‖ q_s),   b = (p_y, 1 − p_y),  q = p without class y

    With two classes q has one entry, so the second part is 0, β does nothing, and α = 1 is plain distillation.
    Departs from the released code, which takes logarithms of probabilities: it is not finite for logits that differ
    by more than about 400.

    Args:
        student_logits_RC: of the proposals that the student sampled; gradient flows.
        teacher_logits_RC: of the same proposals; no gradient.
        label_R: the class of each proposal, 0 … C − 1; in person search 1 = person.
        temperature: T > 0.
        alpha: weight of the part about the labelled class.
        beta: weight of the part about the others.

    Returns:
        Scalar >= 0, at least float32; 0 without proposals.

    Raises:
        ValueError: shapes differ, fewer than two classes, or T <= 0.

    >>> logits = torch.tensor([[0.0, 4.0]])
    >>> round(logit_distillation(torch.zeros(1, 2), logits, torch.tensor([1])).item(), 4)
    1.7751
    """
    if student_logits_RC.ndim != 2 or student_logits_RC.shape != teacher_logits_RC.shape:
        raise ValueError(
            f"student and teacher logits must be two matrices of one shape (proposals, classes), "
            f"got {tuple(student_logits_RC.shape)} and {tuple(teacher_logits_RC.shape)}"
        )
    rows, classes = student_logits_RC.shape
    if classes < 2 or label_R.shape != (rows,):
        raise ValueError(
            f"need at least two classes and one label for each of {rows} proposals, "
            f"got {classes} classes and labels {tuple(label_R.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    with full_precision(student_logits_RC):
        student_RC = at_least_float32(student_logits_RC) / temperature
        teacher_RC = at_least_float32(teacher_logits_RC.detach()) / temperature
        other_RC = torch.arange(classes - 1, device=label_R.device).expand(rows, -1)
        other_RC = other_RC + (other_RC >= label_R[:, None])  # the columns that are not the label's
        of_label = _divergence(_binary(student_RC, label_R, other_RC), _binary(teacher_RC, label_R, other_RC))
        of_others = _divergence(*(x.gather(1, other_RC).log_softmax(1) for x in (student_RC, teacher_RC)))
        return temperature**2 * (alpha * of_label + beta * of_others) / max(rows, 1)


def _binary(logits_RC: Tensor, label_R: Tensor, other_RC: Tensor) -> Tensor:
    """log (p_y, 1 − p_y), both from sums of exponents: 1 − p would lose what is small."""
    whole_R = logits_RC.logsumexp(1)
    of_label_R = logits_RC.gather(1, label_R[:, None])[:, 0]
    return torch.stack([of_label_R - whole_R, logits_RC.gather(1, other_RC).logsumexp(1) - whole_R], dim=1)


def _divergence(student_RC: Tensor, teacher_RC: Tensor) -> Tensor:
    """Σ KL(teacher ‖ student) of logarithms of probabilities."""
    return F.kl_div(student_RC, teacher_RC, reduction="sum", log_target=True)


# --- CD: similarities of persons --------------------------------------------------------------------------------------


def correlation_distillation(student_PD: Tensor, teacher_PE: Tensor) -> Tensor:
    """Σ (S_s − S_t)² over all pairs of persons, S = E · Eᵀ of the rows as they are given.

    A sum, as released: it grows with the square of the number of persons.

    Args:
        student_PD: unit rows; gradient flows.
        teacher_PE: unit rows of the same persons, of any width; no gradient.

    Returns:
        Scalar >= 0, at least float32; 0 without persons.

    Raises:
        ValueError: not two matrices with as many rows.

    >>> same, crossed = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> correlation_distillation(same, crossed).item()
    2.0
    """
    if student_PD.ndim != 2 or teacher_PE.ndim != 2 or len(student_PD) != len(teacher_PE):
        raise ValueError(
            f"student and teacher embeddings must be two matrices with as many rows, "
            f"got {tuple(student_PD.shape)} and {tuple(teacher_PE.shape)}"
        )
    with full_precision(student_PD):
        student_PD, teacher_PE = at_least_float32(student_PD), at_least_float32(teacher_PE.detach())
        return (student_PD @ student_PD.T - teacher_PE @ teacher_PE.T).square().sum()


def teacher_confidence(similarity_RM: Tensor, label_R: Tensor, num_identities: int) -> Tensor:
    """How sure the teacher is of every box: what :func:`distinct_people` ranks by.

    Departs from the released code, where the queue begins at column 482 whatever the data set: at K.

    Args:
        similarity_RM: of :meth:`losses.oim.OIM.similarities` of the teacher.
        label_R: 0 background, 1 … K, 5555 without identity.
        num_identities: K.

    Returns:
        (R,) softmax over all columns, of an identity its own column, of a person without identity the largest of
        the queue, of background 0. No gradient.

    >>> teacher_confidence(torch.zeros(3, 4), torch.tensor([0, 1, 5555]), 2).tolist()
    [0.0, 0.25, 0.25]
    """
    probability_RM = at_least_float32(similarity_RM.detach()).softmax(1)
    column_R = (label_R - 1).clamp(0, num_identities - 1)
    own_R = probability_RM.gather(1, column_R[:, None])[:, 0]
    queue_RQ = probability_RM[:, num_identities:]
    queue_R = queue_RQ.amax(1) if queue_RQ.shape[1] else torch.zeros_like(own_R)
    is_identity_R = (label_R >= 1) & (label_R <= num_identities)
    return torch.where(is_identity_R, own_R, torch.where(label_R == UNLABELLED, queue_R, torch.zeros_like(own_R)))


def distinct_people(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], scores: Sequence[Tensor], iou: float = 0.7
) -> Tensor:
    """Rows of one box for every person, by non-maximum suppression of every identity apart.

    Persons without identity are one identity, as released. Waits for the device.

    Args:
        boxes: of every image (n, 4), x1 y1 x2 y2.
        labels: (n,), 0 background, which is left out.
        scores: (n,), the larger the sooner; of equal ones the lower row.
        iou: above this overlap the later box goes.

    Returns:
        (P,) row numbers in the concatenation of all images: image by image, by falling score. Boxes with a side
        under 0.01 are left out.

    Raises:
        ValueError: not as many lists, or not as many rows in each.

    >>> box = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10]])
    >>> distinct_people([box], [torch.tensor([1, 1, 2])], [torch.tensor([0.1, 0.9, 0.5])]).tolist()
    [1, 2]
    """
    if not len(boxes) == len(labels) == len(scores):
        raise ValueError(
            f"need boxes, labels and scores of every image, got {len(boxes)}, {len(labels)}, {len(scores)}"
        )
    kept, start = [torch.zeros(0, dtype=torch.int64)], 0
    for box_n4, label_n, score_n in zip(boxes, labels, scores, strict=True):
        if box_n4.shape != (len(label_n), 4) or score_n.shape != label_n.shape:
            raise ValueError(
                f"need one label and one score for each box, got boxes {tuple(box_n4.shape)}, "
                f"labels {tuple(label_n.shape)}, scores {tuple(score_n.shape)}"
            )
        kept.append(start + _suppressed(box_n4.detach().cpu(), label_n.cpu(), score_n.detach().cpu(), iou))
        start += len(label_n)
    return torch.cat(kept).to(boxes[0].device if len(boxes) else None)


def _suppressed(box_n4: Tensor, label_n: Tensor, score_n: Tensor, iou: float) -> Tensor:
    sides_n2 = box_n4[:, 2:] - box_n4[:, :2]
    left = (label_n != 0) & (sides_n2 >= 0.01).all(1)
    overlap_nn = _overlaps(box_n4) * (label_n[:, None] == label_n)
    kept = []
    for row in torch.argsort(score_n, descending=True, stable=True).tolist():
        if left[row]:
            kept.append(row)
            left &= overlap_nn[row] <= iou
            left[row] = False
    return torch.tensor(kept, dtype=torch.int64)


def _overlaps(box_n4: Tensor) -> Tensor:
    """Intersection over union of all pairs."""
    low = torch.maximum(box_n4[:, None, :2], box_n4[:, :2])
    high = torch.minimum(box_n4[:, None, 2:], box_n4[:, 2:])
    common_nn = (high - low).clamp(min=0).prod(-1)
    area_n = (box_n4[:, 2:] - box_n4[:, :2]).clamp(min=0).prod(-1)
    return common_nn / (area_n[:, None] + area_n - common_nn).clamp(min=torch.finfo(box_n4.dtype).tiny)


# --- DFD: features of persons and background apart --------------------------------------------------------------------


class FeatureTerms(NamedTuple):
    """The unweighted terms of one level."""

    person: Tensor
    background: Tensor
    attention: Tensor
    context: Tensor


class DisaggregationFeatureDistillation(nn.Module):
    """L_fg, L_bg, L_at and L_gl of one FPN level.

        q = (F_s − F_t)² · A_s(F_t) · A_c(F_t)       L_fg = 1/B Σ q M_f       L_bg = 1/B Σ q M_b
        L_at = 1/B (Σ |A_c(F_s) − A_c(F_t)| + Σ |A_s(F_s) − A_s(F_t)|)        L_gl = 1/B Σ (G_s(F_s) − G_t(F_t))²

    G adds a vector to every cell, made from the attention-pooled map; both sides learn theirs. It starts as the
    identity. Nothing of the size of a map is kept for the backward pass beside the maps themselves.

    Args:
        student_channels: C of the student's map; where it is another than the teacher's, a 1×1 convolution maps it.
        teacher_channels: C of the teacher's map.
        temperature: of the attention.

    >>> distil = DisaggregationFeatureDistillation(2, 2)
    >>> maps = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    >>> terms = distil(*maps, [torch.tensor([[0.0, 0.0, 8.0, 8.0]])], [(8, 8)])
    >>> terms.person.item(), terms.background.item(), terms.context.item()
    (0.8888888955116272, 0.0, 8.0)
    """

    def __init__(self, student_channels: int, teacher_channels: int, temperature: float = 0.5) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature
        same = student_channels == teacher_channels
        self.align = None if same else nn.Conv2d(student_channels, teacher_channels, 1)
        self.student_context = _Context(teacher_channels)
        self.teacher_context = _Context(teacher_channels)

    def forward(
        self,
        student_BCHW: Tensor,
        teacher_BCHW: Tensor,
        boxes: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]] | Tensor,
    ) -> FeatureTerms:
        """The terms of a batch.

        Args:
            student_BCHW: gradient flows.
            teacher_BCHW: of the same images; no gradient.
            boxes: of every image (n, 4), x1 y1 x2 y2 in pixels of the resized image; n may be 0.
            image_sizes: height and width of every image, which boxes are divided by. As released those before
                padding, so that boxes shift in a batch of several sizes; the padded size corrects that.

        Raises:
            ValueError: maps of other sizes, or not boxes and a size for every image.
        """
        expected = (*student_BCHW.shape[:1], self.teacher_context.channels, *student_BCHW.shape[2:])
        if tuple(teacher_BCHW.shape) != expected:
            raise ValueError(f"the teacher's map must be {expected}, got {tuple(teacher_BCHW.shape)}")
        with full_precision(student_BCHW):
            student_BCHW = at_least_float32(student_BCHW)
            if self.align is not None:
                student_BCHW = self.align(student_BCHW)
            teacher_BCHW = at_least_float32(teacher_BCHW.detach())
            height, width = student_BCHW.shape[2:]
            person_BHW, background_BHW = person_masks(boxes, image_sizes, height, width)
            spatial_BHW, channel_BC = attention_maps(teacher_BCHW, self.temperature)
            student_spatial_BHW, student_channel_BC = attention_maps(student_BCHW, self.temperature)
            shift_BC = self.student_context(student_BCHW) - self.teacher_context(teacher_BCHW)
            images = len(student_BCHW)
            person, background, context = student_BCHW.new_zeros(3).unbind()
            for i in range(images):  # what is as large as a map is of one image
                error_HW, global_error = checkpoint(
                    _errors, student_BCHW[i], teacher_BCHW[i], channel_BC[i], shift_BC[i], use_reentrant=False
                )
                weighed_HW = error_HW * spatial_BHW[i]
                person = person + (weighed_HW * person_BHW[i].to(weighed_HW)).sum()
                background = background + (weighed_HW * background_BHW[i].to(weighed_HW)).sum()
                context = context + global_error
            attention = (student_channel_BC - channel_BC).abs().sum() + (student_spatial_BHW - spatial_BHW).abs().sum()
            return FeatureTerms(*(term / max(images, 1) for term in (person, background, attention, context)))


class _Context(nn.Module):
    """The vector of a global context block (Cao et al., ICCV workshops 2019): (B, C, H, W) -> (B, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.mask = nn.Conv2d(channels, 1, 1)
        self.reduce = nn.Linear(channels, channels // 2)
        self.norm = nn.LayerNorm(channels // 2)
        self.expand = nn.Linear(channels // 2, channels)
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in")
        for start in (self.mask.bias, self.expand.weight, self.expand.bias):
            nn.init.zeros_(start)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        attention_BS1 = self.mask(map_BCHW).flatten(1).softmax(1)[:, :, None]
        pooled_BC = (map_BCHW.flatten(2) @ attention_BS1)[:, :, 0]
        return self.expand(F.relu(self.norm(self.reduce(pooled_BC))))


def _errors(student_CHW: Tensor, teacher_CHW: Tensor, channel_C: Tensor, shift_C: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over channels of A_c (F_s − F_t)² in every cell, and Σ (F_s − F_t + shift)²."""
    difference_CHW = student_CHW - teacher_CHW
    error_HW = torch.einsum("chw,c->hw", difference_CHW.square(), channel_C)
    return error_HW, (difference_CHW + shift_C[:, None, None]).square().sum()


def attention_maps(feature_BCHW: Tensor, temperature: float = 0.5) -> tuple[Tensor, Tensor]:
    """Where a map is large, over cells and over channels; each softmax sums to how many there are.

    Returns:
        H·W · softmax over cells of mean_c |F| / T, (B, H, W), and C · softmax over channels of mean_hw |F| / T,
        (B, C); at least float32, gradient flows.

    >>> spatial, channel = attention_maps(torch.ones(1, 2, 3, 4))
    >>> spatial.unique().tolist(), channel.tolist()
    ([1.0], [[1.0, 1.0]])
    """
    size_BCHW = at_least_float32(feature_BCHW).abs()
    batch, channels, height, width = size_BCHW.shape
    spatial_BS = height * width * (size_BCHW.mean(1).flatten(1) / temperature).softmax(1)
    channel_BC = channels * (size_BCHW.mean((2, 3)) / temperature).softmax(1)
    return spatial_BS.view(batch, height, width), channel_BC


def person_masks(
    boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]] | Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Weights of the cells of persons and of the background.

    A box covers the cells from the floor of its low corner to the ceiling of its high one, both included, each with
    one over their number: every person weighs 1, and where persons overlap the smaller one counts. The background
    is what no box covers, each cell with one over their number.

    Args:
        boxes: of every image (n, 4), x1 y1 x2 y2 in pixels; n may be 0.
        image_sizes: height and width of every image, which boxes are divided by.
        height: of the map, cells.
        width: likewise.

    Returns:
        (B, H, W) twice, float32 or as the boxes.

    Raises:
        ValueError: not one size and one set of boxes (n, 4) for every image.

    >>> person, background = person_masks([torch.tensor([[0.0, 0.0, 3.0, 3.0]])], [(8, 8)], 4, 4)
    >>> person[0, 0].tolist()  # cells 0 … 2 of both axes
    [0.1111111119389534, 0.1111111119389534, 0.1111111119389534, 0.0]
    >>> background[0, 3].tolist(), background.sum().item()
    ([0.1428571492433548, 0.1428571492433548, 0.1428571492433548, 0.1428571492433548], 1.0)
    """
    if len(boxes) != len(image_sizes) or any(b.ndim != 2 or b.shape[1] != 4 for b in boxes):
        raise ValueError(
            f"need boxes (n, 4) and a size for every image, got {[tuple(b.shape) for b in boxes]} "
            f"and {len(image_sizes)} sizes"
        )
    person = [
        _one_mask(at_least_float32(box_n4), *size, height, width)
        for box_n4, size in zip(boxes, image_sizes, strict=True)
    ]
    person_BHW = torch.stack(person) if person else torch.zeros(0, height, width)
    empty_BHW = (person_BHW == 0).to(person_BHW)
    return person_BHW, empty_BHW / empty_BHW.sum((1, 2), keepdim=True).clamp(min=1)


def _one_mask(box_n4: Tensor, image_height: int, image_width: int, height: int, width: int) -> Tensor:
    if not len(box_n4):
        return box_n4.new_zeros(height, width)
    x_n2, y_n2 = box_n4[:, 0::2] / image_width * width, box_n4[:, 1::2] / image_height * height
    (x_low, x_high), (y_low, y_high) = ((v[:, 0].floor(), v[:, 1].ceil()) for v in (x_n2, y_n2))
    weight_n = 1 / ((y_high - y_low + 1) * (x_high - x_low + 1))
    x_W, y_H = (torch.arange(size, device=box_n4.device) for size in (width, height))
    inside_nW = (x_W >= x_low[:, None]) & (x_W <= x_high[:, None])
    inside_nH = (y_H >= y_low[:, None]) & (y_H <= y_high[:, None])
    return (weight_n[:, None, None] * inside_nH[:, :, None] * inside_nW[:, None, :]).amax(0)
