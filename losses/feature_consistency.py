"""Distillation of single embeddings, the usual baselines of face recognition: raw L2, feature consistency, angles."""

# Shape legend: B = batch, D = embedding width.

from typing import Literal

from torch import Tensor

from losses.face_kd import cosine_distances
from losses.similarity import at_least_float32, check_pair, full_precision


def raw_l2(student_BD: Tensor, teacher_BD: Tensor, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Mean over images of ‖s − t‖² of raw embeddings; with ``reduction="mean"`` also over their D numbers.

    Args:
        student_BD: raw student embeddings; gradient flows.
        teacher_BD: raw teacher embeddings of the same images; no gradient.

    Returns:
        Scalar >= 0, unweighted, at least float32.

    Raises:
        ValueError: shapes differ, no rows, or another reduction.

    >>> import torch
    >>> raw_l2(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)).item()
    5.0
    """
    check_pair(student_BD, teacher_BD)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be sum or mean, got {reduction!r}")
    with full_precision(student_BD):
        square_BD = (at_least_float32(student_BD) - at_least_float32(teacher_BD.detach())).square()
        return square_BD.mean() if reduction == "mean" else square_BD.sum(dim=1).mean()


def feature_consistency(student_BD: Tensor, teacher_BD: Tensor, form: Literal["cos", "l2n", "half"] = "cos") -> Tensor:
    """FC of three public codes, c = cos(s_i, t_i): mean of 1 − c ("cos"), of ‖ŝ − t̂‖² = 2 (1 − c) ("l2n"), half that.

    Args, Returns: as :func:`raw_l2`, in [0, 2], [0, 4] and [0, 2].

    Raises:
        ValueError: shapes differ, no rows, or another form.

    >>> import torch
    >>> [feature_consistency(torch.eye(2), torch.eye(2)[[1, 0]], form).item() for form in ("cos", "l2n", "half")]
    [1.0, 2.0, 1.0]
    """
    check_pair(student_BD, teacher_BD)
    if form not in ("cos", "l2n", "half"):
        raise ValueError(f"form must be cos, l2n or half, got {form!r}")
    with full_precision(student_BD):
        return cosine_distances(student_BD, teacher_BD).mean() * (2 if form == "l2n" else 1)


def angular(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """ShrinkTeaNet (Duong et al., 2019), its angular loss on the embedding: mean of (1 − cos(s_i, t_i))².

    Args, Returns, Raises: as :func:`raw_l2`; in [0, 4].

    >>> import torch
    >>> angular(torch.eye(2), -torch.eye(2)).item()
    4.0
    """
    check_pair(student_BD, teacher_BD)
    with full_precision(student_BD):
        return cosine_distances(student_BD, teacher_BD).square().mean()
