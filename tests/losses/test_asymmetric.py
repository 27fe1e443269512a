"""The losses D3still is compared with: plain loops, recorded numbers, gradients, and where such losses break."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from losses import aml, cckd, csd, d3still, fitnet, logit_kd, pkt, raml, rkd, rop, spkd, ugd
from losses.similarity import in_chunks, nearest_similarities

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "asymmetric.json").read_text())["cases"]

# Every loss of one student and one teacher matrix, and the fewest rows it is defined for.
LOSSES = {
    "fitnet": (fitnet.feature_mse, 1),
    "logit_kd": (logit_kd.logit_kd, 1),
    "rkd distance": (rkd.distance_term, 2),
    "rkd angle": (rkd.angle_term, 2),
    "pkt": (pkt.pkt, 2),
    "cckd kernel": (cckd.kernel_congruence, 2),
    "cckd neighbours": (cckd.neighbour_product, 2),
    "cckd neighbours raw": (lambda s, t: cckd.neighbour_product(s, t, normalize=False), 2),
    "csd": (lambda s, t: csd.csd(s, t, top_k=2), 2),
    "csd one temperature": (lambda s, t: csd.csd(s, t, 2, 0.5, 0.5), 2),
    "rop": (lambda s, t: rop.rop(s, t, top_k=2), 2),
    "raml absolute": (raml.absolute_term, 1),
    "raml cross": (raml.cross_term, 2),
    "raml student": (raml.student_term, 2),
    "spkd": (spkd.similarity_preserving, 2),
    "ugd": (ugd.feature_distance, 1),
    "aml regression": (aml.regression, 1),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
# What is exactly minimal at student = teacher, and its value there.
MINIMAL = {
    "fitnet": 0, "logit_kd": 0, "rkd distance": 0, "rkd angle": 0, "pkt": 0, "cckd kernel": 0, "cckd neighbours": 0,
    "cckd neighbours raw": 0, "csd one temperature": 0, "spkd": 0, "ugd": 0, "raml absolute": 1e-12,
    "raml cross": 1e-12, "raml student": 1e-12, "aml regression": 7 * 5 * 1e-12 / 2,
}  # fmt: skip


def pair(n=7, d=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(n, d, generator=g, dtype=dtype), torch.randn(n, d, generator=g, dtype=dtype)
    return student.requires_grad_(), teacher


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def arrays(student, teacher):
    return student.detach().numpy(), teacher.numpy()


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


# --- Plain loops


def naive_rkd_distance(s, t):
    n = len(s)
    relative = []
    for x in (s, t):
        distance = [[np.linalg.norm(x[i] - x[j]) for j in range(n)] for i in range(n)]
        positive = [v for row in distance for v in row if v > 0]
        relative.append(np.array(distance) / (sum(positive) / len(positive)))
    return sum(huber(relative[0][i, j] - relative[1][i, j]) for i in range(n) for j in range(n)) / n**2


def naive_rkd_angle(s, t):
    n, total = len(s), 0.0
    for i, j, k in product(range(n), repeat=3):
        cosines = []
        for x in (s, t):
            a, b = x[j] - x[i], x[k] - x[i]
            lengths = np.linalg.norm(a) * np.linalg.norm(b)
            cosines.append(a @ b / lengths if lengths > 0 else 0.0)
        total += huber(cosines[0] - cosines[1])
    return total / n**3


def test_angles_far_from_the_origin_keep_their_digits():
    """float32 rows that are far from 0, and two thousandths apart: no digit of their directions is lost."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (10 + 1e-3 * torch.randn(9, 6, generator=generator) for _ in range(2))
    student[4] = student[2]  # identical rows have no direction
    teacher[5] = teacher[1]
    student.requires_grad_()
    found = rkd.angle_term(student, teacher)
    found.backward()
    assert found.dtype == student.grad.dtype == torch.float32
    assert found.item() == pytest.approx(
        naive_rkd_angle(*(x.detach().double().numpy() for x in (student, teacher))), 1e-6
    )
    assert student.grad.isfinite().all() and 0 < student.grad.abs().max() < 1e4


def test_distances_far_from_the_origin_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (1000 + torch.randn(9, 6, generator=generator) for _ in range(2))
    found = rkd.distance_term(student.requires_grad_(), teacher)
    (gradient,) = torch.autograd.grad(found, student)
    assert found.item() == pytest.approx(
        naive_rkd_distance(*(x.detach().double().numpy() for x in (student, teacher))), 1e-5
    )
    double = student.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(rkd.distance_term(double, teacher.double()), double)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-6)


def naive_pkt(s, t):
    n, probability = len(s), []
    for x in (s, t):
        x = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-7)
        kernel = [[(x[i] @ x[j] + 1) / 2 for j in range(n)] for i in range(n)]
        probability.append([[v / sum(row) for v in row] for row in kernel])
    return (
        sum(
            probability[1][i][j] * math.log((probability[1][i][j] + 1e-7) / (probability[0][i][j] + 1e-7))
            for i in range(n)
            for j in range(n)
        )
        / n**2
    )


def naive_kernel_congruence(s, t, gamma=0.4):
    n, total = len(s), 0.0
    s, t = unit(s), unit(t)
    for i, j in product(range(n), repeat=2):
        kernel = [
            sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * (x[i] @ x[j]) ** p for p in range(3))
            for x in (s, t)
        ]
        total += (kernel[0] - kernel[1]) ** 2
    return total / n**2


def naive_neighbour_product(s, t):
    s, t = unit(s), unit(t)
    rows = [sum(abs(s[i] - t[i]) * abs(s[i + 1] - t[i + 1])) for i in range(len(s) - 1)]
    return sum(rows) / (len(s) - 1)


def naive_neighbours(s, t, k):
    s, t = unit(s), unit(t)
    for i in range(len(s)):
        order = sorted(range(len(s)), key=lambda j: (-(t[i] @ t[j]), j))[:k]
        yield [s[i] @ t[j] for j in order], [t[i] @ t[j] for j in order]


def naive_csd(s, t, k=4, query_temperature=1.0, gallery_temperature=0.01):
    total = 0.0
    for query, gallery in naive_neighbours(s, t, k):
        p, q = np.exp(np.array(gallery) / gallery_temperature), np.exp(np.array(query) / query_temperature)
        p, q = p / p.sum(), q / q.sum()
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    return total / len(s)


def naive_rop(s, t, k=4, temperature=0.1, rank_weight=0.2):
    total = 0.0
    for query, gallery in naive_neighbours(s, t, k):
        softmax = np.exp(rank_weight * np.array(gallery))
        softmax = softmax / softmax.sum()
        for r, c in product(range(k), repeat=2):
            hard = 0.5 if gallery[c] == gallery[r] else float(gallery[c] > gallery[r])
            soft = 1 / (1 + math.exp(-(query[c] - gallery[r]) / temperature))
            total += softmax[r] * (r + 1) * (hard - soft) ** 2 / k
    return total / len(s)


def naive_raml(s, t):
    n, eps = len(s), 1e-6
    s, t = unit(s), unit(t)
    off = [(i, j) for i, j in product(range(n), repeat=2) if i != j]
    return (
        sum((1 - s[i] @ t[i] + eps) ** 2 for i in range(n)) / n,
        sum((s[i] @ t[j] - t[i] @ t[j] + eps) ** 2 for i, j in off) / len(off),
        sum((s[i] @ s[j] - t[i] @ t[j] + eps) ** 2 for i, j in off) / len(off),
    )


@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_the_loops(seed):
    student, teacher = pair(seed=seed)
    s, t = arrays(student, teacher)
    n = len(s)
    softmax = [np.exp(x / 3) / np.exp(x / 3).sum(axis=1, keepdims=True) for x in (s, t)]
    absolute, cross, own = naive_raml(s, t)
    grams = [x @ x.T / np.linalg.norm(x @ x.T, axis=1, keepdims=True) for x in (s, t)]
    expected = [
        (fitnet.feature_mse(student, teacher), ((s - t) ** 2).mean()),
        (logit_kd.logit_kd(student, teacher, 3), 9 * (softmax[1] * np.log(softmax[1] / softmax[0])).sum() / n),
        (rkd.distance_term(student, teacher), naive_rkd_distance(s, t)),
        (rkd.angle_term(student, teacher), naive_rkd_angle(s, t)),
        (pkt.pkt(student, teacher), naive_pkt(s, t)),
        (cckd.kernel_congruence(student, teacher), naive_kernel_congruence(s, t)),
        (cckd.neighbour_product(student, teacher), naive_neighbour_product(s, t)),
        (csd.csd(student, teacher, 4), naive_csd(s, t)),
        (rop.rop(student, teacher, 4), naive_rop(s, t)),
        (raml.absolute_term(student, teacher), absolute),
        (raml.cross_term(student, teacher), cross),
        (raml.student_term(student, teacher), own),
        (spkd.similarity_preserving(student, teacher), ((grams[0] - grams[1]) ** 2).sum() / n**2),
        (ugd.feature_distance(student, teacher), np.linalg.norm(unit(s) - unit(t), axis=1).mean()),
        (aml.regression(student, teacher), ((unit(s) - unit(t) + 1e-6) ** 2).sum() / 2),
    ]
    for found, wanted in expected:
        assert found.item() == pytest.approx(wanted, rel=1e-9, abs=1e-14)


def test_tuples_equal_the_loops():
    student, teacher = pair(9)
    label = torch.tensor([0, 1, 0, 2, 1, 0, 3, 4, 3])
    s, t = map(unit, arrays(student, teacher))
    positives, negatives, counted = aml.mine(student, teacher, label, negatives=3)
    anchors = torch.tensor([0, 1, 2, 4, 5, 6, 8])  # identities 2 and 4 are alone
    assert counted.nonzero().flatten().tolist() == anchors.tolist()
    contrastive = triplet = 0.0
    for a, p, row in zip(anchors.tolist(), positives[anchors].tolist(), negatives[anchors].tolist(), strict=True):
        same = [j % 9 for j in range(a + 1, a + 9) if label[j % 9] == label[a]]
        assert p == same[0]
        others = [j for j in range(9) if label[j] != label[a]]
        assert row == sorted(others, key=lambda j: -(s[a] @ t[j]))[:3]
        near = np.linalg.norm(s[a] - t[p] + 1e-6)
        contrastive += near**2 / 2
        for j in row:
            far = np.linalg.norm(s[a] - t[j] + 1e-6)
            contrastive += max(0, 0.7 - far) ** 2 / 2
            triplet += max(0, near**2 - far**2 + 0.1)
    chosen = student[anchors], teacher[positives[anchors]], teacher[negatives[anchors]]
    everyone = student, teacher[positives], teacher[negatives]
    for loss, margin, expected in ((aml.contrastive, 0.7, contrastive), (aml.triplet, 0.1, triplet)):
        found = loss(*everyone, margin, counted)
        assert loss(*chosen).item() == pytest.approx(expected, rel=1e-9)
        assert found.item() == pytest.approx(expected, rel=1e-9)
        gradients = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (found, loss(*chosen))]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
        assert torch.autograd.gradcheck(lambda x, f=loss, m=margin: f(x, *everyone[1:], m, counted), student)


@pytest.mark.parametrize(
    "label",
    [
        torch.arange(6),  # no positives
        torch.zeros(6, dtype=torch.long),  # one identity: no negatives
        torch.tensor([0, 0, 0, 0, 1, 2]),  # not enough negatives where there are positives, and the reverse
    ],
)
@pytest.mark.parametrize("loss", [aml.contrastive, aml.triplet])
def test_a_batch_without_tuples_has_no_loss(label, loss):
    student, teacher = (x.detach().clone() for x in pair(6))
    student[0] = teacher[1] = 0
    student[3] = student[2]
    student.requires_grad_()
    positives, negatives, counted = aml.mine(student, teacher, label, negatives=5 if label.max() != 2 else 3)
    assert not counted.any() and negatives.shape == (6, len(negatives[0]))
    with torch.autograd.set_detect_anomaly(True):
        value = loss(student, teacher[positives], teacher[negatives], counted_A=counted)
        value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0


def test_local_distance_counts_trusted_positions_only():
    g = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    trusted = torch.tensor([[True, False, True], [False, False, True]])
    s, t = student.detach().flatten(0, 1).numpy(), teacher.flatten(0, 1).numpy()
    rows = np.linalg.norm(unit(s) - unit(t), axis=1)[trusted.flatten().numpy()]
    assert ugd.local_distance(student, teacher, trusted).item() == pytest.approx(rows.mean(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: ugd.local_distance(x, teacher, trusted), (student,))
    nothing = ugd.local_distance(student, teacher, torch.zeros_like(trusted))
    nothing.backward()
    assert nothing.item() == 0 and student.grad.abs().max() == 0


# --- Recorded numbers


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_reference_numbers(case):
    with np.load(GOLDEN / "asymmetric.npz") as stored:
        given = {k: stored[f"{case['id']}/{k}"] for k in ("student", "teacher", "grad_student")}
    student, teacher = torch.tensor(given["student"], requires_grad=True), torch.tensor(given["teacher"])
    h, size = case["hyper"], len(given["student"])
    if case["method"] in ("CSD", "ROP"):  # the authors' code computes these in float64
        s, t = student.double(), teacher.double()
    loss = {
        "FitNet": lambda: h["weight"] * fitnet.feature_mse(student, teacher),
        "VanillaKD": lambda: h["weight"] * logit_kd.logit_kd(student, teacher, h["temperature"]),
        "RKD": lambda: (
            h["distance_weight"] * rkd.distance_term(student, teacher)
            + h["angle_weight"] * rkd.angle_term(student, teacher)
        ),
        "PKT": lambda: h["weight"] * pkt.pkt(student, teacher),
        "CC": lambda: h["weight"] * cckd.neighbour_product(student, teacher, h["normalize"]),
        "paper_CCKD_taylor": lambda: cckd.kernel_congruence(student, teacher, h["gamma"], h["order"]),
        "CSD": lambda: h["weight"] * csd.csd(s, t, min(h["k"], size), h["tau_query"], h["tau_gallery"]),
        "ROP": lambda: h["weight"] * rop.rop(s, t, h["k"], h["tau"], h["rank_weight"]),
        "RAML": lambda: (
            h["weight"]
            * (
                raml.absolute_term(student, teacher)
                + h["lambda1"] * raml.cross_term(student, teacher)
                + h["lambda2"] * raml.student_term(student, teacher)
            )
        ),
        "paper_SPKD": lambda: spkd.similarity_preserving(student, teacher),
    }[case["method"]]()
    loss.backward()
    tolerance, expected = case["tolerance"], given["grad_student"]
    assert abs(loss.item() - case["loss"]) <= tolerance["loss_rtol"] * abs(case["loss"]) + tolerance["loss_atol"]
    gradient = student.grad.numpy()
    assert np.isfinite(gradient).all()
    if case["compare_grad"]:
        allowed = tolerance["grad_rtol"] * np.abs(expected) + tolerance["grad_atol_abs"]
        allowed += tolerance["grad_atol_rel_to_max"] * np.abs(expected).max()
        assert (np.abs(gradient - expected) <= allowed).all()


# --- Every loss alike


@every_loss
def test_gradients(name):
    student, teacher = pair()
    loss = LOSSES[name][0]
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student,), eps=1e-7, atol=1e-5)
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None


@every_loss
def test_autocast_and_half_precision_change_nothing_but_the_rounding_of_the_input(name):
    student, teacher = pair(dtype=torch.float32)
    loss = LOSSES[name][0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(student, teacher)
    assert inside.item() == pytest.approx(loss(student, teacher).item(), rel=1e-6, abs=0)
    for half in (torch.float16, torch.bfloat16):
        low = loss(student.to(half), teacher.to(half))
        assert low.dtype == torch.float32
        assert low.item() == loss(student.to(half).float(), teacher.to(half).float()).item()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_and_duplicate_rows_give_finite_values_and_gradients(name, dtype):
    student, teacher = (x.detach().clone() for x in pair(dtype=dtype))
    student[2], teacher[3] = 0, 0
    student[5], teacher[5] = student[4], teacher[4]
    student[6] = student[1]  # alike for the student only
    student.requires_grad_()
    value = LOSSES[name][0](student, teacher)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1e4  # a division by a norm of zero would be far above


@every_loss
def test_a_collapsed_student_gives_finite_values_and_gradients(name):
    student, teacher = torch.ones(5, 4, requires_grad=True), pair(5, 4, dtype=torch.float32)[1]
    value = LOSSES[name][0](student, teacher)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all() and student.grad.abs().max() < 1e4


@every_loss
def test_two_rows_are_enough_and_too_few_are_refused(name):
    loss, least = LOSSES[name]
    student, teacher = pair(2)
    assert torch.isfinite(loss(student, teacher))
    with pytest.raises(ValueError, match=f"at least {least}, got {least - 1}"):
        loss(student[: least - 1], teacher[: least - 1])
    with pytest.raises(ValueError, match=r"one shape|one row per image"):
        loss(student, teacher[:1])


@pytest.mark.parametrize("name", MINIMAL)
def test_a_perfect_student_has_the_least_loss_and_no_gradient(name):
    teacher = pair()[1]
    student = teacher.clone().requires_grad_()
    value = LOSSES[name][0](student, teacher)
    value.backward()
    assert value.item() == pytest.approx(MINIMAL[name], rel=1e-6, abs=1e-13)
    assert student.grad.abs().max() < 1e-5
    for seed in range(5):
        noise = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert LOSSES[name][0](teacher + 0.1 * noise, teacher) > value


def test_csd_and_rop_are_not_minimal_at_a_perfect_student():
    _, teacher = pair(8)
    for loss in (lambda s: csd.csd(s, teacher, 8), lambda s: rop.rop(s, teacher, 8)):
        student = teacher.clone().requires_grad_()
        value = loss(student)
        value.backward()
        assert value.item() > 0.01 and student.grad.abs().max() > 1e-3


def test_ties_are_taken_in_index_order():
    teacher = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8], [0.6, 0.8]])
    student = torch.eye(4)[:, :2]
    query, gallery = nearest_similarities(student, teacher, 3)
    assert gallery[0].tolist() == pytest.approx([1.0, 0.6, 0.6])
    assert query[1].tolist() == pytest.approx([0.8, 0.8, 0.0])  # rows 1 and 3 are one image, then row 0


def test_chunks_of_rows_give_the_same_as_one(monkeypatch):
    student, teacher = pair(9)
    for loss in (rkd.angle_term, lambda s, t: rop.rop(s, t, 6)):
        monkeypatch.setattr("losses.similarity._AT_ONCE_CPU", 2**20)
        whole = loss(student, teacher)
        (gradient,) = torch.autograd.grad(whole, student)
        monkeypatch.setattr("losses.similarity._AT_ONCE_CPU", 100)
        chunked = loss(student, teacher)
        torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.autograd.grad(chunked, student)[0], gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("at_once", [1, 6, 9, 1000])  # one row, a part of the rows, less than a chunk left, all rows
def test_chunks_give_gradients_to_rows_and_to_what_all_rows_see(monkeypatch, at_once):
    monkeypatch.setattr("losses.similarity._AT_ONCE_CPU", at_once)
    generator = torch.Generator().manual_seed(0)
    row_R3, other_R3 = (torch.randn(7, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    whole_33 = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    index_R = torch.arange(7)

    def function(row_R3, index_R, other_R3, whole_33):
        product_R3 = (row_R3 @ whole_33).tanh() * index_R[:, None]
        return torch.stack([product_R3.sum(dim=1), (product_R3 * other_R3).sum(dim=1)], dim=1)

    def chunked(row_R3, whole_33):
        return in_chunks(3, function, row_R3, index_R, other_R3, whole=(whole_33,))

    given = row_R3.requires_grad_(), whole_33.requires_grad_()
    torch.testing.assert_close(chunked(*given), function(row_R3, index_R, other_R3, whole_33), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(chunked, given)
    assert torch.autograd.gradcheck(lambda row_R3: chunked(row_R3, whole_33.detach()), given[:1])
    assert not chunked(row_R3.detach(), whole_33.detach()).requires_grad
    unused = in_chunks(3, lambda row_R3, whole_33: row_R3.sum(dim=1), row_R3, whole=(whole_33,)).sum()
    assert torch.autograd.grad(unused, given, allow_unused=True, materialize_grads=True)[1].eq(0).all()


def test_autocast_around_the_backward_pass_does_not_reach_chunks(monkeypatch):
    monkeypatch.setattr("losses.similarity._AT_ONCE_CPU", 6)
    row_R3, whole_33 = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (7, 3))

    def gradients(under):
        value = in_chunks(3, lambda row, whole: (row @ whole).tanh().sum(dim=1), row_R3, whole=(whole_33,)).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=under):
            return torch.autograd.grad(value, (row_R3, whole_33))

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


@pytest.mark.parametrize(
    "loss",
    [rkd.angle_term, d3still.differential_term, lambda s, t: rop.rop(s, t, 127)],
    ids=["angles", "all pairs", "rank order"],
)
def test_of_a_papers_batch_chunks_do_not_break_a_compiled_graph(loss):
    """On a CPU, too, whose chunks are small where nothing is compiled."""
    student_BD, teacher_BD = (torch.randn(128, 8, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    asked = [student_BD.clone().requires_grad_() for _ in range(2)]
    torch.compiler.reset()
    whole = torch.compile(loss, backend="eager", fullgraph=True)(asked[0], teacher_BD)
    torch.testing.assert_close(whole, loss(asked[1], teacher_BD))
    gradients = [torch.autograd.grad(v, x)[0] for v, x in ((whole, asked[0]), (loss(asked[1], teacher_BD), asked[1]))]
    torch.testing.assert_close(*gradients)


def test_a_larger_batch_is_compiled_around_the_chunks_of_a_cpu(monkeypatch):
    """As small ones as where nothing is compiled: what a GPU has at once would take gigabytes."""
    monkeypatch.setattr("losses.similarity._AT_ONCE_CPU", 20)
    monkeypatch.setattr("losses.similarity._WHOLE_IF_COMPILED", 60)
    rows = []

    def function(row_R3):
        rows.append(len(row_R3))
        return row_R3.sum(dim=1)

    torch.compiler.reset()
    compiled = torch.compile(lambda row_R3: in_chunks(10, function, row_R3), backend="eager")
    for count, expected in ((6, [6]), (7, [2, 2, 2, 1])):
        rows.clear()
        row_R3 = torch.randn(count, 3)
        torch.testing.assert_close(compiled(row_R3), row_R3.sum(dim=1))
        assert rows[-len(expected) :] == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: csd.csd(s, t, 8), "top_k must be between 1 and the 7 images of the batch, got 8"),
        (lambda s, t: rop.rop(s, t, 0), "top_k must be between 1"),
        (lambda s, t: csd.csd(s, t, 3, 0), "temperatures must be above 0, got 0"),
        (lambda s, t: csd.csd(s, t, 3, math.nan), "temperatures must be above 0, got nan"),
        (lambda s, t: rop.rop(s, t, 3, -1), "temperature must be above 0, got -1"),
        (lambda s, t: logit_kd.logit_kd(s, t, 0), "temperature must be above 0"),
        (lambda s, t: cckd.kernel_congruence(s, t, -1), "gamma must be above 0"),
        (lambda s, t: cckd.kernel_congruence(s, t, order=0), "order at least 1"),
        (lambda s, t: aml.contrastive(s, t, t[None], 0.7), "need anchors"),
        (lambda s, t: aml.triplet(s, t, t[:, None], -0.1), "margin must be at least 0"),
        (lambda s, t: aml.triplet(s, t, t[:, None], counted_A=torch.ones(3)), "one flag for each of 7 tuples"),
        (lambda s, t: aml.mine(s, t, torch.arange(7), negatives=7), "7 images has no 7 negatives"),
        (lambda s, t: ugd.local_distance(s, t, torch.ones(7)), "one flag per position"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(*pair())


def test_similarity_preserving_takes_any_two_widths():
    student, _ = pair(6, 3)
    assert spkd.similarity_preserving(student, pair(6, 9)[1]).item() > 0
