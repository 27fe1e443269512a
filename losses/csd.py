"""Contextual similarity distillation (Wu et al., CVPR 2022): a query's similarities to its teacher's neighbours."""

# Shape legend: B = batch, D = embedding width, K = neighbours.

import torch.nn.functional as F
from torch import Tensor

from losses.similarity import at_least_float32, check_pair, full_precision, nearest_similarities


def csd(
    student_BD: Tensor,
    teacher_BD: Tensor,
    top_k: int,
    query_temperature: float = 1.0,
    gallery_temperature: float = 0.01,
) -> Tensor:
    """:func:`contextual_divergence` on the teacher's ``top_k`` nearest images of the batch, the image itself included.

    As the D3still authors' code has it; the original takes the neighbours from the whole training set.

    Args:
        student_BD: raw student embeddings; gradient flows, none into a zero row.
        teacher_BD: raw teacher embeddings of the same images; no gradient.
        top_k: neighbours, 1 <= top_k <= B (the authors' code silently lowers a larger one to B).
        query_temperature, gallery_temperature: as there.

    Returns:
        Scalar >= 0, unweighted, at least float32. With two different temperatures it is *not* 0 at
        student = teacher, but near log(top_k).

    Raises:
        ValueError: shapes differ, fewer than 2 rows, top_k outside [1, B], or a temperature <= 0.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> csd(x, x, top_k=2, query_temperature=0.5, gallery_temperature=0.5).item()
    0.0
    """
    check_pair(student_BD, teacher_BD, least=2)
    with full_precision(student_BD):
        similarities = nearest_similarities(student_BD, teacher_BD, top_k)
        return contextual_divergence(*similarities, query_temperature, gallery_temperature)


def contextual_divergence(
    query_BK: Tensor, gallery_BK: Tensor, query_temperature: float = 1.0, gallery_temperature: float = 0.01
) -> Tensor:
    """Mean over images of KL(softmax(S^g / τ_g) ‖ softmax(S^q / τ_q)) over the same K neighbours.

    Args:
        query_BK: cosines of the student's query with each neighbour's teacher embedding; gradient flows.
        gallery_BK: cosines of the teacher's own embedding with the same neighbours; no gradient.
        query_temperature, gallery_temperature: τ_q and τ_g, above 0.

    Raises:
        ValueError: shapes differ, no rows, or a temperature <= 0.

    >>> import torch
    >>> even, sharp = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    >>> round(contextual_divergence(even, sharp).item(), 4)  # log 2
    0.6931
    """
    check_pair(query_BK, gallery_BK)
    if not (query_temperature > 0 and gallery_temperature > 0):
        raise ValueError(f"temperatures must be above 0, got {query_temperature} and {gallery_temperature}")
    with full_precision(query_BK):
        query_BK = F.log_softmax(at_least_float32(query_BK) / query_temperature, dim=1)
        gallery_BK = F.log_softmax(at_least_float32(gallery_BK.detach()) / gallery_temperature, dim=1)
        return F.kl_div(query_BK, gallery_BK, log_target=True, reduction="batchmean")
