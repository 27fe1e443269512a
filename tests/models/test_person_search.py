"""The two-stage network of person search: sizes and costs of the card, its parts against plain twins, its contract."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou, nms

from models.network import Network, network_class, rebuild
from models.person_search import NormAware, PersonSearch, PersonSearchConfig, padded, postprocess, refined
from models.pyramid import LEVELS, Pyramid
from models.regions import (
    HEAD_CODER,
    Sampling,
    chosen,
    decoded,
    encoded,
    matched_anchors,
    matched_boxes,
    proposals,
    sampled,
)
from orchestrator import checkpoint
from orchestrator.evaluation import cost

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ddps.npz")
TINY = PersonSearchConfig("resnet10t", 0.125, (64, 96), levels=8, head=16, dim=6, anchors=(8, 16, 32, 48, 64),
                          proposals=30, detections=10)  # fmt: skip
# Parameters in millions and multiply-adds in thousands of millions: body, pyramid, RPN head, first head, second head.
CARD = {
    ("resnet50.tv_in1k", 1.0): (56.94, (109.8, 76.3, 66.6, 13.9, 1.6), 268),
    ("resnet18.tv_in1k", 1.0): (43.92, (48.7, 68.6, 66.6, 13.9, 1.6), 199),
    ("resnet18.tv_in1k", 0.5): (35.42, (13.0, 67.3, 66.6, 13.9, 1.6), 162),
    ("mobilenetv2_100.ra_in1k", 1.0): (34.44, (7.5, 66.9, 66.6, 13.9, 1.6), 157),
}
UNUSED_REGRESSOR = 1024 * 8 + 8  # the public code's second one, which never receives a gradient


def seeded(value=0):
    return torch.Generator().manual_seed(value)


def draw_boxes(count, height, width, seed=0):
    corner = torch.rand(count, 2, generator=seeded(seed)) * torch.tensor([width, height]) * 0.7
    return torch.cat([corner, corner + 4 + torch.rand(count, 2, generator=seeded(seed + 1)) * 0.3 * width], 1)


@pytest.mark.parametrize(("name", "width"), CARD)
def test_sizes_and_costs_are_those_of_the_card(name, width):
    parameters, parts, total = CARD[name, width]
    with torch.device("meta"):
        net = PersonSearch(PersonSearchConfig(name, width)).eval()
        image, count = torch.zeros(1, 3, 896, 1504), {}

        def macs(function):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                result = function()
            count[len(count)] = counter.get_total_flops() / 2e9
            return result

        maps = macs(lambda: net.pyramid.body(image))
        maps = macs(lambda: net.pyramid.fpn(dict(zip(LEVELS, maps, strict=True))))
        macs(lambda: net.regions.head(list(maps.values())))
        pooled = torch.zeros(1000, 256, 7, 7)
        macs(lambda: net.predictor(net.first(pooled)))
        inputs = pooled[:100], net.second(pooled[:100])
        macs(lambda: [net.second(inputs[0]), *(p[0](x.flatten(1)) for p, x in
                                               zip(net.embedding.project, inputs, strict=True))])  # fmt: skip
    assert [round(v, 1) for v in count.values()] == list(parts)
    assert abs(sum(count.values()) - total) < 0.6
    frozen = sum(p.numel() for m in net.pyramid.norms() for p in m.parameters()) if name.startswith("resnet50") else 0
    mine = sum(p.numel() for p in net.parameters())
    assert round((mine - frozen + UNUSED_REGRESSOR) / 1e6, 2) == parameters


@pytest.mark.parametrize(
    ("name", "width", "channels"),
    [("resnet18", 1.0, [64, 128, 256, 512]), ("resnet18", 0.5, [32, 64, 128, 256]),
     ("resnet50", 1.0, [256, 512, 1024, 2048]), ("resnet50", 0.25, [64, 128, 256, 512]),
     ("mobilenetv2_100", 1.0, [24, 32, 96, 320]), ("convnext_atto", 1.0, [40, 80, 160, 320])],
)  # fmt: skip
def test_maps_of_every_backbone(name, width, channels):
    with torch.device("meta"):
        pyramid = Pyramid(name, 16, width)
        maps = pyramid(torch.zeros(2, 3, 288, 480))
    assert pyramid.body.feature_info.channels() == channels
    assert [tuple(m.shape) for m in maps.values()] == [
        (2, 16, 72, 120), (2, 16, 36, 60), (2, 16, 18, 30), (2, 16, 9, 15), (2, 16, 5, 8),
    ]  # fmt: skip
    assert list(maps) == [*LEVELS, "pool"]
    stem = pyramid.stem()
    assert (stem[0].out_channels == max(8, round(64 * width))) if name.startswith("resnet") else not stem


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [("vit_tiny_patch16_224", {}, r"maps at strides \(16, 16, 16, 16\), expected"),
     ("mobilenetv2_100", {"width": 0.5}, "width is for ResNets"),
     ("resnet188", {}, "did you mean resnet18"),
     ("own.module:net", {}, "over a network of timm"),
     ("resnet18", {"width": 0.5, "pretrained": True}, "no pretrained weights for width 0.5")],
)  # fmt: skip
def test_backbones_that_make_no_pyramid(name, options, words):
    with pytest.raises(ValueError, match=words) as error, torch.device("meta"):
        Pyramid(name, **options)
    assert "\n" not in str(error.value)


def test_a_backbone_starts_from_torchvision_s_file(tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(1)
    theirs = resnet18()
    torch.save(theirs.state_dict(), tmp_path / "r18.pth")
    body = Pyramid("resnet18", 8, weights=str(tmp_path / "r18.pth")).body
    assert torch.equal(body["layer4"][1].conv2.weight, theirs.layer4[1].conv2.weight)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        x = theirs.eval().maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        expected = theirs.layer2(theirs.layer1(x))
        torch.testing.assert_close(body.eval()(image)[1], expected)
    with pytest.raises(ValueError, match="holds another network"):
        Pyramid("resnet50", 8, weights=str(tmp_path / "r18.pth"))


def test_the_embedding_is_that_recorded():
    own = {k.removeprefix("nae_head/w."): torch.from_numpy(np.asarray(v)) for k, v in GOLDEN.items()
           if k.startswith("nae_head/w.")}  # fmt: skip
    head = NormAware((18, 16), 12)
    renamed = {"projectors.feat_beFC": "project.0", "projectors.feat_afFC": "project.1"}
    state = {k.replace(old, new): v for k, v in own.items() for old, new in renamed.items() if k.startswith(old)}
    head.load_state_dict(state)
    inputs = [torch.from_numpy(GOLDEN[f"nae_head/{name}"]) for name in ("x_flat", "x_fc")]
    for mode, name in ((False, "emb_eval"), (True, "emb_train")):
        found = head.train(mode)(*inputs)
        torch.testing.assert_close(found, torch.from_numpy(GOLDEN[f"nae_head/{name}"]), rtol=1e-4, atol=1e-6)
    assert head.eval()(*(x[:1] for x in inputs)).norm().item() == pytest.approx(1)  # a single person


def test_proposals_are_torchvision_s():
    torch.manual_seed(0)
    net = PersonSearch(TINY).eval()
    pixels = torch.randn(2, 3, 64, 96)
    maps = net.pyramid(pixels)
    theirs = RegionProposalNetwork(
        net.regions.anchors, net.regions.head, 0.7, 0.3, 256, 0.5, {"training": 50, "testing": 40},
        {"training": 30, "testing": 25}, 0.7,
    ).eval()  # fmt: skip
    sizes = [(64, 96), (64, 70)]
    with torch.no_grad():
        expected, _ = theirs(ImageList(pixels, sizes), maps)
        scored = net.regions(maps, 64, 96)
    found = proposals(scored, sizes, 40, 25)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    people = [draw_boxes(3, 64, 96), torch.zeros(0, 4)]
    labels, boxes = theirs.assign_targets_to_anchors([scored.anchor_N4] * 2, [{"boxes": p} for p in people])
    for person, label, box in zip(people, labels, boxes, strict=True):
        mine, own_box = matched_anchors(scored.anchor_N4, person)
        assert torch.equal(mine.float(), label)
        torch.testing.assert_close(own_box[label > 0], box[label > 0])
    assert (labels[0] > 0).any() and len(proposals(scored, sizes, 40, 25, least=0.99)[0]) < 25


def test_sampled_rows_are_as_asked_and_depend_on_their_own_draws():
    label = torch.tensor([0] * 50 + [7] * 10 + [-1] * 5 + [5555] * 3)
    rows = sampled(label, 16, 0.25, seeded(3))
    assert len(rows) == 16 and (label[rows] > 0).sum() == 4 and (label[rows] == -1).sum() == 0
    assert torch.equal(rows, rows.sort().values) and len(rows.unique()) == 16
    assert torch.equal(rows, sampled(label, 16, 0.25, seeded(3)))
    assert not torch.equal(rows, sampled(label, 16, 0.25, seeded(4)))
    assert sampled(label[:0], 16, 0.25, seeded()).shape == (0,)
    assert (label[sampled(label[50:60], 16, 0.25, seeded()) + 50] > 0).sum() == 4  # nobody else: a quarter all the same
    counts = np.bincount(
        np.concatenate([sampled(label, 16, 0.25, seeded(s)).numpy() for s in range(400)]), minlength=68
    )
    assert 60 < counts[:50].mean() * 50 / 48 < 140 and counts[60:65].sum() == 0
    assert abs(counts[50:60].mean() - counts[65:].mean()) < 30  # labelled or not, people are drawn alike


def test_boxes_are_matched_by_half_and_may_have_no_person():
    people, identity = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]]), torch.tensor([4, 5555])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4.9], [20, 0, 30, 5.1], [50, 50, 60, 60]])
    label, target = matched_boxes(boxes, people, identity)
    assert label.tolist() == [4, 0, 5555, 0] and target[2].tolist() == people[1].tolist()
    assert box_iou(boxes, people)[1, 0] < 0.5 < box_iou(boxes, people)[2, 1]
    label, target = matched_boxes(boxes, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert label.tolist() == [0] * 4 and target.shape == (4, 4)
    head = chosen(
        [boxes, boxes], [people, torch.zeros(0, 4)], [identity, identity[:0]], Sampling(boxes=8), [seeded()] * 2
    )
    assert [len(b) for b in head.boxes] == [4, 4] and head.labels()[1].tolist() == [0] * 4  # 2 people of 8 at most
    assert (head.label_N > 0).sum() == 2


def test_offsets_lead_to_their_targets():
    boxes, targets = draw_boxes(6, 64, 96), draw_boxes(6, 64, 96, seed=5)
    torch.testing.assert_close(decoded(encoded(targets, boxes, HEAD_CODER), boxes, HEAD_CODER), targets)
    offsets = torch.zeros(6, 8)
    offsets[:, 4:] = encoded(targets, boxes, HEAD_CODER)
    found = refined(offsets.requires_grad_(), list(boxes.split(3)), [(64, 96), (20, 30)])
    torch.testing.assert_close(found[0], targets[:3])
    assert found[1].amax(0)[2] <= 30 and found[1].amax(0)[3] <= 20 and not found[0].requires_grad


def step(net, seed=0, people=(3, 0)):
    images = torch.randn(2, 3, 64, 96, generator=seeded(seed))
    boxes = [draw_boxes(n, 60, 90, seed=n) for n in people]
    identities = [torch.arange(1, n + 1) for n in people]
    from models.person_search import Images

    return net.trained(
        Images(images, [(64, 96), (60, 90)]), boxes, identities, Sampling(60, 40, 32, 0.5, 16, 0.25),
        [seeded(1), seeded(2)],
    )  # fmt: skip


def test_a_training_step_sees_everything_and_trains_everything():
    torch.manual_seed(0)
    net = PersonSearch(TINY).train()
    seen = step(net)
    assert list(seen.maps) == [*LEVELS, "pool"] and len(seen.logit_A) == len(seen.anchor_target_A4) == 64
    assert len(seen.regions.boxes) == 2 and len(seen.logit_R2) == len(seen.regions.label_N) == len(seen.delta_R8) == 32
    torch.testing.assert_close(seen.embedding_PD.norm(dim=1), torch.ones(len(seen.embedding_PD)))
    assert (seen.regions.labels()[0] > 0).any() and not seen.regions.labels()[1].any()
    (seen.logit_A.sum() + seen.delta_A4.sum() + seen.logit_R2.sum() + seen.delta_R8.sum()
     + (seen.embedding_PD * torch.arange(6)).sum() + sum(m.sum() for m in seen.maps.values())).backward()  # fmt: skip
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    again = step(net)
    assert all(torch.equal(a, b) for a, b in zip(seen.regions.boxes, again.regions.boxes, strict=True))
    nobody = step(net, people=(0, 0))
    assert not nobody.regions.label_N.any() and nobody.anchor_label_A.sum() == 0


def test_what_is_frozen_stays():
    net = PersonSearch(TINY)
    net.freeze(stem=True, norms=True)
    net.train()
    norms = net.pyramid.norms()
    assert norms and not any(n.training or n.weight.requires_grad for n in norms) and net.embedding.training
    assert not net.pyramid.body["conv1"].weight.requires_grad
    net = PersonSearch(TINY)
    net.freeze(stem=True, norms=False)
    before = net.train().pyramid.body["bn1"].running_mean.clone()
    step(net)
    assert not torch.equal(before, net.pyramid.body["bn1"].running_mean)  # statistics move, as in the public code


def test_a_teacher_pools_given_boxes_as_if_it_had_found_them():
    torch.manual_seed(0)
    net = PersonSearch(TINY).eval()
    image = torch.randn(1, 3, 50, 70)
    images = padded(image)
    assert images.pixels_BCHW.shape[-2:] == (64, 96) and images.sizes == [(50, 70)]
    with torch.no_grad():
        found = net.found(net.pyramid(images.pixels_BCHW), images)[0]
        assert len(found.boxes_N4) == 10 and (found.score_N.diff() <= 0).all()
        assert found.boxes_N4[:, 2].max() <= 70 and found.boxes_N4[:, 3].max() <= 50
        again = net.embed(net.pyramid(images.pixels_BCHW), [found.boxes_N4], images.sizes)
        torch.testing.assert_close(again, found.embedding_ND)
        for a, b in zip(net(image), found, strict=True):
            assert torch.equal(a, b)
    # The first image decides nothing about the next: scales are said.
    tiny_first = PersonSearch(TINY).eval()
    tiny_first.load_state_dict(net.state_dict())
    with torch.no_grad():
        tiny_first(torch.randn(1, 3, 40, 70))
        torch.testing.assert_close(tiny_first(image)[2], found.embedding_ND)


def test_the_best_boxes_that_do_not_overlap():
    boxes, score = draw_boxes(40, 64, 96), torch.rand(40, generator=seeded(1))
    embedding = torch.nn.functional.normalize(torch.randn(40, 5, generator=seeded(2)))
    found = postprocess(boxes, score, embedding, 0.2, 0.4, 7)
    order = [i for i in score.argsort(descending=True).tolist() if score[i] > 0.2]
    kept = []
    for i in order:
        if all(box_iou(boxes[i : i + 1], boxes[j : j + 1]) <= 0.4 for j in kept):
            kept.append(i)
    assert torch.equal(found.boxes_N4, boxes[kept[:7]]) and torch.equal(found.score_N, score[kept[:7]])
    torch.testing.assert_close(found.embedding_ND, embedding[kept[:7]] * score[kept[:7], None])
    assert torch.equal(postprocess(boxes, score, embedding, 0.2, 0.4, 7, weigh=False).embedding_ND, embedding[kept[:7]])
    assert len(postprocess(boxes, score * 0, embedding).score_N) == 0
    assert len(nms(boxes, score, 0.4)) >= len(kept[:7])
    with pytest.raises(ValueError, match=r"need boxes \(n, 4\), n scores and n embeddings"):
        postprocess(boxes, score[1:], embedding)


def test_a_detector_answers_the_contract(tmp_path):
    net = PersonSearch(TINY)
    members = [name for name in (*Network.__annotations__, *vars(Network)) if not name.startswith("_")]
    assert len(members) > 12 and all(hasattr(net, name) for name in members)
    assert net.kind == "person_search" and network_class(net.kind) is PersonSearch
    assert len(net.example(3)[0]) == 3 and torch.equal(net.example(2)[0], net.example(2)[0])
    assert json.dumps(dict(net.feeding)) and net.exportable() == "" and set(net.parts()) == {"total", "body"}
    assert net.extras() == {}
    net.memory = nn.Module()
    net.memory.register_buffer("table_KD", torch.ones(3, 6))
    assert list(net.extras()) == ["memory.table_KD"] and net.deployed().extras() == {}
    checkpoint.save_model(tmp_path, net, {"a": 1})
    again, facts = checkpoint.load_model(tmp_path / "student.safetensors")
    assert facts == {"a": 1} and again.config == net.config
    assert torch.equal(checkpoint.load_extras(tmp_path / "student.safetensors")["memory.table_KD"], torch.ones(3, 6))
    image = net.example(1)[0]
    with torch.no_grad():
        for a, b in zip(again(image), net.deployed()(image), strict=True):
            assert torch.equal(a, b)
    assert rebuild("person_search", json.loads(json.dumps(asdict(net.config)))).config == net.config
    assert net.same([torch.ones(2, 4)] * 3, [torch.ones(3, 4)] * 3) == float("inf")
    found = cost.logged(net)
    assert 0 < found["cost/body/macs"] < found["cost/macs"]
    assert found["cost/parameters"] == sum(p.numel() for p in net.parameters())
    with pytest.raises(ValueError, match="levels 8 instead of 16"):
        checkpoint.load_model(tmp_path / "student.safetensors", PersonSearchConfig(**{**asdict(TINY), "levels": 16}))
