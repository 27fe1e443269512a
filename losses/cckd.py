"""Correlation congruence (Peng et al., ICCV 2019): the published kernel form, and the form of the authors' code.

"CCKD" in tables of other papers can be either; the D3still paper does not say which one its row used.
"""

# Shape legend: B = batch, D = embedding width.

import math

import torch
from torch import Tensor

from losses.similarity import at_least_float32, check_pair, full_precision, unit_pair


def kernel_congruence(student_BD: Tensor, teacher_BD: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Mean squared difference of the two batches' kernel matrices (Peng et al., section 3.3).

    K(x) = Σ_{p=0..order} e^(−2γ) (2γ)^p / p! · (x̂ x̂ᵀ)^p, element-wise powers: the Taylor expansion of the
    Gaussian kernel of unit vectors.

    Args:
        student_BD: raw student embeddings, normalised here; gradient flows, none into a zero row.
        teacher_BD: raw teacher embeddings of the same images; no gradient.
        gamma: γ > 0, inverse width of the kernel.
        order: P >= 1, highest power.

    Returns:
        Scalar >= 0, unweighted, at least float32; 0 where student = teacher.

    Raises:
        ValueError: shapes differ, fewer than 2 rows, gamma <= 0 or order < 1.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> kernel_congruence(x[:, [1, 0]], x).item()  # a rotation changes no relation
    0.0
    """
    check_pair(student_BD, teacher_BD, least=2)
    if not gamma > 0 or order < 1:
        raise ValueError(f"gamma must be above 0 and order at least 1, got gamma {gamma} and order {order}")
    with full_precision(student_BD):
        student_BB, teacher_BB = (x @ x.T for x in unit_pair(student_BD, teacher_BD))
        difference_BB = torch.zeros_like(teacher_BB)
        for p in range(1, order + 1):  # power 0 is 1 on both sides
            factor = math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p)
            difference_BB = difference_BB + factor * (student_BB**p - teacher_BB**p)
        return difference_BB.square().mean()


def neighbour_product(student_BD: Tensor, teacher_BD: Tensor, normalize: bool = True) -> Tensor:
    """The authors' code: 1/(B−1) Σ_i ⟨δ_i, δ_{i+1}⟩ with δ_i = |ŝ_i − t̂_i|, products of *neighbouring* rows.

    It depends on the order of the batch and holds no similarity between images; RepDistiller's "Correlation"
    is the same without normalisation.

    Args:
        student_BD: raw student embeddings; gradient flows.
        teacher_BD: raw teacher embeddings of the same images; no gradient.
        normalize: whether rows are L2-normalised first.

    Returns:
        Scalar >= 0, unweighted, at least float32; 0 where student = teacher.

    Raises:
        ValueError: shapes differ or fewer than 2 rows.

    >>> neighbour_product(torch.ones(3, 2), torch.zeros(3, 2), normalize=False).item()
    2.0
    """
    check_pair(student_BD, teacher_BD, least=2)
    with full_precision(student_BD):
        if normalize:
            student_BD, teacher_BD = unit_pair(student_BD, teacher_BD)
        else:
            student_BD, teacher_BD = at_least_float32(student_BD), at_least_float32(teacher_BD.detach())
        gap_BD = (student_BD - teacher_BD).abs()
        return (gap_BD[:-1] * gap_BD[1:]).sum() / (len(gap_BD) - 1)
