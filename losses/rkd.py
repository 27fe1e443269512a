"""Relational knowledge distillation (Park et al., CVPR 2019): distances and angles between images of a batch.

Both terms compare relations inside each space, never a student with a teacher vector: the two spaces are not
aligned, and asymmetric retrieval stays at chance (all published tables agree).
"""

# Shape legend: B = batch, D = embedding width, R = rows of one chunk.

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.similarity import at_least_float32, check_rows, full_precision, in_chunks

# Entries of the difference vectors (R, B, D) and angles (R, B, B) that may be alive at once: 256 MiB in float32.
_ENTRIES_AT_ONCE = 2**26


def distance_term(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Distance-wise loss: mean over all B² pairs of huber₁(ψ_student − ψ_teacher).

    ψ_ij = ‖x_i − x_j‖₂ divided by the mean over i ≠ j; raw embeddings, distances of different images at least
    1e-6, the diagonal 0. The student's mean is differentiated through.

    Args:
        student_BD: raw student embeddings; gradient flows (zero between identical rows).
        teacher_BD: raw teacher embeddings of the same images, of any width; no gradient.

    Returns:
        Scalar >= 0, unweighted, at least float32; 0 where student = teacher, at any scale.

    Raises:
        ValueError: numbers of rows differ or fewer than 2.

    >>> x = torch.tensor([[0.0], [1.0], [3.0]])
    >>> distance_term(2 * x, x).item()
    0.0
    """
    check_rows(student_BD, teacher_BD, least=2)
    with full_precision(student_BD):
        student_BB = _relative_distances(at_least_float32(student_BD))
        return F.smooth_l1_loss(student_BB, _relative_distances(at_least_float32(teacher_BD.detach())))


def angle_term(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Angle-wise loss: mean over all B³ triples of huber₁(A_student − A_teacher).

    A_ijk = cos of the angle at image i between the directions to j and k; the direction between identical rows
    is zero and sends no gradient. Departs from the authors' code there: it divides by 1e-12, which turns
    duplicated images (common where identities are sampled with replacement) into gradients of order 1e10.

    Works on chunks of images and computes them again in the backward pass: the cost is B³·D, the memory is
    bounded (the original keeps B³ + B²·D numbers: 24 GB for a batch of 120, says its author).

    Args, Returns, Raises: as :func:`distance_term`.

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> angle_term(3 * x + 1, x).item()  # neither scale nor shift matters
    0.0
    """
    check_rows(student_BD, teacher_BD, least=2)
    with full_precision(student_BD):
        student_BD, teacher_BD = at_least_float32(student_BD), at_least_float32(teacher_BD.detach())

        def row_means(student_RD: Tensor, teacher_RD: Tensor) -> Tensor:
            angles = _angles(student_RD, student_BD), _angles(teacher_RD, teacher_BD)
            return F.smooth_l1_loss(*angles, reduction="none").mean(dim=(1, 2))

        width = max(student_BD.shape[1], teacher_BD.shape[1])
        rows = _ENTRIES_AT_ONCE // (len(student_BD) * (len(student_BD) + width))
        return in_chunks(rows, row_means, student_BD, teacher_BD).mean()


def _relative_distances(x_BD: Tensor) -> Tensor:
    square_B = x_BD.square().sum(dim=1)
    distance_BB = (square_B[:, None] + square_B[None, :] - 2 * x_BD @ x_BD.T).clamp_min(1e-12).sqrt()
    distance_BB = distance_BB * (1 - torch.eye(len(x_BD), dtype=x_BD.dtype, device=x_BD.device))
    # The authors' mean of the positive distances: all but the diagonal are. Selecting them would wait for the device.
    return distance_BB / (distance_BB.sum() / (len(x_BD) * (len(x_BD) - 1)))


def _angles(from_RD: Tensor, to_BD: Tensor) -> Tensor:
    direction_RBD = to_BD[None, :, :] - from_RD[:, None, :]
    none_RB1 = (direction_RBD == 0).all(dim=2, keepdim=True)
    unit_RBD = F.normalize(direction_RBD.masked_fill(none_RB1, 1.0), dim=2).masked_fill(none_RB1, 0.0)
    return unit_RBD @ unit_RBD.transpose(1, 2)
