"""Backbone and neck of the retrieval models (D3still, section 4.2, and its authors' code).

    image → backbone → global average pool → BN → ReLU → Linear → BN → embedding [→ Linear → class logits]

The embedding is the raw output of the last batch norm, not L2-normalised: losses and evaluation normalise.
"""

# Shape legend: B = batch, C = channels, D = embedding width, H and W = pixels, N = tokens.

import warnings
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import build_backbone, check_backbone, check_start, is_own, statistics
from models.network import PIXELS, SINCE_0_4, TRAINING_ONLY, EmbeddingNetwork, Pixels, at_least_float32
from models.weights import stamp_of

__all__ = ["NETWORK", "Embedder", "EmbedderConfig", "check_backbone", "check_buildable", "statistics"]


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig:
    """Everything needed to build an :class:`Embedder` again; stored beside its weights as JSON."""

    backbone: str  # any timm name, such as "resnet18.tv_in1k", or "package.module:function" (models/backbone.py)
    embedding_dim: int = 512
    image_size: tuple[int, int] = (224, 224)  # height and width in pixels; some backbones are built for one size
    width: float = 1.0  # scales the channels of every stage; ResNets only
    # > 0 adds the training classifier, which is not part of the retrieval model.
    num_classes: int = field(default=0, metadata=TRAINING_ONLY)
    # Of the input, red, green, blue in [0, 1]; models.backbone.statistics knows them by name.
    mean: tuple[float, float, float] = field(default=PIXELS["imagenet"][0], metadata=SINCE_0_4)
    std: tuple[float, float, float] = field(default=PIXELS["imagenet"][1], metadata=SINCE_0_4)

    def __post_init__(self):
        if self.embedding_dim < 1 or self.width <= 0 or min(self.image_size) < 1 or self.num_classes < 0:
            raise ValueError(f"embedding_dim, width and image_size must be positive, got {asdict(self)}")
        for name in ("image_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std must be three numbers, std above 0, got {self.mean} and {self.std}")


class Embedder(EmbeddingNetwork):
    """A backbone with the neck of D3still.

    ``forward`` maps normalised images (B, 3, H, W) to raw embeddings (B, D). :meth:`with_pooled` also returns the
    pooled feature that the triplet loss compares.

    Args:
        config: what is built.
        pretrained: the backbone starts from the weights that belong to its name.
        weights: the backbone starts from this local file instead (:func:`models.weights.start`).

    Raises:
        ValueError: the backbone cannot be built as asked, or takes no images of this size.
    """

    kind = "embedder"
    Config = EmbedderConfig

    def __init__(self, config: EmbedderConfig, pretrained: bool = False, weights: str = ""):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, config.image_size, config.width, pretrained, weights)
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

    @property
    def pixels(self) -> Pixels:
        """Mean and deviation of the input."""
        return self.config.mean, self.config.std

    @property
    def architecture(self) -> tuple[str, ...]:
        neck = "neck: BatchNorm1d, ReLU, Linear without bias, BatchNorm1d (tensors neck.0 to neck.3)"
        if is_own(self.config.backbone):
            return f"{self.config.backbone}, a function of the user's own; a map is averaged over positions", neck
        return (
            "timm backbone without head; its features averaged over positions",
            "ResNets: last stage stride 1 (not dilated), stem pool 2x2 stride 2 without padding, channels x width",
            "MobileNetV3-small: stage 4 stride 1, no conv_head",
            neck,
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self._embed(self.pool(images_BCHW))

    def with_pooled(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(pooled feature before the neck (B, C), embedding (B, D)); ``classifier`` maps the latter to logits."""
        pooled_BC = self.pool(images_BCHW)
        return pooled_BC, self._embed(pooled_BC)

    def _embed(self, pooled_BC: Tensor) -> Tensor:
        # In float32 also under autocast: an embedding rounded to bfloat16 has other neighbours.
        with torch.autocast(pooled_BC.device.type, enabled=False):
            return self.neck(at_least_float32(pooled_BC))

    def pool(self, images_BCHW: Tensor) -> Tensor:
        return self._pooled(self._features(images_BCHW))

    def with_map(self, images_BCHW: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """(embedding (B, D), map of backbone stage 1 … 4 (B, C, H, W)) of one forward pass.

        Raises:
            ValueError: a backbone of the user's own without timm's ``forward_intermediates``.
        """
        if not hasattr(self.backbone, "forward_intermediates"):
            raise ValueError(f"{self.config.backbone} has no stages: its module has no forward_intermediates as timm's")
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
        map_BCHW = self._features(images_BCHW)
        if map_BCHW.ndim != 4:
            raise ValueError(f"{self.config.backbone} has no feature map, so it has no local embeddings")
        if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":
            map_BCHW = map_BCHW.permute(0, 3, 1, 2)
        cells = [F.adaptive_avg_pool2d(map_BCHW, (p, p)).flatten(2).transpose(1, 2) for p in grids]
        local = [self._embed(c.flatten(0, 1)).view(*c.shape[:2], -1) for c in cells]
        return self._embed(map_BCHW.mean(dim=(2, 3))), local

    def _features(self, images_BCHW: Tensor) -> Tensor:
        if hasattr(self.backbone, "forward_features"):
            return self.backbone.forward_features(images_BCHW)
        return self.backbone(images_BCHW)

    def _pooled(self, features: Tensor) -> Tensor:
        if features.ndim == 2:  # a network of the user's own that has pooled them already
            return features
        if features.ndim == 3:  # tokens of a vision transformer: the backbone knows its class token
            return self.backbone.forward_head(features, pre_logits=True)
        channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        return features.mean(dim=(1, 2) if channels_last else (2, 3))

    @torch.no_grad()
    def _pooled_channels(self) -> int:
        name, (height, width) = self.config.backbone, self.config.image_size
        was_training = self.backbone.training
        self.backbone.eval()  # probing must not touch running statistics
        try:
            features = self._features(torch.zeros(1, 3, height, width))
        except Exception as error:  # of a network of the user's own whatever its forward raises
            known = isinstance(error, AssertionError | RuntimeError) and str(error)
            reason = (str(error) if known else f"{type(error).__name__}: {error}").splitlines()[0]
            raise ValueError(f"{name} takes no images of {height}×{width} pixels: {reason}") from error
        tokens = hasattr(self.backbone, "forward_head")
        if not isinstance(features, Tensor) or features.ndim not in ((2, 3, 4) if tokens else (2, 4)):
            found = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise ValueError(f"{name} has no features: it returns {found} for one image, expected (1, C) or a map")
        channels = self._pooled(features).shape[1]
        self.backbone.train(was_training)
        return channels


NETWORK = Embedder


def check_buildable(config: EmbedderConfig, pretrained: bool = False, weights: str = "") -> None:
    """Raises ValueError when an :class:`Embedder` cannot be built as asked, or not start from the file of ``weights``.

    A network of timm takes no memory. The user's own function is really called, without pretrained weights.
    """
    check_start(config.backbone, config.width, pretrained and not weights)
    device = "cpu" if is_own(config.backbone) else "meta"
    _build(config, device, weights, stamp_of(weights) if weights else None)


@lru_cache(maxsize=64)  # every row of a table asks for the same few networks, a second each
def _build(config: EmbedderConfig, device: str, weights: str, stamp: tuple[int, int] | None) -> None:
    with torch.random.fork_rng(devices=[]), torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a file does not hold is said when it is used; meta tensors take nothing
        Embedder(config, weights=weights)
