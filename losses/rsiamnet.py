"""R-SiamNet's losses (Han et al., ICCV 2021): a person seen in its scene and as a crop is the same person.

    L_ins = mean of 1 - cos(scene, crop)                                                                    eq. 1
    L_int = KL(S_scene ‖ S_crop) + KL(S_crop ‖ S_scene), cosines of all persons of the batch                eq. 2
    L_clu = mean of log(1 + Σ_p Σ_n exp(γ (s_n - s_p))), s = cos(feature, memory row), rows of its cluster
            p against all others n                                                                          eq. 3

Clusters are the connected components of first neighbours (``first_neighbours.py``). With every row its own cluster,
L_clu is the softmax cross-entropy over γ · cosine: instance recognition, which the paper's ablations start from.

No code of the authors is public. The paper leaves open how cosines become a distribution in L_int, which rows may be
neighbours, and how the memory is written: each choice is an argument, and the defaults are our reading.
"""

# Shape legend: B = persons of a batch, N = persons of the training set (rows of the memory), D = embedding width.

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.first_neighbours import first_neighbour_labels, first_neighbours
from losses.similarity import at_least_float32, check_pair, full_precision, unit_rows

__all__ = [
    "cluster_contrastive",
    "first_neighbour_labels",
    "first_neighbours",
    "fused",
    "inter_instance_consistency",
    "self_instance_consistency",
    "update_memory",
]

Normalization = Literal["row_softmax", "matrix_softmax", "linear"]
_NEVER = -1e30  # a logit that adds nothing: finite, so that no gradient becomes 0 · infinity
_SMALLEST = 1e-12  # of a share in the linear form, whose logarithm is taken


def self_instance_consistency(scene_BD: Tensor, crop_BD: Tensor) -> Tensor:
    """L_ins (eq. 1): mean of 1 - cos(scene, crop) over persons.

    Args:
        scene_BD: raw embeddings from the whole scene; gradient flows.
        crop_BD: raw embeddings of the same persons' crops; gradient flows. To stop it on one side, detach that side.

    Returns:
        Scalar in [0, 2], unweighted, at least float32; 0 without persons. A zero row has cosine 0 and no gradient.

    Raises:
        ValueError: shapes differ.

    >>> self_instance_consistency(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
    1.0
    """
    check_pair(scene_BD, crop_BD, least=0)
    with full_precision(scene_BD):
        cosine_B = (unit_rows(scene_BD) * unit_rows(crop_BD)).sum(1)
        return (1 - cosine_B).sum() / max(len(cosine_B), 1)


def inter_instance_consistency(
    scene_BD: Tensor,
    crop_BD: Tensor,
    normalization: Normalization = "row_softmax",
    temperature: float = 1.0,
    keep_diagonal: bool = True,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """L_int (eq. 2): both KL divergences between the two paths' cosines of all persons of the batch.

    With several ranks call it on the embeddings of all of them: half a batch has a quarter of the pairs.

    Args:
        scene_BD, crop_BD: raw embeddings of the same persons; gradient flows to both.
        normalization: how cosines become a distribution: softmax over each row; over the whole matrix; or (S + 1) / 2
            divided by the sum of its row.
        temperature: cosines are divided by it before a softmax. Below 0.5 the diagonal takes all the mass, and the
            loss vanishes: drop it.
        keep_diagonal: whether the cosine of a person with itself, always 1, is part of the distribution.
        reduction: over rows; one distribution over the whole matrix has one sum.

    Returns:
        Scalar >= 0, unweighted, at least float32; 0 for one person or none.

    Raises:
        ValueError: shapes differ, a temperature <= 0 or one for the linear form, or an unknown name.

    >>> one, same = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> round(inter_instance_consistency(one, same).item(), 4)  # (e - 1) / (2 (e + 1))
    0.2311
    """
    check_pair(scene_BD, crop_BD, least=0)
    _check_inter(normalization, temperature, reduction)
    with full_precision(scene_BD):
        log_scene, log_crop = (
            _log_shares(unit_rows(x_BD), normalization, temperature, keep_diagonal) for x_BD in (scene_BD, crop_BD)
        )
        # KL(a ‖ b) + KL(b ‖ a) = Σ (a - b) (log a - log b)
        total = ((log_scene.exp() - log_crop.exp()) * (log_scene - log_crop)).sum()
        is_mean = reduction == "mean" and normalization != "matrix_softmax"
        return total / max(len(scene_BD), 1) if is_mean else total


def _log_shares(unit_BD: Tensor, normalization: Normalization, temperature: float, keep_diagonal: bool) -> Tensor:
    """Logarithm of the distributions, one in each row; without the diagonal rows are one shorter."""
    similarity_BB = unit_BD @ unit_BD.T
    if not keep_diagonal and len(similarity_BB):
        similarity_BB = _without_diagonal(similarity_BB)
    if not similarity_BB.numel():
        return similarity_BB
    if normalization == "linear":
        share_BB = ((similarity_BB + 1) / 2).clamp(min=_SMALLEST)
        return (share_BB / share_BB.sum(1, keepdim=True)).log()
    if normalization == "matrix_softmax":
        return F.log_softmax(similarity_BB.reshape(1, -1) / temperature, dim=1)
    return F.log_softmax(similarity_BB / temperature, dim=1)


def _without_diagonal(square_BB: Tensor) -> Tensor:
    """(B, B - 1), each row in its order."""
    rows = len(square_BB)
    return square_BB.flatten()[1:].view(rows - 1, rows + 1)[:, :-1].reshape(rows, rows - 1)


def _check_inter(normalization: str, temperature: float, reduction: str) -> None:
    if normalization not in ("row_softmax", "matrix_softmax", "linear"):
        raise ValueError(f"normalization is row_softmax, matrix_softmax or linear, got {normalization!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is mean or sum, got {reduction!r}")
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, got {temperature}")
    if normalization == "linear" and temperature != 1:
        raise ValueError(f"the linear form has no temperature, got {temperature}; leave it at 1")


def fused(scene_BD: Tensor, crop_BD: Tensor, normalize: bool = True) -> Tensor:
    """The feature that is compared with the memory: the mean of both paths' unit vectors (B, D), gradient to both.

    It is not made unit again. ``normalize=False`` takes the mean of the raw vectors.

    Raises:
        ValueError: shapes differ.

    >>> fused(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).tolist()
    [[0.5, 0.5]]
    """
    check_pair(scene_BD, crop_BD, least=0)
    with full_precision(scene_BD):
        if normalize:
            scene_BD, crop_BD = unit_rows(scene_BD), unit_rows(crop_BD)
        return (at_least_float32(scene_BD) + at_least_float32(crop_BD)) / 2


def cluster_contrastive(
    feature_BD: Tensor,
    memory_ND: Tensor,
    label_N: Tensor,
    row_B: Tensor,
    scale: float = 16.0,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """L_clu (eq. 3): a person is nearer to every row of its cluster, its own included, than to any other.

        log(1 + Σ_p Σ_n exp(γ (s_n - s_p))) = log(1 + exp(logsumexp_p(-γ s_p) + logsumexp_n(γ s_n)))

    Args:
        feature_BD: any length, compared by cosine; gradient flows.
        memory_ND: rows of any length, compared by cosine; no gradient.
        label_N: the cluster of every row; a person's is that of its own row.
        row_B: the row of every person, 0 … N - 1.
        scale: γ.
        reduction: mean over persons, or one loss for each.

    Returns:
        Scalar (or (B,)) >= 0, unweighted, at least float32: ln(1 + K J) when all cosines are equal, with K rows in
        the cluster and J outside. 0 with a gradient of 0 where no row is outside.

    Raises:
        ValueError: shapes do not fit, a scale <= 0, or an unknown reduction.

    >>> memory, label = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0, 0, 1])
    >>> round(cluster_contrastive(memory[:1], memory, label, torch.tensor([0]), scale=2).item(), 4)
    0.1429
    """
    _check_memory(memory_ND, row_B, feature_BD)
    if label_N.shape != memory_ND.shape[:1]:
        raise ValueError(f"{len(memory_ND)} rows of the memory need a label each, got {tuple(label_N.shape)}")
    if not scale > 0:
        raise ValueError(f"the scale must be above 0, got {scale}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction is mean or none, got {reduction!r}")
    with full_precision(feature_BD):
        feature_BD = unit_rows(feature_BD)
        memory_ND = memory_ND.detach().to(feature_BD.dtype)
        # Lengths are divided out afterwards: unit rows would be a second memory of half a gigabyte.
        length_N = torch.linalg.vector_norm(memory_ND, dim=1)
        length_N = torch.where(length_N > 0, length_N, 1.0)  # a zero row has cosine 0 with everybody
        logit_BN = scale * (feature_BD @ memory_ND.T) / length_N
        same_BN = label_N == label_N[row_B][:, None]
        positive_B = (-logit_BN).masked_fill(~same_BN, _NEVER).logsumexp(1)
        negative_B = logit_BN.masked_fill(same_BN, _NEVER).logsumexp(1)
        # Exact where softplus is not: torch's is linear above 20.
        loss_B = torch.logaddexp(positive_B + negative_B, torch.zeros_like(positive_B))
        return loss_B if reduction == "none" else loss_B.sum() / max(len(loss_B), 1)


@torch.no_grad()
def update_memory(
    memory_ND: Tensor,
    row_B: Tensor,
    feature_BD: Tensor,
    momentum: float = 0.2,
    normalize: bool = True,
    renormalize: bool = True,
) -> None:
    """M_t ← λ M_t + (1 - λ) f, in place and without gradient; call it after the loss has used the old rows.

    With several ranks the rows are those of all of them, so that all memories stay equal.

    Args:
        memory_ND: is written.
        row_B: which row is whose; no row twice, as no person is twice in a batch.
        feature_BD: of these persons.
        momentum: λ, the weight of the **old** row, in [0, 1].
        normalize: make the feature a unit vector first.
        renormalize: make the written row a unit vector.

    Raises:
        ValueError: shapes do not fit, or a momentum outside [0, 1]; nothing is written.

    >>> memory = torch.tensor([[1.0, 0.0]])
    >>> update_memory(memory, torch.tensor([0]), torch.tensor([[0.0, 3.0]]), momentum=0.5, renormalize=False)
    >>> memory.tolist()
    [[0.5, 0.5]]
    """
    _check_memory(memory_ND, row_B, feature_BD)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum, the weight of the old row, must be in [0, 1], got {momentum}")
    feature_BD = unit_rows(feature_BD) if normalize else feature_BD
    written_BD = momentum * memory_ND[row_B] + (1 - momentum) * feature_BD.to(memory_ND)
    memory_ND[row_B] = unit_rows(written_BD).to(memory_ND) if renormalize else written_BD


def _check_memory(memory_ND: Tensor, row_B: Tensor, feature_BD: Tensor) -> None:
    if memory_ND.ndim != 2 or feature_BD.ndim != 2 or feature_BD.shape[1] != memory_ND.shape[1]:
        raise ValueError(
            f"features and memory must be matrices of one width, got {tuple(feature_BD.shape)} and "
            f"{tuple(memory_ND.shape)}"
        )
    if row_B.shape != feature_BD.shape[:1]:
        raise ValueError(f"{len(feature_BD)} features need a row of the memory each, got {tuple(row_B.shape)}")
    # On a device a wrong row is the indexing's own error: nothing waits for it here.
    if row_B.device.type == "cpu" and len(row_B) and not 0 <= row_B.min() <= row_B.max() < len(memory_ND):
        raise ValueError(f"rows must be 0 … {len(memory_ND) - 1}, got {row_B.min()} … {row_B.max()}")
