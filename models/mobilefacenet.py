"""MobileFaceNet (Chen et al., 2018) in the sizes of public face recognition code.

    3×3 stride 2 → 3×3 by channel → three times (bottleneck stride 2, residual bottlenecks) → 1×1
        → one kernel per channel as large as the map → Linear → BN → embedding

A bottleneck is 1×1, 3×3 by channel, 1×1; every convolution has BN, all but the bottleneck's last and the kernel as
large as the map have PReLU.
"""

# Shape legend: B = batch, C = channels, D = embedding width, H and W = pixels, h and w = H / 16 and W / 16.

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.face_network import FaceConfig, FaceNetwork

# Settings of the three public sizes: 1.20, 2.06 ("0.45G") and 6.31 million parameters.
SIZES: dict[str, dict[str, Any]] = {
    "x1": {"blocks": (1, 4, 6, 2), "scale": 1},
    "x2": {"blocks": (1, 4, 6, 2), "scale": 2},
    "large": {"blocks": (2, 8, 12, 4), "scale": 4},
}

# Ours -> of ArcFace's public code, where nothing but the ends has a name.
_MARGIN_CODE = {
    "conv1": "layers.0", "conv2_dw": "layers.1", "conv_23": "layers.2", "conv_3": "layers.3", "conv_34": "layers.4",
    "conv_4": "layers.5", "conv_45": "layers.6", "conv_5": "layers.7", "conv_6_sep": "conv_sep",
    "conv_6_dw": "features.layers.0", "linear": "features.layers.2", "bn": "features.layers.3",
}  # fmt: skip
_NUMBERS = {"conv": "0", "conv_dw": "1", "project": "2", "bn": "1", "prelu": "2"}  # of layers of a module there


@dataclass(frozen=True, kw_only=True)
class MobileFaceNetConfig(FaceConfig):
    """Everything needed to build a :class:`MobileFaceNet` again; stored beside its weights as JSON.

    >>> MobileFaceNetConfig(**SIZES["x2"]).scale
    2

    Raises:
        ValueError: a value outside its range, in one line.
    """

    blocks: tuple[int, ...] = (1, 4, 6, 2)  # at 1/2, 1/4, 1/8 and 1/16 of the size; a first number of 1: one 3×3 alone
    # Of the channels between bottlenecks alone: inside them and after them they stay.
    scale: int = 1
    affine: bool = True  # the last batch norm has scale and shift

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if len(self.blocks) != 4 or min(self.blocks) < 1:
            raise ValueError(f"blocks must be four numbers of blocks, such as (1, 4, 6, 2), got {self.blocks}")
        if self.scale < 1:
            raise ValueError(f"scale must be at least 1, got {self.scale}")


class MobileFaceNet(FaceNetwork):
    """MobileFaceNet in a public size (:data:`SIZES`) or another one.

    Its modules have the names that the code of face distillation uses. See
    :class:`models.face_network.FaceNetwork` for arguments, shapes and errors.
    """

    kind = "mobilefacenet"
    Config = MobileFaceNetConfig
    config: MobileFaceNetConfig
    last_norm = "bn"

    def build(self, config: FaceConfig) -> None:
        first, *rest = self.config.blocks
        narrow, middle, wide, last = (config.channels(count) for count in (64, 128, 256, 512))
        low, high = narrow * self.config.scale, middle * self.config.scale
        self.conv1 = _convolution(3, low, 3, stride=2)
        # Of the unscaled number of groups: with scale 2 every kernel sees two channels.
        self.conv2_dw = _residuals(low, middle, first) if first > 1 else _convolution(low, low, 3, groups=narrow)
        self.conv_23 = _Bottleneck(low, middle, low, stride=2)
        self.conv_3 = _residuals(low, middle, rest[0])
        self.conv_34 = _Bottleneck(low, wide, high, stride=2)
        self.conv_4 = _residuals(high, wide, rest[1])
        self.conv_45 = _Bottleneck(high, last, high, stride=2)
        self.conv_5 = _residuals(high, wide, rest[2])
        self.conv_6_sep = _convolution(high, last, 1)
        self.conv_6_dw = nn.Sequential(OrderedDict(
            conv=nn.Conv2d(last, last, config.grid, groups=last, bias=False), bn=nn.BatchNorm2d(last)))  # fmt: skip
        self.linear = nn.Linear(last, config.embedding_dim, bias=False)
        self.bn = nn.BatchNorm1d(config.embedding_dim, affine=self.config.affine)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def layout(self) -> tuple[str, ...]:
        height, width = self.config.grid
        return (
            f"MobileFaceNet with {'-'.join(map(str, self.config.blocks))} blocks, "
            f"channels between bottlenecks ×{self.config.scale}; BN and PReLU by channel",
            f"neck: {height}×{width} convolution by channel with BN (conv_6_dw), Linear without bias (linear), "
            f"BatchNorm1d {'with' if self.config.affine else 'without'} scale and shift (bn)",
        )

    def maps(self, images_BCHW: Tensor) -> Tensor:
        map_BCHW = self.conv_3(self.conv_23(self.conv2_dw(self.conv1(images_BCHW))))
        return self.conv_6_sep(self.conv_5(self.conv_45(self.conv_4(self.conv_34(map_BCHW)))))

    def neck(self, map_BChw: Tensor) -> Tensor:
        return self.bn(self.linear(self.conv_6_dw(map_BChw).flatten(1)))

    def public_names(self) -> dict[str, str]:
        """Of both public code bases: one has numbers for names, the other puts blocks into "model"."""
        found = {}
        for ours in dict(self.named_modules()):
            top, *inner = ours.split(".")
            if top in _MARGIN_CODE:
                found[".layers.".join([_MARGIN_CODE[top], *(_NUMBERS.get(part, part) for part in inner)])] = ours
                theirs = ".".join([top, *(f"model.{part}" if part.isdigit() else part for part in inner)])
                found |= {theirs: ours, f"output_layer.{theirs}": ours}
        return found


class _Bottleneck(nn.Module):
    def __init__(self, came: int, inside: int, left: int, stride: int = 1, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.conv = _convolution(came, inside, 1)
        self.conv_dw = _convolution(inside, inside, 3, stride, groups=inside)
        self.project = nn.Sequential(OrderedDict(
            conv=nn.Conv2d(inside, left, 1, bias=False), bn=nn.BatchNorm2d(left)))  # fmt: skip

    def forward(self, map_BCHW: Tensor) -> Tensor:
        found = self.project(self.conv_dw(self.conv(map_BCHW)))
        return map_BCHW + found if self.residual else found


def _residuals(channels: int, inside: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(_Bottleneck(channels, inside, channels, residual=True) for _ in range(count)))


def _convolution(came: int, left: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BN, PReLU; the map keeps its size at stride 1."""
    convolution = nn.Conv2d(came, left, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(left), prelu=nn.PReLU(left)))


NETWORK = MobileFaceNet
