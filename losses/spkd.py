"""Similarity-preserving distillation (Tung and Mori, ICCV 2019)."""

# Shape legend: B = batch, D = embedding width.

from torch import Tensor

from losses.similarity import at_least_float32, check_rows, full_precision, unit_rows


def similarity_preserving(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """‖Ĝ_s − Ĝ_t‖²_F / B² with G = x xᵀ of the raw embeddings and L2-normalised rows (eqs. 3 and 4).

    The widths of student and teacher may differ: only relations inside each space are compared.

    Args:
        student_BD: raw student embeddings; gradient flows, none into a zero row.
        teacher_BD: raw teacher embeddings of the same images; no gradient.

    Returns:
        Scalar in [0, 4], unweighted, at least float32; 0 where student = teacher.

    Raises:
        ValueError: numbers of rows differ, or fewer than 2 rows.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> similarity_preserving(3 * x[:, [1, 0]], x).item()  # neither scale nor rotation matters
    0.0
    """
    check_rows(student_BD, teacher_BD, least=2)
    with full_precision(student_BD):
        student_BD, teacher_BD = at_least_float32(student_BD), at_least_float32(teacher_BD.detach())
        difference_BB = unit_rows(student_BD @ student_BD.T) - unit_rows(teacher_BD @ teacher_BD.T)
        return difference_BB.square().mean()
