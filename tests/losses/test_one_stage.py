"""Losses of one-stage detectors: those of torchvision's own code, and what has nobody to find."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.fcos import FCOS as TORCHVISION_FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet

from losses.one_stage import centreness, fcos_losses, focal, giou, retinanet_losses
from models.detectors import FCOS, SPARSE, Limits, RetinaNet, anchors_on, points_on

HEIGHT, WIDTH = 160, 224
SIZES = [(HEIGHT, WIDTH), (HEIGHT - 10, WIDTH - 30)]
PEOPLE = [torch.tensor([[10.0, 20, 60, 150], [40, 30, 90, 140], [100, 5, 108, 20]]), torch.zeros(0, 4)]


class Body(nn.Module):
    out_channels = 64


def pair(name):
    """Ours and torchvision's detector with the same weights, and what both say of the same maps."""
    torch.manual_seed(0)
    limits = {"score_thresh": 0.05, "nms_thresh": 0.5}
    ours = FCOS(64) if name == "fcos" else RetinaNet(64, (32, 64, 128, 256, 512))
    theirs = (TORCHVISION_FCOS if name == "fcos" else TorchvisionRetinaNet)(Body(), 1, **limits)
    for value in ours.parameters():
        if value.ndim > 1:
            nn.init.normal_(value, std=0.05)
    if name == "fcos":
        nn.init.constant_(ours.head.regression_head.bbox_reg.bias, 2.0)
    theirs.head.load_state_dict(ours.head.state_dict())
    strides = dict(zip(SPARSE, (8, 16, 32, 64, 128), strict=True))
    maps = {name: torch.randn(2, 64, -(-HEIGHT // s), -(-WIDTH // s)) for name, s in strides.items()}
    images = ImageList(torch.zeros(2, 3, HEIGHT, WIDTH), SIZES)
    levels = list(maps.values())
    each = theirs.anchor_generator.num_anchors_per_location()[0]
    per_level = [each * m.shape[2] * m.shape[3] for m in levels]
    return (
        ours,
        ours(maps, HEIGHT, WIDTH),
        theirs,
        theirs.head(levels),
        theirs.anchor_generator(images, levels),
        per_level,
    )


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_losses_and_gradients_are_those_of_torchvision(name):
    ours, dense, theirs, said, anchors, per_level = pair(name)
    targets = [{"boxes": p, "labels": torch.zeros(len(p), dtype=torch.int64)} for p in PEOPLE]
    expected = theirs.compute_loss(*(targets, said, anchors), *([per_level] if name == "fcos" else []))
    found = (fcos_losses if name == "fcos" else retinanet_losses)(*ours.trained(dense, PEOPLE))
    for own, other in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
    sum(found).backward()
    sum(expected.values()).backward()
    for own, other in zip(ours.head.parameters(), theirs.head.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_detections_are_those_of_torchvision(name):
    ours, dense, theirs, said, anchors, per_level = pair(name)
    if name == "retinanet":
        dense = dense._replace(logit_BA=dense.logit_BA + 4)
        said["cls_logits"] = said["cls_logits"] + 4
    split = {key: list(value.split(per_level, 1)) for key, value in said.items()}
    expected = theirs.postprocess_detections(split, [list(a.split(per_level)) for a in anchors], SIZES)
    for (box_n4, score_n), other in zip(ours.found(dense, SIZES, Limits()), expected, strict=True):
        real = ((other["boxes"][:, 2:] - other["boxes"][:, :2]) >= 0.01).all(1)  # a box without area is nobody
        kept = min(int(real.sum()), len(box_n4))
        assert kept > 20
        torch.testing.assert_close(score_n[:20], other["scores"][real][:20])
        torch.testing.assert_close(box_n4[:20], other["boxes"][real][:20])
        assert (score_n[1:] <= score_n[:-1]).all()


def test_a_point_is_on_the_smallest_person_around_it():
    anchor = torch.tensor([[46.0, 46, 54, 54], [0, 0, 8, 8]])
    person = torch.tensor([[20.0, 20, 80, 80], [40, 40, 60, 60]])
    is_person, box = points_on(anchor, (2,), person)
    assert is_person.tolist() == [True, False] and box[0].tolist() == [40, 40, 60, 60]


def test_nobody_in_an_image_is_background_alone():
    anchor = torch.tensor([[0.0, 0, 8, 8]])
    assert not points_on(anchor, (1,), torch.zeros(0, 4))[0].any()
    assert anchors_on(anchor, torch.zeros(0, 4))[0].tolist() == [0]
    logit = torch.zeros(1, 1, requires_grad=True)
    terms = fcos_losses(
        logit, anchor[None], logit, torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.bool), anchor[None]
    )
    assert terms.score > 0 and terms.box == terms.centre == 0
    score, box = retinanet_losses(logit, anchor[None], torch.zeros(1, 1, dtype=int), anchor[None])
    assert score > 0 and box == 0


def test_the_divisor_may_be_of_a_larger_batch():
    ours, dense, *_ = pair("fcos")
    seen = ours.trained(dense, PEOPLE)
    alone = fcos_losses(*seen)
    shared = fcos_losses(*seen, positives=2 * seen.is_person_BA.sum())
    for one, half in zip(alone, shared, strict=True):
        torch.testing.assert_close(one, 2 * half)


def test_parts_have_a_gradient_in_float64():
    box = torch.tensor([[0.0, 0, 4, 5], [1, 1, 3, 9], [2, 2, 8, 8]], dtype=torch.float64).requires_grad_()
    other = torch.tensor([[1.0, 1, 5, 4], [5, 0, 9, 3], [1, 3, 7, 9]], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(giou, (box, other))
    logit = torch.tensor([-2.0, 0.3, 1.5], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: focal(x, torch.tensor([True, False, True])), (logit,))
    centre = centreness(torch.tensor([[2.0, 5.0]]), torch.tensor([[[0.0, 0, 8, 10]]]))
    torch.testing.assert_close(centre, torch.tensor([[(2 / 6) ** 0.5]]))


def test_half_precision_and_wrong_shapes():
    half = torch.zeros(1, 2, dtype=torch.float16)
    score, box = retinanet_losses(half, torch.zeros(1, 2, 4).half(), torch.tensor([[1, -1]]), torch.zeros(1, 2, 4))
    assert score.dtype == box.dtype == torch.float32
    with pytest.raises(ValueError, match="need as many labels, boxes and targets"):
        retinanet_losses(half, torch.zeros(1, 3, 4), torch.tensor([[1, -1]]), torch.zeros(1, 2, 4))
