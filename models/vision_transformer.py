"""A plain vision transformer of timm whose attention can leave tokens out.

It takes any size of image, patches that overlap, and other widths and depths than timm's; its weights are timm's,
with the position embedding resized.
"""

# Shape legend: B = images, N = tokens with the class token, index 0, H = heads, R = rows of attention, C = width.

import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from models.backbone import check_backbone
from models.network import at_least_float32
from models.weights import misfit, without_prefixes


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
    scores = at_least_float32(scores_BHNN)
    itself_RN = torch.eye(rows, keys, dtype=torch.bool, device=scores.device)
    allowed_B1RN = torch.where(itself_RN, 1.0, policy_BN.to(scores.dtype)[:, None, None, :])
    if eps:
        weight = (scores - scores.detach().amax(dim=-1, keepdim=True)).exp() * allowed_B1RN
        return (weight + eps / keys) / (weight.sum(dim=-1, keepdim=True) + eps)
    largest = scores.detach().masked_fill(allowed_B1RN == 0, -torch.inf).amax(dim=-1, keepdim=True)
    # A dropped key may exceed every allowed one by any amount; its exponential must stay finite to be multiplied by 0.
    weight = (scores - largest).clamp_max(80.0).exp() * allowed_B1RN
    return weight / weight.sum(dim=-1, keepdim=True)


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


def build_vision_transformer(
    name: str,
    image_size: tuple[int, int],
    patch_size: int = 0,
    patch_stride: int = 0,
    width: int = 0,
    heads: int = 0,
    depth: int = 0,
    drop_path: float = 0.0,
) -> VisionTransformer:
    """A network of timm without head, with :class:`PolicyAttention` in every block.

    Args:
        name: a plain vision transformer with one class token; of a distilled one without its second token, which
            has no part in retrieval.
        image_size: height and width in pixels.
        patch_size: pixels; this and the next four: 0 = the network's own.
        patch_stride: pixels from patch to patch; 0 = side by side.
        width: channels of a token.
        heads: of attention.
        depth: blocks.
        drop_path: largest probability of leaving a block out, in training.

    Raises:
        ValueError: it is no such network, or the sizes do not fit together.
    """
    check_backbone(name)
    own = {"patch_size": patch_size, "embed_dim": width, "num_heads": heads, "depth": depth}
    patches = {"embed_layer": partial(OverlappingPatches, stride=patch_stride)} if patch_stride else {}
    try:
        net = timm.create_model(
            name.replace("_distilled_", "_").split(".")[0], pretrained=False, num_classes=0,
            img_size=image_size, drop_path_rate=drop_path,
            attn_layer=PolicyAttention, **patches, **{k: v for k, v in own.items() if v},
        )  # fmt: skip
    except AssertionError as error:
        raise ValueError(f"{name} of width {width} and {heads} heads: {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no plain vision transformer such as deit_small_patch16_224") from error
    plain = type(net) is VisionTransformer and net.num_prefix_tokens == 1 and net.global_pool == "token"
    if not plain or net.no_embed_class or not all(map(_is_plain, net.blocks)):
        raise ValueError(f"{name} is no plain vision transformer with one class token")
    patch_height, patch_width = net.patch_embed.patch_size
    height, columns = image_size
    if patch_stride:
        if patch_stride > min(patch_height, patch_width):
            raise ValueError(
                f"patch_stride must be at most the patch of {patch_height}×{patch_width} pixels, got {patch_stride}"
            )
        if height < patch_height or columns < patch_width:
            raise ValueError(f"an image of {height}×{columns} pixels is smaller than a patch; enlarge it")
    elif height % patch_height or columns % patch_width:
        raise ValueError(
            f"an image of {height}×{columns} pixels is not whole patches of {patch_height}×{patch_width}; "
            f"choose multiples of {patch_height}"
        )
    return net


def load_resized(
    net: VisionTransformer,
    weights: Mapping[str, Tensor],
    source: str,
    resize: Literal["bicubic", "bilinear"] = "bicubic",
) -> None:
    """Puts the weights of a network for another size of image into one for this.

    The position embedding is resized, the class token's row left alone. Distilled DeiT weights fit the plain
    network: the distillation token, its head and its row of the position embedding are left out.

    Args:
        net: receives the weights.
        weights: by timm's names, perhaps behind a wrapper's prefixes.
        source: where they are from, for the error.
        resize: of the position embedding. timm's is bicubic with anti-aliasing, TransReID's bilinear.

    Raises:
        ValueError: the network's sizes are not those of the weights.
    """
    wanted = net.state_dict()
    weights = without_prefixes(weights, wanted, source)
    distilled = "dist_token" in weights
    weights = {k: v for k, v in weights.items() if not k.startswith(("head", "dist_token"))}
    position_1NC = weights.get("pos_embed")
    if position_1NC is None or set(weights) != set(wanted):
        odd = sorted(set(weights) ^ set(wanted))
        raise ValueError(f"weights {source} do not fit: {len(odd)} tensors differ, first {odd[0]}")
    if distilled:
        position_1NC = torch.cat([position_1NC[:, :1], position_1NC[:, 2:]], dim=1)
    tokens = position_1NC.shape[1] - 1
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"weights {source} do not fit: {tokens} positions are no square of patches")
    weights["pos_embed"] = resample_abs_pos_embed(
        position_1NC, list(net.patch_embed.grid_size), interpolation=resize, antialias=resize == "bicubic"
    )
    if different := misfit(weights, wanted):
        raise ValueError(f"weights {source} do not fit: {different}")
    net.load_state_dict(weights)


@contextlib.contextmanager
def guarded(net: VisionTransformer, eps: float) -> Iterator[None]:
    """Another guard of masked attention in all blocks for a while; 0 = exact."""
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
