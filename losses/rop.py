"""Rank order preservation (Wu et al., ICLR 2023, as in the D3still authors' code)."""

# Shape legend: B = batch, D = embedding width, K = neighbours, R = rows of one chunk.

import torch
from torch import Tensor

from losses.similarity import at_least_float32, check_pair, full_precision, in_chunks, nearest_similarities

_GALLERY_TEMPERATURE = 1e-6  # so sharp that the teacher's order is 0 or 1, and 1/2 for ties


def rop(
    student_BD: Tensor, teacher_BD: Tensor, top_k: int, temperature: float = 0.1, rank_weight: float = 0.2
) -> Tensor:
    """:func:`rank_order` on the teacher's ``top_k`` nearest images of the batch, the image itself included.

    As the D3still authors' code has it; the original takes the neighbours from the whole training set.

    Args:
        student_BD: raw student embeddings; gradient flows, none into a zero row.
        teacher_BD: raw teacher embeddings of the same images; no gradient.
        top_k: neighbours, 1 <= top_k <= B.
        temperature, rank_weight: as there.

    Returns:
        Scalar >= 0, unweighted, at least float32; not 0 at student = teacher (see there).

    Raises:
        ValueError: shapes differ, fewer than 2 rows, top_k outside [1, B], or temperature <= 0.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> rop(x, x, top_k=2).item() > 0
    True
    """
    check_pair(student_BD, teacher_BD, least=2)
    with full_precision(student_BD):
        return rank_order(*nearest_similarities(student_BD, teacher_BD, top_k), temperature, rank_weight)


def rank_order(query_BK: Tensor, gallery_BK: Tensor, temperature: float = 0.1, rank_weight: float = 0.2) -> Tensor:
    """How far the student's soft order of the neighbours is from the teacher's hard one.

    With neighbours sorted by the teacher, I^g_rc = σ((S^g_c − S^g_r) / 1e-6) and
    I^q_rc = σ((S^q_c − S^g_r) / τ): the student's score of c is compared with the *teacher's* score of r.
    The loss is the mean over images of Σ_rc w_r (I^g − I^q)² / K with w_r = softmax_r(ρ S^g) · r: ρ multiplies,
    so a small ρ is almost uniform, and the factor r favours low ranks.

    Even a student equal to its teacher has a loss, because the two orders differ in sharpness.

    Args:
        query_BK: cosines of the student's query with each neighbour's teacher embedding; gradient flows.
        gallery_BK: cosines of the teacher's own embedding with the same neighbours, falling; no gradient.
        temperature: τ > 0.
        rank_weight: ρ.

    Raises:
        ValueError: shapes differ, no rows, or temperature <= 0.

    >>> gallery = torch.tensor([[1.0, 0.0]])
    >>> better, worse = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> (rank_order(better, gallery) < rank_order(worse, gallery)).item()
    True
    """
    check_pair(query_BK, gallery_BK)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    with full_precision(query_BK):
        query_BK, gallery_BK = at_least_float32(query_BK), at_least_float32(gallery_BK.detach())
        rank_K = torch.arange(1, query_BK.shape[1] + 1, device=query_BK.device, dtype=gallery_BK.dtype)

        def row_losses(query_RK: Tensor, gallery_RK: Tensor) -> Tensor:
            gallery_RKK = torch.sigmoid((gallery_RK[:, None, :] - gallery_RK[:, :, None]) / _GALLERY_TEMPERATURE)
            query_RKK = torch.sigmoid((query_RK[:, None, :] - gallery_RK[:, :, None]) / temperature)
            weight_RK = (rank_weight * gallery_RK).softmax(dim=1) * rank_K
            return (weight_RK[:, :, None] * (gallery_RKK - query_RKK).square()).sum(dim=(1, 2)) / len(rank_K)

        return in_chunks(len(rank_K) ** 2, row_losses, query_BK, gallery_BK).mean()
