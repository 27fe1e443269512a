"""DDPS's losses and those it is compared with: recorded numbers, plain loops, gradients, degenerate batches."""

import math
from pathlib import Path
from types import SimpleNamespace

import fake_cuda
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losses.ddps import (
    DisaggregationFeatureDistillation,
    attention_maps,
    correlation_distillation,
    distinct_people,
    logit_distillation,
    person_masks,
    teacher_confidence,
)
from losses.oim import OIM
from losses.pkd import pkd
from losses.reviewkd import ReviewFusion, hierarchical_context

GOLDEN = {k: torch.from_numpy(np.asarray(v)) for k, v in
          np.load(Path(__file__).parents[1] / "golden" / "ddps.npz").items()}  # fmt: skip
# Recorded module -> ours.
RENAMED = {
    "conv_mask_s": "student_context.mask", "channel_add_conv_s.0": "student_context.reduce",
    "channel_add_conv_s.1": "student_context.norm", "channel_add_conv_s.3": "student_context.expand",
    "conv_mask_t": "teacher_context.mask", "channel_add_conv_t.0": "teacher_context.reduce",
    "channel_add_conv_t.1": "teacher_context.norm", "channel_add_conv_t.3": "teacher_context.expand",
}  # fmt: skip


def golden(group, name, dtype=torch.float64):
    found = GOLDEN[f"{group}/{name}"]
    return found.to(dtype) if found.is_floating_point() else found


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(found, expected, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


# --- LD ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logit_distillation_and_its_gradient(dtype):
    student = golden("ld_binary", "logits_s", dtype).requires_grad_()
    teacher, label = golden("ld_binary", "logits_t", dtype), golden("ld_binary", "labels")
    loss = logit_distillation(student, teacher, label)
    loss.backward()
    close(loss, golden("ld_binary", "loss_decoupled"))
    close(loss, golden("ld_binary", "loss_plain_kd"))
    close(student.grad, golden("ld_binary", "grad_logits_s"))
    close(logit_distillation(student, teacher, label, alpha=1, beta=0), golden("ld_binary", "loss_target_part"))
    assert logit_distillation(student, teacher, label, alpha=0, beta=1).item() == 0
    assert logit_distillation(teacher, teacher, label).item() == 0


@pytest.mark.parametrize("classes", [2, 5])
def test_logit_distillation_equals_the_loops(classes):
    student, teacher = rand(7, classes), rand(7, classes, seed=1)
    label, tau, total = torch.arange(7) % classes, 3.0, 0.0
    for s, t, y in zip((student / tau).tolist(), (teacher / tau).tolist(), label.tolist(), strict=True):
        p, q = ([math.exp(v) for v in row] for row in (s, t))
        p, q = ([v / sum(row) for v in row] for row in (p, q))
        binary = sum(b * math.log(b / a) for a, b in ((p[y], q[y]), (1 - p[y], 1 - q[y])))
        others = [(p[k] / (1 - p[y]), q[k] / (1 - q[y])) for k in range(classes) if k != y]
        total += tau**2 * (1.5 * binary + 0.25 * sum(b * math.log(b / a) for a, b in others)) / 7
    assert logit_distillation(student, teacher, label, tau, 1.5, 0.25).item() == pytest.approx(total, rel=1e-12)


def test_logit_distillation_is_finite_for_logits_far_apart():
    student = torch.tensor([[-400.0, 400.0], [400.0, -400.0]], requires_grad=True)
    loss = logit_distillation(student, -student.detach(), torch.tensor([0, 1]), temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(800, rel=1e-6) and student.grad.isfinite().all()


def test_logit_distillation_at_its_edges():
    student = rand(4, 3).requires_grad_()
    label = torch.tensor([0, 2, 1, 1])
    assert torch.autograd.gradcheck(lambda s: logit_distillation(s, rand(4, 3, seed=1), label), (student,))
    empty = torch.zeros(0, 2, requires_grad=True)
    loss = logit_distillation(empty, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and empty.grad.shape == (0, 2)
    for arguments, words in (
        ((rand(3, 2), rand(3, 3), label[:3]), "one shape"),
        ((rand(3, 1), rand(3, 1), label[:3]), "at least two classes"),
        ((rand(3, 2), rand(3, 2), label), "one label for each of 3"),
        ((rand(3, 2), rand(3, 2), label[:3], 0.0), "temperature must be above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            logit_distillation(*arguments)


# --- CD ---------------------------------------------------------------------------------------------------------------


def test_correlation_distillation_and_its_gradient():
    student = golden("cd_hand", "emb_s").requires_grad_()
    loss = 0.01 * correlation_distillation(student, golden("cd_hand", "emb_t"))
    loss.backward()
    close(loss, golden("cd_hand", "loss"), atol=1e-7)
    close(student.grad, golden("cd_hand", "grad_emb_s"), atol=1e-7)


def test_correlation_distillation_equals_the_loops_and_takes_other_widths():
    student, teacher = rand(5, 3), rand(5, 4, seed=1)
    expected = sum((float(student[i] @ student[j]) - float(teacher[i] @ teacher[j])) ** 2
                   for i in range(5) for j in range(5))  # fmt: skip
    assert correlation_distillation(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: correlation_distillation(s, teacher), (student.requires_grad_(),))
    assert correlation_distillation(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0
    with pytest.raises(ValueError, match="as many rows"):
        correlation_distillation(student, teacher[:4])


def test_confidence_is_of_the_own_column_or_of_the_queue():
    """Not of the released column 482 on, which is PRW's."""
    similarity, label = rand(4, 6), torch.tensor([0, 1, 4, 5555])
    share = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in similarity.tolist()]
    expected = [0.0, share[1][0], share[2][3], max(share[3][4:])]
    close(teacher_confidence(similarity, label, 4), torch.tensor(expected), rtol=1e-6)
    assert teacher_confidence(rand(2, 4), torch.tensor([5555, 1]), 4)[0] == 0, "no queue"


def slow_distinct(boxes, labels, scores, iou):
    def overlap(a, b):
        common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        areas = [(v[2] - v[0]) * (v[3] - v[1]) for v in (a, b)]
        return common / (sum(areas) - common)

    found, start = [], 0
    for box, label, score in zip(boxes, labels, scores, strict=True):
        left = sorted(
            (i for i, (b, y) in enumerate(zip(box, label, strict=True)) if y and b[2] - b[0] >= 0.01 <= b[3] - b[1]),
            key=lambda i: (-score[i], i),
        )
        while left:
            first, *left = left
            found.append(start + first)
            left = [i for i in left if label[i] != label[first] or overlap(box[i], box[first]) <= iou]
        start += len(box)
    return found


@pytest.mark.parametrize("ties", [False, True])
def test_distinct_people_equals_the_loops(ties):
    generator = torch.Generator().manual_seed(3)
    boxes, labels, scores = [], [], []
    for count in (40, 0, 25):
        corner = torch.rand(count, 2, generator=generator) * 30
        boxes.append(torch.cat([corner, corner + 5 + 20 * torch.rand(count, 2, generator=generator)], 1))
        labels.append(torch.tensor([0, 1, 2, 5555])[torch.randint(4, (count,), generator=generator)])
        scores.append(torch.full((count,), 0.5) if ties else torch.rand(count, generator=generator))
    boxes[0][3, 2:] = boxes[0][3, :2] + torch.tensor([0.005, 9.0])
    labels[0][3] = 1
    expected = slow_distinct(*([v.tolist() for v in values] for values in (boxes, labels, scores)), 0.3)
    assert distinct_people(boxes, labels, scores, 0.3).tolist() == expected and 3 not in expected
    assert 5 < len(expected) < int(sum((y > 0).sum() for y in labels))
    assert distinct_people([], [], []).shape == (0,)
    with pytest.raises(ValueError, match="one label and one score for each box"):
        distinct_people(boxes, labels, [s[:1] for s in scores])


# --- DFD --------------------------------------------------------------------------------------------------------------


def recorded_dfd(case, dtype):
    student, teacher = (golden(case, name, dtype) for name in ("feat_s", "feat_t"))
    distil = DisaggregationFeatureDistillation(student.shape[1], teacher.shape[1]).to(dtype)
    own = dict(distil.named_parameters())
    with torch.no_grad():
        for theirs, ours in RENAMED.items():
            for kind in ("weight", "bias"):
                parameter = own[f"{ours}.{kind}"]
                parameter.copy_(golden(case, f"w.{theirs}.{kind}", dtype).view(parameter.shape))
    boxes = list(golden(case, "boxes", dtype).split(golden(case, "boxes_per_image").tolist()))
    return distil, student, teacher, boxes, golden(case, "image_sizes_hw").tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["dfd_equal_channels", "dfd_no_box_image"])
def test_feature_distillation_its_parts_and_gradients(case, dtype):
    distil, student, teacher, boxes, sizes = recorded_dfd(case, dtype)
    person, background = person_masks(boxes, sizes, *student.shape[2:])
    close(person, golden(case, "mask_fg"))
    close(background, golden(case, "mask_bg"))
    for side, feature in (("s", student), ("t", teacher)):
        spatial, channel = attention_maps(feature)
        close(spatial, golden(case, f"att_spatial_{side}"), rtol=1e-4)
        close(channel, golden(case, f"att_channel_{side}"), rtol=1e-4)
    terms = distil(student.requires_grad_(), teacher, boxes, sizes)
    for term, name in zip(terms, ("fg", "bg", "att", "global"), strict=True):
        close(term, golden(case, f"loss_{name}"), rtol=1e-4)
    loss = 5e-5 * terms.person + 2.5e-5 * terms.background + 5e-5 * terms.attention + 5e-7 * terms.context
    loss.backward()
    close(loss, golden(case, "loss_total"), rtol=1e-4)
    close(student.grad, golden(case, "grad_feat_s"), rtol=1e-3, atol=1e-7)
    for theirs, ours in RENAMED.items():
        for kind in ("weight", "bias"):
            gradient = distil.get_parameter(f"{ours}.{kind}").grad
            expected = golden(case, f"g.{theirs}.{kind}").view(gradient.shape)
            close(gradient, expected, rtol=1e-3, atol=2e-7)


def slow_masks(boxes, sizes, height, width):
    person = [[[0.0] * width for _ in range(height)] for _ in sizes]
    for mask, box, (image_height, image_width) in zip(person, boxes, sizes, strict=True):
        for x1, y1, x2, y2 in box:
            left, right = math.floor(x1 / image_width * width), math.ceil(x2 / image_width * width)
            top, bottom = math.floor(y1 / image_height * height), math.ceil(y2 / image_height * height)
            for y in range(max(0, top), min(height, bottom + 1)):
                for x in range(max(0, left), min(width, right + 1)):
                    mask[y][x] = max(mask[y][x], 1 / ((bottom - top + 1) * (right - left + 1)))
    background = []
    for mask in person:
        empty = sum(v == 0 for row in mask for v in row)
        background.append([[(v == 0) / empty if empty else 0.0 for v in row] for row in mask])
    return person, background


def test_masks_equal_the_loops():
    """Overlapping persons, one that fills the image, one that leaves it, an image without any, two sizes."""
    boxes = [[[3.0, 5, 20, 40], [10, 8, 30, 33], [55, 60, 70, 90]], [], [[0.0, 0, 50, 30]]]
    sizes = [(64, 64), (48, 60), (30, 50)]
    found = person_masks([torch.tensor(b, dtype=torch.float64).view(-1, 4) for b in boxes], sizes, 9, 11)
    for mask, expected in zip(found, slow_masks(boxes, sizes, 9, 11), strict=True):
        close(mask, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert found[1][2].sum() == 0, "all of it is a person"
    with pytest.raises(ValueError, match="a size for every image"):
        person_masks([torch.zeros(1, 4)], sizes, 9, 11)
    with pytest.raises(ValueError, match=r"need boxes \(n, 4\)"):
        person_masks([torch.zeros(4)], sizes[:1], 9, 11)


@torch.no_grad()
def test_feature_distillation_equals_the_loops():
    distil = DisaggregationFeatureDistillation(3, 4, temperature=0.7).double()
    for parameter in distil.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(parameter)))
    student, teacher = rand(2, 3, 5, 6), rand(2, 4, 5, 6, seed=1)
    boxes, sizes = [torch.tensor([[2.0, 3, 20, 18]]), torch.zeros(0, 4)], [(20, 24)] * 2
    terms = distil(student, teacher, boxes, sizes)
    aligned = distil.align(student)
    masks = person_masks(boxes, sizes, 5, 6)
    (spatial, channel), (own_spatial, own_channel) = (attention_maps(f, 0.7) for f in (teacher, aligned))
    expected = [0.0, 0.0, 0.0, 0.0]
    shift = distil.student_context(aligned) - distil.teacher_context(teacher)
    for n in range(2):
        for own, taught in ((own_channel, channel), (own_spatial, spatial)):
            pairs = zip(own[n].flatten().tolist(), taught[n].flatten().tolist(), strict=True)
            expected[2] += sum(abs(a - b) for a, b in pairs) / 2
        for c in range(4):
            for h in range(5):
                for w in range(6):
                    difference = float(aligned[n, c, h, w] - teacher[n, c, h, w])
                    q = difference**2 * float(spatial[n, h, w] * channel[n, c])
                    expected[0] += q * float(masks[0][n, h, w]) / 2
                    expected[1] += q * float(masks[1][n, h, w]) / 2
                    expected[3] += (difference + float(shift[n, c])) ** 2 / 2
    for term, value in zip(terms, expected, strict=True):
        assert term.item() == pytest.approx(value, rel=1e-6)


def test_feature_distillation_at_its_edges():
    distil = DisaggregationFeatureDistillation(4, 4)
    maps, boxes = rand(1, 4, 3, 3, dtype=torch.float32), [torch.tensor([[0.0, 0, 6, 6]])]
    assert [t.item() for t in distil(maps, maps, boxes, [(12, 12)])] == [0, 0, 0, 0]
    assert distil.align is None and DisaggregationFeatureDistillation(2, 4).align.weight.shape == (4, 2, 1, 1)
    count = sum(p.numel() for _ in range(4) for p in DisaggregationFeatureDistillation(256, 256).parameters())
    assert round(count / 1e6, 3) == 0.531  # the card's
    with torch.autocast("cpu", torch.bfloat16):
        half = distil(maps.bfloat16(), 2 * maps.bfloat16(), boxes, [(12, 12)])
    assert all(t.dtype == torch.float32 and t.isfinite() for t in half)
    with pytest.raises(ValueError, match=r"the teacher's map must be \(1, 4, 3, 3\), got \(1, 4, 3, 2\)"):
        distil(maps, maps[..., :2], boxes, [(12, 12)])
    with pytest.raises(ValueError, match="temperature"):
        DisaggregationFeatureDistillation(4, 4, 0)
    student = rand(2, 4, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: sum(distil.double()(s, rand(2, 4, 2, 2, seed=1), boxes * 2, [(12, 12)] * 2)), (student,)
    )


# --- OIM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["oim_steps", "oim_zero_start"])
def test_oim_over_the_recorded_steps(case, dtype):
    steps = sum(key.startswith(f"{case}/") and key.endswith("_loss") for key in GOLDEN)
    table, queue = golden(case, "s0_lut_before", dtype), golden(case, "s0_cq_before", dtype)
    memory = OIM(table.shape[1], len(table), len(queue)).to(dtype)
    memory.table_KD.copy_(table)
    memory.queue_QD.copy_(queue)
    memory.position.fill_(int(golden(case, "s0_header_before")))
    for step in range(steps):
        embedding = golden(case, f"s{step}_x", dtype).requires_grad_()
        label = golden(case, f"s{step}_labels")
        close(memory.similarities(embedding[label > 0]), golden(case, f"s{step}_logits"), atol=1e-5)
        loss = memory(embedding, label)
        loss.backward()
        close(loss, golden(case, f"s{step}_loss"))
        close(embedding.grad, golden(case, f"s{step}_grad_x"), atol=1e-5)
        memory.update(embedding, label)
        close(memory.table_KD, golden(case, f"s{step}_lut_after"))
        close(memory.queue_QD, golden(case, f"s{step}_cq_after"))
        assert memory.position == golden(case, f"s{step}_header_after")


def test_oim_updates_one_person_after_the_other():
    """Also where an identity comes several times, and more persons without one than the queue holds."""
    memory = OIM(4, 3, 2).double()
    table, queue, position = torch.zeros(3, 4).double(), torch.zeros(2, 4).double(), 0
    for step in range(4):
        embedding = F.normalize(rand(9, 4, seed=step), dim=1)
        label = torch.tensor([1, 5555, 2, 1, 0, 5555, 1, 5555, 2])
        if step == 2:
            label[label == 5555] = 0
        memory.update(embedding, label)
        for x, y in zip(embedding, label.tolist(), strict=True):
            if y == 5555:
                queue[position], position = x, (position + 1) % 2
            elif y:
                table[y - 1] = F.normalize(0.5 * table[y - 1] + 0.5 * x, dim=0)
        close(memory.table_KD, table, rtol=1e-12, atol=1e-15)
        close(memory.queue_QD, queue, rtol=0, atol=0)
        assert memory.position == position


def test_oim_without_a_labelled_person_is_zero_and_fills_the_queue():
    memory = OIM(3, 2, 4)
    embedding = F.normalize(rand(3, 3, dtype=torch.float32), dim=1).requires_grad_()
    loss = memory(embedding, torch.tensor([5555, 0, 5555]))
    loss.backward()
    assert loss.item() == 0 and (embedding.grad == 0).all()
    memory.update(embedding, torch.tensor([5555, 0, 5555]))
    assert torch.equal(memory.queue_QD[:2], embedding[[0, 2]]) and memory.position == 2 and not memory.table_KD.any()
    empty = memory(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    memory.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert empty.item() == 0 and memory.position == 2


def test_oim_starts_with_the_logarithm_of_its_rows():
    for identities, queue in ((5532, 5000), (482, 500)):
        loss = OIM(256, identities, queue)(F.normalize(rand(2, 256), dim=1), torch.tensor([1, identities]))
        assert loss.item() == pytest.approx(math.log(identities + queue), rel=1e-6)


@pytest.mark.parametrize("label", [3, -1, 5554, 5556])
def test_oim_refuses_an_identity_that_is_none_and_writes_nothing(label):
    memory = OIM(3, 2, 4)
    embedding, labels = rand(2, 3, dtype=torch.float32), torch.tensor([1, label])
    for call in (memory, memory.update):
        with pytest.raises(ValueError, match=rf"identity {label} is neither 0 \(background\), 1 … 2 nor 5555"):
            call(embedding, labels)
    assert not memory.table_KD.any() and not memory.queue_QD.any() and memory.position == 0
    with pytest.raises(ValueError, match=r"embeddings \(persons, 3\)"):
        memory(rand(2, 4), labels)
    for settings in ((0, 1, 1), (1, 0, 1), (1, 1, -1), (1, 1, 1, 1.0), (1, 1, 1, 0.5, 0.0)):
        with pytest.raises(ValueError, match=r"OIM needs|momentum must be"):
            OIM(*settings)
    with pytest.raises(ValueError, match="5555 identities: label 5555 stands for a person without one"):
        OIM(1, 5555, 0)


def test_oim_s_state_is_its_buffers():
    memory = OIM(3, 2, 4)
    memory.update(F.normalize(rand(3, 3, dtype=torch.float32), dim=1), torch.tensor([1, 5555, 5555]))
    again = OIM(3, 2, 4)
    again.load_state_dict(memory.state_dict())
    assert again.position == 2 and torch.equal(again.queue_QD, memory.queue_QD)
    assert set(memory.state_dict()) == {"table_KD", "queue_QD", "position"} and not list(memory.parameters())


# --- On a device ------------------------------------------------------------------------------------------------------


class Step(nn.Module):
    """Every loss of this file on what a student makes of a batch."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.teacher.requires_grad_(False)
        self.head, self.embed = nn.Linear(4, 2), nn.Linear(4, 5)
        self.memory, self.distil = OIM(5, 7, 3), DisaggregationFeatureDistillation(4, 6)
        self.fusion = ReviewFusion([4], [6], channels=8)

    def forward(self, batch):
        student, teacher = self.student(batch["images"]), self.teacher(batch["images"])
        pooled = student.mean((2, 3))
        embedding = F.normalize(self.embed(pooled), dim=1)
        confidence = teacher_confidence(self.memory.similarities(embedding), batch["label"], 7)
        features = self.distil(student, teacher, batch["boxes"], [(16, 16)] * 4)
        return SimpleNamespace(terms={
            "ld": logit_distillation(self.head(pooled), batch["logits"], batch["label"].clamp(max=1)),
            "cd": correlation_distillation(embedding, batch["embedding"] * confidence[:, None]),
            "oim": self.memory(embedding, batch["label"]),
            "pkd": pkd(self.distil.align(student), teacher),
            "reviewkd": hierarchical_context(self.fusion([student]), [teacher]),
            **features._asdict(),
        })  # fmt: skip


def test_no_loss_waits_for_the_device():
    batch = {
        "images": rand(4, 3, 8, 8, dtype=torch.float32), "label": torch.tensor([0, 1, 7, 5555]),
        "boxes": [torch.tensor([[1.0, 2, 9, 12]]), torch.zeros(0, 4)] * 2,
        "logits": rand(4, 2, dtype=torch.float32), "embedding": rand(4, 5, dtype=torch.float32),
    }  # fmt: skip
    assert len(fake_cuda.run(Step(), batch).terms) == 9


# --- What DDPS is compared with ---------------------------------------------------------------------------------------


def test_pkd_equals_the_loops():
    student, teacher = rand(2, 3, 4, 5).requires_grad_(), rand(2, 3, 4, 5, seed=1)

    def standardised(x):
        rows = x.detach().transpose(0, 1).flatten(1).tolist()
        means = [sum(row) / len(row) for row in rows]
        stds = [(sum((v - m) ** 2 for v in row) / (len(row) - 1)) ** 0.5 for row, m in zip(rows, means, strict=True)]
        return [(v - m) / (s + 1e-6) for row, m, s in zip(rows, means, stds, strict=True) for v in row]

    pairs = list(zip(standardised(student), standardised(teacher), strict=True))
    expected = sum((a - b) ** 2 for a, b in pairs) / len(pairs) / 2
    assert pkd(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: pkd(s, teacher), (student,))
    assert pkd(teacher, teacher).item() == 0
    constant = torch.ones(1, 2, 2, 2, requires_grad=True)
    loss = pkd(constant, teacher[:1, :2, :2, :2])
    assert loss.isfinite()
    for shapes, words in ((((1, 2, 3, 3), (1, 2, 3, 4)), "one shape"), (((1, 2, 1, 1),) * 2, "at least two values")):
        with pytest.raises(ValueError, match=words):
            pkd(*(torch.zeros(s) for s in shapes))


def test_hierarchical_context_equals_the_loops():
    students = [rand(2, 3, size, size + 2) for size in (8, 3, 1)]
    teachers = [rand(2, 3, size, size + 2, seed=1) for size in (8, 3, 1)]
    expected = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        sizes = [size for size in (4, 2, 1) if size < student.shape[2]]
        parts = [(student - teacher).square().mean().item()]
        for size in sizes:
            pooled = [F.adaptive_avg_pool2d(x, (size, size)) for x in (student, teacher)]
            parts.append((pooled[0] - pooled[1]).square().mean().item())
        weights = [0.5**i for i in range(len(parts))]
        expected += sum(w * p for w, p in zip(weights, parts, strict=True)) / sum(weights)
    assert hierarchical_context(students, teachers).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda *s: hierarchical_context(s, teachers), [s.requires_grad_() for s in students]
    )
    with pytest.raises(ValueError, match="same shapes at every level"):
        hierarchical_context(students, teachers[:2])


def test_review_fuses_from_coarse_to_fine():
    fusion = ReviewFusion([4, 6], [5, 7], channels=3).double().eval()
    fine, coarse = rand(1, 4, 4, 6), rand(1, 6, 2, 3)
    found = fusion([fine, coarse])
    assert [tuple(f.shape) for f in found] == [(1, 5, 4, 6), (1, 7, 2, 3)]
    own, block = fusion.blocks[1].narrow(coarse), fusion.blocks[0]
    close(found[1], fusion.blocks[1].widen(own), rtol=1e-12)
    assert fusion.blocks[1].attend is None
    mixed = block.narrow(fine)
    coarser = own.repeat_interleave(2, 2).repeat_interleave(2, 3)
    share = torch.sigmoid(block.attend[0](torch.cat([mixed, coarser], 1)))
    close(found[0], block.widen(mixed * share[:, :1] + coarser * share[:, 1:]), rtol=1e-12)
    sum(f.sum() for f in found).backward()
    assert all(p.grad is not None for p in fusion.parameters())
    with pytest.raises(ValueError, match="expected 2 levels, got 1"):
        fusion([fine])
