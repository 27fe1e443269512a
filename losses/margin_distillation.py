"""Margins that follow the teacher: MarginDistillation (Svitov and Alyamkin, 2020), TripletDistillation (Feng et al.).

Both turn how sure the teacher is into a margin between ``least`` and ``largest``: of a margin softmax on the teacher's
frozen class centres, or of a triplet loss.
"""

# Shape legend: B = batch, C = classes, D = embedding width, N = triplets.

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from losses.margin_softmax import cosines
from losses.similarity import check_pair, full_precision, unit_rows

Distance = Literal["l2", "angle"]


def teacher_margins(
    teacher_BD: Tensor, weight_CD: Tensor, label_B: Tensor, largest: float = 0.5, least: float = 0.2
) -> Tensor:
    """(B,) m_i = (largest − least) / max_batch(c) · c_i + least with c_i = cos(t_i, W_y): margins of an ArcFace.

    No gradient. Where no cosine of the batch is above 0 every margin is ``least``.

    Args:
        teacher_BD: raw teacher embeddings of the batch of all ranks.
        weight_CD: the teacher's class centres.
        label_B: class of every row.
        largest, least: of the margins, radians.

    Raises:
        ValueError: a least margin above the largest.

    >>> teacher_margins(torch.eye(2), torch.eye(2), torch.tensor([0, 0])).tolist()
    [0.5, 0.20000000298023224]
    """
    _check_margins(largest, least)
    with torch.no_grad():
        sure_B = cosines(teacher_BD, weight_CD).gather(1, label_B[:, None])[:, 0]
        return _margins(sure_B, largest, least)


class TripletTerms(NamedTuple):
    """The loss, and the margins that it had."""

    loss: Tensor
    margin_N: Tensor


def triplet_distillation(
    student: tuple[Tensor, Tensor, Tensor], teacher: tuple[Tensor, Tensor, Tensor], largest: float = 0.5,
    least: float = 0.2, distance: Distance = "l2",
) -> TripletTerms:  # fmt: skip
    """Mean of max(d_ap − d_an + m, 0) of the student, m = (largest − least) / max(g) · g + least with the teacher's gap
    g = max(d_an − d_ap, 0).

    Args:
        student: raw embeddings of anchors, positives and negatives, (N, D) each; gradient flows.
        teacher: those of the teacher, of any width; no gradient.
        largest, least: of the margins.
        distance: of unit vectors: squared L2, or the angle.

    Returns:
        The loss, 0 with a zero gradient without triplets, and the margins (N,).

    Raises:
        ValueError: shapes differ, another distance, or a least margin above the largest.

    >>> a, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    >>> triplet_distillation((a, a, n), (a, a, n)).loss.item()
    0.0
    """
    _check_margins(largest, least)
    if distance not in ("l2", "angle"):
        raise ValueError(f"distance must be l2 or angle, got {distance!r}")
    shapes = [[tuple(x.shape) for x in network] for network in (student, teacher)]
    if any(len(set(of_one)) > 1 for of_one in shapes) or len(student[0]) != len(teacher[0]):
        raise ValueError(
            f"anchors, positives and negatives must be (N, D) each, of student and teacher as many, got {shapes[0]} "
            f"and {shapes[1]}"
        )
    with full_precision(student[0]):
        positive_N, negative_N = _distances(student, distance)
        with torch.no_grad():
            their_positive_N, their_negative_N = _distances(teacher, distance)
            gap_N = (their_negative_N - their_positive_N).clamp(min=0).to(positive_N)
            margin_N = _margins(gap_N, largest, least)
        loss_N = (positive_N - negative_N + margin_N).clamp(min=0)
        return TripletTerms(loss_N.sum() / max(len(loss_N), 1), margin_N)


def hardest_triplets(student_BD: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of anchors, of their farthest image of the same identity, of their nearest of another, by the student.

    Every row is an anchor. One that has no other image of its identity is its own positive; where the batch has one
    identity alone, the negative is of that one too.

    Returns:
        Three (B,) tensors of row numbers, without gradient.

    >>> [rows.tolist() for rows in hardest_triplets(torch.eye(3), torch.tensor([0, 0, 1]))]
    [[0, 1, 2], [1, 0, 2], [2, 2, 0]]
    """
    check_pair(student_BD, student_BD)
    with torch.no_grad(), full_precision(student_BD):
        unit_BD = unit_rows(student_BD)
        similarity_BB = unit_BD @ unit_BD.T
        is_same_BB = label_B[:, None] == label_B
        positive_B = similarity_BB.masked_fill(~is_same_BB, 2.0).argmin(dim=1)
        negative_B = similarity_BB.masked_fill(is_same_BB, -2.0).argmax(dim=1)
        return torch.arange(len(label_B), device=label_B.device), positive_B, negative_B


def _margins(sure_N: Tensor, largest: float, least: float) -> Tensor:
    if not len(sure_N):
        return sure_N
    highest = sure_N.max()
    slope = torch.where(highest > 0, (largest - least) / torch.where(highest > 0, highest, 1.0), 0.0)
    return slope * sure_N + least


def _distances(triplet: tuple[Tensor, Tensor, Tensor], distance: str) -> tuple[Tensor, Tensor]:
    anchor_ND, positive_ND, negative_ND = map(unit_rows, triplet)
    if distance == "l2":
        return tuple((anchor_ND - other_ND).square().sum(dim=1) for other_ND in (positive_ND, negative_ND))
    # Clipped short of ±1, where the slope of the angle is infinite.
    limit = 1 - 1e-7 if anchor_ND.dtype == torch.float32 else 1 - 1e-12
    cosine = ((anchor_ND * other_ND).sum(dim=1) for other_ND in (positive_ND, negative_ND))
    return tuple(one.clamp(-limit, limit).acos() for one in cosine)


def _check_margins(largest: float, least: float) -> None:
    if least > largest:
        raise ValueError(f"the least margin ({least}) must not be above the largest ({largest})")
