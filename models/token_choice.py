"""Which tokens of a vision transformer go on: how many, by what score, and how the choice has a gradient (SUReID)."""

# Shape legend: B = images, N = image tokens, C = width of a token.

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.network import at_least_float32

Rounding = Literal["floor", "round", "ceil"]


def keep_counts(num_tokens: int, keep_ratio: float, rounding: Rounding = "floor") -> tuple[int, int, int]:
    """How many of ``num_tokens`` image tokens are left after each stage: N·p, N·p², N·p³.

    Always of the original N, never of what the stage before left; at least 1. Rounding down is DynamicViT's.

    Raises:
        ValueError: keep_ratio outside (0, 1], or no tokens.

    >>> keep_counts(128, 0.7)
    (89, 62, 43)
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be above 0 and at most 1, got {keep_ratio}")
    if num_tokens < 1:
        raise ValueError(f"there must be at least one image token, got {num_tokens}")
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be one of {', '.join(get_args(Rounding))}, got {rounding!r}")
    # The guard keeps a product such as 0.7 · 10 = 7.000…1 or 6.999…9 at the whole number it means.
    whole = {"floor": lambda x: math.floor(x + 1e-9), "round": round, "ceil": lambda x: math.ceil(x - 1e-9)}[rounding]
    return tuple(max(1, whole(num_tokens * keep_ratio**stage)) for stage in (1, 2, 3))


class TokenPredictor(nn.Module):
    """Log-probabilities of dropping and keeping every image token (eq. 1), one of these before each stage.

    ``lg`` (DynamicViT): half of the channels see the token alone, half the mean over the tokens that are still there.
    ``mlp``: eq. 1 to the letter, a plain MLP on the masked tokens.
    """

    def __init__(self, width: int, kind: Literal["lg", "mlp"] = "lg"):
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"the width of a token predictor must be divisible by 4, got {width}")
        if kind not in ("lg", "mlp"):
            raise ValueError(f"a token predictor is lg or mlp, got {kind!r}")
        self.kind = kind
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.input = nn.Linear(width, width)
        self.output = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, 2),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens_BNC: Tensor, kept_BN: Tensor | None = None) -> Tensor:
        """(B, N, 2) log-probabilities, float32 at least; ``kept_BN`` = the decisions so far, None = all are there.

        Column 1 is to keep, as in the paper; networks of DynamicViT have it in column 0.
        An image without any kept token has a global mean of 0 (the public code divides by zero there).
        """
        if self.kind == "mlp" and kept_BN is not None:
            tokens_BNC = tokens_BNC * kept_BN[:, :, None].to(tokens_BNC.dtype)
        hidden_BNC = F.gelu(self.input(self.norm(tokens_BNC)))
        if self.kind == "lg":
            local, shared = hidden_BNC.chunk(2, dim=2)
            if kept_BN is None:
                mean = shared.mean(dim=1, keepdim=True)
            else:
                weight_BN1 = kept_BN[:, :, None].to(shared.dtype)
                mean = (shared * weight_BN1).sum(dim=1, keepdim=True) / weight_BN1.sum(dim=1, keepdim=True).clamp_min(
                    1e-6
                )
            hidden_BNC = torch.cat([local, mean.expand_as(shared)], dim=2)
        logits_BN2 = self.output(hidden_BNC)
        return F.log_softmax(at_least_float32(logits_BN2), dim=2)


def gumbel_keep(log_probabilities_BN2: Tensor, noise_BN2: Tensor, temperature: float = 1.0, column: int = 1) -> Tensor:
    """Hard decisions, 0 or 1, with the gradient of the soft sample (eq. 2): (B, N).

    The sample is softmax((log π + g) / τ); the value is one-hot of its larger part.

    >>> log_pi = torch.tensor([[[0.4, 0.6], [0.6, 0.4]]]).log()
    >>> gumbel_keep(log_pi, torch.zeros(1, 2, 2)).tolist()
    [[1.0, 0.0]]
    """
    soft_BN2 = ((log_probabilities_BN2 + noise_BN2) / temperature).softmax(dim=2)
    soft_BN = soft_BN2[:, :, column]
    hard_BN = (soft_BN2.argmax(dim=2) == column).to(soft_BN.dtype)
    return hard_BN + (soft_BN - soft_BN.detach())


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Gumbel(0, 1) noise from uniform numbers in [0, 1): −log(−log u), finite at 0 and next to 1.

    >>> gumbel_noise(torch.tensor([0.5])).item()
    0.3665129244327545
    """
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
