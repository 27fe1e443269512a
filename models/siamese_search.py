"""R-SiamNet (Han et al., ICCV 2021): a detector whose pyramid also embeds people, in their scene and as crops.

    scene -> pyramid -> RoIAlign of a person's box ─┐
                                                    ├─ one linear layer -> embedding        search path, instance path
    crop  -> the same pyramid -> cells of the crop ─┘

The paper's detector is RepPoints; FCOS is the closest one of torchvision, RetinaNet and Faster R-CNN are the others.
How a crop's maps become as many cells as a pooled box has is open in the paper: ``crop_cells`` has four readings.
"""

# Shape legend: B = scenes, C = channels, H and W = pixels or cells, N = persons of all scenes, D = embedding width.

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from models.detectors import FCOS, SPARSE, Dense, FasterRCNN, Limits, Maps, People, RetinaNet
from models.network import PIXELS, Graph, Pixels, at_least_float32, shared_copy
from models.person_search import Detected, Images, padded
from models.pyramid import Pyramid
from models.regions import Sampling, Scored, Sizes, pooling
from models.scenes import largest_difference, scene_example, scene_feeding

DETECTORS = ("fcos", "retinanet", "faster_rcnn")
CROP_CELLS = ("align", "average", "whole", "align_tall")
_IMAGE = "image"  # the pixels beside their maps, for embeddings of crops cut from them


@dataclass(frozen=True)
class SiameseSearchConfig:
    """What rebuilds a network."""

    backbone: str = "resnet50.tv_in1k"  # of timm
    width: float = 1.0  # scales the channels of a ResNet
    size: tuple[int, int] = (800, 1333)  # shorter side of the resized image, and what the longer may have at most
    detector: str = "fcos"  # or retinanet, faster_rcnn
    levels: int = 256  # channels of every level of the pyramid
    group_norm: bool = False  # of 32 groups in the pyramid, as the original has
    dim: int = 2048  # D
    crop: tuple[int, int] = (192, 64)  # height and width of a crop
    # align: RoIAlign 7×7 of the whole crop; average: one level, averaged to 7×7; whole: the finest but one level as it
    # is, and RoIAlign of as many cells in the scene; align_tall: RoIAlign 14×6 in both paths
    crop_cells: str = "align"
    crop_level: int = 0  # of "average": 0 is the finest that boxes are pooled from
    search_by: str = "scene"  # what a detected person is embedded by: its scene, or the crop cut from it
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)  # pixels, a level each; FCOS has none
    score: float = 0.05  # below there is no detection
    overlap: float = 0.5  # of two detections
    detections: int = 100  # of an image at most
    candidates: int = 1000  # before NMS, of a level
    pixels: str = "imagenet"  # mean and deviation


class SparsePyramid(Pyramid):
    """Images -> {"0": stride 8, "1": 16, "2": 32, "p6": 64, "p7": 128}: two more levels by convolutions of stride 2."""

    def __init__(
        self, name: str, channels: int, width: float, pretrained: bool, weights: str, group_norm: bool
    ) -> None:
        super().__init__(name, channels, width, pretrained, weights)
        inputs = self.body.feature_info.channels()[1:]
        norm = partial(nn.GroupNorm, 32) if group_norm else None
        self.fpn = FeaturePyramidNetwork(inputs, channels, LastLevelP6P7(channels, channels), norm)

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        return self.fpn(dict(zip(SPARSE, self.body(images_BCHW)[1:], strict=False)))


class Seen(NamedTuple):
    """A training step's view of a batch."""

    maps: dict[str, Tensor]
    detector: NamedTuple  # what the losses of the detector compare


class SiameseSearch(nn.Module):
    """The network.

    Args:
        config: what it is.
        pretrained: start the backbone from timm's weights.
        weights: start the backbone from a local file instead.

    Raises:
        ValueError: an unknown detector or way of pooling, or a network that cannot be built.

    >>> net = SiameseSearch(SiameseSearchConfig("resnet10t", 0.125, (64, 96), levels=64, dim=4, crop=(32, 16)))
    >>> found = net.deployed()(torch.zeros(1, 3, 64, 80))
    >>> [len(x.shape) for x in found], found[2].shape[1], tuple(net.embed_crops(torch.zeros(2, 3, 32, 16)).shape)
    ([2, 1, 2], 4, (2, 4))
    """

    kind: ClassVar[str] = "siamese_search"
    Config = SiameseSearchConfig
    input_names: tuple[str, ...] = ("images",)
    outputs = ("boxes", "scores", "embeddings")
    output = "boxes x1 y1 x2 y2 in pixels of the resized image; unit embeddings, not multiplied by the score"
    architecture = (
        "pyramid: strides 8, 16, 32 of the backbone, two more by convolutions (Faster R-CNN: strides 4 to 64)",
        "detector: torchvision's head of its name, one class",
        "embedding: RoIAlign of four levels, one linear layer, unit length",
    )

    def __init__(self, config: SiameseSearchConfig, pretrained: bool = False, weights: str = "") -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.pixels: Pixels = PIXELS[config.pixels]
        self.trunk, self.detector = _trunk(config, pretrained, weights)
        self.pool = pooling(self.detector.levels[:4], _cells(config))
        height, width = _cells(config)
        self.embedding = nn.Linear(config.levels * height * width, config.dim)
        self._still: list[nn.Module] = []

    # --- training

    def freeze(self, stages: int, norms: bool) -> None:
        """Takes the stem and the first stages of a ResNet, and all norms of the backbone, out of training.

        Frozen norms are in evaluation mode, as in the original: scenes and crops would share their statistics.
        """
        stem = self.trunk.stem() if stages else []
        frozen = [*stem, *(self.trunk.body[f"layer{n}"] for n in range(1, stages + 1) if stem)]
        self._still = self.trunk.norms() if norms else [n for m in frozen for n in m.modules() if _is_norm(n)]
        for module in [*frozen, *self._still]:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> "SiameseSearch":
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    def trained(self, images: Images, people: People, sampling: Sampling, draws: Sequence[torch.Generator]) -> Seen:
        """The search path on a batch; gradient flows to maps and the detector's outputs.

        Args:
            images: padded batch.
            people: boxes (n, 4) of every scene, pixels of the resized one; n may be 0.
            sampling, draws: how much Faster R-CNN looks at; the others look at all places.
        """
        maps = self.trunk(images.pixels_BCHW)
        looked = self.detector(maps, *images.pixels_BCHW.shape[-2:])
        if isinstance(self.detector, FasterRCNN):
            said = self.detector.trained(looked, maps, images.sizes, people, sampling, draws)
        else:
            said = self.detector.trained(looked, people)
        return Seen(maps, said)

    def embed_boxes(self, maps: Maps, boxes: list[Tensor], sizes: Sizes) -> Tensor:
        """Search path: raw embeddings (N, D) of boxes of every scene."""
        like = maps[self.detector.levels[0]]
        pooled_NCHW = self.pool(dict(maps), [b.to(like) for b in boxes], list(sizes))
        return self.embedding(pooled_NCHW.flatten(1))

    def embed_crops(self, crops_NCHW: Tensor) -> Tensor:
        """Instance path: raw embeddings (N, D) of crops, normalised as scenes are."""
        maps, own = self.trunk(crops_NCHW), self.config
        if own.crop_cells == "average":
            cells_NCHW = F.adaptive_avg_pool2d(maps[self.detector.levels[own.crop_level]], _cells(own))
        elif own.crop_cells == "whole":
            cells_NCHW = maps[self.detector.levels[1]]
        else:
            height, width = crops_NCHW.shape[-2:]
            whole_14 = crops_NCHW.new_tensor([[0, 0, width, height]])
            sizes = [(height, width)] * len(crops_NCHW)
            cells_NCHW = self.pool(maps, [whole_14] * len(crops_NCHW), sizes)
        return self.embedding(cells_NCHW.flatten(1))

    # --- search

    def pyramid(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Maps of images; where people are embedded by their crops, the images too."""
        maps = self.trunk(images_BCHW)
        return {**maps, _IMAGE: images_BCHW} if self.config.search_by == "crop" else maps

    def embed(self, maps: Maps, boxes: list[Tensor], sizes: Sizes) -> Tensor:
        """Unit embeddings (N, D) of boxes of every image, as a search has them."""
        if _IMAGE not in maps:
            raw_ND = self.embed_boxes(maps, boxes, sizes)
        else:
            image = maps[_IMAGE]
            crops = roi_align(image, [b.to(image) for b in boxes], self.config.crop, 1.0, 2, aligned=True)
            raw_ND = self.embed_crops(crops) if len(crops) else crops.new_zeros(0, self.config.dim)
        return F.normalize(at_least_float32(raw_ND), eps=1e-12)

    def found(self, maps: Maps, images: Images) -> list[Detected]:
        """People of every image; embeddings are not weighted. Pixels of the resized image."""
        own, sizes = self.config, images.sizes
        limits = Limits(own.score, own.overlap, own.detections, own.candidates)
        looked: Dense | Scored = self.detector(maps, *images.pixels_BCHW.shape[-2:])
        if isinstance(self.detector, FasterRCNN):
            people = self.detector.found(looked, maps, sizes, limits)
        else:
            people = self.detector.found(looked, sizes, limits)
        embeddings = self.embed(maps, [b for b, _ in people], sizes).split([len(b) for b, _ in people])
        return [Detected(box_n4, score_n, e_nD) for (box_n4, score_n), e_nD in zip(people, embeddings, strict=True)]

    def forward(self, images_1CHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (n, 4), scores (n,) and unit embeddings (n, D) of one image, normalised, not padded."""
        images = padded(images_1CHW)
        return tuple(self.found(self.pyramid(images.pixels_BCHW), images)[0])

    # --- what every network is asked for

    @property
    def feeding(self) -> dict[str, Any]:
        return scene_feeding(self.config.size, self.pixels)

    def deployed(self) -> "SiameseSearch":
        return shared_copy(self).eval()

    def example(self, count: int) -> tuple[Tensor, ...]:
        """Images of one size; the network takes them one by one."""
        return scene_example(self.config.size, count)

    def parts(self) -> dict[str, nn.Module]:
        bare = self.deployed()
        return {"total": _Full(bare), "body": bare.trunk.body}

    def extras(self) -> dict[str, Tensor]:
        return {}

    def same(self, ours: Sequence[Tensor], exported: Sequence[Tensor]) -> float:
        """Largest difference of a number; boxes in shares of the shorter side. Infinite for another number of boxes."""
        return largest_difference(self.config.size[0], ours, exported)

    def exportable(self) -> str:
        if self.config.search_by == "crop":
            return "it embeds people by crops of the image it found them in; search_by=scene has a graph"
        return ""

    def graphs(self) -> dict[str, Graph]:
        from models.siamese_search_graph import search_graphs  # which says this class in another way

        return search_graphs(self)


class _Full(nn.Module):
    """Searches with as many detections as there may be: what that costs does not depend on the image."""

    def __init__(self, network: SiameseSearch) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return torch.cat([self._one(image_1CHW) for image_1CHW in images_BCHW.split(1)])

    def _one(self, image_1CHW: Tensor) -> Tensor:
        net, images = self.network, padded(image_1CHW)
        maps = net.pyramid(images.pixels_BCHW)
        net.detector(maps, *images.pixels_BCHW.shape[-2:])
        height, width = images.sizes[0]
        whole_14 = image_1CHW.new_tensor([[0, 0, width, height]])
        if isinstance(net.detector, FasterRCNN):
            net.detector.classify(maps, [whole_14.expand(net.config.candidates, 4)], images.sizes)
        return net.embed(maps, [whole_14.expand(net.config.detections, 4)], images.sizes)


def _check(config: SiameseSearchConfig) -> None:
    for name, known in (("detector", DETECTORS), ("crop_cells", CROP_CELLS), ("search_by", ("scene", "crop"))):
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, got {getattr(config, name)!r}")
    if config.crop_cells == "whole" and any(side % 32 for side in config.crop):
        height, width = config.crop
        raise ValueError(f"crop_cells=whole takes crops whose sides are multiples of 32, got {height}×{width}")
    if config.group_norm and config.levels % 32:
        raise ValueError(f"group_norm has 32 groups; levels must be a multiple of 32, got {config.levels}")


def _trunk(config: SiameseSearchConfig, pretrained: bool, weights: str) -> tuple[Pyramid, nn.Module]:
    """The pyramid and the detector that looks at its levels."""
    own = config
    if own.detector == "faster_rcnn":
        pyramid = Pyramid(own.backbone, own.levels, own.width, pretrained, weights)
        return pyramid, FasterRCNN(own.levels, own.anchors)
    pyramid = SparsePyramid(own.backbone, own.levels, own.width, pretrained, weights, own.group_norm)
    detector = FCOS(own.levels) if own.detector == "fcos" else RetinaNet(own.levels, own.anchors)
    return pyramid, detector


def _cells(config: SiameseSearchConfig) -> tuple[int, int]:
    """Rows and columns that the linear layer sees of a person."""
    if config.crop_cells == "whole":
        stride = 8 if config.detector == "faster_rcnn" else 16
        return config.crop[0] // stride, config.crop[1] // stride
    return (14, 6) if config.crop_cells == "align_tall" else (7, 7)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


NETWORK = SiameseSearch
