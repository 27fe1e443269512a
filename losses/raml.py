"""RAML: absolute and relational alignment across resolutions (Suma and Tolias, WACV 2023).

As in the D3still authors' code, where the relations are those between the images of a batch. Departs from the
original, where they are those between several augmented views of one image.
"""

# Shape legend: B = batch, D = embedding width.

import torch
from torch import Tensor

from losses.similarity import check_pair, full_precision, unit_pair

_EPS = 1e-6  # inside every square, as in the authors' code: no term is exactly 0 at student = teacher


def absolute_term(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Each image's own two embeddings: mean over images of (1 − cos(student_i, teacher_i) + 1e-6)².

    Args:
        student_BD: raw student embeddings, normalised here; gradient flows, none into a zero row.
        teacher_BD: raw teacher embeddings of the same images; no gradient.

    Returns:
        Scalar in [0, 4], unweighted, at least float32.

    Raises:
        ValueError: shapes differ or no rows.

    >>> round(absolute_term(torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 0.0]])).item(), 4)
    1.0
    """
    check_pair(student_BD, teacher_BD)
    with full_precision(student_BD):
        student_BD, teacher_BD = unit_pair(student_BD, teacher_BD)
        return (1 - (student_BD * teacher_BD).sum(dim=1) + _EPS).square().mean()


def cross_term(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Student–teacher relations, weight λ1: Σ_{i≠j} (cos(s_i, t_j) − cos(t_i, t_j) + 1e-6)² / (B (B − 1)).

    Args, Returns: as :func:`absolute_term`.

    Raises:
        ValueError: shapes differ or fewer than 2 rows.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(cross_term(x[:, [1, 0]], x).item(), 4)
    1.0
    """
    check_pair(student_BD, teacher_BD, least=2)
    with full_precision(student_BD):
        student_BD, teacher_BD = unit_pair(student_BD, teacher_BD)
        return _off_diagonal(student_BD @ teacher_BD.T - teacher_BD @ teacher_BD.T)


def student_term(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Student–student relations, weight λ2: Σ_{i≠j} (cos(s_i, s_j) − cos(t_i, t_j) + 1e-6)² / (B (B − 1)).

    Args, Returns: as :func:`absolute_term`.

    Raises:
        ValueError: shapes differ or fewer than 2 rows.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(student_term(x[:, [1, 0]], x).item(), 4)  # a rotation changes no relation inside a space
    0.0
    """
    check_pair(student_BD, teacher_BD, least=2)
    with full_precision(student_BD):
        student_BD, teacher_BD = unit_pair(student_BD, teacher_BD)
        return _off_diagonal(student_BD @ student_BD.T - teacher_BD @ teacher_BD.T)


def _off_diagonal(difference_BB: Tensor) -> Tensor:
    size = len(difference_BB)
    itself_BB = torch.eye(size, dtype=torch.bool, device=difference_BB.device)
    return (difference_BB + _EPS).masked_fill(itself_BB, 0.0).square().sum() / (size * (size - 1))
