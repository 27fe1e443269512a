"""Vision transformer that drops tokens: SUReID's hierarchical token sparsification (Song and Liu, arXiv 2401.07469).

    image → patches → blocks 1-3 → drop → blocks 4-6 → drop → blocks 7-9 → drop → blocks 10-12 → LN → class token f

Before blocks 4, 7 and 10 a small predictor says which image tokens to keep; p, p², p³ of them are left. In training
nothing is removed: a dropped token is masked out of the attention of all others (eq. 4 to 6), so that the decision
has a gradient. At inference the tokens are really removed, with counts that depend on p alone, so that computation
drops and shapes are static.
"""

# Shape legend: B = images, N = tokens (with the class token, index 0, where attention is meant), H = heads,
# R = rows of attention, S = stages, C = width of a token, D = width of the class token = C, K = classes.

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.network import PIXELS, TRAINING_ONLY, EmbeddingNetwork, Pixels, at_least_float32
from models.token_choice import Rounding, TokenPredictor, gumbel_keep, gumbel_noise, keep_counts
from models.vision_transformer import PolicyAttention, build_vision_transformer, guarded, load_resized, masked_softmax
from models.weights import read

__all__ = [
    "NETWORK", "PolicyAttention", "PrunedViT", "PrunedViTConfig", "Rounding", "TokenPredictor", "Trained",
    "gumbel_keep", "gumbel_noise", "ideal_macs", "keep_counts", "load_pretrained", "masked_softmax",
]  # fmt: skip


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
    # > 0 adds the training classifier, which is not part of the retrieval model.
    num_classes: int = field(default=0, metadata=TRAINING_ONLY)

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


class PrunedViT(EmbeddingNetwork):
    """A plain vision transformer with three stages of token pruning, a neck and a classifier.

    ``forward`` maps normalised images (B, 3, H, W) to raw embeddings (B, D), as at inference: tokens are really
    removed and nothing is random. :meth:`trained` is the forward pass of training. A network with cameras is also
    given the camera of every image, 0 … cameras - 1; where it is unknown (None), the mean of their vectors is used.
    """

    kind = "token_pruning"
    Config = PrunedViTConfig
    resize = "bicubic"

    def __init__(self, config: PrunedViTConfig, pretrained: bool = False, weights: str = "", drop_path: float = 0.0,
                 resize: Literal["bicubic", "bilinear"] = "bicubic"):  # fmt: skip
        super().__init__()
        self.config = config
        self.backbone = build_vision_transformer(
            config.backbone, config.image_size, config.patch_size, config.patch_stride, config.width, config.heads,
            config.depth, drop_path,
        )  # fmt: skip
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
    def pixels(self) -> Pixels:
        """Mean and deviation of the input."""
        return PIXELS[self.config.pixels]

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("images", "camera") if self.config.cameras else ("images",)

    def example(self, count: int) -> tuple[Tensor, ...]:
        """Images, and the number of the camera of each for a network with cameras."""
        cameras = (torch.arange(count) % self.config.cameras,) if self.config.cameras else ()
        return (*super().example(count), *cameras)

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
        return self.after_neck(feature_BD) if self.config.embed_after_neck else at_least_float32(feature_BD)

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

        with guarded(self.backbone, 0.0):
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
            feature_BD = at_least_float32(feature_BD)
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
    weights = read(file) if file else timm.create_model(config.backbone, pretrained=True, num_classes=0).state_dict()
    load_resized(net, weights, file or config.backbone, resize)


NETWORK = PrunedViT
