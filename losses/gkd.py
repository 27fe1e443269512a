"""Grouped distillation for face recognition (Zhao et al., AAAI 2023)."""

# Shape legend: B = batch, C = classes.

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.similarity import at_least_float32, check_pair, full_precision


class GroupedTerms(NamedTuple):
    """Unweighted terms; the third part of the whole divergence, inside the rest, is left out: it does harm."""

    binary: Tensor  # how much mass the primary group has
    primary: Tensor  # how it is spread inside


def group_size(student_logits_BC: Tensor, mass: float = 0.93, stride: int = 1) -> Tensor:
    """How many classes are primary: of the student's probabilities (T = 1), summed over the batch and sorted, so many
    that they hold ``mass`` of all; looked for at every ``stride``-th place. One number, on the device.

    >>> group_size(torch.tensor([[9.0, 9.0, 0.0, 0.0]]), 0.9).item()
    2
    """
    with full_precision(student_logits_BC), torch.no_grad():
        probability_BC = at_least_float32(student_logits_BC).softmax(dim=1)
        reached = probability_BC.sum(dim=0).sort(descending=True).values.cumsum(dim=0) / len(probability_BC)
        is_enough = reached[::stride] >= mass
        first = torch.where(is_enough.any(), is_enough.int().argmax() * stride, len(reached) - 1)
        return first + 1


def grouped_kd(
    student_logits_BC: Tensor, teacher_logits_BC: Tensor, label_B: Tensor, temperature: float = 4.0, mass: float = 0.93,
    stride: int = 1, size: int = 0,
) -> GroupedTerms:  # fmt: skip
    """Divergence of the teacher from the student over two bins (primary group and rest), and inside the group.

    A row's primary group are its ``n`` largest student logits, among which the label is forced; n is of
    :func:`group_size`, or fixed. Of equal logits at the group's end all belong to it. Probabilities are at
    ``temperature``, divergences are summed over classes, averaged over the batch, and multiplied by its square.

    Args:
        student_logits_BC: gradient flows.
        teacher_logits_BC: no gradient.
        label_B: class of every row.
        temperature: T.
        mass: τ.
        stride: of the search for n; the authors' adaptive file has 100.
        size: n where it is fixed, 0 = searched; the authors' other file has 10,000.

    Raises:
        ValueError: shapes differ, no rows, or a setting outside its range.

    >>> x = torch.tensor([[3.0, 1.0, 0.0]])
    >>> [round(term.item(), 6) for term in grouped_kd(x, x, torch.tensor([0]))]
    [0.0, 0.0]
    """
    check_pair(student_logits_BC, teacher_logits_BC)
    if not 0 < temperature < math.inf or not 0 < mass <= 1 or stride < 1 or size < 0:
        raise ValueError(
            f"temperature must be above 0, mass in (0, 1], stride at least 1 and size at least 0, got temperature "
            f"{temperature}, mass {mass}, stride {stride}, size {size}"
        )
    with full_precision(student_logits_BC):
        student_BC, teacher_BC = at_least_float32(student_logits_BC), at_least_float32(teacher_logits_BC.detach())
        is_primary_BC = _primary(student_BC.detach(), label_B, mass, stride, size)
        student_BC, teacher_BC = ((x / temperature).log_softmax(dim=1) for x in (student_BC, teacher_BC))
        own, theirs = (_bins(x, is_primary_BC) for x in (student_BC, teacher_BC))
        binary = F.kl_div(own, theirs, log_target=True, reduction="batchmean")
        inside = (x - bins[:, :1] for x, bins in ((student_BC, own), (teacher_BC, theirs)))
        own_BC, theirs_BC = (x.masked_fill(~is_primary_BC, 0.0) for x in inside)
        weight_BC = theirs_BC.exp() * is_primary_BC
        primary = (weight_BC * (theirs_BC - own_BC)).sum(dim=1).mean()
        return GroupedTerms(binary * temperature**2, primary * temperature**2)


def _primary(student_BC: Tensor, label_B: Tensor, mass: float, stride: int, size: int) -> Tensor:
    """(B, C) whether a class is in a row's primary group."""
    classes = student_BC.shape[1]
    if size:
        count = torch.full((), min(size, classes), device=student_BC.device)
    else:
        count = group_size(student_BC, mass, stride)
    forced_BC = student_BC.scatter(1, label_B[:, None], math.inf)
    least_B1 = forced_BC.sort(dim=1, descending=True).values.gather(1, (count - 1).expand(len(label_B), 1))
    return forced_BC >= least_B1


def _bins(log_BC: Tensor, is_primary_BC: Tensor) -> Tensor:
    """(B, 2) logarithms of the mass inside and outside; a group of all classes leaves the least number outside."""
    least = torch.finfo(log_BC.dtype).min / 4
    inside_B = log_BC.masked_fill(~is_primary_BC, least).logsumexp(dim=1)
    outside_B = log_BC.masked_fill(is_primary_BC, least).logsumexp(dim=1)
    return torch.stack([inside_B, outside_B], dim=1)
