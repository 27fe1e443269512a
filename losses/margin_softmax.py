"""Margin softmax: ArcFace (Deng et al., CVPR 2019), CosFace (Wang et al., CVPR 2018), AdaFace (Kim et al., CVPR 2022).

All map cosines between embeddings and class centres to logits; cross-entropy comes after. Everything is at least
float32: a cosine near 1 in half precision has a step of 5e-4, and the angle an infinite slope there.
"""

# Shape legend: B = batch, D = embedding width, C = classes.

import math
from typing import Literal

import torch
from torch import Tensor, nn

from losses.similarity import at_least_float32, full_precision

Gradient = Literal["ste", "exact"]
_LEAST_SINE2 = 1e-7  # of an angle: below, the slope of the sine would be infinite
_LEAST_ANGLE = 1e-3


def cosines(embedding_BD: Tensor, weight_CD: Tensor) -> Tensor:
    """(B, C) cosines of embeddings and class centres, clipped to [-1, 1]; gradient flows to both.

    >>> cosines(torch.tensor([[2.0, 0.0]]), torch.eye(2)).tolist()
    [[1.0, 0.0]]
    """
    with full_precision(embedding_BD):
        embedding_BD, weight_CD = at_least_float32(embedding_BD), at_least_float32(weight_CD)
        common = torch.promote_types(embedding_BD.dtype, weight_CD.dtype)
        embedding_BD, weight_CD = embedding_BD.to(common), weight_CD.to(common)
        # Divided after the product: unit rows of a million centres would be another two gigabytes.
        inner_BC = embedding_BD @ weight_CD.T
        return (inner_BC * _inverse_norms(embedding_BD)[:, None] * _inverse_norms(weight_CD)).clamp(-1, 1)


def arcface_logits(
    cosine_BC: Tensor, label_B: Tensor, margin: float | Tensor = 0.5, scale: float = 64.0, grad: Gradient = "ste",
    monotone: bool = False,
) -> Tensor:  # fmt: skip
    """scale · cos θ, of the label's class scale · cos(θ + margin), by cos θ cos m − √max(1 − cos² θ, 1e-7) sin m.

    Above θ = π − m the label's logit rises again with the angle; with ``monotone`` it is cos θ − m sin m there, as in
    older code.

    Args:
        cosine_BC: cosines, see :func:`cosines`; gradient flows.
        label_B: class of every row, -1 = none of these: no margin.
        margin: m, radians; a tensor (B,) gives every row its own.
        scale: s.
        grad: "exact" is the true derivative; "ste" passes the gradient straight through the margin, as today's public
            code does, whose label's logit has the slope ``scale`` instead of scale · sin(θ + m) / sin θ.

    Returns:
        (B, C) logits, at least float32.

    Raises:
        ValueError: shapes that do not fit, or another ``grad``.

    >>> arcface_logits(torch.tensor([[0.0, 0.5]]), torch.tensor([0]), margin=math.pi / 6, scale=2.0).tolist()
    [[-1.0, 1.0]]
    """
    target_B = _target(cosine_BC, label_B, grad)
    with full_precision(cosine_BC):
        cos_m, sin_m, m = _trigonometry(margin, target_B)
        sine_B = (1 - target_B.square()).clamp(min=_LEAST_SINE2).sqrt()
        moved_B = target_B * cos_m - sine_B * sin_m
        if monotone:
            # cos(π − m) = −cos m
            moved_B = torch.where(target_B > -cos_m, moved_B, target_B - m * sin_m)
        return _logits(cosine_BC, label_B, target_B, moved_B, scale, grad)


def cosface_logits(
    cosine_BC: Tensor, label_B: Tensor, margin: float | Tensor = 0.4, scale: float = 64.0, grad: Gradient = "ste"
) -> Tensor:
    """scale · cos θ, of the label's class scale · (cos θ − margin); ``grad`` makes no difference.

    Args, Returns, Raises: as :func:`arcface_logits`.

    >>> cosface_logits(torch.tensor([[0.5, 0.5]]), torch.tensor([1]), margin=0.25, scale=4.0).tolist()
    [[2.0, 1.0]]
    """
    target_B = _target(cosine_BC, label_B, grad)
    return _logits(cosine_BC, label_B, target_B, target_B - margin, scale, grad)


class AdaFace(nn.Module):
    """AdaFace: the margin follows the norm of the embedding, which stands for the quality of the image.

    q = clip(h (‖x‖ − μ) / (σ + 1e-3), −1, 1); the label's logit is scale · (cos(θ − m q) − (m + m q)), where the angle
    is kept in [1e-3, π − 1e-3]. μ and σ are running values of the norms, clipped to [1e-3, 100]: in training mode they
    take the batch (unbiased deviation) by ``momentum`` before they are used.

    Buffers: ``norm_mean`` (20 at the start) and ``norm_std`` (100). Rows of all ranks must be given.

    Args:
        margin: m.
        h: how much of the distribution is spread over the margins.
        scale: s.
        momentum: weight of the new batch.
        grad: as of :func:`arcface_logits`.

    >>> AdaFace()(torch.tensor([[0.0, 0.5]]), torch.tensor([20.0]), torch.tensor([1])).shape
    torch.Size([1, 2])
    """

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(
        self, margin: float = 0.4, h: float = 0.333, scale: float = 64.0, momentum: float = 0.01,
        grad: Gradient = "ste",
    ) -> None:  # fmt: skip
        super().__init__()
        if grad not in ("ste", "exact"):
            raise ValueError(f"grad must be ste or exact, got {grad!r}")
        self.margin, self.h, self.scale, self.momentum, self.grad = margin, h, scale, momentum, grad
        self.register_buffer("norm_mean", torch.full((), 20.0))
        self.register_buffer("norm_std", torch.full((), 100.0))

    def forward(self, cosine_BC: Tensor, norm_B: Tensor, label_B: Tensor) -> Tensor:
        """(B, C) logits, already scaled; gradient to the cosines alone.

        Raises:
            ValueError: shapes that do not fit.
        """
        target_B = _target(cosine_BC, label_B, self.grad)
        if norm_B.shape != label_B.shape:
            raise ValueError(f"expected one norm for each of {len(label_B)} rows, got {tuple(norm_B.shape)}")
        with full_precision(cosine_BC):
            quality_B = self._quality(at_least_float32(norm_B.detach())).to(target_B)
            angle_B = -self.margin * quality_B
            sine_B = (1 - target_B.square()).clamp(min=_LEAST_SINE2).sqrt()
            turned_B = target_B * angle_B.cos() - sine_B * angle_B.sin()
            # The angle itself is needed to see where it leaves its range; there the logit is constant.
            whole_B = target_B.detach().clamp(-1, 1).acos() + angle_B
            kept_B = whole_B.clamp(_LEAST_ANGLE, math.pi - _LEAST_ANGLE)
            turned_B = torch.where(whole_B == kept_B, turned_B, kept_B.cos())
            moved_B = turned_B - (self.margin + self.margin * quality_B)
            return _logits(cosine_BC, label_B, target_B, moved_B, self.scale, self.grad)

    @torch.no_grad()
    def _quality(self, norm_B: Tensor) -> Tensor:
        norm_B = norm_B.clamp(1e-3, 100)
        if self.training and len(norm_B) > 1:  # one norm has no deviation
            self.norm_mean.lerp_(norm_B.mean().to(self.norm_mean), self.momentum)
            self.norm_std.lerp_(norm_B.std().to(self.norm_std), self.momentum)
        return (self.h * (norm_B - self.norm_mean) / (self.norm_std + 1e-3)).clamp(-1, 1)


def _inverse_norms(x_ND: Tensor) -> Tensor:
    """1 / ‖x‖ of every row, 0 of a zero row, into which no gradient flows."""
    norm_N = torch.linalg.vector_norm(x_ND, dim=1)
    return torch.where(norm_N > 0, 1 / torch.where(norm_N > 0, norm_N, 1.0), 0.0)


def _target(cosine_BC: Tensor, label_B: Tensor, grad: str) -> Tensor:
    """(B,) the label's cosine, of label -1 that of class 0."""
    if cosine_BC.ndim != 2 or label_B.shape != cosine_BC.shape[:1]:
        raise ValueError(
            f"expected cosines (B, C) and labels (B,), got {tuple(cosine_BC.shape)} and {tuple(label_B.shape)}"
        )
    if grad not in ("ste", "exact"):
        raise ValueError(f"grad must be ste or exact, got {grad!r}")
    return at_least_float32(cosine_BC).gather(1, label_B.clamp(min=0)[:, None])[:, 0]


def _logits(cosine_BC: Tensor, label_B: Tensor, target_B: Tensor, moved_B: Tensor, scale: float, grad: str) -> Tensor:
    """All cosines times ``scale``, the labels' replaced by their moved ones."""
    if grad == "ste":
        moved_B = target_B + (moved_B - target_B).detach()
    moved_B = torch.where(label_B >= 0, moved_B, target_B)
    return at_least_float32(cosine_BC).scatter(1, label_B.clamp(min=0)[:, None], moved_B[:, None]) * scale


def _trigonometry(margin: float | Tensor, like: Tensor) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
    """Cosine and sine of the margin, and the margin, made in float64: a rounded angle is seen in the logits."""
    if isinstance(margin, Tensor):
        exact = margin.double()
        return exact.cos().to(like), exact.sin().to(like), margin.to(like)
    return math.cos(margin), math.sin(margin), margin
