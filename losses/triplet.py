"""Triplet losses with mining inside the batch (Hermans et al., 2017)."""

# Shape legend: B = batch, D = embedding width.

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.similarity import at_least_float32


def batch_hard_triplet(embedding_BD: Tensor, identity_B: Tensor, margin: float | None = 0.3) -> Tensor:
    """Furthest positive against nearest negative of every anchor (Hermans et al., 2017, eq. 5).

    Euclidean distances of the embeddings as given (not normalised), sqrt(max(d², 1e-12)). The anchor is a
    member of its own positive set, as in the D3still authors' code: an image that is alone with its identity
    has positive distance 1e-6. Any number of images per identity is allowed.

    Args:
        embedding_BD: raw embeddings; gradient flows.
        identity_B: whose image each row is.
        margin: in units of distance, >= 0; None = soft margin, softplus(d_p − d_n).

    Returns:
        Scalar >= 0, unweighted, mean over anchors; at least float32 also under autocast.

    Raises:
        ValueError: lengths differ, negative margin, or only one identity in the batch (no negatives).

    >>> x = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
    >>> batch_hard_triplet(x, torch.tensor([0, 0, 1, 1]), margin=1.5).item()  # (0, .5, .5, 0) / 4
    0.25
    """
    positive_distance_B, negative_distance_B = _mined(embedding_BD, identity_B, margin, soft=False)
    return _ranking(positive_distance_B, negative_distance_B, margin)


def batch_soft_triplet(embedding_BD: Tensor, identity_B: Tensor, margin: float | None = None) -> Tensor:
    """Softmax-weighted positives and negatives of every anchor (the "batch soft" mining of D3still's code).

    Positives are weighted by softmax(+d), negatives by softmax(−d); the weights are differentiated through.
    Arguments, result and errors as in :func:`batch_hard_triplet`.

    >>> x = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
    >>> round(batch_soft_triplet(x, torch.tensor([0, 0, 1, 1])).item(), 4)
    0.1353
    """
    positive_distance_B, negative_distance_B = _mined(embedding_BD, identity_B, margin, soft=True)
    return _ranking(positive_distance_B, negative_distance_B, margin)


def _mined(embedding_BD: Tensor, identity_B: Tensor, margin: float | None, soft: bool) -> tuple[Tensor, Tensor]:
    if embedding_BD.ndim != 2 or len(embedding_BD) != len(identity_B):
        raise ValueError(
            f"need a matrix (images, width) and one identity per row, "
            f"got {tuple(embedding_BD.shape)} and {tuple(identity_B.shape)}"
        )
    if margin is not None and margin < 0:
        raise ValueError(f"margin must be at least 0, or None for the soft margin, got {margin}")
    with torch.autocast(embedding_BD.device.type, enabled=False):
        x_BD = at_least_float32(embedding_BD)
        square_B = x_BD.square().sum(dim=1)
        distance_BB = (square_B[:, None] + square_B[None, :] - 2 * x_BD @ x_BD.T).clamp_min(1e-12).sqrt()
        # Rounding leaves a few 1e-4 on the diagonal of the expanded square; the true distance is 0.
        distance_BB = distance_BB.masked_fill(torch.eye(len(x_BD), dtype=torch.bool, device=x_BD.device), 1e-6)
        positive_BB = identity_B[:, None] == identity_B[None, :]
        if positive_BB.all(dim=1).any():
            raise ValueError(
                f"a triplet needs at least two identities in the batch, got {identity_B.unique().tolist()}"
            )
        if soft:
            positive_weight_BB = distance_BB.masked_fill(~positive_BB, -torch.inf).softmax(dim=1)
            negative_weight_BB = (-distance_BB).masked_fill(positive_BB, -torch.inf).softmax(dim=1)
            return (positive_weight_BB * distance_BB).sum(dim=1), (negative_weight_BB * distance_BB).sum(dim=1)
        # max and min send the gradient to one of several equally far images; amax would split it between them.
        positive_distance_B = distance_BB.masked_fill(~positive_BB, -torch.inf).max(dim=1).values
        negative_distance_B = distance_BB.masked_fill(positive_BB, torch.inf).min(dim=1).values
        return positive_distance_B, negative_distance_B


def _ranking(positive_distance_B: Tensor, negative_distance_B: Tensor, margin: float | None) -> Tensor:
    gap_B = positive_distance_B - negative_distance_B
    return F.softplus(gap_B).mean() if margin is None else (gap_B + margin).relu().mean()
