"""AdaDistill (Boutros, Štruc and Damer, ECCV 2024): class centres that move as far as student and teacher differ."""

# Shape legend: B = batch, D = embedding width, C = classes.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.margin_softmax import cosines
from losses.similarity import check_pair, full_precision, unit_pair

_LEAST = 1e-6  # of α


class AdaDistill(nn.Module):
    """Class centres that are made of the teacher's embeddings, for a margin softmax of the student.

    For each row in turn: α = clip(cos(s_i, t_i), 1e-6, 1), weighted α' = clip(cos(s_i, t_i) · clip(cos(w_y, t_i), 1e-6,
    1), 1e-6, 1); then w_y ← α w_y + (1 − α) t̂_i. Centres are not made unit again. They have no gradient and no
    optimiser, and begin as N(0, 0.01²).

    Departs from the authors' code: there every rank moves centres of its own, and of several rows of one class an
    arbitrary one wins. Here rows count one after the other, those of one class each seeing the centre as the rows
    before have moved it; given the rows of all ranks in rank order, all ranks have the same centres.

    Args:
        dim: D.
        num_classes: C.
        weighted: α' instead of α.

    Raises:
        ValueError: a size below 1.
    """

    centre_CD: Tensor

    def __init__(self, dim: int, num_classes: int, weighted: bool = True) -> None:
        super().__init__()
        if dim < 1 or num_classes < 1:
            raise ValueError(f"dim and num_classes must be at least 1, got {dim} and {num_classes}")
        self.weighted = weighted
        self.register_buffer("centre_CD", 0.01 * torch.randn(num_classes, dim))

    @torch.no_grad()
    def update(self, student_BD: Tensor, teacher_BD: Tensor, label_B: Tensor) -> Tensor:
        """Moves the centres, before the logits of the same step; returns α of every row, (B,).

        Args:
            student_BD: raw student embeddings, of all ranks.
            teacher_BD: raw teacher embeddings of the same images.
            label_B: their classes.

        Raises:
            ValueError: shapes that do not fit.
        """
        check_pair(student_BD, teacher_BD)
        if teacher_BD.shape[1] != self.centre_CD.shape[1] or label_B.shape != teacher_BD.shape[:1]:
            raise ValueError(
                f"expected embeddings (B, {self.centre_CD.shape[1]}) and labels (B,), got {tuple(teacher_BD.shape)} "
                f"and {tuple(label_B.shape)}"
            )
        with full_precision(student_BD):
            student_BD, teacher_BD = unit_pair(student_BD, teacher_BD)
            alpha_B = (student_BD * teacher_BD).sum(dim=1).clamp(_LEAST, 1).to(self.centre_CD)
            teacher_BD = teacher_BD.to(self.centre_CD)
            # One row after the other: how many rows share a class is known on the device alone, and asking waits.
            moved = []
            for row_1, teacher_1D, alpha_1 in zip(label_B.split(1), teacher_BD.split(1), alpha_B.split(1), strict=True):
                centre_1D = self.centre_CD.index_select(0, row_1)
                if self.weighted:
                    near_1 = F.cosine_similarity(centre_1D, teacher_1D, eps=1e-12).clamp(_LEAST, 1)
                    alpha_1 = (alpha_1 * near_1).clamp(_LEAST, 1)
                self.centre_CD.index_copy_(0, row_1, torch.lerp(teacher_1D, centre_1D, alpha_1))
                moved.append(alpha_1)
        return torch.cat(moved)

    def forward(self, student_BD: Tensor) -> Tensor:
        """(B, C) cosines to the current centres, for the logits of a margin softmax; gradient to the student alone."""
        if student_BD.ndim != 2 or student_BD.shape[1] != self.centre_CD.shape[1]:
            raise ValueError(f"expected embeddings (B, {self.centre_CD.shape[1]}), got {tuple(student_BD.shape)}")
        return cosines(student_BD, self.centre_CD)
