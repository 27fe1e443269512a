"""Class centres and the margin softmax on them: whole on every worker, or every worker's own classes."""

# Shape legend: B = images of all ranks, D = embedding width, C = classes, S = classes that a rank looks at in a step.

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from losses.margin_softmax import AdaFace, arcface_logits, cosface_logits, cosines
from losses.partial_fc import class_rows, initial_rows, own_labels, sampled_classes, split_cross_entropy
from losses.similarity import at_least_float32, full_precision
from orchestrator import distributed
from orchestrator.families.face.recipe import Head


class ClassRows(nn.Module):
    """Centres of the classes ``rows``, that train; all of them, or those of one rank (:mod:`losses.partial_fc`)."""

    def __init__(self, rows: range, dim: int, seed: int) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(initial_rows(rows, dim, seed))


def own_rows(classes: int, dim: int, seed: int, spread: bool) -> ClassRows:
    """The centres that this rank trains: its share, or all."""
    ranks = distributed.world_size() if spread else 1
    return ClassRows(class_rows(classes, distributed.rank() if spread else 0, ranks), dim, seed)


class MarginHead(nn.Module):
    """Cosines to logits with the recipe's margin, and the cross-entropy on them."""

    def __init__(self, own: Head) -> None:
        super().__init__()
        self.own = own
        self.adaface = AdaFace(own.m, own.quality, own.scale, grad=own.grad) if own.kind == "adaface" else None

    def logits(
        self, cosine_BS: Tensor, norm_B: Tensor, label_B: Tensor, margin: float | Tensor | None = None
    ) -> Tensor:
        """Scaled logits; label -1 = none of these columns. ``margin`` replaces the recipe's, one for each row too."""
        own = self.own
        if self.adaface is not None:
            return self.adaface(cosine_BS, norm_B, label_B)
        margin = own.m if margin is None else margin
        if own.kind == "cosface":
            return cosface_logits(cosine_BS, label_B, margin, own.scale)
        return arcface_logits(cosine_BS, label_B, margin, own.scale, own.grad, own.monotone)

    def loss(
        self, embedding_BD: Tensor, label_B: Tensor, centres_CD: Tensor, margin: float | Tensor | None = None
    ) -> Tensor:
        """Cross-entropy over all classes, whose centres every rank has."""
        with full_precision(embedding_BD):
            logits_BC = self.logits(cosines(embedding_BD, centres_CD), norms(embedding_BD), label_B, margin)
            return F.cross_entropy(logits_BC, label_B)

    def spread_loss(self, local_bD: Tensor, label_B: Tensor, own: ClassRows) -> Tensor:
        """The same, of which every rank has the centres of its own classes and looks at a sample of them.

        Args:
            local_bD: this rank's embeddings.
            label_B: labels of all ranks.
            own: this rank's centres.
        """
        with full_precision(local_bD):
            embedding_BD = _gather_for_parts(at_least_float32(local_bD))
            weight_SD, place_B = own.weight, own_labels(label_B, own.rows)
            if self.own.sample < 1:
                chosen_S, place_B = sampled_classes(label_B, own.rows, self.own.sample)
                weight_SD = own.weight[chosen_S]
            logits_BS = self.logits(cosines(embedding_BD, weight_SD), norms(embedding_BD), place_B)
            return split_cross_entropy(logits_BS, place_B, _sum_over_ranks, _largest_over_ranks)


def norms(embedding_BD: Tensor) -> Tensor:
    """(B,) Euclidean norms without gradient: what AdaFace takes for the quality of an image."""
    return torch.linalg.vector_norm(at_least_float32(embedding_BD.detach()), dim=1)


# --- over ranks: each computes a part of one loss, where distributed.gather is for ranks that compute the same


def _gather_for_parts(local_bD: Tensor) -> Tensor:
    """Rows of all ranks, of which every rank computes another part of the loss: their gradients are summed."""
    return local_bD if distributed.world_size() == 1 else _GatherForParts.apply(local_bD)


def _sum_over_ranks(own: Tensor) -> Tensor:
    """Sum over ranks; the gradient of the own part is that of the sum."""
    return own if distributed.world_size() == 1 else _SumOverRanks.apply(own)


@torch.no_grad()
def _largest_over_ranks(own: Tensor) -> Tensor:
    if distributed.world_size() == 1:
        return own
    found = own.clone()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


class _GatherForParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        ctx.rows = len(local)
        return distributed.gather_without_gradient(local)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = distributed.rank() * ctx.rows
        # Gradients are averaged over ranks afterwards, which divides by the world size.
        return gradient[start : start + ctx.rows] * distributed.world_size()


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        found = own.clone()
        dist.all_reduce(found)
        return found

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient
