"""Batch-hard triplet against plain loops and its degenerate cases."""

import math

import pytest
import torch

from losses.triplet import batch_hard_triplet, batch_soft_triplet


def batch(n=12, d=4, identities=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_(), torch.arange(n) % identities


def naive(x, identity, margin):
    distance = [[math.dist(a, b) for b in x.tolist()] for a in x.tolist()]
    total = 0.0
    for i in range(len(x)):
        positives = [max(distance[i][j], 1e-6) for j in range(len(x)) if identity[j] == identity[i]]
        negatives = [distance[i][j] for j in range(len(x)) if identity[j] != identity[i]]
        gap = max(positives) - min(negatives)
        total += max(0.0, gap + margin) if margin is not None else math.log1p(math.exp(gap))
    return total / len(x)


@pytest.mark.parametrize("margin", [0.3, 0.0, None])
@pytest.mark.parametrize("identities", [2, 3, 5])
def test_equals_the_loops(margin, identities):
    x, identity = batch(identities=identities)
    assert batch_hard_triplet(x, identity, margin).item() == pytest.approx(naive(x, identity, margin), rel=1e-9)


@pytest.mark.parametrize("loss", [batch_hard_triplet, batch_soft_triplet])
def test_gradient(loss):
    x, identity = batch()
    assert torch.autograd.gradcheck(lambda x: loss(x, identity, None), (x,))


def test_an_identity_with_one_image_and_unequal_groups_are_allowed():
    x, _ = batch(5)
    identity = torch.tensor([0, 0, 0, 1, 2])
    assert batch_hard_triplet(x, identity).item() == pytest.approx(naive(x, identity, 0.3), rel=1e-9)


def test_duplicates_and_half_precision_stay_finite():
    x = torch.ones(6, 4, dtype=torch.float16, requires_grad=True)
    loss = batch_hard_triplet(x, torch.tensor([0, 0, 1, 1, 2, 2]))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.3, abs=1e-5)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("loss", [batch_hard_triplet, batch_soft_triplet])
@pytest.mark.parametrize("margin", [0.3, None])
def test_one_identity_has_no_negatives_and_no_loss(loss, margin):
    x, identity = batch()
    with torch.autograd.set_detect_anomaly(True):
        value = loss(x, torch.zeros_like(identity), margin)
        value.backward()
    assert value.item() == 0 and x.grad.abs().max() == 0
    assert torch.autograd.gradcheck(lambda x: loss(x, torch.zeros_like(identity), margin), (x,))


@pytest.mark.parametrize("loss", [batch_hard_triplet, batch_soft_triplet])
def test_equal_and_zero_rows_have_finite_gradients(loss):
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]], requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        loss(x, torch.tensor([0, 0, 0, 1]), None).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y[:3]), "one identity per row"),
        (lambda x, y: (x, y, -0.1), "margin must be at least 0"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        batch_hard_triplet(*change(*batch()))
