"""IResNet, the residual network of face recognition (Duta et al., 2020; ArcFace's public code), without squeeze units.

    3×3, BN, PReLU → four stages of blocks, each halves the map → BN, dropout → flatten, Linear, BN → embedding

A block is BN, 3×3, BN, PReLU, 3×3, BN, added to its input; there is no activation after the sum.
"""

# Shape legend: B = batch, C = channels, D = embedding width, H and W = pixels, h and w = H / 16 and W / 16.

from dataclasses import dataclass, field

from torch import Tensor, nn

from models.face_network import FaceConfig, FaceNetwork
from models.network import TRAINING_ONLY

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}  # blocks of the four stages
SHORTCUTS = ("conv", "pool")

_CHANNELS = (64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class IResNetConfig(FaceConfig):
    """Everything needed to build an :class:`IResNet` again; stored beside its weights as JSON.

    >>> IResNetConfig(layers=LAYERS[100]).layers
    (3, 13, 30, 3)

    Raises:
        ValueError: a value outside its range, in one line.
    """

    layers: tuple[int, ...] = LAYERS[50]
    # Where a block halves the map but keeps its channels: a 1×1 convolution with BN, or every second position.
    shortcut: str = "conv"
    inner_norm: bool = True  # BN between a block's first convolution and its PReLU; older public files have none
    dropout: float = field(default=0.0, metadata=TRAINING_ONLY)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))
        if len(self.layers) != len(_CHANNELS) or min(self.layers) < 1:
            raise ValueError(f"layers must be four numbers of blocks, such as {LAYERS[50]}, got {self.layers}")
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {self.shortcut!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


class IResNet(FaceNetwork):
    """IResNet-18, 34, 50 or 100, or one with other numbers of blocks (:data:`LAYERS`).

    Its modules have the names of ArcFace's public code. See :class:`models.face_network.FaceNetwork` for arguments,
    shapes and errors.
    """

    kind = "iresnet"
    Config = IResNetConfig
    config: IResNetConfig
    last_norm = "features"

    def build(self, config: FaceConfig) -> None:
        channels = [config.channels(count) for count in _CHANNELS]
        width, last = channels[0], channels[-1]
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        came = width
        for stage, (left, count) in enumerate(zip(channels, self.config.layers, strict=True), 1):
            blocks = [
                _Block(came, left, 2, self.config),
                *(_Block(left, left, 1, self.config) for _ in range(count - 1)),
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            came = left
        height, columns = config.grid
        self.bn2 = nn.BatchNorm2d(last)
        self.dropout = nn.Dropout(self.config.dropout)
        self.fc = nn.Linear(last * height * columns, config.embedding_dim)
        self.features = nn.BatchNorm1d(config.embedding_dim)
        # Fixed, as in the public code: every feature of the embedding keeps the same deviation.
        self.features.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    @property
    def layout(self) -> tuple[str, ...]:
        norm = "BN, PReLU" if self.config.inner_norm else "PReLU"
        halved = "1×1 convolution with BN" if self.config.shortcut == "conv" else "every second position"
        return (
            f"IResNet with {'-'.join(map(str, self.config.layers))} blocks; stem 3×3, stride 1, BN, PReLU; no pooling",
            f"block: BN, 3×3, {norm}, 3×3 (stride 2 in the first of a stage), BN, added to the input; no activation",
            f"shortcut where only the stride changes: {halved}; where channels change: 1×1 convolution with BN",
            "neck: BN2d (bn2), flatten, Linear with bias (fc), BatchNorm1d (features)",
        )

    def maps(self, images_BCHW: Tensor) -> Tensor:
        map_BCHW = self.prelu(self.bn1(self.conv1(images_BCHW)))
        return self.bn2(self.layer4(self.layer3(self.layer2(self.layer1(map_BCHW)))))

    def neck(self, map_BChw: Tensor) -> Tensor:
        return self.features(self.fc(self.dropout(map_BChw.flatten(1))))

    def public_names(self) -> dict[str, str]:
        """Of the other public code base, whose blocks are one list and whose layers have numbers."""
        found = {"input_layer.0": "conv1", "input_layer.1": "bn1", "input_layer.2": "prelu",
                 "output_layer.0": "bn2", "output_layer.3": "fc", "output_layer.4": "features"}  # fmt: skip
        inner = ("bn2",) if self.config.inner_norm else ()
        block = ("bn1", "conv1", *inner, "prelu", "conv2", "bn3")
        ours = [f"layer{stage}.{b}" for stage, count in enumerate(self.config.layers, 1) for b in range(count)]
        for number, name in enumerate(ours):
            found |= {f"body.{number}.res_layer.{at}": f"{name}.{layer}" for at, layer in enumerate(block)}
            found |= {f"body.{number}.shortcut_layer.{at}": f"{name}.downsample.{at}" for at in (0, 1)}
        return found


class _Block(nn.Module):
    def __init__(self, came: int, left: int, stride: int, config: IResNetConfig):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(came)
        self.conv1 = nn.Conv2d(came, left, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(left) if config.inner_norm else nn.Identity()
        self.prelu = nn.PReLU(left)
        self.conv2 = nn.Conv2d(left, left, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(left)
        self.downsample: nn.Module = nn.Identity()
        if came != left or (stride != 1 and config.shortcut == "conv"):
            self.downsample = nn.Sequential(nn.Conv2d(came, left, 1, stride, bias=False), nn.BatchNorm2d(left))
        elif stride != 1:
            self.downsample = nn.MaxPool2d(1, stride)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        inner = self.prelu(self.bn2(self.conv1(self.bn1(map_BCHW))))
        return self.bn3(self.conv2(inner)) + self.downsample(map_BCHW)


NETWORK = IResNet
