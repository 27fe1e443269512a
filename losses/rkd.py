"""Relational knowledge distillation (Park et al., CVPR 2019): distances and angles between images of a batch.

Both terms compare relations inside each space, never a student with a teacher vector: the two spaces are not
aligned, and asymmetric retrieval stays at chance (all published tables agree).
"""

# Shape legend: B = batch, D = embedding width, R = rows of one chunk.

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.similarity import at_least_float32, check_rows, full_precision, in_chunks

_SAME = 1e-13  # squared distance, as a share of the squared norms, below which rows are identical: float32's rounding


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

    With G = x xᵀ the angle is (G_jk − G_ij − G_ik + G_ii) / (‖x_j − x_i‖ ‖x_k − x_i‖), in float64, where nothing of
    float32's digits is lost in the differences: B³ + B²·D steps, where products of the directions take B³·D. Chunks
    of images are computed again in the backward pass, so the memory is B² (the original keeps B³ + B²·D numbers:
    24 GB for a batch of 120, says its author).

    Args, Returns, Raises: as :func:`distance_term`.

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> round(angle_term(3 * x + 1, x).item(), 12)  # neither scale nor shift matters
    0.0
    """
    check_rows(student_BD, teacher_BD, least=2)
    with full_precision(student_BD):
        student_gram_BB, *student = _corners(student_BD)
        teacher_gram_BB, *teacher = _corners(teacher_BD.detach())
        whole = student_gram_BB, teacher_gram_BB
        gap_B = in_chunks(len(student_BD) ** 2, _angle_gaps, *student, *teacher, whole=whole)
        return gap_B.mean().to(at_least_float32(student_BD).dtype)


def _relative_distances(x_BD: Tensor) -> Tensor:
    x_BD = x_BD - x_BD.mean(dim=0)  # distances are the same, and no digits go into the squares of what rows share
    square_B = x_BD.square().sum(dim=1)
    distance_BB = (square_B[:, None] + square_B[None, :] - 2 * x_BD @ x_BD.T).clamp_min(1e-12).sqrt()
    distance_BB = distance_BB.masked_fill(torch.eye(len(x_BD), dtype=torch.bool, device=x_BD.device), 0.0)
    # The authors' mean of the positive distances: all but the diagonal are. Selecting them would wait for the device.
    return distance_BB / (distance_BB.sum() / (len(x_BD) * (len(x_BD) - 1)))


def _corners(x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What angles are made of, in float64: G, G_ij − G_ii / 2, and 1 / ‖x_j − x_i‖, which is 0 of identical rows."""
    gram_BB = x_BD.double() @ x_BD.double().T
    half_B = gram_BB.diagonal() / 2
    inner_BB = gram_BB - half_B[:, None]
    square_BB = 2 * (half_B[None, :] - inner_BB)
    same_BB = square_BB <= _SAME * 2 * (half_B[:, None] + half_B[None, :])
    return gram_BB, inner_BB, square_BB.masked_fill(same_BB, 1.0).rsqrt().masked_fill(same_BB, 0.0)


def _angle_gaps(
    student_inner_RB: Tensor, student_inverse_RB: Tensor, teacher_inner_RB: Tensor, teacher_inverse_RB: Tensor,
    student_gram_BB: Tensor, teacher_gram_BB: Tensor,
) -> Tensor:  # fmt: skip
    """Mean huber₁ of the angles at R images: (R,)."""
    student_RBB = _angles(student_gram_BB, student_inner_RB, student_inverse_RB)
    teacher_RBB = _angles(teacher_gram_BB, teacher_inner_RB, teacher_inverse_RB)
    return F.smooth_l1_loss(student_RBB, teacher_RBB, reduction="none").mean(dim=(1, 2))


def _angles(gram_BB: Tensor, inner_RB: Tensor, inverse_RB: Tensor) -> Tensor:
    """Cosines at R images between the directions to all others: (R, B, B)."""
    product_RBB = gram_BB - inner_RB[:, :, None] - inner_RB[:, None, :]
    return product_RBB * inverse_RB[:, :, None] * inverse_RB[:, None, :]
