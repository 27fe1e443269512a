"""UGD: the distances of global and local features (Neural Networks 187:107303, 2025; D3still authors' code)."""

# Shape legend: B = batch, P = positions of a square grid over the image, D = embedding width.

import torch
from torch import Tensor

from losses.similarity import check_pair, full_precision, unit_pair


def feature_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """L_FD = mean over images of ‖t̂_i − ŝ_i‖₂.

    Args:
        student_BD: raw student embeddings, normalised here; gradient flows (zero for a perfect or a zero row).
        teacher_BD: raw teacher embeddings of the same images; no gradient.

    Returns:
        Scalar in [0, 2], unweighted, at least float32; 0 where student = teacher.

    Raises:
        ValueError: shapes differ or no rows.

    >>> feature_distance(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, -1.0]])).item()
    2.0
    """
    check_pair(student_BD, teacher_BD)
    with full_precision(student_BD):
        student_BD, teacher_BD = unit_pair(student_BD, teacher_BD)
        return torch.linalg.vector_norm(teacher_BD - student_BD, dim=1).mean()


def local_distance(student_BPD: Tensor, teacher_BPD: Tensor, trusted_BP: Tensor) -> Tensor:
    """L_loc = mean over trusted positions of ‖t̂_loc − ŝ_loc‖₂; 0 if there is none.

    A position is trusted where the teacher's own classifier gives the image's label to it.

    Args:
        student_BPD: projected student features of every position; gradient flows.
        teacher_BPD: teacher features of the same positions, through its neck; no gradient.
        trusted_BP: bool.

    Returns:
        Scalar in [0, 2], unweighted, at least float32.

    Raises:
        ValueError: shapes do not fit or no positions.

    >>> s, t = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> local_distance(s, t, torch.tensor([[True, False]])).item()
    0.0
    """
    if student_BPD.ndim != 3 or trusted_BP.shape != student_BPD.shape[:2]:
        raise ValueError(
            f"need features (images, positions, width) and one flag per position, "
            f"got {tuple(student_BPD.shape)} and {tuple(trusted_BP.shape)}"
        )
    check_pair(student_BPD.flatten(0, 1), teacher_BPD.flatten(0, 1))
    with full_precision(student_BPD):
        student_ND, teacher_ND = unit_pair(student_BPD.flatten(0, 1), teacher_BPD.flatten(0, 1))
        distance_N = torch.linalg.vector_norm(teacher_ND - student_ND, dim=1)
        trusted_N = trusted_BP.flatten()
        return (distance_N * trusted_N).sum() / trusted_N.sum().clamp_min(1)
