"""The harness itself: what works on a GPU passes, and each thing that does not is caught where it is written."""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import run
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Table:
    rows: torch.Tensor
    more: dict


class Module(nn.Module):
    """A task whose loss is a function of itself, the embeddings and the batch."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.tied = self.linear.weight
        self.table = Table(torch.ones(5, 4), {"list": [torch.arange(5)]})

    def forward(self, batch):
        return SimpleNamespace(terms={"loss": self.loss(self, self.norm(self.linear(batch["images"])), batch)})


BATCH = {
    "images": torch.randn(6, 3),
    "label": torch.arange(6) % 3,
    "parts": [{"mask": torch.ones(6, dtype=torch.bool)}],
    "names": ["a", "b"],
}
HOST = torch.arange(4.0)


@cache
def kept_constant(device):
    return torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)


def mean(x):
    return x.float().square().mean()


FINE = {
    "types of autocast": lambda m, x, b: mean(x @ m.linear(b["images"]).float().T),
    "tables": lambda m, x, b: mean(x - m.table.rows[m.table.more["list"][0][b["label"]]]),
    "constants that are kept": lambda m, x, b: mean(x * kept_constant(x.device)),
    "constants made there": lambda m, x, b: mean(x * torch.arange(4, device=x.device)),
    "numbers": lambda m, x, b: mean(x * 2.5 + torch.tensor(0.5)),
    "masks that are filled": lambda m, x, b: mean(x.masked_fill(b["parts"][0]["mask"][:, None], 0.0)),
    "values of the host": lambda m, x, b: mean(x * float(torch.tensor(2.0))),
    "whole-number indices": lambda m, x, b: mean(x[b["label"]]),
    "recomputed": lambda m, x, b: mean(checkpoint(lambda y: y.softmax(dim=1), x, use_reentrant=False)),
    "cross-entropy": lambda m, x, b: F.cross_entropy(x.float(), b["label"], label_smoothing=0.1),
    "attention": lambda m, x, b: mean(F.scaled_dot_product_attention(*(x[None, None],) * 3)),
    "names": lambda m, x, b: mean(x) * len(b["names"]),
}
WAITING = {
    "item": (lambda m, x, b: mean(x) * x.sum().item(), "_local_scalar_dense"),
    "a branch": (lambda m, x, b: mean(x) if (x > 0).any() else mean(-x), "_local_scalar_dense"),
    "a list": (lambda m, x, b: mean(x) * len(x.tolist()), "_local_scalar_dense"),
    "nonzero": (lambda m, x, b: mean(x[b["label"].nonzero()[:, 0]]), "nonzero"),
    "a mask": (lambda m, x, b: mean(x[b["parts"][0]["mask"]]), "selects by a mask"),
    "masked_select": (lambda m, x, b: mean(x.masked_select(x > 0)), "masked_select"),
    "unique": (lambda m, x, b: mean(x) * len(b["label"].unique()), "unique"),
    "equal": (lambda m, x, b: mean(x) * torch.equal(x, x), "equal"),
    "one-hot without classes": (lambda m, x, b: mean(F.one_hot(b["label"])) + mean(x), "waits for the device"),
    "repeats": (lambda m, x, b: mean(x.repeat_interleave(b["label"], dim=0)), "repeat_interleave"),
    "to the host": (lambda m, x, b: mean(x).cpu(), "copies to the host"),
    "a new constant": (lambda m, x, b: mean(x * torch.tensor([1.0, 2, 3, 4], device=x.device)), "copies from the host"),
    "a moved constant": (lambda m, x, b: mean(x * torch.arange(4).to(x.device)), "copies from the host"),
    "an old constant": (lambda m, x, b: mean(x * HOST.to(x)), "copies from the host"),
    "a mask assigned": (lambda m, x, b: mean(_assigned(x.clone(), b["parts"][0]["mask"])), "selects by a mask"),
}
MIXING = {
    "a constant": lambda m, x, b: mean(x * torch.arange(4)),
    "a constant of the module level": lambda m, x, b: mean(x + HOST),
    "an index of the host": lambda m, x, b: mean(x[torch.arange(3)]),
    "a scalar that is stacked": lambda m, x, b: torch.stack([mean(x), torch.tensor(1.0)]).sum(),
}


def _assigned(x, mask):
    x[mask] = x.new_ones(4)
    return x


@pytest.mark.parametrize("name", FINE)
def test_what_works_on_a_gpu_passes(name):
    module = Module(FINE[name])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    losses = run(module, BATCH)
    assert losses.terms["loss"].device.type == "cuda"
    assert all(v.device.type == "cpu" and torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert kept_constant.cache_info().currsize == 0 and type(BATCH["images"]) is torch.Tensor


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_caught(name):
    loss, words = WAITING[name]
    with pytest.raises(AssertionError, match=rf"{words}(.|\n)*called at tests/test_fake_cuda.py:\d+"):
        run(Module(loss), BATCH)


@pytest.mark.parametrize("name", MIXING)
def test_two_devices_are_caught(name):
    with pytest.raises(AssertionError, match="mixes tensors of the host and of the device"):
        run(Module(MIXING[name]), BATCH)


def test_a_table_that_stays_on_the_host_is_caught():
    class Hidden(list):
        def __deepcopy__(self, memo):
            return self

    module = Module(lambda m, x, b: mean(x - m.hidden[0]))
    module.hidden = Hidden([torch.ones(6, 4)])
    with pytest.raises(AssertionError, match="mixes tensors"):
        run(module, BATCH)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda m, x, b: m.linear(b["images"]).sum().bfloat16(), "bfloat16"),
        (lambda m, x, b: m.linear(b["images"]).mean(), "bfloat16"),
        (lambda m, x, b: x.float(), r"shape \(6, 4\)"),
        (lambda m, x, b: torch.tensor(1.0), "on cpu"),
    ],
)
def test_losses_of_another_kind_are_caught(loss, words):
    with pytest.raises(AssertionError, match=f"term loss is .*{words}"):
        run(Module(loss), BATCH)


class Rounded(torch.autograd.Function):
    """Waits in its backward pass alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * float(x.max())


def test_what_waits_backwards_is_caught():
    module = Module(lambda m, x, b: mean(Rounded.apply(x)))
    run(module, BATCH, backward=False)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense.*at tests/test_fake_cuda.py:\d+: return gradient"):
        run(module, BATCH)


def test_gradients_reach_every_parameter():
    found = []

    def loss(m, x, b):
        found.append(m)
        return mean(x @ m.tied) + mean(x)

    run(Module(loss), BATCH)
    assert found[0].tied is found[0].linear.weight
    assert all(p.grad.shape == p.shape and p.grad.dtype == torch.float32 for p in found[0].parameters())
