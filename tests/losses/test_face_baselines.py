"""What ILED and RPSD are compared with: AdaDistill, EKD, GKD, KD, margins that follow the teacher, relations."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import fake_cuda
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import close, rand, under_autocast, with_gradient
from torch import nn

from losses.adadistill import AdaDistill
from losses.ekd import EKD
from losses.gkd import group_size, grouped_kd
from losses.logit_kd import logit_kd
from losses.margin_distillation import hardest_triplets, teacher_margins, triplet_distillation
from losses.margin_softmax import arcface_logits, cosface_logits, cosines
from losses.pkt import pkt
from losses.rkd import angle_term, distance_term
from losses.spkd import similarity_preserving

RECORDED = Path(__file__).parents[1] / "golden"
NUMBERS = json.loads((RECORDED / "face.json").read_text())["logit_baselines"]
PRECISIONS = [(torch.float64, 1e-9, 1e-11), (torch.float32, 2e-4, 2e-5)]


def golden(arrays, *names, dtype=torch.float64):
    found = (torch.from_numpy(np.asarray(arrays[name])) for name in names)
    return [x.to(dtype) if x.is_floating_point() else x.long() for x in found]


def unit(row):
    return [v / math.hypot(*row) for v in row]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


# --- AdaDistill -------------------------------------------------------------------------------------------------------


def slow_update(centres, student, teacher, label, weighted):
    """Row after row, in place; returns α."""
    found = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), label.tolist(), strict=True):
        s, t = unit(s), unit(t)
        alpha = min(max(dot(s, t), 1e-6), 1)
        if weighted:
            alpha = min(max(alpha * min(max(dot(unit(centres[y]), t), 1e-6), 1), 1e-6), 1)
        centres[y] = [alpha * a + (1 - alpha) * b for a, b in zip(centres[y], t, strict=True)]
        found.append(alpha)
    return found


@pytest.mark.parametrize("weighted", [True, False])
def test_adadistill_moves_centres_row_after_row(weighted):
    torch.manual_seed(0)
    head = AdaDistill(5, 4, weighted).double()
    centres = head.centre_CD.tolist()
    for step in range(4):
        student, label = rand(7, 5, seed=step), torch.tensor([1, 1, 3, 1, 0, 3, 1])  # 2 never
        teacher = rand(7, 5, seed=50 + step) + student
        teacher[6] = -student[6]  # α at its least
        teacher[5] = student[5]
        alpha = head.update(student, teacher, label)
        close(alpha, slow_update(centres, student, teacher, label, weighted), 1e-12)
        close(head.centre_CD, centres, 1e-12)
        assert alpha[6] == 1e-6 and (weighted or alpha[5] == pytest.approx(1))
    assert head.centre_CD[2].norm() < 0.1 < head.centre_CD[1].norm()


def test_of_rows_of_one_class_the_later_sees_the_centre_as_moved():
    head = AdaDistill(3, 2).double()
    whole, parts = copy.deepcopy(head), copy.deepcopy(head)
    student, teacher, label = rand(4, 3), rand(4, 3, seed=1) + rand(4, 3), torch.tensor([1, 1, 1, 0])
    alpha = whole.update(student, teacher, label)
    for row in range(4):
        assert torch.equal(parts.update(student[[row]], teacher[[row]], label[[row]]), alpha[[row]])
    assert torch.equal(whole.centre_CD, parts.centre_CD)
    order = torch.tensor([2, 1, 0, 3])
    head.update(student[order], teacher[order], label[order])
    assert not torch.allclose(head.centre_CD[1], whole.centre_CD[1]) and torch.equal(head.centre_CD[0],
                                                                                     whole.centre_CD[0])  # fmt: skip


def test_only_the_student_learns_from_the_centres():
    head, student = AdaDistill(4, 3).double(), rand(5, 4).requires_grad_()
    teacher, label = rand(5, 4, seed=1).requires_grad_(), torch.tensor([0, 2, 1, 2, 0])
    assert not head.update(student, teacher, label).requires_grad and not list(head.parameters())
    cosine = head(student)
    close(cosine, [[dot(unit(s), unit(w)) for w in head.centre_CD.tolist()] for s in student.tolist()], 1e-12)
    F.cross_entropy(cosface_logits(cosine, label), label).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None and not head.centre_CD.requires_grad
    assert torch.autograd.gradcheck(head, (student,))


def test_adadistill_begins_small_and_goes_on_where_it_was_stored():
    torch.manual_seed(0)
    head, other = AdaDistill(16, 500), AdaDistill(16, 500)
    assert head.centre_CD.std() == pytest.approx(0.01, rel=0.05) and head.centre_CD.dtype == torch.float32
    other.load_state_dict(copy.deepcopy(head.state_dict()))
    for one in (head, other):
        one.update(rand(6, 16), rand(6, 16, seed=1), torch.arange(6))
    assert torch.equal(head.centre_CD, other.centre_CD)


def test_zero_rows_and_half_precision_of_adadistill():
    low, wide = AdaDistill(4, 3), AdaDistill(4, 3)
    wide.load_state_dict(copy.deepcopy(low.state_dict()))
    student, teacher, label = rand(6, 4).bfloat16(), rand(6, 4, seed=1).bfloat16(), torch.arange(6) % 3
    student[0], teacher[1] = 0, 0
    with torch.autocast("cpu", torch.bfloat16):
        alpha = low.update(student, teacher, label)
        cosine = low(student)
    assert torch.equal(alpha, wide.update(student.float(), teacher.float(), label)) and alpha.dtype == torch.float32
    assert torch.equal(cosine, wide(student.float())) and cosine.dtype == torch.float32
    assert torch.equal(low.centre_CD, wide.centre_CD) and low.centre_CD.isfinite().all()
    assert alpha[0] == pytest.approx(1e-6) and low.double()(student.double()).dtype == torch.float64


# --- EKD --------------------------------------------------------------------------------------------------------------


class SlowEKD:
    def __init__(self, loss):
        self.loss = loss
        self.threshold = [[0.0] * len(loss.anchors) for _ in range(2)]

    def __call__(self, student, teacher, label, training=True):
        loss, rows = self.loss, len(label)
        pairs = [(i, j) for i in range(rows) for j in range(i + 1, rows)]
        same = [label[i] == label[j] for i, j in pairs]
        values = [[dot(unit(x[i]), unit(x[j])) for i, j in pairs] for x in (student.tolist(), teacher.tolist())]
        ranks = []
        for threshold, value in zip(self.threshold, values, strict=True):
            falling = sorted((v for v, genuine in zip(value, same, strict=True) if not genuine), reverse=True)
            if training and falling:
                for k, anchor in enumerate(loss.anchors):
                    new = falling[min(len(falling) // anchor, len(falling) - 1)]
                    threshold[k] = loss.momentum * new + (1 - loss.momentum) * threshold[k]
            exponents = [[min(max((v - th) / loss.temperature, -50), 50) for th in threshold] for v in value]
            ranks.append([sum(1 / (1 + math.exp(-e)) for e in row) for row in exponents])
        square = [(a - b) ** 2 for a, b in zip(*ranks, strict=True)]
        genuine = [v for v, own in zip(square, same, strict=True) if own]
        others = sorted((i for i, own in enumerate(same) if not own), key=lambda i: (-values[0][i], i))[: loss.top_k]
        others = [square[i] for i in others]
        return [sum(x) / len(x) if x else 0.0 for x in (genuine, others)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"anchors": (2, 5, 10_000), "top_k": 7, "temperature": 0.3, "momentum": 0.4},
        {"anchors": (1, 3), "top_k": 1, "temperature": 0.1, "momentum": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("at_once", [7, 2**20])  # numbers that are ranked in a chunk
def test_ekd_is_that_of_plain_loops_over_steps(monkeypatch, settings, at_once):
    monkeypatch.setattr("losses.similarity._AT_ONCE_CPU", at_once)
    loss = EKD(**settings).double()
    slow = SlowEKD(loss)
    for step in range(4):
        student, teacher = rand(9, 4, seed=step), rand(9, 6, seed=50 + step)
        label = torch.randint(4, (9,), generator=torch.Generator().manual_seed(step))
        close(torch.stack(loss(student, teacher, label)), slow(student, teacher, label), 1e-10)
        close(loss.student_threshold_K, slow.threshold[0], 1e-12)
        close(loss.teacher_threshold_K, slow.threshold[1], 1e-12)
    loss.eval()
    close(torch.stack(loss(student, teacher, label)), slow(student, teacher, label, False), 1e-10)
    close(loss.student_threshold_K, slow.threshold[0], 1e-12)


def test_thresholds_take_the_batch_before_they_rank_it():
    loss = EKD(anchors=(1_000_000,), momentum=1.0).double()
    student, teacher = rand(4, 3), rand(4, 3, seed=1)
    loss(student, teacher, torch.arange(4))
    gram = F.normalize(student) @ F.normalize(student).T
    close(loss.student_threshold_K, [gram.triu(1)[gram.triu(1) != 0].max()])


def test_of_few_pairs_ekd_is_zero_and_not_nan():
    for label, is_zero in (
        ([0, 1, 2, 3], (True, False)),  # no genuine pair
        ([0, 0, 0, 0], (False, True)),  # no impostors
        ([0], (True, True)),
    ):
        label = torch.tensor(label)
        loss = EKD().double()
        student, teacher = rand(len(label), 5).requires_grad_(), rand(len(label), 3, seed=1)
        terms = loss(student, teacher, label)
        assert [term.item() == 0 for term in terms] == list(is_zero)
        sum(terms).backward()
        assert student.grad.isfinite().all() and student.grad.any() == (not all(is_zero))
        if is_zero[1]:
            assert not loss.student_threshold_K.any() and not loss.teacher_threshold_K.any()
        for term, zero in zip(terms, is_zero, strict=True):
            assert term.isfinite() and term.requires_grad and (term == 0) == zero


def test_anchors_beyond_the_impostors_take_the_first_and_one_takes_the_last():
    loss = EKD(anchors=(1, 2, 1000), momentum=1.0).double()
    student, label = rand(5, 3), torch.tensor([0, 0, 1, 1, 2])
    loss(student, student, label)
    found = F.normalize(student) @ F.normalize(student).T
    impostors = sorted((float(found[i, j]) for i in range(5) for j in range(i + 1, 5) if label[i] != label[j]),
                       reverse=True)  # fmt: skip
    assert len(impostors) == 8
    close(loss.student_threshold_K, [impostors[7], impostors[4], impostors[0]])


def test_hardest_impostors_of_one_similarity_are_the_earlier_pairs():
    student = torch.ones(4, 3, dtype=torch.float64)
    teacher, label = rand(4, 5), torch.arange(4)
    loss = EKD(top_k=2, temperature=1.0).double()
    slow = SlowEKD(loss)
    close(torch.stack(loss(student, teacher, label)), slow(student, teacher, label))


def test_gradients_and_lengths_of_ekd():
    teacher, label = rand(7, 4, seed=1).requires_grad_(), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    loss = EKD(anchors=(2, 4, 100), temperature=0.2, top_k=6, momentum=0.5).double()
    loss(rand(7, 3, seed=5), teacher, label)
    loss.eval()
    student = rand(7, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, label), (student,))
    terms = loss(student, teacher, label)
    sum(terms).backward()
    assert teacher.grad is None and not loss.student_threshold_K.requires_grad
    close((student.grad * student).sum(dim=1), torch.zeros(7))
    close(torch.stack(loss(5 * student, teacher / 3, label)), torch.stack(terms), 1e-11)
    student = torch.zeros(7, 3, requires_grad=True, dtype=torch.float64)
    sum(loss(student, teacher, label)).backward()
    assert not student.grad.any()


@pytest.mark.parametrize("at_once", [1, 2**19])  # a pair at a time, all pairs
def test_a_batch_between_forward_and_backward_moves_no_gradient(monkeypatch, at_once):
    monkeypatch.setattr("losses.similarity._AT_ONCE_CPU", at_once)
    label_B = torch.arange(8) // 2

    def gradient(between):
        student_BD, teacher_BD = rand(8, 5, seed=1).requires_grad_(), rand(8, 5, seed=2)
        module = EKD((1, 3), 5, momentum=0.5).double()
        value = sum(module(student_BD, teacher_BD, label_B))
        if between:
            module(rand(8, 5, seed=3), rand(8, 5, seed=4), label_B)
        value.backward()
        return student_BD.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=0, atol=0)


def test_a_student_like_its_teacher_ranks_alike():
    loss, teacher = EKD().double(), rand(8, 4)
    turn = torch.linalg.qr(rand(4, 4, seed=1)).Q
    for _ in range(3):
        student = (2 * teacher @ turn).requires_grad_()
        terms = loss(student, teacher, torch.arange(8) // 2)
        sum(terms).backward()
        close(torch.stack(terms), [0, 0], atol=1e-20)
        close(student.grad, torch.zeros(8, 4), atol=1e-9)


def test_evaluation_moves_no_thresholds_and_a_restored_ekd_goes_on_as_the_other():
    loss, other = EKD(momentum=0.3), EKD(momentum=0.3)
    steps = [(rand(6, 4, seed=i, dtype=torch.float32), rand(6, 4, seed=50 + i, dtype=torch.float32),
              torch.arange(6) // 2) for i in range(6)]  # fmt: skip
    for step in steps[:3]:
        loss(*step)
    assert set(loss.state_dict()) == {"student_threshold_K", "teacher_threshold_K"}
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    for step in steps[3:]:
        before = copy.deepcopy(loss.state_dict())
        loss.eval()(*step)
        assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())
        assert loss.train()(*step) == other(*step)
        assert all(not torch.equal(v, before[k]) for k, v in loss.state_dict().items())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_and_autocast_change_ekd_by_the_rounding_alone(kind):
    student, teacher, label = rand(8, 6).to(kind), rand(8, 5, seed=1).to(kind), torch.arange(8) // 2
    for part in range(2):
        found = with_gradient(under_autocast(lambda *x: EKD()(*x)[part]), student, teacher, label)  # noqa: B023
        wide = with_gradient(lambda *x: EKD()(*x)[part], student.float(), teacher.float(), label)  # noqa: B023
        assert found[0].dtype == torch.float32 and found[0] == wide[0] and torch.equal(found[1], wide[1].to(kind))
    assert EKD()(student.double(), teacher.double(), label)[0].dtype == torch.float64


# --- GKD and KD -------------------------------------------------------------------------------------------------------


def test_grouped_and_plain_kd_as_recorded():
    student, teacher, label = golden(
        np.load(RECORDED / "face.npz"), *(f"logit_baselines/{x}" for x in ("student_logits", "teacher_logits", "label"))
    )
    close(logit_kd(student, teacher, 4.0), NUMBERS["kd"])
    for stride in (1, 5):
        terms, recorded = grouped_kd(student, teacher, label, stride=stride), NUMBERS[f"gkd_stride{stride}"]
        close(terms.binary, recorded["binary"])
        close(terms.primary, recorded["primary"])
        assert group_size(student, stride=stride) == recorded["n"]


@pytest.mark.parametrize(("dtype", "rtol", "atol"), PRECISIONS)
def test_grouped_and_plain_kd_in_full_as_recorded(shared, dtype, rtol, atol):
    arrays = np.load(shared / "golden/face/logit_baselines.npz")
    student, teacher, label = golden(arrays, "student_logits", "teacher_logits", "label", dtype=dtype)
    value, gradient = with_gradient(lambda s: logit_kd(s, teacher, 4.0), student)
    close(value, arrays["kd_loss"], rtol, atol)
    close(gradient, arrays["kd_grad"], rtol, atol)
    for stride in (1, 5):

        def whole(s):
            terms = grouped_kd(s, teacher, label, stride=stride)  # noqa: B023
            return terms.binary + 8 * terms.primary

        value, gradient = with_gradient(whole, student)
        close(value, arrays[f"gkd_stride{stride}_loss"], rtol, atol)
        close(gradient, arrays[f"gkd_stride{stride}_grad"], rtol, atol)


def shares(row, temperature=1.0):
    row = [math.exp((v - max(row)) / temperature) for v in row]
    return [v / sum(row) for v in row]


def slow_grouped(student, teacher, label, temperature, mass, stride, size):
    rows, classes = student.shape
    student, teacher = student.tolist(), teacher.tolist()
    if not size:
        summed = sorted((sum(shares(row)[c] for row in student) for c in range(classes)), reverse=True)
        reached = [i for i in range(0, classes, stride) if sum(summed[: i + 1]) >= mass * rows]
        size = reached[0] + 1 if reached else classes
    binary = primary = 0.0
    for s, t, y in zip(student, teacher, label.tolist(), strict=True):
        group = sorted(range(classes), key=lambda c: (c != y, -s[c]))[:size]
        p, q = shares(s, temperature), shares(t, temperature)
        own, theirs = (sum(x[c] for c in group) for x in (p, q))
        if len(group) < classes:
            binary += theirs * math.log(theirs / own) + (1 - theirs) * math.log((1 - theirs) / (1 - own))
        primary += sum(q[c] / theirs * math.log(q[c] / theirs * own / p[c]) for c in group)
    return [temperature**2 * x / rows for x in (binary, primary)]


@pytest.mark.parametrize(
    ("temperature", "mass", "stride", "size"),
    [(4.0, 0.93, 1, 0), (1.0, 0.5, 1, 0), (2.0, 0.8, 3, 0), (2.0, 0.99, 8, 0), (4.0, 1.0, 1, 0), (3.0, 0.9, 1, 4),
     (3.0, 0.9, 1, 1), (3.0, 0.9, 1, 100), (2.0, 0.9, 100, 0)],
)  # fmt: skip
def test_grouped_kd_is_that_of_written_out_groups(temperature, mass, stride, size):
    student, teacher, label = 3 * rand(5, 12), 3 * rand(5, 12, seed=1), torch.tensor([0, 11, 3, 3, 7])
    student[2, 3] = student[2].min() - 5  # the label is forced in
    terms = grouped_kd(student, teacher, label, temperature, mass, stride, size)
    close(torch.stack(terms), slow_grouped(student, teacher, label, temperature, mass, stride, size), 1e-10)
    assert torch.autograd.gradcheck(
        lambda s: grouped_kd(s, teacher, label, temperature, mass, stride, size), (student.requires_grad_(),)
    )


def test_a_group_of_all_classes_is_plain_kd():
    student, teacher, label = rand(4, 6), rand(4, 6, seed=1), torch.tensor([5, 0, 2, 2])
    terms = grouped_kd(student, teacher, label, size=6)
    close(terms.primary, logit_kd(student, teacher, 4.0), 1e-12)
    close(terms.binary, 0, atol=1e-14)


def test_what_is_left_out_of_grouped_kd_is_the_part_inside_the_rest():
    """Binary, plus the divergences inside either group by the teacher's mass there, is the whole."""
    student, teacher, label = rand(1, 8), rand(1, 8, seed=1), torch.tensor([2])
    terms = grouped_kd(student, teacher, label, size=3)
    group = sorted(range(8), key=lambda c: (c != 2, -student[0, c].item()))[:3]
    rest = [c for c in range(8) if c not in group]
    p, q = (shares(x[0].tolist(), 4.0) for x in (student, teacher))
    own, theirs = (sum(x[c] for c in rest) for x in (p, q))
    inside = 16 * sum(q[c] / theirs * math.log(q[c] / theirs * own / p[c]) for c in rest)
    close(terms.binary + (1 - theirs) * terms.primary + theirs * inside, logit_kd(student, teacher, 4.0), 1e-11)


def test_equal_logits_at_the_end_of_a_group_belong_to_it():
    student = torch.tensor([[5.0, 1, 1, 1, 0, 0]], dtype=torch.float64)
    teacher, label = rand(1, 6), torch.tensor([0])
    found = [torch.stack(grouped_kd(student, teacher, label, size=size)) for size in (2, 3, 4)]
    close(found[0], found[2])
    close(found[1], slow_grouped(student, teacher, label, 4.0, 1.0, 1, 4))


def test_margin_logits_of_scale_64_and_a_student_like_its_teacher():
    """As released, the logits of both are those of a margin softmax."""
    label = torch.tensor([0, 1, 2, 3])
    student, teacher = (cosface_logits(cosines(rand(4, 5, seed=i), rand(9, 5, seed=7)), label).float() for i in (0, 1))
    value, gradient = with_gradient(lambda s: sum(grouped_kd(s, teacher, label)), student)
    assert value.isfinite() and gradient.isfinite().all() and gradient.any()
    value, gradient = with_gradient(lambda s: sum(grouped_kd(s, teacher, label)), 1000 * student)
    assert value.isfinite() and gradient.isfinite().all()
    value, gradient = with_gradient(lambda s: sum(grouped_kd(s, teacher.double(), label)), teacher.double())
    close(value, 0, atol=1e-13)
    close(gradient, torch.zeros(4, 9), atol=1e-13)
    low = with_gradient(under_autocast(lambda s: sum(grouped_kd(s, teacher.bfloat16(), label))), student.bfloat16())
    wide = with_gradient(lambda s: sum(grouped_kd(s, teacher.bfloat16().float(), label)), student.bfloat16().float())
    assert low[0] == wide[0] and low[0].dtype == torch.float32 and torch.equal(low[1], wide[1].bfloat16())


# --- Margins that follow the teacher ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol", "atol"), PRECISIONS)
def test_margin_and_triplet_distillation_as_recorded(shared, dtype, rtol, atol):
    arrays = np.load(shared / "golden/face/margin_triplet.npz")
    student, teacher, weight, label = golden(arrays, "student", "teacher", "weight", "label", dtype=dtype)
    margin = teacher_margins(teacher, weight, label)
    close(margin, arrays["md_margin"], rtol, atol)
    loss = F.cross_entropy(arcface_logits(cosines(student, weight), label, margin), label)
    close(loss, arrays["md_loss"], rtol, atol)
    triplets = [golden(arrays, *(f"{who}{part}" for part in "apn"), dtype=dtype) for who in "st"]
    for distance in ("l2", "angle"):
        terms = triplet_distillation(*map(tuple, triplets), distance=distance)
        close(terms.margin_N, arrays[f"td_{distance}_margin"], rtol, atol)
        close(terms.loss, arrays[f"td_{distance}_loss"], rtol, atol)


def test_the_margin_of_a_row_is_how_sure_the_teacher_is():
    teacher, weight, label = rand(6, 4), rand(3, 4, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    sure = [dot(unit(t), unit(weight[y].tolist())) for t, y in zip(teacher.tolist(), label.tolist(), strict=True)]
    found = teacher_margins(teacher.requires_grad_(), weight, label, 0.6, 0.1)
    close(found, [(0.6 - 0.1) / max(sure) * c + 0.1 for c in sure], 1e-12)
    assert not found.requires_grad and found.max() == pytest.approx(0.6)
    assert teacher_margins(-weight.detach(), weight, torch.arange(3)).tolist() == pytest.approx([0.2] * 3)
    assert teacher_margins(torch.zeros(3, 4), weight, torch.arange(3)).tolist() == pytest.approx([0.2] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        low = teacher_margins(teacher.detach().bfloat16(), weight.float(), label)
    assert torch.equal(low, teacher_margins(teacher.detach().bfloat16().float(), weight.float(), label))


def slow_triplets(student, teacher, largest, least, distance):
    def far(a, b):
        a, b = unit(a), unit(b)
        if distance == "angle":
            return math.acos(max(min(dot(a, b), 1), -1))
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    apart = [[(far(a, p), far(a, n)) for a, p, n in zip(*(x.tolist() for x in network), strict=True)]
             for network in (student, teacher)]  # fmt: skip
    gaps = [max(n - p, 0) for p, n in apart[1]]
    margins = [(largest - least) / max(gaps) * gap + least if max(gaps) else least for gap in gaps]
    losses = [max(p - n + m, 0) for (p, n), m in zip(apart[0], margins, strict=True)]
    return sum(losses) / len(losses), margins


@pytest.mark.parametrize("distance", ["l2", "angle"])
def test_triplets_are_those_of_plain_loops(distance):
    student = tuple(rand(7, 4, seed=i) for i in range(3))
    for teacher in (tuple(rand(7, 6, seed=i) for i in (3, 4, 5)), (rand(7, 6), rand(7, 6, seed=1), rand(7, 6))):
        found = triplet_distillation(student, teacher, 0.7, 0.1, distance)
        loss, margins = slow_triplets(student, teacher, 0.7, 0.1, distance)
        close(found.loss, loss, 1e-12)
        close(found.margin_N, margins, 1e-12)
    assert margins == [0.1] * 7, "the teacher itself errs"
    student = tuple(x.requires_grad_() for x in student)
    teacher = tuple(rand(7, 6, seed=i).requires_grad_() for i in (3, 4, 5))
    call = lambda *x: triplet_distillation(x, teacher, distance=distance).loss  # noqa: E731
    assert torch.autograd.gradcheck(call, student)
    call(*student).backward()
    assert all(x.grad is None for x in teacher)
    for x in student:
        close((x.grad * x).sum(dim=1), torch.zeros(7))


@pytest.mark.parametrize("distance", ["l2", "angle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triplets_of_none_of_zero_rows_and_of_one_image_are_finite(distance, dtype):
    none = torch.zeros(0, 4, dtype=dtype, requires_grad=True)
    terms = triplet_distillation((none,) * 3, (none.detach(),) * 3, distance=distance)
    terms.loss.backward()
    assert terms.loss == 0 and none.grad.shape == (0, 4) and len(terms.margin_N) == 0
    anchor, other = rand(3, 4, dtype=dtype), rand(3, 4, seed=1, dtype=dtype)
    anchor[2] = 0
    teacher = (rand(3, 2, dtype=dtype), rand(3, 2, seed=1, dtype=dtype), torch.zeros(3, 2, dtype=dtype))
    for triplet in ((anchor, anchor, other), (anchor, other, -anchor), (anchor, -anchor, anchor)):
        triplet = tuple(x.clone().requires_grad_() for x in triplet)
        loss = triplet_distillation(triplet, teacher, distance=distance).loss
        loss.backward()
        assert loss.isfinite() and all(x.grad.isfinite().all() for x in triplet) and not triplet[0].grad[2].any()
        assert max(x.grad.abs().max() for x in triplet) < 1e4


def test_half_precision_and_autocast_change_triplets_by_the_rounding_alone():
    for distance in ("l2", "angle"):
        student, teacher = ([rand(5, 4, seed=i).bfloat16() for i in own] for own in ((0, 1, 2), (3, 4, 5)))
        low = with_gradient(
            under_autocast(lambda a: triplet_distillation((a, *student[1:]), tuple(teacher), distance=distance).loss),  # noqa: B023
            student[0],
        )
        student, teacher = ([x.float() for x in network] for network in (student, teacher))
        wide = with_gradient(
            lambda a: triplet_distillation((a, *student[1:]), tuple(teacher), distance=distance).loss,  # noqa: B023
            student[0],
        )
        assert low[0].dtype == torch.float32 and low[0] == wide[0] and torch.equal(low[1], wide[1].bfloat16())


def test_hardest_triplets_are_those_of_plain_loops():
    for seed in range(5):
        student = rand(9, 3, seed=seed)
        label = torch.randint(3, (9,), generator=torch.Generator().manual_seed(seed))
        anchors, positives, negatives = (x.tolist() for x in hardest_triplets(student.requires_grad_(), label))
        near = [[dot(unit(a), unit(b)) for b in student.tolist()] for a in student.tolist()]
        assert anchors == list(range(9))
        for i in range(9):
            same = [j for j in range(9) if label[j] == label[i] and j != i]
            others = [j for j in range(9) if label[j] != label[i]]
            assert positives[i] == min(same, key=lambda j: near[i][j], default=i)
            assert negatives[i] == max(others, key=lambda j: near[i][j])
    alone = hardest_triplets(rand(4, 3), torch.zeros(4, dtype=torch.int64))
    assert all(0 <= x.min() <= x.max() < 4 for x in alone), "one identity has no others, but rows"
    assert [x.tolist() for x in hardest_triplets(rand(1, 3), torch.tensor([5]))] == [[0]] * 3


# --- Relations --------------------------------------------------------------------------------------------------------


def slow_relations(student, teacher):
    """RKD's two terms, PKT, SP in loops."""

    def huber(x):
        return x * x / 2 if abs(x) < 1 else abs(x) - 0.5

    rows, found = len(student), {}
    near = []
    for x in (student.tolist(), teacher.tolist()):
        apart = [[math.dist(a, b) for b in x] for a in x]
        mean = sum(map(sum, apart)) / (rows * (rows - 1))
        angle = []
        for i in range(rows):
            for j in range(rows):
                for k in range(rows):
                    to = [[b - a for a, b in zip(x[i], x[m], strict=True)] for m in (j, k)]
                    norms = math.hypot(*to[0]) * math.hypot(*to[1])
                    angle.append(dot(*to) / norms if norms else 0.0)
        kernel = [[(dot(a, b) / (math.hypot(*a) + 1e-7) / (math.hypot(*b) + 1e-7) + 1) / 2 for b in x] for a in x]
        near.append({
            "distance": [v / mean for row in apart for v in row],
            "angle": angle,
            "pkt": [v / sum(row) for row in kernel for v in row],
            "sp": [v for a in x for v in unit([dot(a, b) for b in x])],
        })  # fmt: skip
    own, theirs = near
    for name in ("distance", "angle"):
        found[name] = sum(huber(a - b) for a, b in zip(own[name], theirs[name], strict=True)) / len(own[name])
    found["pkt"] = sum(t * math.log((t + 1e-7) / (s + 1e-7))
                       for s, t in zip(own["pkt"], theirs["pkt"], strict=True)) / rows**2  # fmt: skip
    found["sp"] = sum((s - t) ** 2 for s, t in zip(own["sp"], theirs["sp"], strict=True)) / rows**2
    return found


RELATIONS = {"distance": distance_term, "angle": angle_term, "pkt": pkt, "sp": similarity_preserving}


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("widths", [(3, 5), (5, 2), (1, 4), (4, 4)], ids=str)
def test_relations_take_a_teacher_of_another_width(name, widths):
    student, teacher = (rand(6, width, seed=width) for width in widths)
    close(RELATIONS[name](student, teacher), slow_relations(student, teacher)[name], 1e-9, 1e-12)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: RELATIONS[name](s, teacher), (student.requires_grad_(),))
    RELATIONS[name](student, teacher).backward()
    assert teacher.grad is None
    wide = torch.cat([teacher.detach(), torch.zeros(6, 3)], dim=1)
    close(RELATIONS[name](student, wide), RELATIONS[name](student, teacher), 1e-12)
    close(RELATIONS[name](wide, teacher), 0, atol=1e-13)


def test_chunks_of_unequal_widths_change_nothing(monkeypatch):
    student, teacher = rand(7, 3), rand(7, 5, seed=1)
    expected = with_gradient(angle_term, student, teacher)
    monkeypatch.setattr("losses.similarity._AT_ONCE_CPU", 2 * 7 * 7)
    found = with_gradient(angle_term, student, teacher)
    close(found[0], expected[0], 1e-13)
    close(found[1], expected[1], 1e-12)


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: AdaDistill(0, 3), "dim and num_classes must be at least 1, got 0 and 3"),
        (lambda: AdaDistill(3, 0), "got 3 and 0"),
        (lambda: AdaDistill(3, 2).update(rand(2, 3), rand(2, 4), torch.arange(2)), "one shape"),
        (lambda: AdaDistill(3, 2).update(rand(2, 4), rand(2, 4), torch.arange(2)),
         r"expected embeddings \(B, 3\) and labels \(B,\), got \(2, 4\) and \(2,\)"),
        (lambda: AdaDistill(3, 2).update(rand(2, 3), rand(2, 3), torch.arange(3)), r"got \(2, 3\) and \(3,\)"),
        (lambda: EKD(anchors=()), r"anchors and top_k must be at least 1.*got anchors \(\)"),
        (lambda: EKD(anchors=(10, 0)), r"got anchors \(10, 0\), top_k 2000, temperature 0.01, momentum 0.01"),
        (lambda: EKD(top_k=0), "top_k 0"),
        (lambda: EKD(temperature=0), "temperature 0,"),
        (lambda: EKD(temperature=math.inf), "temperature inf"),
        (lambda: EKD(momentum=1.5), r"momentum between 0 and 1, got .* momentum 1\.5"),
        (lambda: EKD()(rand(2, 3), rand(3, 3), torch.arange(2)),
         r"student and teacher \(B, D\) and labels \(B,\), got \(2, 3\), \(3, 3\) and \(2,\)"),
        (lambda: EKD()(rand(2, 3), rand(2, 3), torch.arange(3)), r"got \(2, 3\), \(2, 3\) and \(3,\)"),
        (lambda: EKD()(rand(2), rand(2, 3), torch.arange(2)), r"got \(2,\), \(2, 3\) and \(2,\)"),
        (lambda: grouped_kd(rand(2, 3), rand(2, 4), torch.arange(2)), "one shape"),
        (lambda: grouped_kd(rand(0, 3), rand(0, 3), torch.arange(0)), "at least 1, got 0"),
        (lambda: grouped_kd(rand(2, 3), rand(2, 3), torch.arange(2), 0),
         "temperature must be above 0, mass in .*, stride at least 1 and size at least 0, got temperature 0, mass 0"),
        (lambda: grouped_kd(rand(2, 3), rand(2, 3), torch.arange(2), mass=0), "mass 0, stride 1, size 0"),
        (lambda: grouped_kd(rand(2, 3), rand(2, 3), torch.arange(2), mass=1.1), "mass 1.1, stride 1"),
        (lambda: grouped_kd(rand(2, 3), rand(2, 3), torch.arange(2), stride=0), "stride 0, size 0"),
        (lambda: grouped_kd(rand(2, 3), rand(2, 3), torch.arange(2), size=-1), "size -1"),
        (lambda: logit_kd(rand(2, 3), rand(2, 4)), "one shape"),
        (lambda: teacher_margins(rand(2, 3), rand(2, 3), torch.arange(2), 0.2, 0.5),
         r"the least margin \(0\.5\) must not be above the largest \(0\.2\)"),
        (lambda: triplet_distillation((rand(2, 3),) * 3, (rand(2, 3),) * 3, 0.2, 0.5), r"least margin \(0\.5\)"),
        (lambda: triplet_distillation((rand(2, 3),) * 3, (rand(2, 3),) * 3, distance="l1"),
         "distance must be l2 or angle, got 'l1'"),
        (lambda: triplet_distillation((rand(2, 3), rand(2, 3), rand(1, 3)), (rand(2, 3),) * 3),
         r"must be \(N, D\) each, of student and teacher as many, got \[\(2, 3\), \(2, 3\), \(1, 3\)\] and "),
        (lambda: triplet_distillation((rand(2, 3),) * 3, (rand(2, 3), rand(2, 3), rand(2, 4))),
         r"and \[\(2, 3\), \(2, 3\), \(2, 4\)\]"),
        (lambda: triplet_distillation((rand(2, 3),) * 3, (rand(1, 3),) * 3), r"and \[\(1, 3\), \(1, 3\), \(1, 3\)\]"),
        (lambda: hardest_triplets(rand(0, 3), torch.arange(0)), "at least 1, got 0"),
        (lambda: pkt(rand(2, 3), rand(3, 3)), r"one row per image, got \(2, 3\) and \(3, 3\)"),
        (lambda: pkt(rand(1, 3), rand(1, 4)), "at least 2, got 1"),
        (lambda: distance_term(rand(2, 3), rand(3, 2)), r"one row per image, got \(2, 3\) and \(3, 2\)"),
        (lambda: distance_term(rand(1, 3), rand(1, 4)), "at least 2, got 1"),
        (lambda: angle_term(rand(2, 3), rand(2)), r"one row per image, got \(2, 3\) and \(2,\)"),
        (lambda: angle_term(rand(1, 3), rand(1, 4)), "at least 2, got 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- On a device ------------------------------------------------------------------------------------------------------


class Step(nn.Module):
    """Every loss of this file on what a student makes of a batch."""

    def __init__(self):
        super().__init__()
        self.student, self.weight = nn.Linear(6, 4), nn.Parameter(rand(5, 4, dtype=torch.float32))
        self.ekd, self.centres = EKD(), nn.ModuleList([AdaDistill(4, 5, weighted) for weighted in (True, False)])

    def forward(self, batch):
        student, teacher, label = self.student(batch["x"]), batch["teacher"], batch["label"]
        genuine, impostor = self.ekd(student, teacher, label)
        terms = {"genuine": genuine, "impostor": impostor}
        cosine = cosines(student, self.weight)
        margin = teacher_margins(teacher, self.weight, label)
        terms["margin"] = F.cross_entropy(arcface_logits(cosine, label, margin), label)
        for size in (0, 3):
            grouped = grouped_kd(cosine, cosines(teacher, self.weight), label, size=size)
            terms |= {f"{name} {size}": value for name, value in grouped._asdict().items()}
        for centres in self.centres:
            centres.update(student, teacher, label)
            logits = cosface_logits(centres(student), label)
            terms[f"centres {centres.weighted}"] = F.cross_entropy(logits, label)
        mined = hardest_triplets(student, label)
        for distance in ("l2", "angle"):
            triplets = ([x.index_select(0, rows) for rows in mined] for x in (student, teacher))
            terms[f"triplet {distance}"] = triplet_distillation(*triplets, distance=distance).loss
        for name, relation in RELATIONS.items():
            terms[name] = relation(student, batch["wide"])
        return SimpleNamespace(terms=terms)


def test_no_loss_waits_for_the_device():
    batch = {
        "x": rand(4, 6, dtype=torch.float32), "teacher": rand(4, 4, dtype=torch.float32),
        "wide": rand(4, 7, dtype=torch.float32), "label": torch.tensor([0, 1, 1, 2]),
    }  # fmt: skip
    assert len(fake_cuda.run(Step(), batch).terms) == 2 + 1 + 4 + 2 + 2 + len(RELATIONS)
