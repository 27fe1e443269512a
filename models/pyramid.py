"""A backbone's maps at strides 4, 8, 16 and 32, and the feature pyramid over them (Lin et al., CVPR 2017).

Any network of timm that gives out such maps: ResNets, MobileNets, ConvNeXts … A ResNet's ``width`` scales its stem too.
"""

# Shape legend: B = images, C = channels, H and W = cells of a level.

import warnings

import timm
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from models.backbone import check_start, is_own
from models.weights import start

STRIDES = (4, 8, 16, 32)
LEVELS = ("0", "1", "2", "3")  # names of the levels that boxes are pooled from; "pool" is one more
COARSEST = "pool"


class Pyramid(nn.Module):
    """Images (B, 3, H, W) -> {"0": (B, C, H/4, W/4), …, "3": stride 32, "pool": stride 64}.

    Args:
        name: a network of timm.
        channels: C of every level.
        width: scales the channels of a ResNet.
        pretrained: start from timm's weights.
        weights: start from a local file instead (:func:`models.weights.start`).

    Raises:
        ValueError: there is no such network, or it has no maps at these strides.

    Warns:
        UserWarning: in one line, when a file fits in part.
    """

    def __init__(
        self, name: str, channels: int = 256, width: float = 1.0, pretrained: bool = False, weights: str = ""
    ) -> None:
        super().__init__()
        self.body = _body(name, width, pretrained and not weights)
        if weights and (left := start(self.body, weights)):
            warnings.warn(left, stacklevel=3)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels, LastLevelMaxPool())

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        return self.fpn(dict(zip(LEVELS, self.body(images_BCHW), strict=True)))

    def stem(self) -> list[nn.Module]:
        """The first convolution and norm of a ResNet; of other networks nothing."""
        return [self.body[name] for name in ("conv1", "bn1")] if _is_resnet(self.body) else []

    def norms(self) -> list[nn.Module]:
        """The batch norms of the backbone."""
        return [m for m in self.body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _body(name: str, width: float, pretrained: bool) -> nn.Module:
    if is_own(name):
        raise ValueError(f"a pyramid is built over a network of timm, got {name}; name one, such as resnet18.tv_in1k")
    check_start(name, width, pretrained)
    options: dict = {}
    if width != 1.0:
        options["channels"] = tuple(max(8, round(c * width)) for c in (64, 128, 256, 512))
    try:
        body = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=(-4, -3, -2, -1), **options
        )
        strides = tuple(body.feature_info.reduction())
    except TypeError as error:
        if width != 1.0:
            raise ValueError(f"width is for ResNets; {name} has no scalable width, got {width}") from error
        raise
    except (RuntimeError, AttributeError, AssertionError, IndexError) as error:
        raise ValueError(f"{name} gives out no feature maps: {error}") from error
    if strides != STRIDES:
        raise ValueError(f"{name} has maps at strides {strides}, expected {STRIDES}; take a convolutional network")
    if width != 1.0:
        _narrow_stem(body, max(8, round(64 * width)))
    return body


def _is_resnet(body: nn.Module) -> bool:
    return {"conv1", "bn1", "layer1"} <= set(dict(body.named_children()))


def _narrow_stem(body: nn.Module, channels: int) -> None:
    """timm scales the stages alone: the stem, and what the first stage sees of it, follow here."""
    first = body["layer1"][0]
    body["conv1"], body["bn1"] = nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels)
    entry = first.conv1
    first.conv1 = nn.Conv2d(channels, entry.out_channels, entry.kernel_size, entry.stride, entry.padding, bias=False)
    fresh, out = [body["conv1"], first.conv1], first.bn1.num_features * first.expansion
    first.downsample = None
    if channels != out:
        first.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
        fresh.append(first.downsample[0])
    for convolution in fresh:  # as timm's own
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
