"""R-SiamNet as ONNX graphs: the same people, found with as many rows in every image.

As :mod:`models.person_search_graph` has it: what a search throws away scores -1, comes last in every NMS, and is
dropped at the very end.
"""

# Shape legend: H and W = pixels, K = places of one level, N = boxes, D = embedding width.

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from models.detectors import FasterRCNN
from models.network import Graph
from models.person_search import SMALLEST, padded
from models.person_search_graph import NONE, FixedPool, after_nms, free_device, graphs_of, large, proposed
from models.regions import HEAD_CODER, Sizes, decoded
from models.siamese_search import SiameseSearch


def search_graphs(network: SiameseSearch) -> dict[str, Graph]:
    """People of an image of any size, and of the network's own size; and the embeddings of given boxes.

    Images (1, 3, H, W) are normalised and not padded; boxes are in their pixels, and there may be none of them.
    """
    torchs, traced = network.deployed(), network.deployed()
    traced.pool = FixedPool(traced.pool)
    if isinstance(traced.detector, FasterRCNN):
        traced.detector.pool = FixedPool(traced.detector.pool)
        free_device(traced.detector.regions.anchors)
    else:
        free_device(traced.detector.anchors)
    return graphs_of(network, Search(traced).eval(), traced, torchs)


class Search(nn.Module):
    """The outputs of :class:`SiameseSearch`, whose pools are :class:`FixedPool`."""

    def __init__(self, network: SiameseSearch) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_1CHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net, own, images = self.network, self.network.config, padded(images_1CHW)
        maps = net.pyramid(images.pixels_BCHW)
        looks = self._two_stage if isinstance(net.detector, FasterRCNN) else self._one_stage
        box_N4, score_N = looks(maps, images.pixels_BCHW, images.sizes)
        score_N = torch.where((score_N > own.score) & large(box_N4, SMALLEST), score_N, NONE)
        score_N, rows = after_nms(box_N4, score_N, own.overlap).topk(min(own.detections, own.candidates))
        embedding_ND = net.embed(maps, [box_N4[rows]], images.sizes)
        real = (score_N > NONE).nonzero()[:, 0]
        return box_N4[rows][real], score_N[real], embedding_ND[real]

    def _one_stage(self, maps: dict[str, Tensor], pixels_BCHW: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """The best places of every level; a small level is filled with places of no size."""
        net, count = self.network, self.network.config.candidates
        dense = net.detector(maps, *pixels_BCHW.shape[-2:])
        levels = zip(
            net.detector.scores(dense)[0].split(dense.per_level), dense.code_BA4[0].split(dense.per_level),
            dense.anchor_A4.split(dense.per_level), strict=True,
        )  # fmt: skip
        scores, codes, anchors = [], [], []
        for score_K, code_K4, anchor_K4 in levels:
            best = F.pad(score_K, (0, count), value=NONE).topk(count)
            scores.append(best.values)
            codes.append(F.pad(code_K4, (0, 0, 0, count))[best.indices])
            anchors.append(F.pad(anchor_K4, (0, 0, 0, count))[best.indices])
        return clip_boxes_to_image(net.detector.decode(torch.cat(codes), torch.cat(anchors)), sizes[0]), torch.cat(
            scores
        )

    def _two_stage(self, maps: dict[str, Tensor], pixels_BCHW: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
        net = self.network
        scored = net.detector(maps, *pixels_BCHW.shape[-2:])
        box_N4, score_N = proposed(scored, sizes[0], net.config.candidates, 0.0)
        logit_N2, delta_N8 = net.detector.classify(maps, [box_N4], sizes)
        box_N4 = clip_boxes_to_image(decoded(delta_N8[:, 4:], box_N4, HEAD_CODER), sizes[0])
        return box_N4, torch.where(score_N > NONE, logit_N2.softmax(1)[:, 1], NONE)
