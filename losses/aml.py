"""Asymmetric metric learning (Budnik and Avrithis, CVPR 2021): the student's anchor among the teacher's features.

An anchor is embedded by the student; its positive and negatives by the teacher (asymmetric) or by the student
(symmetric). Gradient flows into whatever is given with gradient: give the teacher's embeddings detached.

All terms normalise the embeddings and *sum* over tuples, as the authors' code does.
"""

# Shape legend: A = anchors, N = negatives of one anchor, B = batch, D = embedding width.

import torch
from torch import Tensor

from losses.similarity import check_pair, full_precision, largest_columns, unit_pair, unit_rows

_EPS = 1e-6  # added to every difference, as torch's pairwise distance does in the authors' code


def regression(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Σ_i ½ ‖ŝ_i − t̂_i + 1e-6‖₂²: the anchor's own teacher embedding is its only positive.

    The strongest asymmetric variant of the paper; up to constants the sum of 1 − cos.

    Args:
        student_BD: raw student embeddings; gradient flows, none into a zero row.
        teacher_BD: raw teacher embeddings of the same images; no gradient.

    Returns:
        Scalar in [0, 2B], unweighted, at least float32.

    Raises:
        ValueError: shapes differ or no rows.

    >>> round(regression(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 0.0]])).item(), 4)
    1.0
    """
    check_pair(student_BD, teacher_BD)
    with full_precision(student_BD):
        return (_distance(unit_rows(student_BD), unit_rows(teacher_BD.detach())).square() / 2).sum()


def contrastive(
    anchor_AD: Tensor,
    positive_AD: Tensor,
    negative_AND: Tensor,
    margin: float = 0.7,
    counted_A: Tensor | None = None,
) -> Tensor:
    """Σ over tuples of ½ D_p² + Σ_n ½ max(0, margin − D_n)², Euclidean D of unit vectors.

    Args:
        anchor_AD, positive_AD, negative_AND: raw embeddings of every tuple.
        margin: distance above which a negative is far enough, >= 0.
        counted_A: bool, which tuples count; None = all. The others have neither a loss nor a gradient.

    Returns:
        Scalar >= 0, unweighted, at least float32; 0 for no tuples.

    Raises:
        ValueError: shapes do not fit or margin < 0.

    >>> a, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0]]])
    >>> round(contrastive(a, a, n).item(), 4)  # the negative is √2 away
    0.0
    """
    near_A, far_AN = _tuple_distances(anchor_AD, positive_AD, negative_AND, margin, counted_A)
    return _counted_sum(near_A.square() / 2 + ((margin - far_AN).relu().square() / 2).sum(dim=1), counted_A)


def triplet(
    anchor_AD: Tensor,
    positive_AD: Tensor,
    negative_AND: Tensor,
    margin: float = 0.1,
    counted_A: Tensor | None = None,
) -> Tensor:
    """Σ over tuples and negatives of max(0, D_p² − D_n² + margin), Euclidean D of unit vectors.

    The authors' class has margin 0.1, their command line passes 0.7.

    Args, Returns, Raises: as :func:`contrastive`; the margin is one of squared distances.

    >>> a, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 0.0]]])
    >>> round(triplet(a, a, n).item(), 4)
    0.1
    """
    near_A, far_AN = _tuple_distances(anchor_AD, positive_AD, negative_AND, margin, counted_A)
    return _counted_sum((near_A.square()[:, None] - far_AN.square() + margin).relu().sum(dim=1), counted_A)


def mine(anchor_BD: Tensor, pool_BD: Tensor, label_B: Tensor, negatives: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """A tuple for every image of a batch as anchor: another image of its identity, and hard negatives.

    The positive is the next image of the identity in the batch (cyclic). The negatives are the images of other
    identities in the pool that are nearest to the anchor, equal similarities in index order.

    An anchor counts only where the batch has a positive and enough negatives for it; what else it is given is
    arbitrary. Every anchor is returned, because leaving some out would wait for the device.

    Args:
        anchor_BD: student embeddings.
        pool_BD: embeddings of the same images that positives and negatives come from.
        label_B: identities.
        negatives: how many of each anchor.

    Returns:
        Indices of positives (B,) and negatives (B, N), and which anchors count, bool (B,).

    Raises:
        ValueError: not more images in the batch than ``negatives``.

    Needs images of several identities, as batches of P identities × K images have: with one, nothing counts.

    >>> e = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> positive, negative, counted = mine(e, e, torch.tensor([0, 0, 1, 2]), negatives=1)
    >>> positive[counted].tolist(), negative[counted].tolist(), counted.tolist()
    ([1, 0], [[3], [3]], [True, True, False, False])
    """
    size = len(label_B)
    if size <= negatives:
        raise ValueError(f"a batch of {size} images has no {negatives} negatives for each; lower negatives")
    same_BB = label_B[:, None] == label_B[None, :]
    with torch.no_grad(), full_precision(anchor_BD):
        anchor_BD, pool_BD = unit_pair(anchor_BD, pool_BD)
        similarity_BB = anchor_BD @ pool_BD.T
    far_BB = similarity_BB.masked_fill(same_BB, -torch.inf)
    negative_BN = largest_columns(far_BB, negatives)
    row_B = torch.arange(size, device=label_B.device)
    steps_BB = ((row_B[None, :] - row_B[:, None]) % size).masked_fill(~same_BB, size).fill_diagonal_(size)
    steps_B, positive_B = steps_BB.min(dim=1)
    return positive_B, negative_BN, (steps_B < size) & ((~same_BB).sum(dim=1) >= negatives)


def _counted_sum(loss_A: Tensor, counted_A: Tensor | None) -> Tensor:
    return (loss_A if counted_A is None else loss_A.masked_fill(~counted_A, 0.0)).sum()


def _tuple_distances(
    anchor_AD: Tensor, positive_AD: Tensor, negative_AND: Tensor, margin: float, counted_A: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    if (
        anchor_AD.shape != positive_AD.shape
        or negative_AND.ndim != 3
        or ((negative_AND.shape[0], negative_AND.shape[2]) != tuple(anchor_AD.shape))
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (anchor_AD, positive_AD, negative_AND))
        raise ValueError(f"need anchors (A, D), positives (A, D) and negatives (A, N, D), got {shapes}")
    if counted_A is not None and counted_A.shape != anchor_AD.shape[:1]:
        raise ValueError(f"need one flag for each of {len(anchor_AD)} tuples, got {tuple(counted_A.shape)}")
    with full_precision(anchor_AD):
        anchor_AD, positive_AD = unit_rows(anchor_AD), unit_rows(positive_AD)
        negative_AND = unit_rows(negative_AND.flatten(0, 1)).view(negative_AND.shape)
        return _distance(anchor_AD, positive_AD), _distance(anchor_AD[:, None, :], negative_AND)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a - b + _EPS, dim=-1)
