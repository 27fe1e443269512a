"""Where are people? Three detectors over a feature pyramid, built from torchvision's heads, anchors and matcher.

FCOS scores points, RetinaNet anchors, Faster R-CNN proposals. Each has three methods: ``forward`` looks at the maps,
``trained`` says what its losses compare, ``found`` gives the people of every image; the second head of Faster R-CNN
looks at the maps again.
"""

# Shape legend: B = images, A = points or anchors of an image, G = persons of an image, n = boxes of one image,
# R = sampled proposals of all images.

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, clip_boxes_to_image

from models.network import at_least_float32
from models.person_search import real_people, refined
from models.pyramid import LEVELS
from models.regions import (
    HeadInput,
    Regions,
    Sampling,
    Scored,
    Sizes,
    chosen,
    decoded,
    encoded,
    pooling,
    proposals,
    sampled_anchors,
    top_of_levels,
)

Maps = Mapping[str, Tensor]
People = Sequence[Tensor]  # boxes (G, 4) of every image, pixels
SPARSE = ("0", "1", "2", "p6", "p7")  # levels at strides 8, 16, 32, 64, 128
_POOL = 7
_RADIUS = 1.5  # of FCOS: a point within so many strides of a person's centre can be on it


class Limits(NamedTuple):
    """What is a detection."""

    score: float = 0.05  # below there is none
    overlap: float = 0.5  # of two
    detections: int = 100  # of an image at most
    candidates: int = 1000  # before NMS: of a level, of Faster R-CNN proposals of an image


class Dense(NamedTuple):
    """What a one-stage detector says of every place."""

    logit_BA: Tensor
    code_BA4: Tensor  # FCOS: distances to the sides; RetinaNet: offsets
    centre_BA: Tensor | None  # logits of centre-ness; FCOS alone
    anchor_A4: Tensor
    per_level: tuple[int, ...]


class Points(NamedTuple):
    """FCOS in training."""

    logit_BA: Tensor
    box_BA4: Tensor
    centre_BA: Tensor
    point_A2: Tensor
    is_person_BA: Tensor
    target_BA4: Tensor


class Anchors(NamedTuple):
    """RetinaNet in training."""

    logit_BA: Tensor
    delta_BA4: Tensor
    label_BA: Tensor  # 1 person, 0 background, -1 neither
    target_BA4: Tensor


class Proposed(NamedTuple):
    """Faster R-CNN in training."""

    logit_A: Tensor  # of the sampled anchors
    delta_A4: Tensor
    anchor_label_A: Tensor
    anchor_target_A4: Tensor
    logit_R2: Tensor  # of the sampled proposals
    delta_R8: Tensor
    regions: HeadInput


class _OneStage(nn.Module):
    levels = SPARSE
    anchors: AnchorGenerator
    head: nn.Module

    def forward(self, maps: Maps, height: int, width: int) -> Dense:
        """Gradient flows; images are padded to ``height`` × ``width``."""
        levels = [maps[name] for name in self.levels]
        said = {name: at_least_float32(value) for name, value in self.head(levels).items()}
        images = ImageList(levels[0].new_empty(1, 1, height, width), [(height, width)])
        like = [at_least_float32(level[:1, :1]) for level in levels]  # half precision has no room for corners
        anchor_A4 = self.anchors(images, like)[0]
        each = self.anchors.num_anchors_per_location()
        per_level = tuple(n * m.shape[-2] * m.shape[-1] for n, m in zip(each, levels, strict=True))
        centre = said.get("bbox_ctrness")
        return Dense(
            said["cls_logits"][..., 0], said["bbox_regression"], None if centre is None else centre[..., 0], anchor_A4,
            per_level,
        )  # fmt: skip

    def found(self, dense: Dense, sizes: Sizes, limits: Limits) -> list[tuple[Tensor, Tensor]]:
        """Boxes (n, 4) and scores (n,) of every image by falling score."""
        score_BA = self.scores(dense)
        top_BN, _ = top_of_levels(score_BA, dense.per_level, limits.candidates)
        found = []
        for image, size in enumerate(sizes):
            rows = top_BN[image]
            box_n4 = self.decode(dense.code_BA4[image, rows], dense.anchor_A4[rows])
            found.append(real_people(clip_boxes_to_image(box_n4, size), score_BA[image, rows], *limits[:3]))
        return found


class FCOS(_OneStage):
    """FCOS: a point of the pyramid is on a person, and so far from its sides; the score is √(person · centre-ness)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 32 or channels == 32:  # of one channel each, a map of one cell would have nothing to norm by
            raise ValueError(f"FCOS norms 32 groups of channels; levels must be a larger multiple, got {channels}")
        self.anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)  # as large as the stride
        self.head = FCOSHead(channels, 1, 1)
        self.coder = BoxLinearCoder(normalize_by_size=True)

    def decode(self, code: Tensor, anchor_A4: Tensor) -> Tensor:
        return self.coder.decode(code, anchor_A4.expand_as(code))

    def scores(self, dense: Dense) -> Tensor:
        return (dense.logit_BA.sigmoid() * dense.centre_BA.sigmoid()).sqrt()

    def trained(self, dense: Dense, people: People) -> Points:
        """Points with what they should say."""
        matched = [points_on(dense.anchor_A4, dense.per_level, person_G4) for person_G4 in people]
        is_person_BA, target_BA4 = (torch.stack(x) for x in zip(*matched, strict=True))
        box_BA4 = self.decode(dense.code_BA4, dense.anchor_A4)
        return Points(dense.logit_BA, box_BA4, dense.centre_BA, _centres(dense.anchor_A4), is_person_BA, target_BA4)


@torch.no_grad()
def points_on(anchor_A4: Tensor, per_level: Sequence[int], person_G4: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a point is on a person, (A,) bool, and that person's box, (A, 4); of several persons the smallest.

    On a person: near its centre, inside its box, and the farthest side is 4 to 8 strides away; the finest level takes
    all that are nearer, the coarsest all that are farther.
    """
    count = len(anchor_A4)
    if not len(person_G4):
        return anchor_A4.new_zeros(count, dtype=torch.bool), torch.zeros_like(anchor_A4)
    person_G4 = person_G4.to(anchor_A4)
    point_A2, stride_A1 = _centres(anchor_A4), (anchor_A4[:, 2] - anchor_A4[:, 0])[:, None]
    near_AG = (point_A2[:, None] - _centres(person_G4)).abs().amax(2) < _RADIUS * stride_A1
    distance_AG4 = torch.cat([point_A2[:, None] - person_G4[:, :2], person_G4[:, 2:] - point_A2[:, None]], 2)
    farthest_AG = distance_AG4.amax(2)
    least_A1, most_A1 = 4 * stride_A1, 8 * stride_A1
    least_A1[: per_level[0]], most_A1[count - per_level[-1] :] = 0, torch.inf
    on_AG = near_AG & (distance_AG4.amin(2) > 0) & (farthest_AG > least_A1) & (farthest_AG < most_A1)
    area_AG = torch.where(on_AG, (person_G4[:, 2:] - person_G4[:, :2]).prod(1), torch.inf)
    return on_AG.any(1), person_G4[area_AG.argmin(1)]


class RetinaNet(_OneStage):
    """RetinaNet: nine anchors for each place, three sizes and three ratios."""

    def __init__(self, channels: int, anchor_sizes: Sequence[int]) -> None:
        super().__init__()
        sizes = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in anchor_sizes)
        self.anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        self.head = RetinaNetHead(channels, 9, 1)

    def decode(self, code: Tensor, anchor_A4: Tensor) -> Tensor:
        return decoded(code, anchor_A4)

    def scores(self, dense: Dense) -> Tensor:
        return dense.logit_BA.sigmoid()

    def trained(self, dense: Dense, people: People) -> Anchors:
        """Anchors with what they should say."""
        matched = [anchors_on(dense.anchor_A4, person_G4) for person_G4 in people]
        label_BA, target_BA4 = (torch.stack(x) for x in zip(*matched, strict=True))
        return Anchors(dense.logit_BA, dense.code_BA4, label_BA, target_BA4)


@torch.no_grad()
def anchors_on(anchor_A4: Tensor, person_G4: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (A,), 1 person from an overlap of 0.5 or as its best anchor, 0 below 0.4, -1 between; offsets (A, 4)."""
    if not len(person_G4):
        return anchor_A4.new_zeros(len(anchor_A4), dtype=torch.int64), torch.zeros_like(anchor_A4)
    person_G4 = person_G4.to(anchor_A4)
    overlap_GA = box_iou(person_G4, anchor_A4)
    best_A, person_A = overlap_GA.max(0)
    is_best_A = (overlap_GA == overlap_GA.amax(1, keepdim=True)).any(0)  # torchvision's low-quality matches
    label_A = torch.where((best_A >= 0.5) | is_best_A, 1, torch.where(best_A < 0.4, 0, -1))
    return label_A, encoded(person_G4[person_A], anchor_A4)


class FasterRCNN(nn.Module):
    """Proposals at strides 4 to 64, then one head: background or person, and a better box."""

    levels = (*LEVELS, "pool")

    def __init__(self, channels: int, anchor_sizes: Sequence[int], width: int = 1024) -> None:
        super().__init__()
        self.regions = Regions(channels, anchor_sizes)
        self.pool = pooling(LEVELS, (_POOL, _POOL))
        self.first = TwoMLPHead(channels * _POOL**2, width)
        self.predictor = FastRCNNPredictor(width, 2)

    def forward(self, maps: Maps, height: int, width: int) -> Scored:
        return self.regions({name: maps[name] for name in self.levels}, height, width)

    def classify(self, maps: Maps, boxes: list[Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
        return self.predictor(self.first(self.pool(dict(maps), boxes, list(sizes))))

    def trained(
        self, scored: Scored, maps: Maps, sizes: Sizes, people: People, sampling: Sampling,
        draws: Sequence[torch.Generator],
    ) -> Proposed:  # fmt: skip
        """Sampled anchors and proposals with what they should say; waits for the device."""
        anchors = sampled_anchors(scored, people, sampling, draws)
        boxes = proposals(scored, sizes, sampling.before_nms, sampling.proposals)
        identities = [torch.ones(len(p), dtype=torch.int64, device=p.device) for p in people]
        regions = chosen(boxes, people, identities, sampling, draws)
        return Proposed(*anchors, *self.classify(maps, regions.boxes, sizes), regions)

    def found(self, scored: Scored, maps: Maps, sizes: Sizes, limits: Limits) -> list[tuple[Tensor, Tensor]]:
        """Boxes (n, 4) and scores (n,) of every image by falling score."""
        boxes = proposals(scored, sizes, limits.candidates, limits.candidates)
        logit_R2, delta_R8 = self.classify(maps, boxes, sizes)
        score_R, counts = at_least_float32(logit_R2).softmax(1)[:, 1], [len(b) for b in boxes]
        better = refined(delta_R8, boxes, sizes)
        return [real_people(*own, *limits[:3]) for own in zip(better, score_R.split(counts), strict=True)]


def _centres(box_N4: Tensor) -> Tensor:
    return (box_N4[:, :2] + box_N4[:, 2:]) / 2
