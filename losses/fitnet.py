"""FitNet between embeddings (Romero et al., ICLR 2015), as the D3still paper and its authors' code use it.

Departs from the original, which regresses an intermediate layer: student and teacher embeddings have one width
here, so no regressor is needed.
"""

# Shape legend: B = batch, D = embedding width.

from torch import Tensor

from losses.similarity import at_least_float32, check_pair, full_precision


def feature_mse(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Mean squared difference of the raw embeddings, over all B·D entries; nothing is normalised.

    Args:
        student_BD: raw student embeddings; gradient flows.
        teacher_BD: raw teacher embeddings of the same images; no gradient.

    Returns:
        Scalar >= 0, unweighted, at least float32; 0 exactly where student = teacher.

    Raises:
        ValueError: shapes differ or no rows.

    >>> import torch
    >>> feature_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
    2.0
    """
    check_pair(student_BD, teacher_BD)
    with full_precision(student_BD):
        return (at_least_float32(student_BD) - at_least_float32(teacher_BD.detach())).square().mean()
