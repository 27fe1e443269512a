"""Where a two-stage detector looks: proposals from anchors, which of them are trained on, and boxes as offsets.

Built from torchvision's anchors, RPN head, box coder and matcher. What is sampled is drawn from a generator of each
image's own, so that it depends neither on how images are shared among ranks nor on what was drawn before.
"""

# Shape legend: B = images, N = anchors or boxes of one image, G = boxes of persons in it.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image
from torchvision.ops.poolers import initLevelMapper

from models.network import at_least_float32
from models.pyramid import LEVELS

Sizes = Sequence[tuple[int, int]]  # height and width of every image before padding
HEAD_CODER = (10.0, 10.0, 5.0, 5.0)  # weights of a head's offsets
_RATIOS = (0.5, 1.0, 2.0)
SMALLEST_PROPOSAL = 1e-3  # sides of a proposal, pixels
OVERLAP = 0.7  # of two proposals of a level


class Scored(NamedTuple):
    """What the RPN says of every anchor."""

    logit_BN: Tensor
    delta_BN4: Tensor
    anchor_N4: Tensor
    per_level: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How many proposals and rows a training step looks at, for each image."""

    before_nms: int = 2000  # of each level
    proposals: int = 2000  # after NMS
    anchors: int = 256
    anchor_share: float = 0.5  # of them at most on persons
    boxes: int = 512
    box_share: float = 0.25


class HeadInput(NamedTuple):
    """Sampled boxes of all images with what they are matched to."""

    boxes: list[Tensor]  # of every image (n, 4), pixels of the resized image
    label_N: Tensor  # identity, 0 background
    target_N4: Tensor  # offsets to the matched person

    def labels(self) -> list[Tensor]:
        """Of every image."""
        return list(self.label_N.split([len(b) for b in self.boxes]))


class Regions(nn.Module):
    """Region proposal network: one anchor size for each level, three ratios."""

    def __init__(self, channels: int, anchor_sizes: Sequence[int]) -> None:
        super().__init__()
        self.anchors = AnchorGenerator(tuple((s,) for s in anchor_sizes), (_RATIOS,) * len(anchor_sizes))
        self.head = RPNHead(channels, len(_RATIOS))

    def forward(self, maps: Mapping[str, Tensor], height: int, width: int) -> Scored:
        """Logits and offsets of all anchors over images padded to ``height`` × ``width``; gradient flows."""
        levels = list(maps.values())
        logits, deltas = self.head(levels)
        per_level = tuple(3 * level.shape[-2] * level.shape[-1] for level in levels)
        # One channel says all that anchors need; half precision has no room for their corners.
        like = [at_least_float32(level[:1, :1]) for level in levels]
        anchor_N4 = self.anchors(ImageList(like[0].new_empty(1, 1, height, width), [(height, width)]), like)[0]
        logit_M1, delta_M4 = concat_box_prediction_layers(logits, deltas)
        images = len(levels[0])
        return Scored(
            at_least_float32(logit_M1).view(images, -1), at_least_float32(delta_M4).view(images, -1, 4), anchor_N4,
            per_level,
        )  # fmt: skip


@torch.no_grad()
def proposals(
    scored: Scored, sizes: Sizes, before_nms: int, after_nms: int, least: float = 0.0, iou: float = OVERLAP
) -> list[Tensor]:
    """Boxes (n, 4) of every image, by falling score: the best of each level, after NMS of each level apart.

    Args:
        scored: of all anchors.
        sizes: boxes are clipped to their image.
        before_nms: how many of each level.
        after_nms: how many in all.
        least: probability below which there is no proposal.
    """
    top_N, level_N = top_of_levels(scored.logit_BN, scored.per_level, before_nms)
    found = []
    for image, size in enumerate(sizes):
        rows_N = top_N[image]
        box_N4 = decoded(scored.delta_BN4[image, rows_N], scored.anchor_N4[rows_N])
        box_N4, score_N = clip_boxes_to_image(box_N4, size), scored.logit_BN[image, rows_N].sigmoid()
        real_N = ((box_N4[:, 2:] - box_N4[:, :2]) >= SMALLEST_PROPOSAL).all(1) & (score_N >= least)
        box_N4, score_N, own_N = box_N4[real_N], score_N[real_N], level_N[real_N]
        found.append(box_N4[batched_nms(box_N4, score_N, own_N, iou)[:after_nms]])
    return found


def top_of_levels(logit_BN: Tensor, per_level: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Numbers of the best anchors of each level, (B, N), and the level of each, (N,)."""
    rows, levels, start = [], [], 0
    for level, logit_Bn in enumerate(logit_BN.split(list(per_level), 1)):
        best_Bn = logit_Bn.topk(min(count, per_level[level]), dim=1).indices
        rows.append(best_Bn + start)
        levels.append(torch.full_like(best_Bn[0], level))
        start += per_level[level]
    return torch.cat(rows, 1), torch.cat(levels)


def decoded(delta_N4: Tensor, box_N4: Tensor, weights: tuple[float, ...] = (1.0,) * 4) -> Tensor:
    """Boxes that offsets lead to, (N, 4); :func:`encoded` is the inverse."""
    return BoxCoder(weights).decode_single(delta_N4, box_N4)


def encoded(target_N4: Tensor, box_N4: Tensor, weights: tuple[float, ...] = (1.0,) * 4) -> Tensor:
    """Offsets that lead from boxes to their targets."""
    return BoxCoder(weights).encode_single(target_N4, box_N4)


@torch.no_grad()
def matched_anchors(anchor_N4: Tensor, person_G4: Tensor) -> tuple[Tensor, Tensor]:
    """The person of every anchor: labels (N,), 1 person, 0 background, -1 neither; boxes (N, 4)."""
    label_N, person_N4 = _matched(anchor_N4, person_G4, Matcher(0.7, 0.3, allow_low_quality_matches=True))
    return label_N.clamp(max=1), person_N4


@torch.no_grad()
def matched_boxes(box_N4: Tensor, person_G4: Tensor, identity_G: Tensor) -> tuple[Tensor, Tensor]:
    """The person of every box by an overlap of one half: its identity, 0 background (N,); its box (N, 4)."""
    row_N, person_N4 = _matched(box_N4, person_G4, Matcher(0.5, 0.5, allow_low_quality_matches=False))
    if not len(identity_G):
        return row_N, person_N4
    return torch.where(row_N > 0, identity_G[(row_N - 1).clamp(min=0)], 0), person_N4


def _matched(box_N4: Tensor, person_G4: Tensor, matcher: Matcher) -> tuple[Tensor, Tensor]:
    """Number of the matched person from 1, 0 = background, -1 = between the thresholds; and its box."""
    if not len(person_G4):
        return torch.zeros(len(box_N4), dtype=torch.int64, device=box_N4.device), torch.zeros_like(box_N4)
    match_N = matcher(box_iou(person_G4.to(box_N4), box_N4))
    row_N = torch.where(match_N >= 0, match_N + 1, torch.where(match_N == Matcher.BELOW_LOW_THRESHOLD, 0, -1))
    return row_N, person_G4.to(box_N4)[match_N.clamp(min=0)]


def sampled(label_N: Tensor, count: int, share: float, draw: torch.Generator) -> Tensor:
    """Row numbers, rising: up to ``share`` of ``count`` rows with a label above 0, the rest of those with 0.

    Rows with -1 are never taken. The draws are made on the CPU, for every row one, whatever its label.

    >>> label = torch.tensor([0, 3, 0, -1, 0, 9])
    >>> rows = sampled(label, 4, 0.25, torch.Generator().manual_seed(0))
    >>> len(rows), int((label[rows] > 0).sum())
    (4, 1)
    """
    uniform_N = torch.rand(len(label_N), generator=draw).to(label_N.device)
    positive, negative = (label_N > 0).nonzero()[:, 0], (label_N == 0).nonzero()[:, 0]
    positive = positive[uniform_N[positive].argsort()[: int(count * share)]]
    negative = negative[uniform_N[negative].argsort()[: count - len(positive)]]
    return torch.cat([positive, negative]).sort().values


@torch.no_grad()
def _anchor_rows(scored: Scored, person_G4: Tensor, sampling: Sampling, draw: torch.Generator) -> tuple[Tensor, ...]:
    label_N, person_N4 = matched_anchors(scored.anchor_N4, person_G4)
    rows = sampled(label_N, sampling.anchors, sampling.anchor_share, draw)
    return rows, label_N[rows], encoded(person_N4[rows], scored.anchor_N4[rows])


def sampled_anchors(
    scored: Scored, people: Sequence[Tensor], sampling: Sampling, draws: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, offsets, labels and targets of the anchors that are trained on, image by image; gradient flows."""
    found = []
    for image, (person_G4, draw) in enumerate(zip(people, draws, strict=True)):
        rows, label_n, target_n4 = _anchor_rows(scored, person_G4, sampling, draw)
        found.append((scored.logit_BN[image, rows], scored.delta_BN4[image, rows], label_n, target_n4))
    return tuple(map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def chosen(
    boxes: Sequence[Tensor],
    people: Sequence[Tensor],
    identities: Sequence[Tensor],
    sampling: Sampling,
    draws: Sequence[torch.Generator],
) -> HeadInput:
    """Boxes that a head is trained on: of the given ones and those of the people themselves."""
    kept, labels, targets = [], [], []
    for box_n4, person_n4, identity_n, draw in zip(boxes, people, identities, draws, strict=True):
        box_n4 = torch.cat([box_n4, person_n4.to(box_n4)])
        label_n, matched_n4 = matched_boxes(box_n4, person_n4, identity_n)
        rows = sampled(label_n, sampling.boxes, sampling.box_share, draw)
        kept.append(box_n4[rows])
        labels.append(label_n[rows])
        targets.append(encoded(matched_n4[rows], box_n4[rows], HEAD_CODER))
    return HeadInput(kept, torch.cat(labels), torch.cat(targets))


def pooling(levels: Sequence[str], cells: tuple[int, int]) -> MultiScaleRoIAlign:
    """RoIAlign of four levels; a box of √area s is on level ⌊log₂(s / 56)⌋, the finest being 0.

    On strides 8 to 64 torchvision calls that scale 112 on level 4, on strides 4 to 32 scale 224 on level 4.
    """
    finest = 2 if tuple(levels) == LEVELS else 3
    pool = MultiScaleRoIAlign(
        list(levels), list(cells), sampling_ratio=2, canonical_scale=56 * 2 ** (4 - finest), canonical_level=4
    )
    # torchvision would guess them from the first image it sees, and keep them.
    pool.scales = [1 / 2 ** (finest + level) for level in range(4)]
    pool.map_levels = initLevelMapper(finest, finest + 3, pool.canonical_scale, pool.canonical_level)
    return pool
