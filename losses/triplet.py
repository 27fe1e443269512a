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
        ValueError: lengths differ, or negative margin.

    Needs two identities in the batch, as batches of P identities × K images have: whoever makes the batch checks it,
    on the host, because looking at the labels here would wait for the device. With one, the loss is 0.

    >>> x = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
    >>> batch_hard_triplet(x, torch.tensor([0, 0, 1, 1]), margin=1.5).item()  # (0, .5, .5, 0) / 4
    0.25
    """
    positive_distance_B, negative_distance_B = _mined(embedding_BD, identity_B, margin, soft=False)
    return _ranking(positive_distance_B, negative_distance_B, margin)


def batch_soft_triplet(embedding_BD: Tensor, identity_B: Tensor, margin: float | None = None) -> Tensor:
    """Softmax-weighted positives and negatives of every anchor (the "batch soft" mining of D3still's code).

    Positives are weighted by softmax(+d), negatives by softmax(−d); the weights are differentiated through.
    Arguments, result, errors and needs as in :func:`batch_hard_triplet`.

    >>> x = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
    >>> round(batch_soft_triplet(x, torch.tensor([0, 0, 1, 1])).item(), 4)
    0.1353
    """
    positive_distance_B, negative_distance_B = _mined(embedding_BD, identity_B, margin, soft=True)
    return _ranking(positive_distance_B, negative_distance_B, margin)


def camera_triplet(embedding_BD: Tensor, identity_B: Tensor, camera_B: Tensor, margin: float | None = None) -> Tensor:
    """Batch-hard triplet across cameras: SUReID's teacher loss as we define it.

    The furthest image of the same identity seen by *another* camera against the nearest image of another identity
    seen by the *same* camera: what a camera's look alone can neither explain nor excuse. Where a batch has no such
    image, the unconstrained set takes its place, for positives without the anchor itself where possible.
    The paper names a "camera-constrained triplet loss" of earlier work and does not define it.

    Args:
        embedding_BD: raw embeddings; gradient flows.
        identity_B: whose image each row is.
        camera_B: which camera saw it.
        margin: in units of distance, >= 0; None = soft margin.

    Returns:
        Scalar >= 0, unweighted, mean over anchors; at least float32 also under autocast.

    Raises:
        ValueError: as :func:`batch_hard_triplet`, or not one camera per row.

    Needs two identities in the batch, as :func:`batch_hard_triplet`.

    >>> x = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
    >>> identity, camera = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    >>> camera_triplet(x, identity, camera, margin=2.5).item()  # every anchor: 1 - 3 + 2.5
    0.5
    """
    if camera_B.shape != embedding_BD.shape[:1]:
        raise ValueError(f"need one camera per row, got {tuple(camera_B.shape)} for {len(embedding_BD)} rows")
    distance_BB, same_BB = _distances(embedding_BD, identity_B, margin)
    same_camera_BB = camera_B[:, None] == camera_B[None, :]
    itself_BB = torch.eye(len(camera_B), dtype=torch.bool, device=camera_B.device)
    others_BB = _or_else(same_BB & ~itself_BB, same_BB)
    positive_BB = _or_else(same_BB & ~same_camera_BB, others_BB)
    negative_BB = _or_else(~same_BB & same_camera_BB, ~same_BB)
    return _ranking(*_hardest(distance_BB, positive_BB, negative_BB), margin)


def _or_else(first_BB: Tensor, second_BB: Tensor) -> Tensor:
    """Row by row the first mask, or the second where the first is empty."""
    return torch.where(first_BB.any(dim=1, keepdim=True), first_BB, second_BB)


def _mined(embedding_BD: Tensor, identity_B: Tensor, margin: float | None, soft: bool) -> tuple[Tensor, Tensor]:
    distance_BB, positive_BB = _distances(embedding_BD, identity_B, margin)
    if soft:
        positive_weight_BB = distance_BB.masked_fill(~positive_BB, -torch.inf).softmax(dim=1)
        # A softmax over nothing is NaN, also in its gradient: a row without negatives is weighed whole, then put away.
        lonely_B1 = positive_BB.all(dim=1, keepdim=True)
        negative_weight_BB = (-distance_BB).masked_fill(positive_BB & ~lonely_B1, -torch.inf).softmax(dim=1)
        negative_distance_B = (negative_weight_BB * distance_BB).sum(dim=1).masked_fill(lonely_B1[:, 0], torch.inf)
        return (positive_weight_BB * distance_BB).sum(dim=1), negative_distance_B
    return _hardest(distance_BB, positive_BB, ~positive_BB)


def _hardest(distance_BB: Tensor, positive_BB: Tensor, negative_BB: Tensor) -> tuple[Tensor, Tensor]:
    """Each anchor's distance to its furthest positive and to its nearest negative; infinite where there is none."""
    # max and min send the gradient to one of several equally far images; amax would split it between them.
    positive_distance_B = distance_BB.masked_fill(~positive_BB, -torch.inf).max(dim=1).values
    negative_distance_B = distance_BB.masked_fill(~negative_BB, torch.inf).min(dim=1).values
    return positive_distance_B, negative_distance_B


def _distances(embedding_BD: Tensor, identity_B: Tensor, margin: float | None) -> tuple[Tensor, Tensor]:
    """All distances, and which pairs are of one identity; the arguments checked."""
    if embedding_BD.ndim != 2 or identity_B.shape != embedding_BD.shape[:1] or not len(identity_B):
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
    return distance_BB, identity_B[:, None] == identity_B[None, :]


def _ranking(positive_distance_B: Tensor, negative_distance_B: Tensor, margin: float | None) -> Tensor:
    gap_B = positive_distance_B - negative_distance_B
    return F.softplus(gap_B).mean() if margin is None else (gap_B + margin).relu().mean()
