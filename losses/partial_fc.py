"""Softmax over classes of which every rank has some rows, and of these a sample: Partial FC (An et al., CVPR 2022).

Nothing here talks to other ranks: who trains hands in how sums and maxima over ranks are made.
"""

# Shape legend: B = batch of all ranks, C = classes, S = classes that a rank looks at in a step, D = embedding width.

from collections.abc import Callable

import torch
from torch import Tensor

from losses.similarity import at_least_float32, full_precision

Reduce = Callable[[Tensor], Tensor]


def class_rows(classes: int, rank: int, ranks: int) -> range:
    """Which classes a rank owns: C // W, one more on the first C mod W ranks.

    >>> [list(class_rows(5, rank, 2)) for rank in range(2)]
    [[0, 1, 2], [3, 4]]
    """
    share, more = divmod(classes, ranks)
    start = share * rank + min(rank, more)
    return range(start, start + share + (rank < more))


def initial_rows(rows: range, dim: int, seed: int, deviation: float = 0.01) -> Tensor:
    """(len(rows), D) class centres N(0, deviation²): of a class the same whoever owns it, nothing else is drawn.

    >>> torch.equal(initial_rows(range(5000), 2, 0)[4500:], initial_rows(range(4500, 5000), 2, 0))
    True
    """
    block = 4096
    found = []
    for number in range(rows.start // block, -(-rows.stop // block)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        drawn = torch.randn(block, dim, generator=generator) * deviation
        found.append(drawn[max(rows.start - number * block, 0) : rows.stop - number * block])
    return torch.cat(found) if found else torch.zeros(0, dim)


@torch.no_grad()
def sampled_classes(label_B: Tensor, rows: range, rate: float) -> tuple[Tensor, Tensor]:
    """Which of a rank's classes a step looks at, and the labels among them.

    All classes of the batch are there, others at random, int(rate · rows) together. Departs from the released code
    where the batch could have more classes than that: there the number follows the batch, and the host waits for it;
    here it is at least that of the batch's rows.

    Args:
        label_B: classes of the batch of all ranks.
        rows: that this rank owns.
        rate: share that is looked at.

    Returns:
        (S,) row numbers within ``rows``, rising; (B,) places of the labels in them, -1 = another rank's.
    """
    count = min(len(rows), max(int(rate * len(rows)), min(len(label_B), len(rows))))
    own_B = label_B - rows.start
    is_own_B = (own_B >= 0) & (own_B < len(rows))
    drawn = torch.rand(len(rows) + 1, device=label_B.device)
    drawn.index_fill_(0, torch.where(is_own_B, own_B, len(rows)), 2.0)  # another rank's: the last place, cut off
    chosen_S = drawn[:-1].topk(count).indices.sort().values
    place = torch.full((len(rows) + 1,), -1, device=label_B.device)
    place[chosen_S] = torch.arange(count, device=label_B.device)
    return chosen_S, place[torch.where(is_own_B, own_B, len(rows))]


def own_labels(label_B: Tensor, rows: range) -> Tensor:
    """The labels as numbers within ``rows``, -1 = another rank's.

    >>> own_labels(torch.tensor([0, 3, 4]), range(3, 5)).tolist()
    [-1, 0, 1]
    """
    own_B = label_B - rows.start
    return torch.where((own_B >= 0) & (own_B < len(rows)), own_B, -1)


def split_cross_entropy(
    logits_BS: Tensor, label_B: Tensor, total: Reduce = lambda x: x, largest: Reduce = lambda x: x
) -> Tensor:
    """Mean cross-entropy of logits whose columns are spread over ranks; every label is on one of them.

    Departs from the released code, which keeps probabilities above 1e-30: logarithms need no floor, and the gradient,
    softmax minus one-hot, is the same.

    Args:
        logits_BS: this rank's columns for the batch of all ranks; gradient flows.
        label_B: the labels among them, -1 = another rank's.
        total: sums over ranks; its gradient is that of the own part.
        largest: maximum over ranks.

    Returns:
        Scalar, at least float32, the same on all ranks.

    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> y = torch.tensor([2])
    >>> torch.allclose(split_cross_entropy(x, y), torch.nn.functional.cross_entropy(x, y))
    True
    """
    with full_precision(logits_BS):
        logits_BS = at_least_float32(logits_BS)
        least = torch.finfo(logits_BS.dtype).min
        highest_B = logits_BS.detach().amax(dim=1) if logits_BS.shape[1] else logits_BS.new_full((len(label_B),), least)
        highest_B = largest(highest_B)
        mass_B = total((logits_BS - highest_B[:, None]).exp().sum(dim=1))
        is_own_B = label_B >= 0
        if logits_BS.shape[1]:
            own_B = logits_BS.gather(1, label_B.clamp(min=0)[:, None])[:, 0] - highest_B
        else:
            own_B = logits_BS.sum(dim=1)
        target_B = total(torch.where(is_own_B, own_B, 0.0))
        return (mass_B.log() - target_B).mean()
