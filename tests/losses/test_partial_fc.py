"""Softmax over classes that are spread over ranks: ranks as threads, against the softmax of one; samples of classes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import fake_cuda
import pytest
import torch
import torch.nn.functional as F
from numerics import rand
from torch import nn

from losses.margin_softmax import AdaFace, arcface_logits, cosface_logits, cosines
from losses.partial_fc import class_rows, initial_rows, own_labels, sampled_classes, split_cross_entropy


def close(found, expected, rtol=1e-11, atol=1e-13):
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=rtol, atol=atol)


def on_ranks(ranks, function):
    """``function(rank, total, largest)`` on every rank at once; their results, in order of rank."""
    barrier, shown = threading.Barrier(ranks, timeout=60), [None] * ranks

    def everyones(rank, value):
        shown[rank] = value.detach()
        barrier.wait()
        found = list(shown)
        barrier.wait()
        return found

    def one(rank):
        def total(value):
            return value + sum(x for other, x in enumerate(everyones(rank, value)) if other != rank)

        try:
            return function(rank, total, lambda value: torch.stack(everyones(rank, value)).amax(dim=0))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


HEADS = {
    "plain": lambda cosine, norm, label: 64 * cosine,
    "arcface": lambda cosine, norm, label: arcface_logits(cosine, label, grad="exact"),
    "arcface ste": lambda cosine, norm, label: arcface_logits(cosine, label),
    "cosface": lambda cosine, norm, label: cosface_logits(cosine, label),
    "adaface": lambda cosine, norm, label: AdaFace().double()(cosine, norm, label),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("classes", "ranks"), [(11, 1), (11, 2), (11, 3), (4, 3), (2, 3)])
def test_classes_spread_over_ranks_are_the_softmax_of_one(classes, ranks, head):
    """Also where a rank has no class. Loss, and gradients to embeddings (summed over ranks) and class rows."""
    embedding, weight = rand(9, 6).requires_grad_(), rand(classes, 6, seed=1).requires_grad_()
    label = torch.randint(classes, (9,), generator=torch.Generator().manual_seed(2))
    expected = F.cross_entropy(HEADS[head](cosines(embedding, weight), embedding.norm(dim=1), label), label)
    expected.backward()

    def of_rank(rank, total, largest):
        rows = class_rows(classes, rank, ranks)
        own = embedding.detach().clone().requires_grad_()
        centres = weight.detach()[rows.start : rows.stop].clone().requires_grad_()
        own_label = own_labels(label, rows)
        logits = HEADS[head](cosines(own, centres), own.detach().norm(dim=1), own_label) if rows else own @ centres.T
        loss = split_cross_entropy(logits, own_label, total, largest)
        loss.backward()
        return loss, own.grad, centres.grad

    found = on_ranks(ranks, of_rank)
    for loss, _, _ in found:
        close(loss, expected)
    close(sum(gradient for _, gradient, _ in found), embedding.grad)
    close(torch.cat([gradient for _, _, gradient in found]), weight.grad)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_sample_of_classes_is_the_softmax_of_those_columns(ranks):
    torch.manual_seed(0)
    embedding, weight = rand(5, 6), rand(40, 6, seed=1)
    label = torch.tensor([0, 39, 13, 13, 20])
    chosen = [sampled_classes(label, class_rows(40, rank, ranks), 0.5) for rank in range(ranks)]

    def of_rank(rank, total, largest):
        rows, (places, own_label) = class_rows(40, rank, ranks), chosen[rank]
        own = embedding.clone().requires_grad_()
        centres = weight[rows.start : rows.stop].clone().requires_grad_()
        logits = arcface_logits(cosines(own, centres[places]), own_label)
        loss = split_cross_entropy(logits, own_label, total, largest)
        loss.backward()
        return loss, own.grad, centres.grad

    found = on_ranks(ranks, of_rank)
    columns = torch.cat([places + class_rows(40, rank, ranks).start for rank, (places, _) in enumerate(chosen)])
    assert len(columns) == (7 + 6 + 6 if ranks == 3 else 20)
    now, centres = embedding.clone().requires_grad_(), weight.clone().requires_grad_()
    among = torch.tensor([columns.tolist().index(y) for y in label.tolist()])
    expected = F.cross_entropy(arcface_logits(cosines(now, centres[columns]), among), among)
    expected.backward()
    close(found[0][0], expected)
    close(sum(x for _, x, _ in found), now.grad)
    close(torch.cat([x for _, _, x in found]), centres.grad)
    left_out = torch.ones(40, dtype=torch.bool).index_fill(0, columns, False)
    assert left_out.sum() == 40 - len(columns) and not centres.grad[left_out].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_far_apart_stay_finite(dtype):
    logits = torch.tensor([[3e4, -3e4, 0.0, 1.0], [-3e4, 3e4, 3e4, 0.0], [-1e4] * 4], dtype=dtype)
    label = torch.tensor([1, 2, 0])
    for ranks in (1, 2):

        def of_rank(rank, total, largest):
            rows = class_rows(4, rank, ranks)  # noqa: B023
            own = logits[:, rows.start : rows.stop].clone().requires_grad_()
            loss = split_cross_entropy(own, own_labels(label, rows), total, largest)
            loss.backward()
            return loss, own.grad

        expected = logits.clone().requires_grad_()
        loss = F.cross_entropy(expected, label)
        loss.backward()
        found = on_ranks(ranks, of_rank)
        close(found[0][0], loss, 1e-6)
        close(torch.cat([x for _, x in found], dim=1), expected.grad, 1e-6, 1e-7)


def test_the_split_softmax_is_float32_at_least_and_has_a_true_gradient():
    logits, label = 64 * rand(4, 7).tanh(), torch.tensor([0, 6, 3, 3])
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", torch.bfloat16):
            low = split_cross_entropy(logits.to(kind), label)
        assert low.dtype == torch.float32 and low == split_cross_entropy(logits.to(kind).float(), label)
    assert split_cross_entropy(logits, label).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: split_cross_entropy(x, label), (logits.requires_grad_(),), atol=1e-6)
    assert split_cross_entropy(rand(1, 1), torch.tensor([0])) == 0, "one class is always right"


# --- Who owns what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 1, 2, 7, 8, 85_742])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_all_classes_evenly(classes, ranks):
    found = [class_rows(classes, rank, ranks) for rank in range(ranks)]
    assert [i for rows in found for i in rows] == list(range(classes))
    for rank, rows in enumerate(found):
        assert len(rows) == classes // ranks + (rank < classes % ranks)
        assert rows.start == (classes // ranks) * rank + min(rank, classes % ranks)


def test_labels_of_other_ranks_are_told():
    label = torch.tensor([0, 3, 4, 6, 7, 9])
    assert own_labels(label, range(4, 7)).tolist() == [-1, -1, 0, 2, -1, -1]
    assert own_labels(label, range(10)).tolist() == label.tolist()
    assert own_labels(label, range(4, 4)).tolist() == [-1] * 6


def test_a_class_begins_the_same_whoever_owns_it():
    state = torch.get_rng_state()
    whole = initial_rows(range(9000), 3, seed=5)
    for ranks in (1, 2, 3, 5):
        parts = [initial_rows(class_rows(9000, rank, ranks), 3, seed=5) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.get_rng_state(), state), "nothing else is drawn"
    for rows in (range(4096), range(4095, 4097), range(4096, 8192), range(8191, 8192), range(70, 70), range(0)):
        assert torch.equal(initial_rows(rows, 3, seed=5), whole[rows.start : rows.stop])
    assert whole.std().item() == pytest.approx(0.01, rel=0.03) and abs(whole.mean()) < 3e-4
    assert not torch.equal(whole[:4096], whole[4096:8192])
    assert not torch.equal(whole, initial_rows(range(9000), 3, seed=6))
    torch.testing.assert_close(initial_rows(range(9), 3, 5, deviation=1.0), 100 * whole[:9])


# --- Samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("rows", [range(30), range(25, 60), range(90, 100), range(7, 7)], ids=str)
def test_a_sample_has_all_classes_of_the_batch(rows, rate):
    for seed in range(5):
        torch.manual_seed(seed)
        label = torch.randint(100, (8,))
        label[3] = label[4]
        chosen, place = sampled_classes(label, rows, rate)
        found = chosen.tolist()
        assert found == sorted(set(found)) and all(0 <= i < len(rows) for i in found)
        assert len(found) == min(len(rows), max(int(rate * len(rows)), 8))
        for y, at in zip(label.tolist(), place.tolist(), strict=True):
            assert (at == -1) == (y not in rows)
            assert y not in rows or found[at] == y - rows.start


def test_a_sample_of_all_is_all():
    label, rows = torch.tensor([5, 12, 3]), range(4, 10)
    chosen, place = sampled_classes(label, rows, 1.0)
    assert chosen.tolist() == list(range(6)) and torch.equal(place, own_labels(label, rows))


def test_a_batch_of_more_rows_than_a_rank_has_classes_takes_them_all():
    chosen, place = sampled_classes(torch.tensor([0, 1, 0, 1, 2, 2]), range(1, 4), 0.1)
    assert chosen.tolist() == [0, 1, 2] and place.tolist() == [-1, 0, -1, 0, 1, 1]


def test_others_are_drawn_evenly_and_anew():
    torch.manual_seed(0)
    label, counts, samples = torch.tensor([2, 17]), torch.zeros(20), set()
    for _ in range(600):
        chosen, _ = sampled_classes(label, range(20), 0.4)
        counts[chosen] += 1
        samples.add(tuple(chosen.tolist()))
    assert counts[2] == counts[17] == 600 and len(samples) > 500
    others = counts[[i for i in range(20) if i not in (2, 17)]] / 600
    assert (others - 6 / 18).abs().max() < 0.08
    torch.manual_seed(0)
    assert torch.equal(sampled_classes(label, range(20), 0.4)[0], first_of_seed(label))


def first_of_seed(label):
    torch.manual_seed(0)
    return sampled_classes(label, range(20), 0.4)[0]


# --- On a device ------------------------------------------------------------------------------------------------------


class Step(nn.Module):
    """Both kinds of rank: with a sample, and with all of its rows."""

    def __init__(self):
        super().__init__()
        self.student, self.weight = nn.Linear(6, 4), nn.Parameter(rand(30, 4, dtype=torch.float32))

    def forward(self, batch):
        rows, student = range(10, 40), self.student(batch["x"])
        chosen, place = sampled_classes(batch["label"], rows, 0.3)
        part = arcface_logits(cosines(student, self.weight.index_select(0, chosen)), place)
        whole, own = cosines(student, self.weight), own_labels(batch["label"], rows)
        return SimpleNamespace(terms={
            "part": split_cross_entropy(part, place),
            "whole": split_cross_entropy(cosface_logits(whole, own), own, lambda x: x + 1, lambda x: x + 1),
        })  # fmt: skip


def test_no_rank_waits_for_the_device():
    batch = {"x": rand(5, 6, dtype=torch.float32), "label": torch.tensor([3, 10, 39, 12, 80])}
    assert len(fake_cuda.run(Step(), batch).terms) == 2
