"""Evaluation-oriented distillation for face recognition (Huang et al., CVPR 2022)."""

# Shape legend: B = batch, D = embedding width, P = pairs of the batch, C = pairs of a chunk, K = thresholds.

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses.similarity import full_precision, in_chunks, mean_where, unit_rows


class EKD(nn.Module):
    """Pairs are ranked by both networks against the thresholds of given false positive rates, and ranks are matched.

    Pairs are those above the diagonal of unit embeddings, genuine by label. Of each network the threshold k is the
    impostor similarity at place ⌊n / a_k⌋ in falling order; running values move by ``momentum`` towards the batch's
    first, and rank it then: r(v) = Σ_k σ((v − th_k) / temperature), the exponent within ±50. The terms are the mean
    squares of r_student − r_teacher over the genuine pairs, and over the ``top_k`` impostor pairs of largest student
    similarity. The released weights are 0.02 and 0.01.

    Buffers: ``student_threshold_K``, ``teacher_threshold_K``, 0 at the start, which biases the first hundreds of steps
    as released; they move in training mode alone. Rows of all ranks must be given.

    Args:
        anchors: a_k, the inverse false positive rates.
        top_k: impostor pairs; more than there are takes all.
        temperature: of the ranks.
        momentum: weight of the batch.

    Raises:
        ValueError: a setting outside its range.
    """

    anchor_K: Tensor
    student_threshold_K: Tensor
    teacher_threshold_K: Tensor

    def __init__(
        self, anchors: Sequence[int] = (10, 100, 1_000, 10_000, 100_000, 1_000_000), top_k: int = 2000,
        temperature: float = 0.01, momentum: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        if not anchors or min(anchors) < 1 or top_k < 1 or not 0 < temperature < math.inf or not 0 <= momentum <= 1:
            raise ValueError(
                f"anchors and top_k must be at least 1, temperature above 0 and momentum between 0 and 1, got "
                f"anchors {tuple(anchors)}, top_k {top_k}, temperature {temperature}, momentum {momentum}"
            )
        self.anchors, self.top_k = tuple(anchors), top_k
        self.temperature, self.momentum = temperature, momentum
        self.register_buffer("anchor_K", torch.tensor(self.anchors), persistent=False)
        self.register_buffer("student_threshold_K", torch.zeros(len(self.anchors)))
        self.register_buffer("teacher_threshold_K", torch.zeros(len(self.anchors)))

    def forward(self, student_BD: Tensor, teacher_BD: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
        """(genuine term, impostor term), unweighted, at least float32; 0 with a zero gradient where there is no pair.

        Args:
            student_BD: raw student embeddings; gradient flows, none into a zero row and none through thresholds.
            teacher_BD: raw teacher embeddings of the same images, of any width; no gradient.
            label_B: identities.

        Raises:
            ValueError: numbers of rows differ.
        """
        if not (student_BD.ndim == teacher_BD.ndim == 2 and len(student_BD) == len(teacher_BD) == len(label_B)):
            shapes = f"{tuple(student_BD.shape)}, {tuple(teacher_BD.shape)} and {tuple(label_B.shape)}"
            raise ValueError(f"expected student and teacher (B, D) and labels (B,), got {shapes}")
        with full_precision(student_BD):
            student_BD, teacher_BD = unit_rows(student_BD), unit_rows(teacher_BD.detach())
            first_P, second_P = torch.triu_indices(len(label_B), len(label_B), 1, device=label_B.device)
            student_P = (student_BD @ student_BD.T)[first_P, second_P]
            teacher_P = (teacher_BD @ teacher_BD.T)[first_P, second_P].to(student_P)
            is_genuine_P = label_B[first_P] == label_B[second_P]
            order_P = student_P.detach().masked_fill(is_genuine_P, -math.inf).argsort(descending=True, stable=True)
            with torch.no_grad():
                self._follow(self.student_threshold_K, student_P.detach(), is_genuine_P)
                self._follow(self.teacher_threshold_K, teacher_P, is_genuine_P)
            square_P = (self._rank(student_P, self.student_threshold_K)
                        - self._rank(teacher_P, self.teacher_threshold_K)).square()  # fmt: skip
            hardest_P = order_P[: self.top_k]
            return mean_where(square_P, is_genuine_P), mean_where(square_P[hardest_P], ~is_genuine_P[hardest_P])

    def _follow(self, threshold_K: Tensor, value_P: Tensor, is_genuine_P: Tensor) -> None:
        """Running thresholds of one network; a batch without impostor pairs changes nothing."""
        if not self.training or not len(value_P):
            return
        falling_P = value_P.masked_fill(is_genuine_P, -math.inf).sort(descending=True).values
        impostors = (~is_genuine_P).sum()
        place_K = (impostors // self.anchor_K).minimum(impostors - 1).clamp(min=0)
        found_K = falling_P[place_K].to(threshold_K)
        moved_K = torch.lerp(threshold_K, found_K, self.momentum)
        threshold_K.copy_(torch.where(impostors > 0, moved_K, threshold_K))

    def _rank(self, value_P: Tensor, threshold_K: Tensor) -> Tensor:
        def rank(value_C: Tensor, threshold_K: Tensor) -> Tensor:
            exponent_CK = (value_C[:, None] - threshold_K) / self.temperature
            return exponent_CK.clamp(-50, 50).sigmoid().sum(dim=1)

        # The backward pass ranks once more, when a later batch may have moved the thresholds.
        return in_chunks(len(threshold_K), rank, value_P, whole=(threshold_K.to(value_P, copy=True),))
