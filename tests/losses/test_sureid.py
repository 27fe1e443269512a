"""SUReID's losses and the camera triplet: recorded numbers, plain loops, gradients, degenerate batches."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses.sureid import feature_term, logit_term, ratio_loss
from losses.triplet import batch_hard_triplet, camera_triplet

GOLDEN = {k: torch.from_numpy(np.asarray(v)) for k, v in
          np.load(Path(__file__).parents[1] / "golden" / "sureid.npz").items()}  # fmt: skip


def golden(group, name, dtype=torch.float64):
    found = GOLDEN[f"{group}/{name}"]
    return found.to(dtype) if found.is_floating_point() else found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-7)])
def test_ratio_loss_and_its_gradient(dtype, tolerance):
    masks = golden("ratio_loss", "masks", dtype).transpose(0, 1).clone().requires_grad_()
    loss = ratio_loss(masks, golden("ratio_loss", "targets", dtype))
    loss.backward()
    torch.testing.assert_close(loss.double(), golden("ratio_loss", "loss"), rtol=0, atol=tolerance)
    torch.testing.assert_close(masks.grad.transpose(0, 1).double(), golden("ratio_loss", "grad_masks"),
                               rtol=0, atol=tolerance)  # fmt: skip


def test_ratio_loss_equals_the_loops():
    masks = (torch.rand(4, 3, 10, generator=torch.Generator().manual_seed(0)) > 0.4).double()
    targets = (0.7, 0.49, 0.343)
    total = 0.0
    for image in masks.tolist():
        for target, stage in zip(targets, image, strict=True):
            total += (target - sum(stage) / len(stage)) ** 2
    assert ratio_loss(masks, targets).item() == pytest.approx(total / (4 * 3), rel=1e-12)


@pytest.mark.parametrize("targets", [(0.5, 0.5), (0.5, 1.2, 0.1), (-0.1, 0.5, 0.5)])
def test_ratio_loss_refuses_other_targets(targets):
    with pytest.raises(ValueError, match="one keep ratio"):
        ratio_loss(torch.ones(2, 3, 4), targets)
    with pytest.raises(ValueError, match="not empty"):
        ratio_loss(torch.ones(0, 3, 4), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distillation_terms_are_the_recorded_ones(dtype):
    tolerance = {"rtol": 1e-11 if dtype == torch.float64 else 2e-6, "atol": 1e-11 if dtype == torch.float64 else 1e-7}
    f_s, f_t, g_s, g_t = (golden("npkd", n, dtype) for n in ("f_s", "f_t", "g_s", "g_t"))
    found = {
        "l2_sum_ts": feature_term(f_s, f_t),
        "l2_mean_ts": feature_term(f_s, f_t, reduction="mean"),
        "l2_sum_st": feature_term(f_s, f_t, "st_interpolation"),
        "l2_mean_st": feature_term(f_s, f_t, "st_interpolation", "mean"),
        "kl_teacher_student_T1": logit_term(g_s, g_t),
        "kl_student_teacher_T1": logit_term(g_s, g_t, direction="st"),
        "kl_teacher_student_T4": logit_term(g_s, g_t, 4.0) / 16,
        "kl_student_teacher_T4": logit_term(g_s, g_t, 4.0, "st") / 16,
        "loss_kd_default": 0.1 * logit_term(g_s, g_t) + feature_term(f_s, f_t),
        "loss_kd_mean": 0.1 * logit_term(g_s, g_t) + feature_term(f_s, f_t, reduction="mean"),
        "loss_kd_T4": 0.1 * logit_term(g_s, g_t, 4.0) + feature_term(f_s, f_t),
    }
    for name, value in found.items():
        torch.testing.assert_close(value.double(), golden("npkd", name), msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def test_gradients_of_distillation_are_the_recorded_ones():
    f_s, g_s = (golden("npkd", n).clone().requires_grad_() for n in ("f_s", "g_s"))
    (0.1 * logit_term(g_s, golden("npkd", "g_t")) + feature_term(f_s, golden("npkd", "f_t"))).backward()
    torch.testing.assert_close(f_s.grad, golden("npkd", "grad_f_s_default"), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(g_s.grad, golden("npkd", "grad_g_s_default"), rtol=1e-11, atol=1e-12)


def test_interpolation_is_along_channels():
    teacher = golden("npkd", "f_t")
    pairs = teacher.reshape(len(teacher), -1, 2).mean(dim=2)
    torch.testing.assert_close(pairs, golden("npkd", "interp_ts"), rtol=0, atol=1e-15)
    assert feature_term(pairs, teacher).item() == pytest.approx(0, abs=1e-25)
    assert feature_term(teacher, teacher).item() == 0  # equal widths: the identity
    wider = golden("npkd", "interp_st")
    assert feature_term(golden("npkd", "f_s"), wider, "st_interpolation").item() == pytest.approx(0, abs=1e-25)


def test_the_projections_train_and_the_teacher_does_not():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, d, generator=g, dtype=torch.float64, requires_grad=True) for d in (6, 10))
    for align, sizes in (("ts_linear", (10, 6)), ("st_linear", (6, 10))):
        projection = torch.nn.Linear(*sizes).double()
        loss = feature_term(student, teacher, align, projection=projection)
        loss.backward()
        moved, fixed = (teacher, student) if align == "ts_linear" else (student, teacher)
        expected = sum(
            sum((a - b) ** 2 for a, b in zip(row, other, strict=True))
            for row, other in zip(fixed.tolist(), projection(moved).tolist(), strict=True)
        ) / 4  # fmt: skip
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert projection.weight.grad.abs().sum() > 0
        assert teacher.grad is None


@pytest.mark.parametrize("align", ["ts_interpolation", "st_interpolation"])
def test_gradcheck(align):
    g = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(3, 4, generator=g).double().requires_grad_(), torch.randn(3, 6, generator=g).double()
    assert torch.autograd.gradcheck(lambda s: feature_term(s, teacher, align), (student,))
    logits = torch.randn(3, 4, generator=g).double()
    for direction in ("ts", "st"):
        assert torch.autograd.gradcheck(lambda s, d=direction: logit_term(s, logits, 2.0, d), (student,))


def test_half_precision_and_autocast_change_nothing():
    f_s, f_t, g_s, g_t = (golden("npkd", n, torch.float32) for n in ("f_s", "f_t", "g_s", "g_t"))
    with torch.autocast("cpu", torch.bfloat16):
        assert feature_term(f_s, f_t).item() == pytest.approx(golden("npkd", "l2_sum_ts").item(), rel=2e-6)
        assert logit_term(g_s, g_t).item() == pytest.approx(golden("npkd", "kl_teacher_student_T1").item(), rel=2e-6)
    assert feature_term(f_s.half(), f_t.half()).dtype == torch.float32


def test_zero_rows_one_row_and_extreme_logits_are_finite():
    assert feature_term(torch.zeros(1, 4), torch.zeros(1, 8)).item() == 0
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = logit_term(logits, -logits.detach())
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: feature_term(torch.ones(2, 3), torch.ones(3, 3)), "as many rows"),
        (lambda: feature_term(torch.ones(0, 3), torch.ones(0, 3)), "at least one"),
        (lambda: feature_term(torch.ones(2, 3), torch.ones(2, 3), "linear"), "align must be"),
        (lambda: feature_term(torch.ones(2, 3), torch.ones(2, 3), reduction="max"), "reduction must be"),
        (lambda: feature_term(torch.ones(2, 3), torch.ones(2, 3), "ts_linear"), "needs a projection"),
        (lambda: feature_term(torch.ones(2, 3), torch.ones(2, 3), projection=torch.nn.Linear(3, 3)), "no projection"),
        (lambda: logit_term(torch.ones(2, 3), torch.ones(2, 4)), "one shape"),
        (lambda: logit_term(torch.ones(2, 3), torch.ones(2, 3), 0.0), "temperature"),
        (lambda: logit_term(torch.ones(2, 3), torch.ones(2, 3), float("inf")), "temperature"),
        (
            lambda: feature_term(torch.ones(2, 3), torch.ones(2, 4), "ts_linear", projection=torch.nn.Linear(4, 1)),
            "must map to 3 channels",
        ),
        (lambda: logit_term(torch.ones(2, 3), torch.ones(2, 3), direction="up"), "direction"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_identity_loss_and_total(dtype, tolerance):
    logits, labels = golden("id_and_total_loss", "logits", dtype), golden("id_and_total_loss", "labels")
    plain, smooth = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(plain.double(), golden("id_and_total_loss", "ce"), rtol=tolerance, atol=0)
    torch.testing.assert_close(smooth.double(), golden("id_and_total_loss", "ce_smooth01"), rtol=tolerance, atol=0)


# --- The camera triplet ---------------------------------------------------------------------------------------------


def people(n=24, identities=4, cameras=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64).requires_grad_()
    return x, torch.arange(n) % identities, torch.randint(0, cameras, (n,), generator=g)


def naive_camera(x, identity, camera, margin):
    total = 0.0
    for i in range(len(x)):

        def distance(j, i=i):
            return max(math.dist(x[i], x[j]), 1e-6)

        others = [j for j in range(len(x)) if identity[j] == identity[i] and j != i] or [i]
        strangers = [j for j in range(len(x)) if identity[j] != identity[i]]
        positives = [j for j in others if camera[j] != camera[i]] or others
        negatives = [j for j in strangers if camera[j] == camera[i]] or strangers
        gap = max(map(distance, positives)) - min(map(distance, negatives))
        total += max(0.0, gap + margin) if margin is not None else math.log1p(math.exp(gap))
    return total / len(x)


@pytest.mark.parametrize("margin", [None, 0.3])
@pytest.mark.parametrize("cameras", [1, 2, 3, 8])
def test_camera_triplet_equals_the_loops(margin, cameras):
    x, identity, camera = people(cameras=cameras)
    expected = naive_camera(x.tolist(), identity.tolist(), camera.tolist(), margin)
    assert camera_triplet(x, identity, camera, margin).item() == pytest.approx(expected, rel=1e-9)


def test_camera_triplet_without_a_choice_is_the_plain_one():
    x, identity, _ = people()
    same = torch.zeros(len(x), dtype=torch.long)
    assert camera_triplet(x, identity, same).item() == pytest.approx(
        batch_hard_triplet(x, identity, None).item(), rel=1e-12
    )
    assert torch.autograd.gradcheck(lambda x: camera_triplet(x, identity, same), (x,))


@pytest.mark.parametrize("margin", [None, 0.3])
def test_camera_triplet_of_one_identity_is_nothing(margin):
    x, identity, camera = people()
    with torch.autograd.set_detect_anomaly(True):
        loss = camera_triplet(x, torch.zeros_like(identity), camera, margin)
        loss.backward()
    assert loss.item() == 0 and x.grad.abs().max() == 0


def test_camera_triplet_of_lonely_and_equal_images_is_finite():
    x = torch.zeros(3, 2, requires_grad=True)
    loss = camera_triplet(x, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5) and x.grad.isfinite().all()
    with pytest.raises(ValueError, match="one camera per row"):
        camera_triplet(x, torch.tensor([0, 1, 2]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="one camera per row"):
        camera_triplet(x, torch.tensor([0, 1, 2]), torch.tensor([[0], [0], [1]]))
    for empty_or_wrong in (lambda: batch_hard_triplet(x, torch.tensor([[0], [1], [2]])),
                           lambda: batch_hard_triplet(x[:0], torch.tensor([]))):  # fmt: skip
        with pytest.raises(ValueError, match="one identity per row"):
            empty_or_wrong()
