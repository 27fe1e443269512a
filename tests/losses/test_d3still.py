"""D3still's terms against plain loops, recorded numbers, and the cases in which such losses break."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from losses.d3still import differential_term, feature_term, pairwise_term, relation_terms
from losses.similarity import unit_rows
from losses.triplet import batch_hard_triplet, batch_soft_triplet

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [c for c in json.loads((GOLDEN / "d3still.json").read_text())["cases"] if "loss" in c]


def pair(n: int = 7, d: int = 5, seed: int = 0, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(n, d, generator=g, dtype=dtype), torch.randn(n, d, generator=g, dtype=dtype)
    return student.requires_grad_(), teacher


def cosines(student, teacher):
    s = student.detach().numpy() / np.linalg.norm(student.detach().numpy(), axis=1, keepdims=True)
    t = teacher.numpy() / np.linalg.norm(teacher.numpy(), axis=1, keepdims=True)
    return s @ t.T, t @ t.T


def naive_relation(student, teacher, top_k, margin=0.1):
    """Equations 9, 10 and 17, written as loops."""
    query, gallery = cosines(student, teacher)
    n = len(query)
    sums = {"inconsistent": 0.0, "consistent": 0.0}
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: (-gallery[i, j], j))
        if top_k is None:
            pairs = [(j, l) for j in range(n) if j != i for l in range(n)]  # noqa: E741 - the paper's letter
        else:
            pairs = list(product(others[: top_k - 1], repeat=2))
        row = {"inconsistent": 0.0, "consistent": 0.0}
        for j, l in pairs:  # noqa: E741
            a, b = query[i, j] - query[i, l], gallery[i, j] - gallery[i, l]
            if a * b != 0:
                row["inconsistent" if a * b < 0 else "consistent"] += ((a - b) / (margin + abs(b))) ** 2
        for name in sums:
            sums[name] += row[name] ** 0.5 / n
    return sums["inconsistent"], sums["consistent"]


@pytest.mark.parametrize("top_k", [2, 3, 5, 7, None])
@pytest.mark.parametrize("seed", range(3))
def test_relation_terms_equal_the_loops(top_k, seed):
    student, teacher = pair(seed=seed)
    found = [t.item() for t in relation_terms(student, teacher, top_k)]
    assert found == pytest.approx(naive_relation(student, teacher, top_k), rel=1e-12, abs=1e-14)


def test_differential_and_pairwise_terms_equal_the_loops():
    student, teacher = pair()
    query, gallery = cosines(student, teacher)
    n = len(query)
    rows = []
    for i in range(n):
        squares = 0.0
        for j, l in product(range(n), range(n)):  # noqa: E741 - the paper's letter
            b = gallery[i, j] - gallery[i, l]
            squares += ((query[i, j] - query[i, l] - b) / (0.1 + abs(b))) ** 2
        rows.append(squares**0.5)
    assert differential_term(student, teacher).item() == pytest.approx(sum(rows) / n, rel=1e-12)
    rows = [sum((query[i, j] - gallery[i, j]) ** 2 for j in range(n)) ** 0.5 for i in range(n)]
    assert pairwise_term(student, teacher).item() == pytest.approx(sum(rows) / n, rel=1e-12)


def test_feature_term_has_two_readings():
    student, teacher = pair()
    gaps = [cosines(student, teacher)[0][i, i] - 1 for i in range(7)]
    assert feature_term(student, teacher, "A").item() == pytest.approx(sum(map(abs, gaps)) / 7, rel=1e-12)
    assert feature_term(student, teacher).item() == pytest.approx(sum(g * g for g in gaps) ** 0.5 / 7, rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: feature_term(s, t, "A"),
        lambda s, t: feature_term(s, t, "B"),
        pairwise_term,
        differential_term,
        lambda s, t: relation_terms(s, t, 4)[0],
        lambda s, t: relation_terms(s, t, 4)[1],
        lambda s, t: relation_terms(s, t, None)[0],
    ],
)
def test_gradients(loss):
    student, teacher = pair()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student,), eps=1e-7, atol=1e-5)
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_reference_numbers(case):
    with np.load(GOLDEN / "d3still.npz") as stored:
        arrays = {k: stored[f"{case['id']}/{k}"] for k in ("student", "teacher", "labels", "grad_student")
                  if f"{case['id']}/{k}" in stored.files}  # fmt: skip
    student, teacher = torch.tensor(arrays["student"], requires_grad=True), torch.tensor(arrays["teacher"])
    hyper, method = case["hyper"], case["method"]
    if method == "D3":  # the authors' code: ties by its rule, relation terms divided by k - 1
        inconsistent, consistent = relation_terms(student, teacher, hyper["k"], hyper["m"], ties="reference")
        relation = (hyper["beta"] * inconsistent + hyper["gamma"] * consistent) / (hyper["k"] - 1)
        loss = hyper["alpha"] * feature_term(student, teacher) + relation
    elif method == "triplet":
        triplet = batch_hard_triplet if hyper["mining"] == "batch_hard" else batch_soft_triplet
        loss = triplet(student, torch.tensor(arrays["labels"]), hyper["margin"])
    elif method == "paper_LtotalA_k6":
        inconsistent, consistent = relation_terms(student, teacher, hyper["k"], hyper["m"])
        loss = hyper["alpha"] * feature_term(student, teacher, "A") + hyper["beta"] * inconsistent
        loss = loss + hyper["gamma"] * consistent
    else:
        loss = {
            "paper_Lpd": lambda: differential_term(student, teacher, hyper["m"]),
            "paper_LfA": lambda: feature_term(student, teacher, "A"),
            "paper_Lirpd_full": lambda: relation_terms(student, teacher, None, hyper["m"])[0],
            "paper_Lcrpd_full": lambda: relation_terms(student, teacher, None, hyper["m"])[1],
            "paper_Lcrpd_top6": lambda: relation_terms(student, teacher, hyper["k"], hyper["m"])[1],
        }[method]()
    loss.backward()
    tolerance, expected = case["tolerance"], arrays["grad_student"]
    assert abs(loss.item() - case["loss"]) <= tolerance["loss_rtol"] * abs(case["loss"]) + tolerance["loss_atol"]
    gradient = student.grad.numpy()
    assert np.isfinite(gradient).all()
    if case["compare_grad"]:
        allowed = tolerance["grad_rtol"] * np.abs(expected) + tolerance["grad_atol_abs"]
        allowed += tolerance["grad_atol_rel_to_max"] * np.abs(expected).max()
        assert (np.abs(gradient - expected) <= allowed).all()


def test_a_perfect_student_has_no_loss_and_no_gradient():
    _, teacher = pair()
    student = teacher.clone().requires_grad_()
    total = sum(relation_terms(student, teacher, 5)) + feature_term(student, teacher) + pairwise_term(student, teacher)
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_zero_rows_give_finite_values_and_gradients(dtype):
    student, teacher = pair(dtype=torch.float32)
    student, teacher = student.detach().to(dtype), teacher.to(dtype)
    student[2], teacher[3] = 0, 0
    student.requires_grad_()
    terms = [feature_term(student, teacher), *relation_terms(student, teacher, 5), differential_term(student, teacher)]
    assert all(t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for t in terms)
    sum(terms).backward()
    assert torch.isfinite(student.grad).all() and student.grad[2].abs().max() == 0


def test_teacher_ties_are_dropped_and_the_reference_pushes_them_apart():
    teacher = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.0, 1.0]])
    student, _ = pair(4, 2, dtype=torch.float32)
    # Rows 1 and 2 of the gallery are one image: the student cannot order them either.
    dropped = [t.item() for t in relation_terms(student, teacher, 4)]
    assert dropped == pytest.approx(naive_relation(student, teacher.double(), 4), rel=1e-4)
    # Two different vectors with one similarity to row 0.
    teacher = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    student = torch.tensor([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0]])
    inconsistent, consistent = relation_terms(student[:, :], teacher, 3)
    reference = relation_terms(student, teacher, 3, ties="reference")
    assert reference[0] > inconsistent and reference[1] > consistent


def test_duplicated_gallery_images_do_not_hide_the_image_itself():
    student, teacher = pair(6)
    teacher[4] = teacher[1]
    found = [t.item() for t in relation_terms(student, teacher, 4)]
    assert found == pytest.approx(naive_relation(student, teacher, 4), rel=1e-9)


def test_two_neighbours_leave_no_pair():
    student, teacher = pair()
    assert [t.item() for t in relation_terms(student, teacher, 2)] == [0.0, 0.0]


def test_autocast_changes_nothing():
    student, teacher = pair(dtype=torch.float32)
    outside = [feature_term(student, teacher), *relation_terms(student, teacher, 4), pairwise_term(student, teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = [feature_term(student, teacher), *relation_terms(student, teacher, 4), pairwise_term(student, teacher)]
    assert [t.item() for t in inside] == [t.item() for t in outside]


def test_chunks_of_rows_give_the_same_as_one(monkeypatch):
    student, teacher = pair(9)

    def terms():
        found = differential_term(student, teacher), *relation_terms(student, teacher, None)
        return torch.stack([*found, *relation_terms(student, teacher, 6)])

    whole = terms()
    gradients = [torch.autograd.grad(term, student, retain_graph=True)[0] for term in whole]
    monkeypatch.setattr("losses.similarity._AT_ONCE_CPU", 2 * 81)
    chunked = terms()
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
    for term, gradient in zip(chunked, gradients, strict=True):
        found = torch.autograd.grad(term, student, retain_graph=True)[0]
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-13)


def test_terms_do_not_depend_on_scale_rotation_or_order():
    student, teacher = pair()
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    order = torch.randperm(7)
    moved = relation_terms(3 * student[order] @ rotation, 0.5 * teacher[order] @ rotation, 4)
    for a, b in zip(moved, relation_terms(student, teacher, 4), strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: relation_terms(s, t, 8), "top_k must be between 2 and the 7 images"),
        (lambda s, t: relation_terms(s, t, 1), "top_k must be between 2"),
        (lambda s, t: relation_terms(s, t, 3, margin=0), "margin must be above 0"),
        (lambda s, t: relation_terms(s, t, 3, ties="x"), "ties must be"),
        (lambda s, t: relation_terms(s[:1], t[:1], 2), "at least 2"),
        (lambda s, t: feature_term(s, t[:3]), "one shape"),
        (lambda s, t: feature_term(s[:0], t[:0]), "at least 1"),
        (lambda s, t: feature_term(s, t, "C"), "reading must be"),
        (lambda s, t: differential_term(s, t, -1), "margin must be above 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(*pair())


def test_unit_rows_keep_zero_rows_and_their_gradient_at_zero():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    unit = unit_rows(x)
    unit.sum().backward()
    assert unit[0].tolist() == [0, 0] and x.grad[0].tolist() == [0, 0]
    assert torch.isfinite(x.grad).all()
