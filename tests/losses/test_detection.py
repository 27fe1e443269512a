"""Task losses of the detector: recorded numbers, plain loops, gradients, degenerate batches."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from losses.detection import head_losses, proposal_losses

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ddps.npz")


def golden(name):
    return torch.from_numpy(np.asarray(GOLDEN[f"first_head_losses/{name}"]))


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth(x, beta):
    return 0.5 * x * x / beta if abs(x) < beta else abs(x) - 0.5 * beta


def test_the_first_head_s_losses_and_gradients_are_those_recorded():
    logits, deltas = golden("cls_logits").requires_grad_(), golden("box_deltas").requires_grad_()
    person, box = head_losses(logits, deltas, golden("labels"), golden("reg_targets"))
    (person + 10 * box).backward()
    for found, name in ((person, "loss_cls"), (box, "loss_reg"), (logits.grad, "grad_cls"), (deltas.grad, "grad_reg")):
        torch.testing.assert_close(found, golden(name), rtol=1e-5, atol=1e-7)


def test_both_equal_the_loops():
    label = torch.tensor([0, 3, 5555, 0, 1])
    logit, delta, target = rand(5, 2), rand(5, 8, seed=1), rand(5, 4, seed=2)
    person, box = head_losses(logit, delta, label, target)
    rows = [(row[1] if y else row[0], row) for row, y in zip(logit.tolist(), label.tolist(), strict=True)]
    assert person.item() == pytest.approx(sum(math.log(sum(map(math.exp, row))) - own for own, row in rows) / 5)
    expected = sum(smooth((delta[r, 4 + c] - target[r, c]).item(), 1.0) for r in (1, 2, 4) for c in range(4)) / 5
    assert box.item() == pytest.approx(expected)
    label = (label > 0).long()
    objectness, offsets = proposal_losses(logit[:, 0], delta[:, :4], label, target)
    each = [math.log1p(math.exp(-v if y else v)) for v, y in zip(logit[:, 0].tolist(), label.tolist(), strict=True)]
    assert objectness.item() == pytest.approx(sum(each) / 5)
    expected = sum(smooth((delta[r, c] - target[r, c]).item(), 1 / 9) for r in (1, 2, 4) for c in range(4)) / 5
    assert offsets.item() == pytest.approx(expected)


def test_gradients():
    label, target = torch.tensor([0, 2, 1]), rand(3, 4, seed=3)
    inputs = rand(3, 2).requires_grad_(), rand(3, 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: sum(head_losses(a, b, label, target)), inputs)
    inputs = rand(3).requires_grad_(), rand(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: sum(proposal_losses(a, b, label.clamp(max=1), target)), inputs)


def test_degenerate_batches():
    logit, delta = rand(0, 2).requires_grad_(), rand(0, 8).requires_grad_()
    person, box = head_losses(logit, delta, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    (person + box).backward()
    assert person.item() == box.item() == 0 and logit.grad is not None
    nobody = head_losses(rand(4, 2), rand(4, 8), torch.zeros(4, dtype=torch.int64), torch.full((4, 4), float("nan")))
    assert nobody[1].item() == 0 and nobody[0].isfinite()  # targets of background are not looked at
    half = [x.half() for x in (rand(3, 2), rand(3, 8))]
    person, box = head_losses(*half, torch.tensor([0, 1, 2]), rand(3, 4).half())
    assert person.dtype == box.dtype == torch.float32
    with pytest.raises(ValueError, match=r"of 3 labels must be .*\(3, 2\), \(3, 8\), \(3, 4\)"):
        head_losses(rand(3, 2), rand(3, 4), torch.zeros(3), rand(3, 4))
