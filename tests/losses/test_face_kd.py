"""ILED, RPSD with its bank, and feature consistency: recorded numbers, plain loops, gradients, degenerate batches."""

import copy
import itertools
import json
import math
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import fake_cuda
import numpy as np
import pytest
import torch
from numerics import close, rand, under_autocast, with_gradient
from torch import nn

from losses.face_kd import ILED, RPSD, cosine_distances, ramp
from losses.feature_consistency import angular, feature_consistency, raw_l2

RECORDED = Path(__file__).parents[1] / "golden"
NUMBERS = json.loads((RECORDED / "face.json").read_text())
MINERS = ("hard_negative", "teacher_similar", "discrepancy", "all", "random")
INSTANCE = {
    "adaptive": ILED(),
    "adaptive, some deviations above": ILED(kappa=0.7, easy_weight=0.3),
    "hard only": ILED(easy_weight=0.0),
    "topk": ILED("topk", ratio_start=0.6, ratio_end=0.2, easy_weight=0.1),
    "soft": ILED("soft", gamma=1.7),
    "none": ILED("none"),
    "cos": feature_consistency,
    "l2n": lambda s, t: feature_consistency(s, t, "l2n"),
    "half": lambda s, t: feature_consistency(s, t, "half"),
    "angular": angular,
}


def tensors(arrays, group=""):
    start = f"{group}/" if group else ""
    found = {k.removeprefix(start): torch.from_numpy(np.asarray(v)) for k, v in arrays.items() if k.startswith(start)}
    return {k: v if v.is_floating_point() else v.long() for k, v in found.items()}


def own(loss):
    """A copy in float64, so that no test moves another's state; functions as they are."""
    return copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss


def slow_distances(student, teacher):
    found = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        norms = [max(math.sqrt(sum(v * v for v in x)), 1e-12) for x in (s, t)]
        found.append(1 - sum(a * b for a, b in zip(s, t, strict=True)) / norms[0] / norms[1])
    return found


# --- Recorded numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMBERS["iled"])
def test_iled_gives_the_recorded_losses_over_steps(name):
    inputs = tensors(np.load(RECORDED / "face.npz"), "iled")
    loss = ILED(**NUMBERS["iled"][name]["settings"]).double()
    for step, expected in enumerate(NUMBERS["iled"][name]["losses"]):
        close(loss(inputs["student"][step], inputs["teacher"][step]), expected)


@pytest.mark.parametrize("name", NUMBERS["rpsd"])
def test_rpsd_gives_the_recorded_losses_over_steps(name):
    inputs = tensors(np.load(RECORDED / "face.npz"), "rpsd")
    loss = RPSD(8, 8, 10, **NUMBERS["rpsd"][name]["settings"]).double()
    for step, expected in enumerate(NUMBERS["rpsd"][name]["losses"]):
        rows = [inputs[x][step] for x in ("student", "teacher", "label")]
        pairs = loss.pairs(*rows)
        close(loss.loss(pairs), expected)
        assert pairs.is_mined_BR.sum() == NUMBERS["rpsd"][name]["pairs"][step]
        loss.enqueue(*rows)


@pytest.mark.parametrize("name", NUMBERS["iled"])
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-9, 1e-11), (torch.float32, 2e-4, 2e-5)])
def test_iled_in_full_as_recorded(shared, name, dtype, rtol, atol):
    golden = tensors(np.load(shared / "golden/face/iled.npz"))
    loss = ILED(**NUMBERS["iled"][name]["settings"]).to(dtype)
    for step in range(3):
        student, teacher = (golden[x][step].to(dtype) for x in ("student", "teacher"))
        state = copy.deepcopy(loss)
        value, gradient = with_gradient(loss, student, teacher)
        close(value, golden[f"{name}_loss"][step], rtol, atol)
        close(gradient, golden[f"{name}_grad"][step], rtol, atol)
        distance = cosine_distances(student, teacher)
        close(distance, golden["d"][step], rtol, atol)
        close(state.weights(distance), golden[f"{name}_w"][step], rtol, atol)
        if loss.miner == "adaptive":
            close(loss.mean, golden[f"{name}_mu"][step], rtol, atol)
            close(loss.deviation, golden[f"{name}_sigma"][step], rtol, atol)
            close(loss.mean + loss.kappa * loss.deviation, golden[f"{name}_tau"][step], rtol, atol)
        if loss.miner == "topk":
            loss.seen.fill_(step)
            close(loss.ratio(), golden["topk_ratio"][step])
            loss.seen.fill_(step + 1)


@pytest.mark.parametrize("name", NUMBERS["rpsd"])
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-9, 1e-11), (torch.float32, 2e-4, 2e-5)])
def test_rpsd_in_full_as_recorded(shared, name, dtype, rtol, atol):
    golden = tensors(np.load(shared / "golden/face/rpsd.npz"))
    loss = RPSD(8, 8, 10, **NUMBERS["rpsd"][name]["settings"]).to(dtype)
    for step in range(3):
        student, teacher, label = (golden[x][step] for x in ("student", "teacher", "label"))
        student, teacher = student.to(dtype), teacher.to(dtype)
        mined = loss.pairs(student, teacher, label).is_mined_BR
        used = torch.cat([mined[:, : loss.count], mined[:, loss.bank_size :]], dim=1)
        width = golden[f"{name}_ncols"][step]
        if not loss.include_batch:
            used = used[:, :width]
        assert used.shape[1] == width and torch.equal(used.long(), golden[f"{name}_mask"][step, :, :width])
        value, gradient = with_gradient(loss, student, teacher, label)
        close(value, golden[f"{name}_loss"][step], rtol, atol)
        close(gradient, golden[f"{name}_grad"][step], rtol, atol)
        loss.enqueue(student, teacher, label)
        close(loss.teacher_MD, golden["bank_t"][step], rtol, atol)
        close(loss.student_MD, golden["bank_s"][step], rtol, atol)
        assert torch.equal(loss.label_M, golden["bank_y"][step])
        assert (loss.ptr, loss.count) == (golden["bank_ptr"][step], golden["bank_count"][step])


def test_more_rows_than_slots_as_recorded(shared):
    golden = tensors(np.load(shared / "golden/face/rpsd.npz"))
    student, teacher, label = (golden[x].flatten(0, 1) for x in ("student", "teacher", "label"))
    bank = RPSD(8, 8, 5).double()
    bank.enqueue(student[:3], teacher[:3], label[:3])
    bank.enqueue(student[6:14], teacher[6:14], label[6:14])
    close(bank.teacher_MD, golden["oversize_t"])
    assert torch.equal(bank.label_M, golden["oversize_y"])
    assert (bank.ptr, bank.count) == (golden["oversize_ptr"], golden["oversize_count"])


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-9, 1e-11), (torch.float32, 2e-4, 2e-5)])
def test_baselines_of_single_embeddings_as_recorded(shared, dtype, rtol, atol):
    golden = tensors(np.load(shared / "golden/face/instance_baselines.npz"))
    for name, loss in {
        "raw_l2_sum": raw_l2,
        "raw_l2_mean": lambda s, t: raw_l2(s, t, "mean"),
        "fc_cos": INSTANCE["cos"],
        "fc_l2n": INSTANCE["l2n"],
        "fc_half_l2n": INSTANCE["half"],
        "fc_cos2": angular,
    }.items():
        value, gradient = with_gradient(loss, golden["student"].to(dtype), golden["teacher"].to(dtype))
        close(value, golden[f"loss_{name}"], rtol, atol)
        close(gradient, golden[f"grad_{name}"], rtol, atol)


# --- Single embeddings ------------------------------------------------------------------------------------------------


class SlowILED:
    """ILED in plain numbers: weights of a batch, running values, the step."""

    def __init__(self, loss):
        self.loss, self.mean, self.deviation, self.step = loss, None, None, 0

    def weights(self, distances):
        loss, count = self.loss, len(distances)
        mean = sum(distances) / count
        easy = [loss.easy_weight] * count
        self.step += 1
        if loss.miner == "adaptive":
            deviation = math.sqrt(sum((d - mean) ** 2 for d in distances) / count)
            if self.mean is None:
                self.mean, self.deviation = mean, deviation
            else:
                self.mean = loss.momentum * self.mean + (1 - loss.momentum) * mean
                self.deviation = loss.momentum * self.deviation + (1 - loss.momentum) * deviation
            above = self.mean + loss.kappa * self.deviation
            return [1.0 if d > above else e for d, e in zip(distances, easy, strict=True)]
        if loss.miner == "topk":
            done = min((self.step - 1) / loss.ratio_steps, 1)
            ratio = loss.ratio_end + (loss.ratio_start - loss.ratio_end) * (1 + math.cos(math.pi * done)) / 2
            for i in sorted(range(count), key=lambda i: (-distances[i], i))[: max(1, math.ceil(ratio * count - 1e-9))]:
                easy[i] = 1.0
            return easy
        return [(d / mean) ** loss.gamma if loss.miner == "soft" else 1.0 for d in distances]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.7, "kappa": 0.8, "easy_weight": 0.3},
        {"kappa": -0.5, "easy_weight": 0.0},
        {"momentum": 0.0},
        {"momentum": 1.0, "easy_weight": 0.1},
        {"miner": "topk", "ratio_steps": 3, "easy_weight": 0.2},
        {"miner": "topk", "ratio_start": 0.1, "ratio_end": 0.9, "ratio_steps": 2, "easy_weight": 0.0},
        {"miner": "soft"},
        {"miner": "soft", "gamma": 0.0},
        {"miner": "soft", "gamma": 2.5},
        {"miner": "none"},
    ],
    ids=str,
)
def test_iled_is_that_of_plain_loops_over_steps(settings):
    loss = ILED(**settings).double()
    slow = SlowILED(loss)
    for step in range(5):
        student, teacher = rand(7, 5, seed=step), rand(7, 5, seed=100 + step)
        teacher = teacher + (0.5 + step / 3) * student  # nearer and nearer, so that running values move
        distances = slow_distances(student, teacher)
        weights = slow.weights(distances)
        weights = weights if any(weights) else [1.0] * 7  # nothing is hard: the mean
        value, gradient = with_gradient(loss, student, teacher)
        close(value, sum(w * d for w, d in zip(weights, distances, strict=True)) / sum(weights), 1e-12)
        # ∂d/∂s = (c ŝ − t̂) / ‖s‖, the weights held fast
        expected = []
        for w, d, s, t in zip(weights, distances, student.tolist(), teacher.tolist(), strict=True):
            norm_s, norm_t = math.hypot(*s), math.hypot(*t)
            part = [((1 - d) * a / norm_s - b / norm_t) / norm_s for a, b in zip(s, t, strict=True)]
            expected.append([w / sum(weights) * v for v in part])
        close(gradient, expected, 1e-10)
        if loss.miner == "adaptive":
            close(loss.mean, slow.mean, 1e-13)
            close(loss.deviation, slow.deviation, 1e-13)
        assert loss.seen == step + 1


@pytest.mark.parametrize(
    ("rows", "ratio", "kept"), [(1, 0.3, 1), (10, 0.3, 3), (10, 0.31, 4), (5, 0.01, 1), (7, 1, 7), (25, 0.28, 7)]
)
def test_topk_keeps_so_many_of_the_hardest(rows, ratio, kept):
    loss = ILED("topk", ratio_start=ratio, ratio_end=ratio, easy_weight=0.0)
    assert loss.weights(rand(rows)).sum() == kept


def test_ties_of_topk_go_to_the_lower_row():
    loss = ILED("topk", ratio_start=0.5, ratio_end=0.5, easy_weight=0.0)
    assert loss.weights(torch.tensor([0.1, 0.7, 0.2, 0.7, 0.7, 0.7])).tolist() == [0, 1, 0, 1, 1, 0]
    assert loss.weights(torch.ones(6)).tolist() == [1, 1, 1, 0, 0, 0]
    assert ILED(easy_weight=0.0).weights(torch.ones(6)).sum() == 0, "nothing is above its own mean"


def test_baselines_of_single_embeddings_are_those_of_plain_loops():
    student, teacher = rand(6, 5), rand(6, 5, seed=1)
    distances = slow_distances(student, teacher)
    squares = [sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
               for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]  # fmt: skip
    unit = [[[v / math.hypot(*row) for v in row] for row in x.tolist()] for x in (student, teacher)]
    unit_squares = [sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) for s, t in zip(*unit, strict=True)]
    for found, expected in (
        (raw_l2(student, teacher), sum(squares) / 6),
        (raw_l2(student, teacher, "mean"), sum(squares) / 30),
        (feature_consistency(student, teacher), sum(distances) / 6),
        (feature_consistency(student, teacher, "l2n"), sum(unit_squares) / 6),
        (feature_consistency(student, teacher, "half"), sum(unit_squares) / 12),
        (angular(student, teacher), sum(d * d for d in distances) / 6),
    ):
        close(found, expected, 1e-12)


def test_iled_without_difference_between_easy_and_hard_is_feature_consistency():
    student, teacher = rand(8, 4).requires_grad_(), rand(8, 4, seed=1)
    cos = feature_consistency(student, teacher)
    for loss in (ILED(easy_weight=1.0), ILED("topk", easy_weight=1.0), ILED("none"), ILED("soft", gamma=0.0)):
        loss = loss.double()
        close(loss(student, teacher), cos, 1e-13)
        close(*(torch.autograd.grad(one, student, retain_graph=True)[0] for one in (loss(student, teacher), cos)))
    assert feature_consistency(student, teacher, "l2n") == 2 * cos
    assert feature_consistency(student, teacher, "half") == cos


@pytest.mark.parametrize("name", INSTANCE)
def test_a_student_like_its_teacher_has_nothing_to_learn_from_single_embeddings(name):
    teacher = rand(6, 5)
    for student in (teacher, 3.5 * teacher):
        value, gradient = with_gradient(own(INSTANCE[name]), student, teacher)
        close(value, 0, atol=1e-14)
        close(gradient, torch.zeros(6, 5), atol=1e-14)
    value, gradient = with_gradient(raw_l2, teacher, teacher)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("name", INSTANCE)
def test_the_length_of_a_row_does_not_matter(name):
    student, teacher = rand(6, 5), rand(6, 5, seed=1)
    value, gradient = with_gradient(own(INSTANCE[name]), student, teacher)
    longer = student * torch.tensor([1, 0.01, 1000, 3, 0.5, 20])[:, None]
    close(own(INSTANCE[name])(longer, teacher * 7), value, 1e-12)
    close((gradient * student).sum(dim=1), torch.zeros(6), atol=1e-14)
    assert (gradient.norm(dim=1) > 0).any()


@pytest.mark.parametrize("name", [name for name in INSTANCE if name != "soft"])
def test_gradients_of_single_embeddings_are_true_ones(name):
    """But for "soft", whose weights are held fast though they follow the embeddings."""
    loss = own(INSTANCE[name])
    if isinstance(loss, ILED):
        loss(rand(6, 5, seed=3), rand(6, 5, seed=4))  # the first batch sets the running values
        loss.eval()
    teacher = rand(6, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (rand(6, 5).requires_grad_(),))
    loss(rand(6, 5).requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_raw_l2_has_a_true_gradient_and_none_for_the_teacher():
    teacher = rand(4, 3, seed=1).requires_grad_()
    for reduction in ("sum", "mean"):
        assert torch.autograd.gradcheck(lambda s: raw_l2(s, teacher, reduction), (rand(4, 3).requires_grad_(),))  # noqa: B023
    raw_l2(rand(4, 3).requires_grad_(), teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", [*INSTANCE, "raw"])
@pytest.mark.parametrize("rows", [1, 5])
def test_zero_rows_and_duplicates_are_finite_and_send_nothing(name, rows):
    student, teacher = rand(rows, 4), rand(rows, 4, seed=1)
    student[0] = 0
    teacher[-1] = 0
    student[-2:] = student[-1]
    value, gradient = with_gradient(own(INSTANCE.get(name, raw_l2)), student, teacher)
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 10
    if name != "raw":
        assert not gradient[0].any()
        assert not own(INSTANCE[name])(torch.zeros(rows, 4), teacher).isnan()


def test_one_row_is_no_harder_than_the_mean_of_one():
    student, teacher = rand(1, 4), rand(1, 4, seed=1)
    distance = slow_distances(student, teacher)[0]
    for miner in ("adaptive", "topk", "soft", "none"):
        close(ILED(miner, easy_weight=0.0).double()(student, teacher), distance, 1e-12)


@pytest.mark.parametrize("name", [*INSTANCE, "raw"])
def test_half_precision_and_autocast_change_single_embeddings_by_their_rounding_alone(name):
    student, teacher = rand(8, 6, dtype=torch.float32), rand(8, 6, seed=1, dtype=torch.float32)
    loss = INSTANCE.get(name, raw_l2)
    for half in (torch.bfloat16, torch.float16, torch.float32):
        low = with_gradient(under_autocast(copy.deepcopy(loss)), student.to(half), teacher.to(half))
        wide = with_gradient(copy.deepcopy(loss), student.to(half).float(), teacher.to(half).float())
        assert low[0].dtype == torch.float32 and low[0] == wide[0]
        assert low[1].dtype == half and torch.equal(low[1], wide[1].to(half))
    assert own(loss)(student.double(), teacher.double()).dtype == torch.float64


# --- Settings and state -----------------------------------------------------------------------------------------------


def test_ramp_counts_from_one_and_ends_at_one():
    assert [ramp(step, 4) for step in (0, 1, 2, 4, 5)] == [0, 0.25, 0.5, 1, 1]
    assert ramp(0, 0) == 1
    step = torch.tensor([1, 2, 4, 9])
    assert ramp(step, 4).tolist() == [0.25, 0.5, 1, 1] and ramp(step, 0).tolist() == [1] * 4
    assert isinstance(ramp(1, 4), float) and ramp(step, 0).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ILED("hard"), "miner must be one of adaptive, topk, soft, none, got hard"),
        (lambda: ILED(momentum=1.1), "momentum must be between 0 and 1, got 1.1"),
        (lambda: ILED(easy_weight=-0.5), "easy_weight must be between 0 and 1, got -0.5"),
        (lambda: ILED(easy_weight=math.nan), "easy_weight must be between 0 and 1, got nan"),
        (lambda: ILED(ratio_start=0), "ratio_start must be above 0 and at most 1, got 0"),
        (lambda: ILED(ratio_end=1.5), r"ratio_end must be above 0 and at most 1, got 1\.5"),
        (lambda: ILED(ratio_steps=0), "ratio_steps must be at least 1, got 0"),
        (lambda: ILED(gamma=-1), "gamma must be at least 0, got -1"),
        (lambda: ILED()(rand(2, 3), rand(3, 3)), r"one shape \(images, width\), got \(2, 3\) and \(3, 3\)"),
        (lambda: ILED()(rand(0, 3), rand(0, 3)), "needs at least 1, got 0"),
        (lambda: RPSD(3, 3, miner="soft"),
         "miner must be one of hard_negative, teacher_similar, discrepancy, all, random, got soft"),
        (lambda: RPSD(3, 3, reference="own"), "reference must be one of self, cross, got own"),
        (lambda: RPSD(3, 3, phi="mse"), "phi must be one of square, huber, got mse"),
        (lambda: RPSD(0, 3), "dim_student must be at least 1, got 0"),
        (lambda: RPSD(3, -1), "dim_teacher must be at least 1, got -1"),
        (lambda: RPSD(3, 3, bank_size=-1), "bank_size must be at least 0, got -1"),
        (lambda: RPSD(3, 3, top_k=-1), "top_k must be at least 0, got -1"),
        (lambda: RPSD(3, 3, delta=0), "delta must be above 0, got 0"),
        (lambda: RPSD(3, 4, reference="cross"), "of widths 3 and 4; take reference=self, or equal widths"),
        (lambda: RPSD(3, 4)(rand(2, 4), rand(2, 4), torch.arange(2)),
         r"expected student \(B, 3\), teacher \(B, 4\) and labels \(B,\) with B at least 1, "
         r"got \(2, 4\), \(2, 4\) and \(2,\)"),
        (lambda: RPSD(3, 4)(rand(2, 3), rand(3, 4), torch.arange(2)), r"got \(2, 3\), \(3, 4\) and \(2,\)"),
        (lambda: RPSD(3, 4)(rand(2, 3), rand(2, 4), torch.arange(3)), r"got \(2, 3\), \(2, 4\) and \(3,\)"),
        (lambda: RPSD(3, 4)(rand(0, 3), rand(0, 4), torch.arange(0)), r"B at least 1, got \(0, 3\)"),
        (lambda: RPSD(3, 4).enqueue(rand(2, 3), rand(2, 3), torch.arange(2)), r"got \(2, 3\), \(2, 3\) and \(2,\)"),
        (lambda: raw_l2(rand(2, 3), rand(2, 3), "none"), "reduction must be sum or mean, got 'none'"),
        (lambda: raw_l2(rand(2, 3), rand(2, 4)), "one shape"),
        (lambda: feature_consistency(rand(2, 3), rand(2, 3), "l2"), "form must be cos, l2n or half, got 'l2'"),
        (lambda: feature_consistency(rand(0, 3), rand(0, 3)), "at least 1, got 0"),
        (lambda: angular(rand(2, 3), rand(2, 4)), "one shape"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("miner", ["adaptive", "topk", "soft", "none"])
def test_evaluation_moves_no_state_of_iled(miner):
    loss = ILED(miner, ratio_steps=4)
    loss(rand(5, 3, dtype=torch.float32), rand(5, 3, seed=1, dtype=torch.float32))
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    first, second = (loss(rand(5, 3, seed=2), rand(5, 3, seed=3)) for _ in range(2))
    assert first == second and all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())


@pytest.mark.parametrize("miner", ["adaptive", "topk"])
def test_a_restored_iled_goes_on_as_the_other(miner):
    loss, other = (ILED(miner, ratio_steps=4, kappa=0.5) for _ in range(2))
    batches = [(rand(6, 3, seed=i, dtype=torch.float32), rand(6, 3, seed=50 + i, dtype=torch.float32))
               for i in range(6)]  # fmt: skip
    for batch in batches[:3]:
        loss(*batch)
    fresh = [other(*batch).item() for batch in batches[3:]]
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    expected = [loss(*batch).item() for batch in batches[3:]]
    assert [other(*batch).item() for batch in batches[3:]] == expected != fresh


# --- Pairs and the bank -----------------------------------------------------------------------------------------------


def slow_unit(x):
    return [v / sum(v * v for v in x) ** 0.5 for v in x]


def slow_rpsd(loss, student, teacher, label, bank, sample=None, use_bank=True):
    """Pair by pair, from a deque of (student, teacher, label, sample) rows; gradient by way of single numbers."""
    fresh = [slow_unit(x) for x in student], [slow_unit(x) for x in teacher]
    total, count = 0.0, 0
    for i in range(len(label)):
        references = []
        for s, t, y, image in bank if use_bank else ():
            if sample is None or image < 0 or image != sample[i]:
                references.append((s, t, y))
        if loss.include_batch:
            references += [(fresh[0][j], fresh[1][j], label[j]) for j in range(len(label)) if j != i]
        found = []
        for s, t, y in references:
            own_reference = t if loss.reference == "cross" else s
            student_ij = sum(a * b for a, b in zip(fresh[0][i], own_reference, strict=True))
            teacher_ij = sum(a * b for a, b in zip(fresh[1][i], t, strict=True))
            found.append((student_ij, teacher_ij, y == label[i]))
        mined = []
        if loss.miner == "all":
            mined = found
        elif loss.miner == "hard_negative":
            others = sorted((x for x in found if not x[2]), key=lambda x: -x[0].item())
            mined = [x for x in found if x[2]] + others[: loss.top_k]
        elif loss.miner == "teacher_similar":
            mined = sorted(found, key=lambda x: -x[1].item())[: loss.top_k]
        elif loss.miner == "discrepancy":
            mined = sorted(found, key=lambda x: -abs(x[0] - x[1]).item())[: loss.top_k]
        for s, t, _ in mined:
            difference = s - t
            if loss.phi == "square":
                total = total + difference**2
            elif abs(difference) <= loss.delta:
                total = total + difference**2 / 2
            else:
                total = total + loss.delta * (abs(difference) - loss.delta / 2)
            count += 1
    return total / count if count else 0.0 * student.sum()


def steps_of(count, rows=4, widths=(3, 5), identities=4):
    for step in range(count):
        label = torch.randint(identities, (rows,), generator=torch.Generator().manual_seed(step))
        yield rand(rows, widths[0], seed=2 * step), rand(rows, widths[1], seed=2 * step + 1), label


VARIANTS = [
    *({"miner": miner, "top_k": 3} for miner in MINERS[:4]),
    *({"miner": miner, "reference": "cross", "phi": "huber", "delta": 0.3, "top_k": 3} for miner in MINERS[:4]),
    {"miner": "discrepancy", "include_batch": False, "top_k": 2, "phi": "huber"},
    {"miner": "hard_negative", "top_k": 0},
    {"miner": "teacher_similar", "top_k": 0},
    {"miner": "all", "bank_size": 0},
    {"miner": "hard_negative", "bank_size": 3, "top_k": 1},
    {"miner": "hard_negative", "top_k": 64},
    {"miner": "discrepancy", "half": True, "top_k": 3},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_rpsd_is_that_of_single_pairs_over_steps(settings):
    widths = (4, 4) if settings.get("reference") == "cross" else (3, 5)
    settings = {"bank_size": 9} | settings
    loss = RPSD(*widths, **settings)
    loss = loss if loss.teacher_MD.dtype == torch.float16 else loss.double()
    bank = deque(maxlen=settings["bank_size"])
    for student, teacher, label in steps_of(4, widths=widths):
        value, gradient = with_gradient(loss, student, teacher, label)
        expected, slow_gradient = with_gradient(lambda *x: slow_rpsd(loss, *x, bank), student, teacher, label)
        close(value, expected, 1e-11)
        close(gradient, slow_gradient, 1e-10)
        loss.enqueue(student, teacher, label)
        stored = (lambda x: x.half().tolist()) if loss.teacher_MD.dtype == torch.float16 else torch.Tensor.tolist
        for row in range(len(label)):
            unit = (torch.tensor(slow_unit(x[row]), dtype=torch.float64) for x in (student, teacher))
            bank.append((*map(stored, unit), label[row], -1))


def test_the_slots_wrap_as_a_deque_does():
    bank, rows, written, order = RPSD(2, 3, 7).double(), deque(maxlen=7), 0, itertools.count()
    for count in (1, 3, 2, 4, 7, 1, 9, 7, 20, 3):
        student, teacher = rand(count, 2, seed=next(order)), rand(count, 3, seed=next(order))
        label = torch.arange(written, written + count)
        bank.enqueue(student, teacher, label, 10 * label)
        rows.extend(zip(student, teacher, label, strict=True))
        written += count
        assert (bank.ptr, bank.count) == (written % 7, min(written, 7))
        for s, t, y in rows:
            slot = int(y) % 7  # the labels count what was written
            assert bank.label_M[slot] == y and bank.sample_M[slot] == 10 * y
            close(bank.student_MD[slot], slow_unit(s), 1e-12)
            close(bank.teacher_MD[slot], slow_unit(t), 1e-12)
        empty = 7 - len(rows)
        assert (bank.label_M == -1).sum() == empty == (bank.sample_M == -1).sum()
        assert not bank.student_MD[len(rows) :].any()


def test_empty_slots_are_never_references():
    """A label of -1 neither, which they bear."""
    loss = RPSD(3, 3, 8, miner="hard_negative").double()
    student, teacher = rand(3, 3), rand(3, 3, seed=1)
    loss.enqueue(student[:2], teacher[:2], torch.tensor([0, 1]))
    mined = loss.pairs(student, teacher, torch.tensor([-1, -1, 0])).is_mined_BR
    assert not mined[:, 2:8].any() and mined[:, :2].all() and mined[:, 8:].sum() == 6


@pytest.mark.parametrize("miner", MINERS)
def test_a_row_is_not_its_own_reference_and_the_stored_same_image_neither(miner):
    loss = RPSD(3, 5, 9, miner=miner, top_k=50).double()
    (student, teacher, label), *more = steps_of(3)
    sample = torch.tensor([3, 1, 4, 1])
    loss.enqueue(student, teacher, label, sample)
    loss.enqueue(*more[0])  # images unknown
    student, teacher, label = more[1]
    now = torch.tensor([1, 9, 3, -1])
    pairs = loss.pairs(student, teacher, label, now)
    expected = torch.ones(4, 13, dtype=torch.bool)
    expected[:, 8] = False  # empty
    expected[:, 9:] = ~torch.eye(4, dtype=torch.bool)
    expected[0, 1] = expected[0, 3] = expected[2, 0] = False
    assert torch.equal(pairs.is_mined_BR, expected) and pairs.slots == 9
    if miner != "random":
        bank = deque((s.tolist(), t.tolist(), y, int(i)) for s, t, y, i in
                     zip(loss.student_MD, loss.teacher_MD, loss.label_M, loss.sample_M, strict=True))  # fmt: skip
        bank.pop()
        close(loss.loss(pairs), slow_rpsd(loss, student, teacher, label, bank, now.tolist()), 1e-11)


@pytest.mark.parametrize("off", [False, torch.tensor(False)], ids=["number", "tensor"])
def test_a_bank_that_is_not_used_is_as_none(off):
    loss, without = (RPSD(3, 5, size, miner="all").double() for size in (6, 0))
    first, second = steps_of(2)
    loss.enqueue(*first)
    without.enqueue(*first)
    close(loss(*second, use_bank=off), without(*second), 1e-13)
    on = loss(*second, use_bank=not off if off is False else ~off)
    assert on == loss(*second) and abs(on - without(*second)) > 1e-3


def test_random_pairs_are_some_of_the_references():
    torch.manual_seed(0)
    loss, chosen = RPSD(3, 5, 6, miner="random", top_k=3).double(), []
    first, second = steps_of(2)
    loss.enqueue(*first)
    for _ in range(200):
        pairs = loss.pairs(*second)
        mined = pairs.is_mined_BR
        assert (mined.sum(dim=1) == 3).all() and not mined[:, 4:6].any() and not mined[:, 6:].diagonal().any()
        close(loss.loss(pairs), (pairs.difference_BR[mined] ** 2).mean(), 1e-12)
        chosen.append(mined)
    share = torch.stack(chosen).double().mean(dim=0)
    assert ((share - 3 / 7).abs() < 0.15)[share > 0].all() and (share > 0).sum() == 4 * 7


def test_ties_go_to_the_earlier_reference():
    """A bank slot before the batch, a lower slot before a higher one."""
    same = torch.ones(4, 2, dtype=torch.float64)
    for miner in ("hard_negative", "teacher_similar", "discrepancy"):
        loss = RPSD(2, 2, 3, miner=miner, top_k=4).double()
        loss.enqueue(same[:3], same[:3], torch.arange(3))
        mined = loss.pairs(same, same, torch.arange(10, 14)).is_mined_BR
        assert mined[:, :3].all() and mined[:, 3:].long().argmax(dim=1).tolist() == [1, 0, 0, 0]
        assert (mined.sum(dim=1) == 4).all()


def test_one_slot_more_or_less_than_a_label_needs():
    """Every reference of the anchor's label counts beside the top_k others, however many."""
    loss = RPSD(3, 3, 8, miner="hard_negative", top_k=2).double()
    loss.enqueue(rand(8, 3), rand(8, 3, seed=1), torch.tensor([0, 0, 0, 0, 0, 1, 2, 3]))
    mined = loss.pairs(rand(2, 3, seed=2), rand(2, 3, seed=3), torch.tensor([0, 7])).is_mined_BR
    assert mined[0, :5].all() and mined[0, 5:].sum() == 2 and mined[1].sum() == 2


@pytest.mark.parametrize("settings", [x for x in VARIANTS if x.get("miner") in ("all", "hard_negative")], ids=str)
def test_gradients_of_pairs_are_true_ones(settings):
    loss = RPSD(4, 4, **{"bank_size": 6} | settings).double()
    first, (student, teacher, label) = steps_of(2, widths=(4, 4))
    loss.enqueue(*first)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, label), (student.requires_grad_(),))
    loss(student, teacher, label).backward()
    assert teacher.grad is None and not any(x.requires_grad for x in loss.buffers())


@pytest.mark.parametrize("miner", MINERS)
def test_a_student_of_the_teachers_shape_has_nothing_to_learn_from_pairs(miner):
    teacher = rand(6, 5)
    turn = torch.linalg.qr(rand(5, 5, seed=1)).Q
    for student in (teacher, 3 * teacher @ turn):
        value, gradient = with_gradient(RPSD(5, 5, miner=miner).double(), student, teacher, torch.arange(6) // 2)
        close(value, 0, atol=1e-25)
        close(gradient, torch.zeros(6, 5), atol=1e-13)


def test_pairs_do_not_see_a_rotation_of_the_student_and_its_bank():
    turn = torch.linalg.qr(rand(4, 4, seed=99)).Q
    first, (student, teacher, label) = steps_of(2, widths=(4, 4))
    for miner, reference in itertools.product(MINERS[:4], ("self", "cross")):
        loss, turned = (RPSD(4, 4, 6, miner=miner, reference=reference, top_k=3).double() for _ in range(2))
        loss.enqueue(*first)
        turned.enqueue(first[0] @ turn, *first[1:])
        apart = abs(loss(student, teacher, label) - turned(student @ turn, teacher, label))
        assert apart < 1e-14 if reference == "self" else apart > 1e-3
        assert abs(loss(student, teacher, label) - loss(student @ turn, teacher, label)) > 1e-3, "the bank stays behind"
    iled = ILED("none").double()
    assert abs(iled(student, teacher) - iled(student @ turn, teacher)) > 1e-2


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_length_of_a_row_does_not_matter_to_pairs(settings):
    loss = RPSD(4, 4, **{"bank_size": 6} | settings).double()
    first, (student, teacher, label) = steps_of(2, widths=(4, 4))
    loss.enqueue(*first)
    value, gradient = with_gradient(loss, student, teacher, label)
    longer = student * torch.tensor([1, 0.01, 1000, 3])[:, None]
    close(loss(longer, 0.1 * teacher, label), value, 1e-11)
    close((gradient * student).sum(dim=1), torch.zeros(4), atol=1e-13)


def test_the_order_of_the_batch_does_not_matter_to_all_pairs():
    loss = RPSD(3, 5, 6, miner="all").double()
    first, (student, teacher, label) = steps_of(2)
    loss.enqueue(*first)
    order = torch.tensor([2, 0, 3, 1])
    value, gradient = with_gradient(loss, student, teacher, label)
    other, moved = with_gradient(loss, student[order], teacher[order], label[order])
    close(other, value, 1e-13)
    close(moved, gradient[order], 1e-12)


def test_all_pairs_of_a_batch_compare_the_gram_matrices():
    student, teacher = rand(6, 3), rand(6, 5, seed=1)
    grams = [torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T for x in (student, teacher)]
    square = (grams[0] - grams[1]).square()
    expected = (square.sum() - square.diagonal().sum()) / 30
    close(RPSD(3, 5, miner="all").double()(student, teacher, torch.arange(6)), expected, 1e-13)


def test_all_pairs_with_the_teachers_vectors_are_a_quadratic_form_of_the_single_error():
    loss = RPSD(4, 4, 6, miner="all", reference="cross", include_batch=False).double()
    first, (student, teacher, label) = steps_of(2, widths=(4, 4))
    loss.enqueue(*first)
    references = loss.teacher_MD[:4]
    moment = references.T @ references / 4
    error = torch.nn.functional.normalize(student) - torch.nn.functional.normalize(teacher)
    close(loss(student, teacher, label), sum(e @ moment @ e for e in error) / 4, 1e-12)


def test_to_store_a_batch_changes_neither_its_loss_nor_its_gradient():
    first, (student, teacher, label) = steps_of(2)
    loss = RPSD(3, 5, 6).double()
    loss.enqueue(*first)
    before = copy.deepcopy(loss.state_dict())
    expected = with_gradient(loss, student, teacher, label)
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items()), "forward stores nothing"
    student.requires_grad_()
    value = loss(student, teacher, label)
    loss.enqueue(student, teacher, label)
    value.backward()
    assert value == expected[0] and torch.equal(student.grad, expected[1])
    assert loss(student, teacher, label) != value
    loss.eval()
    before = copy.deepcopy(loss.state_dict())
    loss(student, teacher, label)
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())


@pytest.mark.parametrize("miner", MINERS)
def test_no_reference_or_no_pair_gives_zero_with_a_gradient_of_zero(miner):
    one = rand(1, 3), rand(1, 5, seed=1), torch.tensor([0])
    for loss, batch, use_bank in (
        (RPSD(3, 5, 4, miner=miner), one, True),
        (RPSD(3, 5, 0, miner=miner), one, True),
        (RPSD(3, 5, 4, miner=miner, include_batch=False), next(iter(steps_of(1))), True),
        (RPSD(3, 5, 4, miner=miner, include_batch=False), next(iter(steps_of(1))), False),
    ):
        loss = loss.double()
        if not use_bank:
            loss.enqueue(*batch)
        value, gradient = with_gradient(lambda *x: loss(*x, use_bank=use_bank), *batch)  # noqa: B023
        assert value == 0 and gradient is not None and not gradient.any()
    loss = RPSD(3, 5, 4, miner=miner).double()
    loss.enqueue(rand(1, 3, seed=2), rand(1, 5, seed=3), torch.tensor([7]))
    assert loss(*one) > 0, "one row has the bank"


def test_one_identity_has_no_others():
    student, teacher, label = rand(4, 3), rand(4, 5, seed=1), torch.zeros(4, dtype=torch.int64)
    close(RPSD(3, 5).double()(student, teacher, label), RPSD(3, 5, miner="all").double()(student, teacher, label))
    alone = RPSD(3, 5, top_k=0).double()
    assert alone(student, teacher, torch.arange(4)) == 0, "neither others nor its own"


@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("reference", ["self", "cross"])
def test_zero_rows_and_duplicates_of_pairs_are_finite_and_send_nothing(miner, reference):
    loss = RPSD(4, 4, 6, miner=miner, reference=reference, top_k=5)
    student, teacher = rand(5, 4, dtype=torch.float32), rand(5, 4, seed=1, dtype=torch.float32)
    student[0], teacher[1], student[3], teacher[3] = 0, 0, student[4], teacher[4]
    label = torch.tensor([0, 0, 1, 2, 2])
    for _ in range(3):
        value, gradient = with_gradient(loss, student, teacher, label)
        assert value.isfinite() and gradient.isfinite().all() and not gradient[0].any() and gradient.abs().max() < 10
        loss.enqueue(student, teacher, label)
        assert all(x.isfinite().all() for x in loss.buffers())
    value, gradient = with_gradient(loss, torch.zeros(5, 4), torch.zeros(5, 4), label)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("miner", MINERS[:4])
def test_half_precision_and_autocast_change_pairs_by_their_rounding_alone(miner):
    label = torch.arange(8) // 2
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        low, wide = (RPSD(6, 5, 12, miner=miner, top_k=3) for _ in range(2))
        for step in range(3):
            student, teacher = (rand(8, width, seed=10 * step + width).to(kind) for width in (6, 5))
            found = with_gradient(under_autocast(low), student, teacher, label)
            under_autocast(low.enqueue)(student, teacher, label)
            expected = with_gradient(wide, student.float(), teacher.float(), label)
            wide.enqueue(student.float(), teacher.float(), label)
            assert found[0].dtype == torch.float32 and found[0] == expected[0]
            assert found[1].dtype == kind and torch.equal(found[1], expected[1].to(kind))
            assert torch.equal(low.student_MD, wide.student_MD) and torch.equal(low.teacher_MD, wide.teacher_MD)
    assert RPSD(6, 5, miner=miner)(student.double(), teacher.double(), label).dtype == torch.float64


def test_a_bank_of_half_precision_takes_half_the_room_and_nearly_gives_the_same():
    whole, half = RPSD(3, 5, 9), RPSD(3, 5, 9, half=True)
    first, second = steps_of(2)
    for loss in (whole, half):
        loss.enqueue(*first)
    assert half.student_MD.dtype == half.teacher_MD.dtype == torch.float16
    value = half(*(x.float() if x.is_floating_point() else x for x in second))
    assert value.dtype == torch.float32 and abs(value - whole(*second)) < 1e-3


def test_a_restored_bank_goes_on_as_the_other():
    loss, other = (RPSD(3, 5, 6, top_k=2) for _ in range(2))
    batches = [tuple(x.float() if x.is_floating_point() else x for x in batch) for batch in steps_of(6)]
    for batch in batches[:3]:
        loss.enqueue(*batch, torch.arange(4))
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    for batch in batches[3:]:
        assert loss(*batch, torch.arange(4)) == other(*batch, torch.arange(4)) > 0
        for one in (loss, other):
            one.enqueue(*batch, torch.arange(4))
    for name in ("teacher_MD", "student_MD", "label_M", "sample_M", "ptr", "count"):
        assert torch.equal(loss.state_dict()[name], other.state_dict()[name])


def test_staleness_is_the_mean_square_of_either_part():
    loss = RPSD(3, 5, 6, miner="hard_negative", top_k=3, phi="huber").double()
    first, second = steps_of(2)
    pairs = loss.pairs(*first)
    assert loss.staleness(pairs)["bank"] == 0 and loss.staleness(pairs)["batch"] > 0
    loss.enqueue(*first)
    pairs = loss.pairs(*second)
    parts = {"bank": [], "batch": []}
    for i, j in itertools.product(range(4), range(10)):
        if pairs.is_mined_BR[i, j]:
            parts["bank" if j < 6 else "batch"].append(float(pairs.difference_BR[i, j]) ** 2)
    found = loss.staleness(pairs)
    for name, squares in parts.items():
        close(found[name], sum(squares) / len(squares), 1e-12)
        assert not found[name].requires_grad


# --- On a device ------------------------------------------------------------------------------------------------------


class Step(nn.Module):
    """Every loss of this file on what a student makes of a batch."""

    def __init__(self):
        super().__init__()
        self.student = nn.Linear(6, 4)
        self.iled = nn.ModuleDict({miner: ILED(miner) for miner in ("adaptive", "topk", "soft", "none")})
        self.rpsd = nn.ModuleDict({miner: RPSD(4, 4, 9, top_k=3, miner=miner, phi="huber") for miner in MINERS})

    def forward(self, batch):
        student, teacher, label, sample = self.student(batch["x"]), batch["teacher"], batch["label"], batch["sample"]
        share, terms = ramp(batch["step"], 10), {"raw": raw_l2(student, teacher), "angular": angular(student, teacher)}
        terms["fc"] = feature_consistency(student, teacher, "l2n")
        for miner, loss in self.iled.items():
            terms[f"iled {miner}"] = share * loss(student, teacher)
        for miner, loss in self.rpsd.items():
            pairs = loss.pairs(student, teacher, label, sample, batch["step"] > 2)
            terms[f"rpsd {miner}"] = loss.loss(pairs)
            terms |= {f"{name} {miner}": value for name, value in loss.staleness(pairs).items()}
            loss.enqueue(student, teacher, label, sample)
        return SimpleNamespace(terms=terms)


def test_no_loss_waits_for_the_device():
    batch = {
        "x": rand(4, 6, dtype=torch.float32), "teacher": rand(4, 4, dtype=torch.float32), "step": torch.tensor(3),
        "label": torch.tensor([0, 1, 1, 2]), "sample": torch.arange(4),
    }  # fmt: skip
    assert len(fake_cuda.run(Step(), batch).terms) == 3 + 4 + 3 * len(MINERS)


def test_the_same_image_twice_in_a_batch_is_no_reference():
    """Shown among the shuffled and among the balanced ones, it would be its own positive."""
    student, teacher = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    loss = RPSD(5, 6, bank_size=0, miner="all").double()
    label, sample = torch.tensor([0, 1, 0, 2]), torch.tensor([7, 3, 7, 9])
    mined = loss.pairs(student, teacher, label, sample).is_mined_BR
    assert mined.tolist() == [[bool(sample[i] != sample[j]) for j in range(4)] for i in range(4)]
    assert loss.pairs(student, teacher, label).is_mined_BR.sum() == 12
