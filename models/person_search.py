"""Person search in two stages, as SeqNet has it with a feature pyramid: where is a person, and who is it?

    images -> pyramid -> proposals -> first head (person or not, better box) -> second head (embedding)

The second head's embedding is norm-aware (NAE, Chen et al., CVPR 2020): two projections, batch norms, unit length.
Feature maps and regions are returned, not hooked: whoever distils asks a teacher for the same boxes.
"""

# Shape legend: B = images, C = channels, H and W = cells or pixels, R = sampled proposals and P = sampled second boxes
# of all images, N = boxes of all images, n = boxes of one image, D = embedding width.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import clip_boxes_to_image, nms

from models.network import (
    PIXELS,
    Graph,
    Pixels,
    at_least_float32,
    shared_copy,
)
from models.pyramid import LEVELS, Pyramid
from models.regions import (
    HEAD_CODER,
    HeadInput,
    Regions,
    Sampling,
    Scored,
    Sizes,
    chosen,
    decoded,
    pooling,
    proposals,
    sampled_anchors,
)
from models.scenes import largest_difference, scene_example, scene_feeding

SMALLEST = 0.01  # sides of a detection, pixels
_POOL = 7  # cells of a pooled region


@dataclass(frozen=True)
class PersonSearchConfig:
    """What rebuilds a network."""

    backbone: str = "resnet50.tv_in1k"  # of timm
    width: float = 1.0  # scales the channels of a ResNet
    size: tuple[int, int] = (900, 1500)  # shorter side of the resized image, and what the longer may have at most
    levels: int = 256  # channels of every level of the pyramid
    head: int = 1024  # width of the two layers of each head
    dim: int = 256  # D
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)  # pixels, a level each
    proposals: int = 1000  # of an image, when it is searched
    proposal_score: float = 0.0  # probability below which there is no proposal, also in training
    score: float = 0.05  # below there is no detection
    overlap: float = 0.5  # of two detections
    detections: int = 100  # of an image at most
    pixels: str = "imagenet"  # mean and deviation


class Images(NamedTuple):
    """A batch at one size: normalised, padded with zeros at the right and below."""

    pixels_BCHW: Tensor
    sizes: Sizes  # before padding


class Trained(NamedTuple):
    """All that a training step has seen; what belongs to one image lies together, in the order of the images."""

    maps: dict[str, Tensor]  # "0" … "3", "pool"
    logit_A: Tensor  # of the sampled anchors
    delta_A4: Tensor
    anchor_label_A: Tensor
    anchor_target_A4: Tensor
    regions: HeadInput
    logit_R2: Tensor  # of the sampled proposals: background, person
    delta_R8: Tensor
    people: HeadInput  # of the second head; their targets are not used
    embedding_PD: Tensor  # unit rows


class Detected(NamedTuple):
    """People of one image by falling score."""

    boxes_N4: Tensor
    score_N: Tensor
    embedding_ND: Tensor


class NormAware(nn.Module):
    """Embedding of two inputs: each a linear layer and a batch norm to a half of D; unit rows (N, D).

    SeqNet makes a class score of the norm, which no loss of DDPS looks at: it is left out.
    """

    def __init__(self, inputs: Sequence[int], dim: int) -> None:
        super().__init__()
        widths = [dim // len(inputs) + (i < dim % len(inputs)) for i in range(len(inputs))]
        self.project = nn.ModuleList(
            nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o)) for i, o in zip(inputs, widths, strict=True)
        )
        for linear, norm in self.project:
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.normal_(norm.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, *inputs: Tensor) -> Tensor:
        parts = [project(x.flatten(1)) for project, x in zip(self.project, inputs, strict=True)]
        with torch.autocast(inputs[0].device.type, enabled=False):
            return F.normalize(at_least_float32(torch.cat(parts, 1)), eps=1e-12)


class PersonSearch(nn.Module):
    """The network.

    Args:
        config: what it is.
        pretrained: start the backbone from timm's weights.
        weights: start the backbone from a local file instead.

    >>> net = PersonSearch(PersonSearchConfig("resnet10t", 0.125, (64, 96), levels=8, head=16, dim=4))
    >>> found = net.deployed()(torch.zeros(1, 3, 64, 80))
    >>> [len(x.shape) for x in found], found[2].shape[1]
    ([2, 1, 2], 4)
    """

    kind: ClassVar[str] = "person_search"
    Config = PersonSearchConfig
    input_names: tuple[str, ...] = ("images",)
    outputs = ("boxes", "scores", "embeddings")
    output = "boxes x1 y1 x2 y2 in pixels of the resized image; unit embeddings, multiplied by the score in a gallery"
    architecture = (
        "pyramid: backbone at strides 4, 8, 16, 32; feature pyramid with one more level by max pooling",
        "anchors: one size a level, ratios 0.5, 1, 2; proposals are pooled 7×7 from four levels",
        "first head: two linear layers, class logits and offsets (weights 10, 10, 5, 5)",
        "second head: two linear layers; projections of its input and of its output, batch norms, unit length",
    )

    def __init__(self, config: PersonSearchConfig, pretrained: bool = False, weights: str = "") -> None:
        super().__init__()
        self.config = config
        self.pixels: Pixels = PIXELS[config.pixels]
        self.pyramid = Pyramid(config.backbone, config.levels, config.width, pretrained, weights)
        self.regions = Regions(config.levels, config.anchors)
        self.pool = pooling(LEVELS, (_POOL, _POOL))
        pooled = config.levels * _POOL**2
        self.first = TwoMLPHead(pooled, config.head)
        self.predictor = FastRCNNPredictor(config.head, 2)
        self.second = TwoMLPHead(pooled, config.head)
        self.embedding = NormAware((pooled, config.head), config.dim)
        self.memory: nn.Module | None = None  # of identities, such as OIM's: whoever trains sets it
        self._still: list[nn.Module] = []

    # --- training

    def freeze(self, stem: bool, norms: bool) -> None:
        """Takes a ResNet's first convolution and norm, or the statistics and weights of all norms, out of training.

        The stem's running statistics still move, as in the public code.
        """
        for module in self.pyramid.stem() if stem else []:
            module.requires_grad_(False)
        self._still = self.pyramid.norms() if norms else []
        for module in self._still:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> "PersonSearch":
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    def trained(
        self,
        images: Images,
        people: Sequence[Tensor],
        identities: Sequence[Tensor],
        sampling: Sampling,
        draws: Sequence[torch.Generator],
    ) -> Trained:
        """A training step's view of a batch; gradient flows to logits, offsets, maps and embeddings.

        Waits for the device: how many boxes are sampled decides shapes.

        Args:
            images: padded batch.
            people: boxes (n, 4) of every image, pixels of the resized image; n may be 0.
            identities: (n,) of every image, above 0.
            sampling: how much is looked at.
            draws: a generator of each image, on the CPU.
        """
        maps = self.pyramid(images.pixels_BCHW)
        scored = self.regions(maps, *images.pixels_BCHW.shape[-2:])
        anchors = sampled_anchors(scored, people, sampling, draws)
        proposed = self.proposals(scored, images.sizes, sampling)
        regions = chosen(proposed, people, identities, sampling, draws)
        logit_R2, delta_R8 = self.classify(maps, regions.boxes, images.sizes)
        second = refined(delta_R8, regions.boxes, images.sizes)
        persons = chosen(second, people, identities, sampling, draws)
        embedding_PD = self.embed(maps, persons.boxes, images.sizes)
        return Trained(maps, *anchors, regions, logit_R2, delta_R8, persons, embedding_PD)

    def proposals(self, scored: Scored, sizes: Sizes, sampling: Sampling | None = None) -> list[Tensor]:
        """Boxes of every image; without ``sampling`` as many as in a search."""
        own = self.config
        counts = (sampling.before_nms, sampling.proposals) if sampling else (own.proposals, own.proposals)
        return proposals(scored, sizes, *counts, own.proposal_score)

    def classify(self, maps: Mapping[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
        """First head on given boxes: logits (N, 2) and offsets (N, 8)."""
        return self.predictor(self.first(self.pooled(maps, boxes, sizes)))

    def embed(self, maps: Mapping[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> Tensor:
        """Second head on given boxes: unit embeddings (N, D)."""
        pooled_NCHW = self.pooled(maps, boxes, sizes)
        return self.embedding(pooled_NCHW, self.second(pooled_NCHW))

    def pooled(self, maps: Mapping[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> Tensor:
        """(N, C, 7, 7)"""
        return self.pool(dict(maps), boxes, list(sizes))

    # --- search

    def found(self, maps: Mapping[str, Tensor], images: Images) -> list[Detected]:
        """People of every image; embeddings are not weighted. Pixels of the resized image."""
        own = self.config
        proposed = self.proposals(self.regions(maps, *images.pixels_BCHW.shape[-2:]), images.sizes)
        logit_R2, delta_R8 = self.classify(maps, proposed, images.sizes)
        score_R, counts = logit_R2.float().softmax(1)[:, 1], [len(b) for b in proposed]
        better = refined(delta_R8, proposed, images.sizes)
        people = [
            real_people(box_n4, score_n, own.score, own.overlap, own.detections)
            for box_n4, score_n in zip(better, score_R.split(counts), strict=True)
        ]
        embeddings = self.embed(maps, [b for b, _ in people], images.sizes).split([len(b) for b, _ in people])
        return [Detected(*own, e_nD) for own, e_nD in zip(people, embeddings, strict=True)]

    def forward(self, images_1CHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (n, 4), scores (n,) and unit embeddings (n, D) of one image, normalised, not padded."""
        images = padded(images_1CHW)
        return tuple(self.found(self.pyramid(images.pixels_BCHW), images)[0])

    # --- what every network is asked for

    @property
    def feeding(self) -> dict[str, Any]:
        return scene_feeding(self.config.size, self.pixels)

    def deployed(self) -> "PersonSearch":
        bare = shared_copy(self)
        bare.memory = None
        return bare.eval()

    def example(self, count: int) -> tuple[Tensor, ...]:
        """Images of one size; the network takes them one by one."""
        return scene_example(self.config.size, count)

    def parts(self) -> dict[str, nn.Module]:
        bare = self.deployed()
        return {"total": _Full(bare), "body": bare.pyramid.body}

    def extras(self) -> dict[str, Tensor]:
        """The memory of identities: who distils ranks boxes by it."""
        if self.memory is None:
            return {}
        return {f"memory.{name}": value for name, value in self.memory.named_buffers()}

    def same(self, ours: Sequence[Tensor], exported: Sequence[Tensor]) -> float:
        """Largest difference of a number; boxes in shares of the shorter side. Infinite for another number of boxes."""
        return largest_difference(self.config.size[0], ours, exported)

    def exportable(self) -> str:
        return ""

    def graphs(self) -> dict[str, Graph]:
        from models.person_search_graph import search_graphs  # which says this class in another way

        return search_graphs(self)


class _Full(nn.Module):
    """Searches with as many proposals and detections as there may be: what they cost does not depend on the image."""

    def __init__(self, network: PersonSearch) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return torch.cat([self._one(image_1CHW) for image_1CHW in images_BCHW.split(1)])

    def _one(self, image_1CHW: Tensor) -> Tensor:
        net, images = self.network, padded(image_1CHW)
        maps = net.pyramid(images.pixels_BCHW)
        proposed = net.proposals(net.regions(maps, *images.pixels_BCHW.shape[-2:]), images.sizes)[0]
        height, width = images.sizes[0]
        whole = proposed.new_tensor([[0, 0, width, height]])
        for count, head in ((net.config.proposals, net.classify), (net.config.detections, net.embed)):
            boxes = torch.cat([proposed[:count], whole.expand(max(0, count - len(proposed)), 4)])
            found = head(maps, [boxes], images.sizes)
        return found


def padded(images_1CHW: Tensor, stride: int = 32) -> Images:
    """One image, padded to a multiple of the stride."""
    height, width = images_1CHW.shape[-2:]
    # Not -height % stride: with this torch.export sees a multiple, and simple sizes of all maps.
    below, right = ((n + stride - 1) // stride * stride - n for n in (height, width))
    return Images(F.pad(images_1CHW, (0, right, 0, below)), [(height, width)])


def refined(delta_N8: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """The boxes that the first head's offsets for persons lead to, inside their images; no gradient."""
    counts = [len(b) for b in boxes]
    box_N4 = decoded(at_least_float32(delta_N8.detach())[:, 4:], torch.cat(boxes), HEAD_CODER)
    return [clip_boxes_to_image(b, size) for b, size in zip(box_N4.split(counts), sizes, strict=True)]


def postprocess(
    boxes_N4: Tensor,
    score_N: Tensor,
    embedding_ND: Tensor,
    score_threshold: float = 0.05,
    nms_iou: float = 0.5,
    top: int = 100,
    weigh: bool = True,
) -> Detected:
    """The best boxes that do not overlap, by falling score.

    For a query's image the caller appends the person's own box with score 1 and passes ``weigh=False``.

    Args:
        boxes_N4: x1 y1 x2 y2.
        score_N: boxes with one above the threshold stay.
        embedding_ND: unit rows.
        nms_iou: of two boxes that overlap more the lower one goes.
        top: how many stay at most.
        weigh: multiply the embeddings by the score, as in a gallery.

    Raises:
        ValueError: not as many rows of each.

    >>> box = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    >>> postprocess(box, torch.tensor([0.5, 0.9, 0.01]), torch.ones(3, 1)).embedding_ND.tolist()
    [[0.8999999761581421]]
    """
    rows = len(boxes_N4)
    if boxes_N4.shape != (rows, 4) or score_N.shape != (rows,) or embedding_ND.ndim != 2 or len(embedding_ND) != rows:
        raise ValueError(
            f"need boxes (n, 4), n scores and n embeddings, got {tuple(boxes_N4.shape)}, {tuple(score_N.shape)} "
            f"and {tuple(embedding_ND.shape)}"
        )
    kept = _best(boxes_N4, score_N, score_threshold, nms_iou, top)
    embedding_ND = embedding_ND[kept] * score_N[kept, None] if weigh else embedding_ND[kept]
    return Detected(boxes_N4[kept], score_N[kept], embedding_ND)


def real_people(box_n4: Tensor, score_n: Tensor, least: float, iou: float, top: int) -> tuple[Tensor, Tensor]:
    """Boxes and scores of the detections of one image by falling score; a box without area is none."""
    real_n = ((box_n4[:, 2:] - box_n4[:, :2]) >= SMALLEST).all(1)
    box_n4, score_n = box_n4[real_n], score_n[real_n]
    rows = _best(box_n4, score_n, least, iou, top)
    return box_n4[rows], score_n[rows]


def _best(box_n4: Tensor, score_n: Tensor, least: float, iou: float, top: int) -> Tensor:
    rows = (score_n > least).nonzero()[:, 0]
    return rows[nms(box_n4[rows], score_n[rows], iou)[:top]]


NETWORK = PersonSearch
