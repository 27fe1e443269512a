"""Online instance matching (Xiao et al., CVPR 2017, eq. 1 to 3), as SeqNet and DDPS train re-identification with it.

    logits = s · x · [table; queue]ᵀ          L = mean over labelled persons of −log softmax(logits)[identity]

The table holds one embedding of every identity, the queue the latest embeddings of persons without one. Labels are
those of person search: 0 background, 1 … K identity, 5555 a person without identity.
"""

# Shape legend: N = persons, D = embedding width, K = identities, Q = length of the queue, M = K + Q.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.similarity import at_least_float32, full_precision, unit_rows

UNLABELLED = 5555
_IGNORED = -100  # of torch's cross-entropy


class OIM(nn.Module):
    """Loss, table and queue; all three buffers start at zero and belong to the state of a training.

    Args:
        dim: width D of the embeddings.
        num_identities: K, of the training set: CUHK-SYSU 5,532, PRW 482.
        queue_size: Q: 5,000 and 500.
        momentum: weight of the old row when a table row is updated.
        scale: s, the inverse temperature.

    >>> memory = OIM(2, num_identities=2, queue_size=2, scale=1.0)
    >>> person = torch.tensor([[1.0, 0.0]])
    >>> round(memory(person, torch.tensor([1])).item(), 4)  # ln(K + Q): all rows are zero
    1.3863
    >>> memory.update(person, torch.tensor([1]))
    >>> memory.table_KD.tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """

    table_KD: Tensor
    queue_QD: Tensor
    position: Tensor

    def __init__(
        self, dim: int, num_identities: int, queue_size: int, momentum: float = 0.5, scale: float = 30.0
    ) -> None:
        super().__init__()
        if min(dim, num_identities) < 1 or queue_size < 0:
            raise ValueError(
                f"OIM needs a width and identities above 0 and a queue of at least 0, got {dim}, {num_identities}, "
                f"{queue_size}"
            )
        if num_identities >= UNLABELLED:
            raise ValueError(
                f"{num_identities} identities: label {UNLABELLED} stands for a person without one, so there may be "
                f"{UNLABELLED - 1:,} at most; train on a part of the data"
            )
        if not 0 <= momentum < 1 or scale <= 0:
            raise ValueError(f"momentum must be in [0, 1) and scale above 0, got {momentum} and {scale}")
        self.momentum, self.scale = momentum, scale
        self.register_buffer("table_KD", torch.zeros(num_identities, dim))
        self.register_buffer("queue_QD", torch.zeros(queue_size, dim))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # the queue's next row

    @property
    def num_identities(self) -> int:
        """K."""
        return len(self.table_KD)

    def similarities(self, embedding_ND: Tensor) -> Tensor:
        """s · x · [table; queue]ᵀ, (N, K + Q), at least float32; gradient flows to the embeddings alone."""
        with full_precision(embedding_ND):
            rows_MD = torch.cat([self.table_KD, self.queue_QD])
            return self.scale * at_least_float32(embedding_ND).to(rows_MD.dtype) @ rows_MD.T

    def forward(self, embedding_ND: Tensor, label_N: Tensor) -> Tensor:
        """The loss of a batch; changes no state.

        Departs from the released code, where a batch without a labelled person is NaN: it is 0 with a gradient of 0.

        Args:
            embedding_ND: unit rows; gradient flows.
            label_N: 0, 1 … K or 5555.

        Returns:
            Scalar >= 0, unweighted, at least float32.

        Raises:
            ValueError: not one label for every row, another width, or (where labels are on the CPU) a label that
                is none; on a device such a label stops the program there, since nothing waits for it.
        """
        self._check(embedding_ND, label_N)
        labelled_N = self._is_labelled(label_N)
        target_N = torch.where(labelled_N, label_N - 1, _IGNORED)
        similarity_NM = self.similarities(embedding_ND)
        total = F.cross_entropy(similarity_NM, target_N, ignore_index=_IGNORED, reduction="sum")
        return total / labelled_N.sum().clamp(min=1)

    @torch.no_grad()
    def update(self, embedding_ND: Tensor, label_N: Tensor) -> None:
        """Takes persons into table and queue, one after the other; call it after the backward pass.

        Departs from the released code, which does this inside the backward pass. With several ranks the rows are
        those of all of them in rank order, so that the buffers stay equal. Waits for the device once.

        Args:
            embedding_ND: unit rows.
            label_N: as in :meth:`forward`.

        Raises:
            ValueError: as :meth:`forward`; nothing is written.
        """
        label_N = label_N.cpu()
        self._check(embedding_ND, label_N)
        embedding_ND = embedding_ND.detach().to(self.table_KD)
        self._update_table(embedding_ND, label_N)
        self._update_queue(embedding_ND[(label_N == UNLABELLED).nonzero()[:, 0].to(embedding_ND.device)])

    def _update_table(self, embedding_ND: Tensor, label_N: Tensor) -> None:
        """row ← unit(m · row + (1 − m) · x), person by person: the first of every identity, then the second …"""
        rows = self._is_labelled(label_N).nonzero()[:, 0]
        identity = label_N[rows] - 1
        turn = _occurrence(identity)
        for t in range(int(turn.max()) + 1 if len(turn) else 0):
            own = identity[turn == t].to(self.table_KD.device)
            new = embedding_ND[rows[turn == t].to(embedding_ND.device)]
            self.table_KD[own] = unit_rows(self.momentum * self.table_KD[own] + (1 - self.momentum) * new)

    def _update_queue(self, embedding_ND: Tensor) -> None:
        count, length = len(embedding_ND), len(self.queue_QD)
        if not count or not length:
            return
        last = embedding_ND[-length:]  # earlier ones would be overwritten
        at = self.position + count - len(last) + torch.arange(len(last), device=self.position.device)
        self.queue_QD[at % length] = last
        self.position.copy_((self.position + count) % length)

    def _is_labelled(self, label_N: Tensor) -> Tensor:
        return (label_N >= 1) & (label_N <= self.num_identities)

    def _check(self, embedding_ND: Tensor, label_N: Tensor) -> None:
        dim = self.table_KD.shape[1]
        if embedding_ND.ndim != 2 or embedding_ND.shape[1] != dim or label_N.shape != embedding_ND.shape[:1]:
            raise ValueError(
                f"OIM takes embeddings (persons, {dim}) and a label for each, "
                f"got {tuple(embedding_ND.shape)} and {tuple(label_N.shape)}"
            )
        known_N = self._is_labelled(label_N) | (label_N == 0) | (label_N == UNLABELLED)
        if label_N.device.type != "cpu":
            torch._assert_async(known_N.all())
        elif not known_N.all():
            raise ValueError(
                f"identity {int(label_N[~known_N][0])} is neither 0 (background), 1 … {self.num_identities} "
                f"nor {UNLABELLED} (without identity); number the identities of the training set from 1"
            )


def _occurrence(value_N: Tensor) -> Tensor:
    """How many equal values are before each, such as [0, 0, 1] for [7, 3, 7]."""
    order = torch.argsort(value_N, stable=True)
    ordered = value_N[order]
    first = torch.searchsorted(ordered, ordered)  # where the run of equal values begins
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order)) - first
    return found
