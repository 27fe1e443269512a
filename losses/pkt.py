"""Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018)."""

# Shape legend: B = batch, D = embedding width.

import torch
from torch import Tensor

from losses.similarity import at_least_float32, check_rows, full_precision

_EPS = 1e-7


def pkt(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Divergence of the conditional probabilities that the cosine kernel gives to images of the batch.

    K = (x̃ x̃ᵀ + 1) / 2 with x̃ = x / (‖x‖ + 1e-7), P = K divided by its row sums (the image itself included);
    the loss is the *mean* over all B² entries of P_t · log((P_t + 1e-7) / (P_s + 1e-7)). Values are tiny, 1e-6
    to 1e-3, which is why its usual weight is 30,000; below float32 its gradient is noise.

    Args:
        student_BD: raw student embeddings; gradient flows, none into a zero row.
        teacher_BD: raw teacher embeddings of the same images, of any width; no gradient.

    Returns:
        Scalar, unweighted, at least float32; 0 where student = teacher. The 1e-7 can make it slightly negative.

    Raises:
        ValueError: numbers of rows differ or fewer than 2 (one row is always alike).

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> pkt(x[:, [1, 0]], x).item()  # a rotation changes no relation
    0.0
    """
    check_rows(student_BD, teacher_BD, least=2)
    with full_precision(student_BD):
        student_BB = _conditional(at_least_float32(student_BD))
        teacher_BB = _conditional(at_least_float32(teacher_BD.detach())).to(student_BB.dtype)
        return (teacher_BB * ((teacher_BB + _EPS) / (student_BB + _EPS)).log()).mean()


def _conditional(x_BD: Tensor) -> Tensor:
    # vector_norm has gradient 0 at a zero row; the row itself is held out of the graph, as 1 / 1e-7 is no gradient.
    zero_B1 = (x_BD == 0).all(dim=1, keepdim=True)
    x_BD = x_BD.masked_fill(zero_B1, 0.0)
    unit_BD = x_BD / (torch.linalg.vector_norm(x_BD, dim=1, keepdim=True) + _EPS)
    kernel_BB = (unit_BD @ unit_BD.T + 1) / 2
    return kernel_BB / kernel_BB.sum(dim=1, keepdim=True)
