"""D3still: decoupled differential distillation for asymmetric image retrieval (Xie et al., CVPR 2024).

The student embeds queries, the teacher the gallery. With cosine similarities
S^q_ij = cos(student_i, teacher_j) and S^g_ij = cos(teacher_i, teacher_j), the loss asks that every student
row *orders* its nearest gallery images as the teacher's row does:

    L = α L_f + β L_irpd + γ L_crpd                                                     (eq. 18)

Every function takes raw embeddings, normalises them itself, works in at least float32 also under autocast,
detaches the teacher and returns unweighted scalars in the paper's scale.
"""

# Shape legend: B = batch, D = embedding width, K = kept neighbours (the image itself not counted),
# R = rows of one chunk, N = columns a row is compared on.

from typing import Literal

import torch
from torch import Tensor

from losses.similarity import check_pair, full_precision, in_chunks, largest_columns, unit_pair


def feature_term(student_BD: Tensor, teacher_BD: Tensor, reading: Literal["A", "B"] = "B") -> Tensor:
    """Distance of each image's two embeddings, L_f (eqs. 7 and 15), with v_i = cos(student_i, teacher_i) − 1.

    The brackets of the printed equation allow two readings: A = mean |v_i|, B = ‖v‖₂ / B. The authors' code
    computes B. A is up to √B larger, so a weight α means nothing without its reading.

    Departs from the paper's eq. 15 only where two gallery images are identical: the diagonal is taken, not
    the top-1 column, which then may be the twin.

    Args:
        student_BD: raw student embeddings; gradient flows (zero where the student is already perfect).
        teacher_BD: raw teacher embeddings of the same images; no gradient.
        reading: "A" or "B".

    Returns:
        Scalar in [0, 2], unweighted.

    Raises:
        ValueError: shapes differ, no rows, or an unknown reading.

    >>> student, teacher = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> feature_term(student, teacher, reading="A").item()  # v = (-1, 0)
    0.5
    """
    check_pair(student_BD, teacher_BD)
    with full_precision(student_BD):
        student_BD, teacher_BD = unit_pair(student_BD, teacher_BD)
        gap_B = (student_BD * teacher_BD).sum(dim=1) - 1
        if reading == "A":
            return gap_B.abs().mean()
        if reading == "B":
            return torch.linalg.vector_norm(gap_B) / len(gap_B)
    raise ValueError(f"reading must be 'A' (mean of |1-cos|) or 'B' (norm over the batch), got {reading!r}")


def relation_terms(
    student_BD: Tensor,
    teacher_BD: Tensor,
    top_k: int | None = 10,
    margin: float = 0.1,
    ties: Literal["drop", "reference"] = "drop",
) -> tuple[Tensor, Tensor]:
    """Inconsistent and consistent relation terms on the teacher's top-k, L_irpd and L_crpd (eqs. 16 and 17).

    For each image the ``top_k - 1`` nearest *other* images are kept, by the teacher, equal similarities in
    index order. On all ordered pairs (j, l) of them a = S^q_ij − S^q_il and b = S^g_ij − S^g_il are compared:
    e = (a − b) / (margin + |b|). A pair with a·b < 0 is ordered against the teacher and counts in the first
    term, one with a·b > 0 in the second; both terms are the mean over images of the norm of their e.

    The paper's scale: no division by k − 1 (the authors' code divides both terms by it).

    Args:
        student_BD: raw student embeddings; gradient flows, the grouping itself is not differentiated.
        teacher_BD: raw teacher embeddings of the same images; no gradient.
        top_k: neighbours counted with the image itself, 2 <= top_k <= B; 2 leaves one neighbour and so no
            pair: both terms are 0. None compares all other images j with all images l (eqs. 9 and 10).
        margin: m > 0; below about 1e-2 near-ties dominate in float32.
        ties: "drop" ignores pairs that the teacher ranks equal. "reference" reproduces the authors' code,
            which replaces b = 0 by 1 and so pushes tied images apart, and which truncates a top_k above B.

    Returns:
        (inconsistent, consistent), two unweighted scalars >= 0.

    Raises:
        ValueError: shapes differ, fewer than 2 rows, top_k outside [2, B], margin <= 0, unknown ties.

    A student equal to its teacher orders everything alike and differs nowhere:

    >>> e = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> [term.item() for term in relation_terms(e, e, top_k=3)]
    [0.0, 0.0]
    """
    check_pair(student_BD, teacher_BD, least=2)
    if margin <= 0:
        raise ValueError(f"margin must be above 0, got {margin}")
    if ties not in ("drop", "reference"):
        raise ValueError(f"ties must be 'drop' or 'reference', got {ties!r}")
    if top_k is not None and (top_k < 2 or (top_k > len(student_BD) and ties != "reference")):
        raise ValueError(
            f"top_k must be between 2 and the {len(student_BD)} images of the batch, got {top_k}; "
            f"lower top_k or enlarge the batch"
        )
    with full_precision(student_BD):
        query_BB, gallery_BB = _similarities(student_BD, teacher_BD)
        if top_k is None:
            self_B = torch.arange(len(query_BB), device=query_BB.device)
            return _mean_norms(query_BB, gallery_BB, self_B, margin, ("inconsistent", "consistent"), ties)
        neighbours_BK = _other_neighbours(gallery_BB, top_k - 1)
        query_BK, gallery_BK = query_BB.gather(1, neighbours_BK), gallery_BB.gather(1, neighbours_BK)
        return _mean_norms(query_BK, gallery_BK, None, margin, ("inconsistent", "consistent"), ties)


def differential_term(student_BD: Tensor, teacher_BD: Tensor, margin: float = 0.1) -> Tensor:
    """Pairwise differential distillation before decoupling, L_pd (eq. 6): all ordered pairs, self included.

    Memory is bounded by working on chunks of rows; the cost is B³.

    Args:
        student_BD: raw student embeddings; gradient flows.
        teacher_BD: raw teacher embeddings; no gradient.
        margin: m > 0.

    Returns:
        Scalar >= 0, unweighted.

    Raises:
        ValueError: shapes differ, no rows, or margin <= 0.

    >>> e = torch.eye(3)
    >>> differential_term(e, e).item()
    0.0
    """
    check_pair(student_BD, teacher_BD)
    if margin <= 0:
        raise ValueError(f"margin must be above 0, got {margin}")
    with full_precision(student_BD):
        query_BB, gallery_BB = _similarities(student_BD, teacher_BD)
        (term,) = _mean_norms(query_BB, gallery_BB, None, margin, ("all",), ties="drop")
        return term


def pairwise_term(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Pairwise similarity distillation, L_pair (eq. 3): mean over images of ‖S^q_i − S^g_i‖₂.

    Args:
        student_BD: raw student embeddings; gradient flows.
        teacher_BD: raw teacher embeddings; no gradient.

    Returns:
        Scalar >= 0, unweighted.

    Raises:
        ValueError: shapes differ or there are no rows.

    >>> pairwise_term(torch.eye(2).flip(0), torch.eye(2)).item()  # each row differs by (1, 1)
    1.4142135381698608
    """
    check_pair(student_BD, teacher_BD)
    with full_precision(student_BD):
        query_BB, gallery_BB = _similarities(student_BD, teacher_BD)
        return torch.linalg.vector_norm(query_BB - gallery_BB, dim=1).mean()


def _similarities(student_BD: Tensor, teacher_BD: Tensor) -> tuple[Tensor, Tensor]:
    student_BD, teacher_BD = unit_pair(student_BD, teacher_BD)
    return student_BD @ teacher_BD.T, teacher_BD @ teacher_BD.T


def _other_neighbours(gallery_BB: Tensor, count: int) -> Tensor:
    """Columns of the teacher's nearest other images, nearest first, ties by index: (B, count)."""
    # The image itself is taken out by its index, not as "the first column": with duplicated images or by
    # rounding the first column can be another image.
    others_BB = gallery_BB.clone().fill_diagonal_(torch.inf)
    return largest_columns(others_BB, count + 1)[:, 1:]


def _row_norms(
    query_RN: Tensor, gallery_RN: Tensor, self_R: Tensor | None, margin: float, groups: tuple[str, ...], ties: str
) -> Tensor:
    """Norm of e over each row's ordered pairs, once per group: (R, len(groups))."""
    a_RNN = query_RN[:, :, None] - query_RN[:, None, :]
    b_RNN = gallery_RN[:, :, None] - gallery_RN[:, None, :]
    if ties == "reference":
        b_RNN = b_RNN.masked_fill(b_RNN == 0, 1.0)
    e_RNN = (a_RNN - b_RNN) / (margin + b_RNN.abs())
    if self_R is not None:  # j ≠ i, while l may be i
        e_RNN = e_RNN.masked_fill((torch.arange(e_RNN.shape[1], device=e_RNN.device) == self_R[:, None])[:, :, None], 0)
    order_RNN = (a_RNN * b_RNN).detach() if ties == "drop" else (a_RNN / b_RNN).detach()
    keep = {"all": None, "inconsistent": order_RNN < 0, "consistent": order_RNN > 0}
    # vector_norm, not sqrt of a sum: a row without any pair in the group has gradient 0, not NaN.
    return torch.stack(
        [
            torch.linalg.vector_norm(e_RNN if keep[g] is None else e_RNN.masked_fill(~keep[g], 0), dim=(1, 2))
            for g in groups
        ],
        dim=1,
    )


def _mean_norms(
    query_BN: Tensor, gallery_BN: Tensor, self_B: Tensor | None, margin: float, groups: tuple[str, ...], ties: str
) -> tuple[Tensor, ...]:
    """Mean over images of the row norms, once per group; a few rows at a time where there are many pairs."""

    def norms(query_RN: Tensor, gallery_RN: Tensor, self_R: Tensor | None = None) -> Tensor:
        return _row_norms(query_RN, gallery_RN, self_R, margin, groups, ties)

    by_row = (query_BN, gallery_BN) if self_B is None else (query_BN, gallery_BN, self_B)
    return in_chunks(query_BN.shape[1] ** 2, norms, *by_row).mean(dim=0).unbind()
