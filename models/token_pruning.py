"""Vision transformer that drops tokens: SUReID's hierarchical token sparsification (Song and Liu, arXiv 2401.07469).

    image → patches → blocks 1-3 → drop → blocks 4-6 → drop → blocks 7-9 → drop → blocks 10-12 → LN → class token f

Before blocks 4, 7 and 10 a small predictor says which image tokens to keep; p, p², p³ of them are left. In training
nothing is removed: a dropped token is masked out of the attention of all others (eq. 4 to 6), so that the decision
has a gradient. At inference the tokens are really removed, with counts that depend on p alone, so that computation
drops and shapes are static.
"""

# Shape legend: B = images, N = tokens (with the class token, index 0, where attention is meant), H = heads,
# R = rows of attention, S = stages, C = width of a token, D = width of the class token = C, K = classes.

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from models.embedder import check_backbone

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


def masked_softmax(scores_BHNN: Tensor, policy_BN: Tensor, eps: float = 1e-6) -> Tensor:
    """Attention weights in which dropped tokens influence nobody but themselves (eq. 4 to 6).

    G_ij = 1 if i = j else policy_j, and A~_ij = exp(A_ij) G_ij / Σ_k exp(A_ik) G_ik. Departs from eq. 6 as printed,
    whose denominator carries G_ij: it would cancel and mask nothing.

    With ``eps`` > 0 the guarded form of DynamicViT, for training: (e + eps/N) / (Σ e + eps) with e relative to the
    largest score of *all* keys. Values and gradients are bounded, but a dropped key that exceeds all kept ones by
    more than about 14 makes the row nearly uniform. With ``eps`` = 0 the exact form, relative to the largest
    *allowed* score.

    Args:
        scores_BHNN: scaled products of queries and keys; row r is token r, so that fewer rows than keys are the
            first ones (one row: the class token's attention). Gradient flows.
        policy_BN: 1 = kept, 0 = dropped, for every key; gradient flows (multiplicatively: a mask inside the
            exponent would have an infinite one).
        eps: the guard.

    Returns:
        Weights of the shape of the scores, float32 at least; rows sum to 1.

    Raises:
        ValueError: shapes do not fit, or eps is negative.

    >>> masked_softmax(torch.zeros(1, 1, 3, 3), torch.tensor([[1.0, 1.0, 0.0]]), eps=0.0)[0, 0].tolist()
    [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.3333333432674408, 0.3333333432674408, 0.3333333432674408]]
    """
    rows, keys = scores_BHNN.shape[-2:] if scores_BHNN.ndim == 4 else (0, 0)
    if not 0 < rows <= keys or policy_BN.shape != (len(scores_BHNN), keys):
        raise ValueError(
            f"need scores (images, heads, rows, tokens) and a policy (images, tokens), "
            f"got {tuple(scores_BHNN.shape)} and {tuple(policy_BN.shape)}"
        )
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0, got {eps}")
    scores = _at_least_float32(scores_BHNN)
    itself_RN = torch.eye(rows, keys, dtype=torch.bool, device=scores.device)
    allowed_B1RN = torch.where(itself_RN, 1.0, policy_BN.to(scores.dtype)[:, None, None, :])
    if eps:
        weight = (scores - scores.detach().amax(dim=-1, keepdim=True)).exp() * allowed_B1RN
        return (weight + eps / keys) / (weight.sum(dim=-1, keepdim=True) + eps)
    largest = scores.detach().masked_fill(allowed_B1RN == 0, -torch.inf).amax(dim=-1, keepdim=True)
    # A dropped key may exceed every allowed one by any amount; its exponential must stay finite to be multiplied by 0.
    weight = (scores - largest).clamp_max(80.0).exp() * allowed_B1RN
    return weight / weight.sum(dim=-1, keepdim=True)


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
        return F.log_softmax(_at_least_float32(logits_BN2), dim=2)


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


class PolicyAttention(Attention):
    """timm's attention that takes a policy (B, N) of kept tokens through ``attn_mask``; without one it is fused."""

    guard: float = 1e-6  # eps of masked_softmax

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        query, key, value = self.heads(x)
        if attn_mask is None:
            mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        else:
            weight = masked_softmax(query * self.scale @ key.transpose(2, 3), attn_mask, self.guard)
            mixed = weight.to(value.dtype) @ value
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, N, head width) each."""
        batch, tokens, _ = x.shape
        return self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def of_class_token(self, x: Tensor, policy_BN: Tensor | None) -> Tensor:
        """Mean over heads of the class token's attention to all tokens (eq. 7): (B, N)."""
        query, key, _ = self.heads(x)
        score_BH1N = query[:, :, :1] * self.scale @ key.transpose(2, 3)
        if policy_BN is None:
            return score_BH1N[:, :, 0].softmax(dim=2).mean(dim=1)
        return masked_softmax(score_BH1N, policy_BN, self.guard)[:, :, 0].mean(dim=1)


class OverlappingPatches(PatchEmbed):
    """timm's patches, a new one every ``stride`` pixels (TransReID's sliding window).

    Pixels at the right and lower edge that no whole patch reaches are not seen, as in TransReID.
    """

    def __init__(self, *args: Any, stride: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.proj.stride = (stride, stride)
        sizes = zip(self.img_size, self.patch_size, strict=True)
        self.grid_size = tuple((size - patch) // stride + 1 for size, patch in sizes)
        self.num_patches = math.prod(self.grid_size)


@dataclass(frozen=True, kw_only=True)
class PrunedViTConfig:
    """Everything needed to build a :class:`PrunedViT` again; stored beside its weights as JSON."""

    backbone: str = "deit_small_patch16_224"  # a plain vision transformer of timm
    image_size: tuple[int, int] = (256, 128)  # height and width in pixels, whole patches
    patch_stride: int = 0  # pixels from patch to patch; 0 = side by side
    patch_size: int = 0  # pixels; this and the next three: 0 = the network's own
    width: int = 0  # channels of a token
    heads: int = 0
    depth: int = 0
    cameras: int = 0  # > 0 adds a vector of the image's camera to every token (TransReID's SIE)
    camera_weight: float = 3.0  # λ of that vector
    pruning: bool = True
    stages: tuple[int, int, int] = (3, 6, 9)  # tokens are dropped before these blocks, counted from 0
    keep_ratio: float = 0.7  # p
    rounding: Rounding = "floor"
    predictor: Literal["lg", "mlp"] = "lg"
    keep_column: Literal[1, 0] = 1  # of the predictor's output; DynamicViT's weights need 0
    inference: Literal["topk", "threshold"] = "topk"  # threshold: π_keep > 1/2, another count for every image
    token_order: Literal["position", "score"] = "position"  # of the kept tokens; the class token does not see it
    # What tokens are chosen by at inference. Controls for the predictor: the class token's attention in the block
    # before, and chance (the same positions of every image).
    selection: Literal["predictor", "attention", "random"] = "predictor"
    selection_seed: int = 0  # of "random"
    attention_scale: Literal["head", "width"] = "head"  # 1/√(C/H), or 1/√C as eq. 4 prints
    softmax_guard: float = 1e-6  # of masked attention in training; 0 = exact
    reweight: Literal["post", "pre_last", "pool", "off"] = "post"  # eq. 7, 8
    reweight_at_inference: bool = False  # departs from the paper, where it is used in training alone
    neck: bool = True  # batch norm (its bias frozen at 0) between class token and classifier
    embed_after_neck: bool = False  # the embedding that is searched with
    pixels: Literal["half", "imagenet"] = "half"  # mean and deviation of the input: 0.5, or ImageNet's
    num_classes: int = 0  # > 0 adds the training classifier, which is not part of the retrieval model

    def __post_init__(self):
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "stages", tuple(self.stages))
        counts = self.patch_stride, self.patch_size, self.width, self.heads, self.depth, self.cameras, self.num_classes
        if min(self.image_size) < 1 or min(counts) < 0:
            raise ValueError(f"sizes must be positive, got {asdict(self)}")
        if not 0 <= self.camera_weight < math.inf:
            raise ValueError(f"camera_weight must be at least 0, got {self.camera_weight}")
        if not 0 <= self.softmax_guard < math.inf:
            raise ValueError(f"softmax_guard must be at least 0, got {self.softmax_guard}")
        if len(self.stages) != 3:
            raise ValueError(f"stages must be three blocks, got {self.stages}")
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                known = ", ".join(map(str, get_args(kind)))
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        keep_counts(1, self.keep_ratio)
        if self.inference == "threshold" and self.selection != "predictor":
            raise ValueError(f"inference=threshold needs selection=predictor, got {self.selection}")


class Trained(NamedTuple):
    """What losses see of a forward pass in training."""

    feature_BD: Tensor  # class token after the final LayerNorm, before the neck
    masks_BSN: Tensor | None  # cumulative decisions of the image tokens; None without pruning


class _Tokens(NamedTuple):
    """What a choice of tokens may look at: class token and image tokens, and those before the last block."""

    now_BNC: Tensor
    before_BNC: Tensor
    place_BN: Tensor  # of the image tokens in the original grid, row by row
    policy_BN: Tensor | None = None  # which keys the last block saw; None = all


class PrunedViT(nn.Module):
    """A plain vision transformer with three stages of token pruning, a neck and a classifier.

    ``forward`` maps normalised images (B, 3, H, W) to raw embeddings (B, D), as at inference: tokens are really
    removed and nothing is random. :meth:`trained` is the forward pass of training. A network with cameras is also
    given the camera of every image, 0 … cameras - 1; where it is unknown (None), the mean of their vectors is used.
    """

    resize = "bicubic"  # to image_size, with anti-aliasing

    def __init__(self, config: PrunedViTConfig, pretrained: bool = False, weights: str = "", drop_path: float = 0.0,
                 resize: Literal["bicubic", "bilinear"] = "bicubic"):  # fmt: skip
        super().__init__()
        self.config = config
        self.backbone = _backbone(config, drop_path)
        if pretrained or weights:
            load_pretrained(self.backbone, config, weights, resize)
        width, depth = self.backbone.embed_dim, len(self.backbone.blocks)
        self.num_tokens = self.backbone.patch_embed.num_patches
        for block in self.backbone.blocks:
            block.attn.guard = config.softmax_guard
            if config.attention_scale == "width":
                block.attn.scale = width**-0.5
        self.cameras = None
        if config.cameras:
            self.cameras = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.cameras, width), std=0.02))
        self.predictors = self.reweight = None
        if config.pruning:
            # pre_last reweights by the attention of the block before the last: to the same tokens.
            end = depth - (config.reweight == "pre_last")
            if not 0 < config.stages[0] < config.stages[1] < config.stages[2] < end:
                raise ValueError(f"stages must rise and lie between 1 and {end - 1}, got {config.stages}")
            self.predictors = nn.ModuleList(TokenPredictor(width, config.predictor) for _ in config.stages)
            if config.reweight != "off":
                self.reweight = nn.Parameter(torch.tensor(0.5))  # λ of eq. 8
        self.neck = self.classifier = None
        if config.neck:
            self.neck = nn.BatchNorm1d(width)
            self.neck.bias.requires_grad_(False)
        if config.num_classes:
            self.classifier = nn.Linear(width, config.num_classes, bias=False)
            nn.init.normal_(self.classifier.weight, std=0.001)

    @property
    def architecture(self) -> tuple[str, ...]:
        """How the network is built, for whoever rebuilds it from its stored weights."""
        config = self.config
        lines = ["timm VisionTransformer without head; tokens: class token, then the patches row by row"]
        if config.patch_stride:
            lines.append(f"a patch every {config.patch_stride} pixels: patches overlap")
        if config.cameras:
            lines.append(
                f"{config.camera_weight:g} × a row of tensor cameras is added to every token after the position "
                f"embedding: the image's camera, in rising order of the training set's numbers; the mean row if unknown"
            )
        if config.attention_scale == "width":
            lines.append("attention scores are divided by the root of the width, not of the head's width")
        if config.pruning:
            body = "second half of the channels averaged over tokens, " if config.predictor == "lg" else ""
            which = (
                f"the {', '.join(map(str, self.counts))} image tokens of the largest"
                if config.inference == "topk"
                else "those above 1/2 of the"
            )
            lines += [
                f"before blocks {', '.join(map(str, config.stages))} (from 0), on the image tokens: LayerNorm(1e-5), "
                f"Linear, GELU, {body}Linear, GELU, Linear, GELU, Linear, softmax (tensors predictors.0 to .2)",
                f"{which} output {config.keep_column} go on, and the class token",
            ]
            if config.selection != "predictor":
                seed = f" of seed {config.selection_seed}" if config.selection == "random" else ""
                lines.append(f"not as trained: tokens are not chosen by that output but by {config.selection}{seed}")
            if config.reweight_at_inference:
                lines.append(f"tokens reweighted by the class token's attention: {config.reweight} (tensor reweight)")
        lines.append(
            "embedding: class token after the final LayerNorm" + ", then the batch norm neck" * config.embed_after_neck
        )
        return tuple(lines)

    @property
    def pixels(self) -> str:
        """Mean and deviation of the input."""
        return self.config.pixels

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many image tokens are left after each stage."""
        return keep_counts(self.num_tokens, self.config.keep_ratio, self.config.rounding)

    def forward(self, images_BCHW: Tensor, camera_B: Tensor | None = None) -> Tensor:
        if not self.config.pruning:
            feature_BD = self._plain(images_BCHW, camera_B)
        elif self.config.inference == "threshold":
            feature_BD = self.masked(images_BCHW, camera_B)[0]
        else:
            feature_BD = self.gathered(images_BCHW, camera_B)[0]
        return self.after_neck(feature_BD) if self.config.embed_after_neck else _at_least_float32(feature_BD)

    def trained(
        self, images_BCHW: Tensor, noise_BSN2: Tensor | None = None, temperature: float = 1.0,
        camera_B: Tensor | None = None,
    ) -> Trained:  # fmt: skip
        """The forward pass of training: all tokens through all blocks, dropped ones masked.

        Args:
            images_BCHW: normalised.
            noise_BSN2: Gumbel noise of every stage, image token and column; not needed without pruning.
            temperature: τ of the Gumbel softmax.
            camera_B: of every image, for a network with cameras.
        """
        if not self.config.pruning:
            return Trained(self._plain(images_BCHW, camera_B), None)

        def decide(stage: int, tokens: _Tokens, kept_BN: Tensor) -> Tensor:
            log_pi_BN2 = self.predictors[stage](tokens.now_BNC[:, 1:], kept_BN)
            return gumbel_keep(log_pi_BN2, noise_BSN2[:, stage], temperature, self.config.keep_column) * kept_BN

        return Trained(*self._masked(images_BCHW, camera_B, decide, self.config.reweight))

    def masked(self, images_BCHW: Tensor, camera_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inference with masks instead of removal: (class token after LN (B, D), masks (B, S, N)).

        Equal to :meth:`gathered`, as costly as no pruning; and how ``inference="threshold"`` is computed.
        """

        def decide(stage: int, tokens: _Tokens, kept_BN: Tensor) -> Tensor:
            score_BN = self._score(stage, tokens, kept_BN)
            if self.config.inference == "threshold":
                return (score_BN > math.log(0.5)) * kept_BN
            chosen_BK = score_BN.masked_fill(kept_BN == 0, -torch.inf).topk(self.counts[stage], dim=1).indices
            return torch.zeros_like(kept_BN).scatter(1, chosen_BK, 1.0)

        with _guard(self.backbone, 0.0):
            return self._masked(images_BCHW, camera_B, decide, self._reweight_at_inference)

    def gathered(self, images_BCHW: Tensor, camera_B: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Inference with real removal: (class token after LN (B, D), positions of the kept tokens of every stage).

        Positions are those of the original grid, row by row: (B, count of the stage) each.
        """
        x_BNC = self._tokens(images_BCHW, camera_B)
        before_BNC = x_BNC
        place_BN = torch.arange(self.num_tokens, device=x_BNC.device).expand(len(x_BNC), -1)
        places = []
        reweighting = self._reweight_at_inference
        for number in range(len(self.backbone.blocks)):
            if number in self.config.stages:
                stage = self.config.stages.index(number)
                score_BN = self._score(stage, _Tokens(x_BNC, before_BNC, place_BN))
                kept_BK = score_BN.topk(self.counts[stage], dim=1).indices
                if self.config.token_order == "position":
                    kept_BK = kept_BK.sort(dim=1).values
                kept_BKC = kept_BK[:, :, None].expand(-1, -1, x_BNC.shape[2])
                x_BNC = torch.cat([x_BNC[:, :1], x_BNC[:, 1:].gather(1, kept_BKC)], dim=1)
                place_BN = place_BN.gather(1, kept_BK)
                places.append(place_BN)
            before_BNC, x_BNC = x_BNC, self._run(number, x_BNC, None, reweighting)
        return self.backbone.norm(x_BNC[:, 0]), places

    @property
    def _reweight_at_inference(self) -> str:
        return self.config.reweight if self.config.reweight_at_inference else "off"

    def _masked(
        self, images_BCHW: Tensor, camera_B: Tensor | None, decide: Callable, reweight: str
    ) -> tuple[Tensor, Tensor]:
        """All tokens through all blocks; ``decide(stage, tokens, kept)`` gives the next cumulative mask."""
        x_BNC = self._tokens(images_BCHW, camera_B)
        kept_BN, policy_BN, masks = x_BNC.new_ones(len(x_BNC), self.num_tokens), None, []
        before_BNC, place_BN = x_BNC, torch.arange(self.num_tokens, device=x_BNC.device).expand(len(x_BNC), -1)
        for number in range(len(self.backbone.blocks)):
            if number in self.config.stages:
                stage = self.config.stages.index(number)
                kept_BN = decide(stage, _Tokens(x_BNC, before_BNC, place_BN, policy_BN), kept_BN)
                policy_BN = torch.cat([kept_BN.new_ones(len(kept_BN), 1), kept_BN], dim=1)
                masks.append(kept_BN)
            before_BNC, x_BNC = x_BNC, self._run(number, x_BNC, policy_BN, reweight)
        return self.backbone.norm(x_BNC[:, 0]), torch.stack(masks, dim=1)

    def _score(self, stage: int, tokens: _Tokens, kept_BN: Tensor | None = None) -> Tensor:
        """How much every image token is worth keeping, for the choice at inference: (B, N)."""
        config = self.config
        if config.selection == "random":
            chance_N = torch.from_numpy(np.random.default_rng(config.selection_seed).random(self.num_tokens))
            return chance_N.to(tokens.now_BNC.device, torch.float32)[tokens.place_BN]
        if config.selection == "attention":
            block = self.backbone.blocks[config.stages[stage] - 1]
            return block.attn.of_class_token(block.norm1(tokens.before_BNC), tokens.policy_BN)[:, 1:]
        return self.predictors[stage](tokens.now_BNC[:, 1:], kept_BN)[:, :, config.keep_column]

    def _run(self, number: int, x_BNC: Tensor, policy_BN: Tensor | None, reweight: str) -> Tensor:
        """One block, and the reweighting of image tokens by the class token's attention (eq. 8) where it belongs.

        Departs from eq. 8 as printed, concat(x_class · Attn × x_image), whose shapes do not fit: read as
        x + λ · [x_class ; a ⊙ x_image]. ``post`` (after the last block) is what the paper describes; the final
        LayerNorm then removes it from the class token. ``pre_last`` and ``pool`` do change the class token.
        """
        block, last = self.backbone.blocks[number], len(self.backbone.blocks) - 1
        out_BNC = block(x_BNC, attn_mask=policy_BN)
        if reweight == "off" or number != (last - 1 if reweight == "pre_last" else last):
            return out_BNC
        attention_BN = block.attn.of_class_token(block.norm1(x_BNC), policy_BN)
        class_B1C, image_BNC = out_BNC[:, :1], out_BNC[:, 1:]
        weighted_BNC = attention_BN[:, 1:, None] * image_BNC
        if reweight == "pool":
            return torch.cat([class_B1C + self.reweight * weighted_BNC.sum(dim=1, keepdim=True), image_BNC], dim=1)
        return out_BNC + self.reweight * torch.cat([class_B1C, weighted_BNC], dim=1)

    def _plain(self, images_BCHW: Tensor, camera_B: Tensor | None) -> Tensor:
        x_BNC = self._tokens(images_BCHW, camera_B)
        for block in self.backbone.blocks:
            x_BNC = block(x_BNC)
        return self.backbone.norm(x_BNC[:, 0])

    def _tokens(self, images_BCHW: Tensor, camera_B: Tensor | None = None) -> Tensor:
        net = self.backbone
        x_BNC = net._pos_embed(net.patch_embed(images_BCHW))
        if self.cameras is not None:
            camera_BC = self.cameras.mean(dim=0, keepdim=True) if camera_B is None else self.cameras[camera_B]
            x_BNC = x_BNC + self.config.camera_weight * camera_BC[:, None]
        return net.norm_pre(net.patch_drop(x_BNC))

    def after_neck(self, feature_BD: Tensor) -> Tensor:
        """What the classifier sees of class tokens: of all ranks, whose batch statistics belong together."""
        # In float32 also under autocast: an embedding rounded to bfloat16 has other neighbours.
        with torch.autocast(feature_BD.device.type, enabled=False):
            feature_BD = _at_least_float32(feature_BD)
            return feature_BD if self.neck is None else self.neck(feature_BD)


def ideal_macs(num_tokens: int, width: int, depth: int, patch_pixels: int, stages: tuple[int, ...] = (),
               counts: tuple[int, ...] = (), predictors: bool = True) -> int:  # fmt: skip
    """Multiply-accumulates of one image: patch embedding, blocks 12 n C² + 2 n² C, predictors.

    Args:
        num_tokens: image tokens before any pruning; n counts the class token too.
        width: C.
        depth: blocks.
        patch_pixels: numbers of one patch, 3 · 16 · 16.
        stages: blocks before which tokens are dropped, from 0; empty = no pruning.
        counts: image tokens left after each stage.
        predictors: whether their cost is counted.

    >>> ideal_macs(128, 384, 12, 768, (3, 6, 9), keep_counts(128, 0.7)) / 1e9
    1.905807168
    """
    total, tokens = num_tokens * patch_pixels * width, num_tokens
    for block in range(depth):
        if block in stages:
            if predictors:
                total += tokens * (width**2 + width**2 // 2 + width**2 // 8 + width // 2)
            tokens = counts[stages.index(block)]
        total += 12 * (tokens + 1) * width**2 + 2 * (tokens + 1) ** 2 * width
    return total


def load_pretrained(
    net: VisionTransformer, config: PrunedViTConfig, file: str = "", resize: Literal["bicubic", "bilinear"] = "bicubic"
) -> None:
    """Puts timm's weights of the network, or those of a file of the same layout, into a network of another size.

    The position embedding is resized, the class token's row left alone. Distilled DeiT weights fit the plain
    network: the distillation token, its head and its row of the position embedding are left out.

    Args:
        net: receives the weights.
        config: its configuration; one that changes patches or widths has no pretrained weights.
        file: a local .safetensors or .pth file; empty = downloaded by timm.
        resize: of the position embedding. timm's is bicubic with anti-aliasing, TransReID's bilinear.

    Raises:
        ValueError: the network's sizes are not those of the weights, or the file cannot be read.
    """
    changed = [n for n in ("patch_size", "width", "heads", "depth") if getattr(config, n)]
    if changed and not file:
        raise ValueError(f"there are no pretrained weights for another {', '.join(changed)}; set pretrained to false")
    if file:
        try:
            weights = timm.models.load_state_dict(file, use_ema=False, weights_only=True)
        except Exception as error:  # zip, pickle, safetensors and OS errors alike mean there are no weights
            raise ValueError(f"weights {file} cannot be read: {(str(error) or repr(error)).splitlines()[0]}") from error
    else:
        weights = timm.create_model(config.backbone, pretrained=True, num_classes=0).state_dict()
    distilled = "dist_token" in weights
    weights = {k: v for k, v in weights.items() if not k.startswith(("head", "dist_token"))}
    position_1NC, wanted = weights.get("pos_embed"), net.state_dict()
    if position_1NC is None or set(weights) != set(wanted):
        odd = sorted(set(weights) ^ set(wanted))
        raise ValueError(f"weights {file or config.backbone} do not fit: {len(odd)} tensors differ, first {odd[0]}")
    if distilled:
        position_1NC = torch.cat([position_1NC[:, :1], position_1NC[:, 2:]], dim=1)
    tokens = position_1NC.shape[1] - 1
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"weights {file or config.backbone} do not fit: {tokens} positions are no square of patches")
    weights["pos_embed"] = resample_abs_pos_embed(
        position_1NC, list(net.patch_embed.grid_size), interpolation=resize, antialias=resize == "bicubic"
    )
    wrong = [k for k in wanted if weights[k].shape != wanted[k].shape]
    if wrong:
        raise ValueError(
            f"weights {file or config.backbone} do not fit: {wrong[0]} is {tuple(weights[wrong[0]].shape)}, "
            f"expected {tuple(wanted[wrong[0]].shape)}"
        )
    net.load_state_dict(weights)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@contextlib.contextmanager
def _guard(net: VisionTransformer, eps: float) -> Iterator[None]:
    before = [block.attn.guard for block in net.blocks]
    for block in net.blocks:
        block.attn.guard = eps
    try:
        yield
    finally:
        for block, guard in zip(net.blocks, before, strict=True):
            block.attn.guard = guard


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is attention and MLP and nothing else: what :class:`PolicyAttention` computes."""
    if type(block) is not Block or not isinstance(block.attn, PolicyAttention):
        return False
    extras = block.attn.q_norm, block.attn.k_norm, block.attn.norm
    return all(isinstance(extra, nn.Identity) for extra in extras) and block.attn.gate is None


def _backbone(config: PrunedViTConfig, drop_path: float) -> VisionTransformer:
    check_backbone(config.backbone)
    # Distilled weights go into the plain class: the distillation token has no part in retrieval.
    name = config.backbone.replace("_distilled_", "_").split(".")[0]
    own = {"patch_size": config.patch_size, "embed_dim": config.width, "num_heads": config.heads, "depth": config.depth}
    stride = config.patch_stride
    patches = {"embed_layer": partial(OverlappingPatches, stride=stride)} if stride else {}
    try:
        net = timm.create_model(
            name, pretrained=False, num_classes=0, img_size=config.image_size, drop_path_rate=drop_path,
            attn_layer=PolicyAttention, **patches, **{k: v for k, v in own.items() if v},
        )  # fmt: skip
    except AssertionError as error:
        raise ValueError(f"{config.backbone} of width {config.width} and {config.heads} heads: {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{config.backbone} is no plain vision transformer such as deit_small_patch16_224") from error
    plain = type(net) is VisionTransformer and net.num_prefix_tokens == 1 and net.global_pool == "token"
    if not plain or net.no_embed_class or not all(map(_is_plain, net.blocks)):
        raise ValueError(f"{config.backbone} is no plain vision transformer with one class token")
    patch_height, patch_width = net.patch_embed.patch_size
    height, width = config.image_size
    if stride:
        if stride > min(patch_height, patch_width):
            raise ValueError(
                f"patch_stride must be at most the patch of {patch_height}×{patch_width} pixels, got {stride}"
            )
        if height < patch_height or width < patch_width:
            raise ValueError(f"an image of {height}×{width} pixels is smaller than a patch; enlarge it")
    elif height % patch_height or width % patch_width:
        raise ValueError(
            f"an image of {height}×{width} pixels is not whole patches of {patch_height}×{patch_width}; "
            f"choose multiples of {patch_height}"
        )
    return net
