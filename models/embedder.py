"""Backbone and neck of the retrieval models (D3still, section 4.2, and its authors' code).

    image → backbone → global average pool → BN → ReLU → Linear → BN → embedding [→ Linear → class logits]

The embedding is the raw output of the last batch norm, not L2-normalised: losses and evaluation normalise.
"""

# Shape legend: B = batch, C = channels, D = embedding width, H and W = pixels, N = tokens.

import difflib
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

Config = TypeVar("Config")  # a model's configuration with a field num_classes


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig:
    """Everything needed to build an :class:`Embedder` again; stored beside its weights as JSON."""

    backbone: str  # any timm name, such as "resnet18.tv_in1k"
    embedding_dim: int = 512
    image_size: tuple[int, int] = (224, 224)  # height and width in pixels; some backbones are built for one size
    width: float = 1.0  # scales the channels of every stage; ResNets only
    num_classes: int = 0  # > 0 adds the training classifier, which is not part of the retrieval model

    def __post_init__(self):
        if self.embedding_dim < 1 or self.width <= 0 or min(self.image_size) < 1 or self.num_classes < 0:
            raise ValueError(f"embedding_dim, width and image_size must be positive, got {asdict(self)}")
        object.__setattr__(self, "image_size", tuple(self.image_size))


class Embedder(nn.Module):
    """A timm backbone with the neck of D3still.

    ``forward`` maps normalised images (B, 3, H, W) to raw embeddings (B, D). :meth:`parts` also returns the
    pooled feature that the triplet loss compares.
    """

    pixels = "imagenet"  # mean and deviation of the input
    resize = "bilinear"  # to image_size, with anti-aliasing
    architecture = (
        "timm backbone without head; its features averaged over positions",
        "ResNets: last stage stride 1 (not dilated), stem pool 2x2 stride 2 without padding, channels x width",
        "MobileNetV3-small: stage 4 stride 1, no conv_head",
        "neck: BatchNorm1d, ReLU, Linear without bias, BatchNorm1d (tensors neck.0 to neck.3)",
    )

    def __init__(self, config: EmbedderConfig, pretrained: bool = False):
        super().__init__()
        self.config = config
        self.backbone = _backbone(config, pretrained)
        channels = self._pooled_channels()
        self.neck = nn.Sequential(
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Linear(channels, config.embedding_dim, bias=False),
            nn.BatchNorm1d(config.embedding_dim),
        )
        nn.init.kaiming_normal_(self.neck[2].weight, mode="fan_out")
        self.classifier = None
        if config.num_classes:
            self.classifier = nn.Linear(config.embedding_dim, config.num_classes, bias=False)
            nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self._embed(self.pool(images_BCHW))

    def parts(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(pooled feature before the neck (B, C), embedding (B, D)); ``classifier`` maps the latter to logits."""
        pooled_BC = self.pool(images_BCHW)
        return pooled_BC, self._embed(pooled_BC)

    def _embed(self, pooled_BC: Tensor) -> Tensor:
        # In float32 also under autocast: an embedding rounded to bfloat16 has other neighbours.
        with torch.autocast(pooled_BC.device.type, enabled=False):
            return self.neck(pooled_BC if pooled_BC.dtype == torch.float64 else pooled_BC.float())

    def pool(self, images_BCHW: Tensor) -> Tensor:
        return self._pooled(self.backbone.forward_features(images_BCHW))

    def with_map(self, images_BCHW: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """(embedding (B, D), map of backbone stage 1 … 4 (B, C, H, W)) of one forward pass."""
        last = len(self.backbone.feature_info) - 1
        features, (map_BCHW,) = self.backbone.forward_intermediates(
            images_BCHW, indices=[last - 4 + stage], output_fmt="NCHW"
        )
        return self._embed(self._pooled(features)), map_BCHW

    def local(self, images_BCHW: Tensor, grids: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """(embedding (B, D), for every grid size p the embeddings of its p × p positions (B, p², D)).

        The last map is averaged over each position's area and sent through the neck, as the whole image is.
        Square grids also over oblong maps, where columns or rows repeat.
        """
        map_BCHW = self.backbone.forward_features(images_BCHW)
        if map_BCHW.ndim != 4:
            raise ValueError(f"{self.config.backbone} has no feature map, so it has no local embeddings")
        if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":
            map_BCHW = map_BCHW.permute(0, 3, 1, 2)
        cells = [F.adaptive_avg_pool2d(map_BCHW, (p, p)).flatten(2).transpose(1, 2) for p in grids]
        local = [self._embed(c.flatten(0, 1)).view(*c.shape[:2], -1) for c in cells]
        return self._embed(map_BCHW.mean(dim=(2, 3))), local

    def _pooled(self, features: Tensor) -> Tensor:
        if features.ndim == 3:  # tokens of a vision transformer: the backbone knows its class token
            return self.backbone.forward_head(features, pre_logits=True)
        channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        return features.mean(dim=(1, 2) if channels_last else (2, 3))

    @torch.no_grad()
    def _pooled_channels(self) -> int:
        was_training = self.backbone.training
        self.backbone.eval()  # probing must not touch running statistics
        channels = self.pool(torch.zeros(1, 3, *self.config.image_size)).shape[1]
        self.backbone.train(was_training)
        return channels


def retrieval_config(config: Config) -> Config:
    """The same network without its training classifier."""
    return replace(config, num_classes=0)


def check_backbone(name: str) -> None:
    """Raises ValueError, with near names, unless timm knows the network."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))


def _backbone(config: EmbedderConfig, pretrained: bool) -> nn.Module:
    check_backbone(config.backbone)
    options: dict = {}
    if config.width != 1.0:
        if pretrained:
            raise ValueError(
                f"there are no pretrained weights for width {config.width}; set width to 1 or pretrained to false"
            )
        options["channels"] = tuple(max(8, round(c * config.width)) for c in (64, 128, 256, 512))
    if config.backbone.startswith("swin"):
        options["img_size"] = config.image_size
    try:
        net = timm.create_model(config.backbone, pretrained=pretrained, num_classes=0, **options)
    except TypeError as error:
        if config.width != 1.0:
            raise ValueError(
                f"width is for ResNets; {config.backbone} has no scalable width, got {config.width}"
            ) from error
        raise
    if isinstance(net, ResNet):
        _keep_last_stage_resolution(net)
        # Departs from torchvision's 3×3 pool with padding 1: the authors' code pools 2×2 without padding.
        net.maxpool = nn.MaxPool2d(kernel_size=2, stride=2)
    elif config.backbone.startswith("mobilenetv3_small"):
        # The authors' code keeps the resolution in torchvision's feature block 9, which is stage 4 here.
        net.blocks[4][0].conv_dw.stride = (1, 1)
        net.conv_head, net.norm_head, net.act2 = nn.Identity(), nn.Identity(), nn.Identity()
    return net


def _keep_last_stage_resolution(net: ResNet) -> None:
    """Last stride 1, not dilated: a finer map for retrieval, the pretrained kernels unchanged."""
    first = net.layer4[0]
    for conv in (first.conv1, getattr(first, "conv2", None), getattr(first, "conv3", None)):
        if isinstance(conv, nn.Conv2d):
            conv.stride = (1, 1)
    for module in first.downsample or ():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        elif isinstance(module, nn.AvgPool2d):
            module.kernel_size = module.stride = 1
