"""A person search as ONNX graphs: the same people, found with as many rows in every image.

What a search throws away decides how many boxes it goes on with. torchvision's NMS of levels and its pool look at
such numbers, which torch.export cannot follow. Here every level keeps as many rows as there may be proposals; those
that a search throws away score -1: they come last in every NMS, so suppress nothing, and are dropped at the very end.
Boxes of exactly the same score are in any order in torch, and may be in another one in a graph.
"""

# Shape legend: H and W = pixels, C = channels, K = anchors of one level, N = boxes, D = embedding width.

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, nms, roi_align
from torchvision.ops.poolers import LevelMapper

from models.network import Graph
from models.person_search import SMALLEST, PersonSearch, padded
from models.regions import HEAD_CODER, OVERLAP, SMALLEST_PROPOSAL, Scored, decoded

NONE = -1.0  # score of a box that a search throws away
_TRACED = (219, 318)  # pixels: no two sides of a map are alike, and none is 1, which would be taken for fixed
_FREE = {2: "height", 3: "width"}


def search_graphs(network: PersonSearch) -> dict[str, Graph]:
    """People of an image of any size, and of the network's own size; and the embeddings of given boxes.

    Images (1, 3, H, W) are normalised and not padded; boxes are in their pixels, and there may be none of them.
    """
    torchs, traced = network.deployed(), network.deployed()
    traced.pool = FixedPool(traced.pool)
    free_device(traced.regions.anchors)
    return graphs_of(network, Search(traced).eval(), traced, torchs)


def free_device(anchors: AnchorGenerator) -> None:
    """Anchors are no buffers: they stay where the network has been, and are traced on the CPU."""
    anchors.cell_anchors = [cell.cpu() for cell in anchors.cell_anchors]


def graphs_of(network: nn.Module, search: nn.Module, traced: nn.Module, torchs: nn.Module) -> dict[str, Graph]:
    """The graphs of a network that searches: ``search`` and ``traced`` say in another way what ``torchs`` does."""
    draw = torch.Generator().manual_seed(1)
    (own,), small = network.example(1), torch.randn(1, 3, *_TRACED, generator=draw)
    upright = own.transpose(2, 3).contiguous()
    names, outputs = network.input_names, network.outputs
    return {
        "": Graph(search, (small,), names, outputs, (_FREE,), ((own,), (upright,)), torchs),
        "fixed": Graph(search, (own,), names, outputs, reference=torchs),
        "embedding": Graph(
            Embedding(traced).eval(), (small, _boxes(small, 5, draw)), (*names, "boxes"), outputs[-1:],
            (_FREE, {0: "people"}),
            tuple((image, _boxes(image, n, draw)) for image, n in ((own, 9), (upright, 0))),
            Embedding(torchs).eval(),
        ),
    }  # fmt: skip


class Search(nn.Module):
    """The outputs of :class:`PersonSearch`, whose pool is a :class:`FixedPool`."""

    def __init__(self, network: PersonSearch) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_1CHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net, own, images = self.network, self.network.config, padded(images_1CHW)
        (size,) = images.sizes
        maps = net.pyramid(images.pixels_BCHW)
        scored = net.regions(maps, *images.pixels_BCHW.shape[-2:])
        box_N4, score_N = proposed(scored, size, own.proposals, own.proposal_score)
        logit_N2, delta_N8 = net.classify(maps, [box_N4], images.sizes)
        box_N4 = clip_boxes_to_image(decoded(delta_N8[:, 4:], box_N4, HEAD_CODER), size)
        person_N = logit_N2.softmax(1)[:, 1]
        real_N = (score_N > NONE) & large(box_N4, SMALLEST) & (person_N > own.score)
        score_N, rows = after_nms(box_N4, torch.where(real_N, person_N, NONE), own.overlap).topk(
            min(own.detections, own.proposals)
        )
        embedding_ND = net.embed(maps, [box_N4[rows]], images.sizes)
        real = (score_N > NONE).nonzero()[:, 0]
        return box_N4[rows][real], score_N[real], embedding_ND[real]


class Embedding(nn.Module):
    """Unit embeddings (N, D) of the people in given boxes (N, 4) of one image."""

    def __init__(self, network: PersonSearch) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_1CHW: Tensor, box_N4: Tensor) -> Tensor:
        images = padded(images_1CHW)
        return self.network.embed(self.network.pyramid(images.pixels_BCHW), [box_N4], images.sizes)


class FixedPool(nn.Module):
    """What torchvision's pool does for one image, at the strides of the pyramid; that one infers them from sizes."""

    def __init__(self, pool: MultiScaleRoIAlign) -> None:
        super().__init__()
        self.names, self.output_size, self.samples = pool.featmap_names, pool.output_size, pool.sampling_ratio
        self.strides = [round(1 / scale) for scale in pool.scales]
        finest, coarsest = (stride.bit_length() - 1 for stride in (self.strides[0], self.strides[-1]))
        self.level_of = LevelMapper(finest, coarsest, pool.canonical_scale, pool.canonical_level)

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        (box_N4,) = boxes
        level_N, roi_N5 = self.level_of(boxes), F.pad(box_N4, (1, 0))
        pooled_NCHW = box_N4.new_zeros(box_N4.shape[0], maps[self.names[0]].shape[1], *self.output_size)
        # Every box on its own level: all boxes on all levels would need no rows, and takes four times as long.
        for level, (name, stride) in enumerate(zip(self.names, self.strides, strict=True)):
            rows = (level_N == level).nonzero()[:, 0]
            pooled_NCHW[rows] = roi_align(maps[name], roi_N5[rows], self.output_size, 1 / stride, self.samples)
        return pooled_NCHW


def proposed(scored: Scored, size: tuple[int, int], count: int, least: float) -> tuple[Tensor, Tensor]:
    """``count`` boxes by falling score, and their scores: what :func:`models.regions.proposals` gives come first."""
    levels = zip(
        scored.logit_BN[0].split(scored.per_level), scored.delta_BN4[0].split(scored.per_level),
        scored.anchor_N4.split(scored.per_level), strict=True,
    )  # fmt: skip
    logits, deltas, anchors = [], [], []
    for logit_K, delta_K4, anchor_K4 in levels:
        # A small level has fewer anchors: further ones are of no size, so that they are not real.
        best = F.pad(logit_K, (0, count), value=-torch.inf).topk(count)
        logits.append(best.values)
        deltas.append(F.pad(delta_K4, (0, 0, 0, count))[best.indices])
        anchors.append(F.pad(anchor_K4, (0, 0, 0, count))[best.indices])
    box_N4 = clip_boxes_to_image(decoded(torch.cat(deltas), torch.cat(anchors)), size)
    score_N = torch.cat(logits).sigmoid()
    score_N = torch.where(large(box_N4, SMALLEST_PROPOSAL) & (score_N >= least), score_N, NONE)
    parts = zip(box_N4.split(count), score_N.split(count), strict=True)
    score_N, rows = torch.cat([after_nms(*level, OVERLAP) for level in parts]).topk(count)
    return box_N4[rows], score_N


def after_nms(box_N4: Tensor, score_N: Tensor, iou: float) -> Tensor:
    """The scores again, without those of the boxes that NMS removes."""
    kept = nms(box_N4, score_N, iou)
    return torch.full_like(score_N, NONE).index_put((kept,), score_N[kept])


def large(box_N4: Tensor, least: float) -> Tensor:
    return ((box_N4[:, 2:] - box_N4[:, :2]) >= least).all(1)


def _boxes(image_1CHW: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Boxes (count, 4) anywhere in an image."""
    height, width = image_1CHW.shape[-2:]
    corner_N22 = torch.rand(count, 2, 2, generator=draw).sort(1).values
    return (corner_N22 * torch.tensor([width, height])).flatten(1)
