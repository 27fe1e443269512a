"""ArcFace, CosFace and AdaFace: recorded numbers, angles in plain loops, gradients, many steps under autocast."""

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
from numerics import close, rand
from torch import nn

from losses.margin_softmax import AdaFace, arcface_logits, cosface_logits, cosines

RECORDED = Path(__file__).parents[1] / "golden"
NUMBERS = json.loads((RECORDED / "face.json").read_text())["margin_heads"]
HEADS = {
    "arc_exact": lambda cosine, label: arcface_logits(cosine, label, grad="exact"),
    "arc_ste": arcface_logits,
    "arc_fallback": lambda cosine, label: arcface_logits(cosine, label, grad="exact", monotone=True),
    "cosface": cosface_logits,
}
PRECISIONS = [(torch.float64, 1e-9, 1e-11), (torch.float32, 2e-4, 2e-5)]


def golden(arrays, name, dtype):
    found = torch.from_numpy(np.asarray(arrays[name]))
    return found.to(dtype) if found.is_floating_point() else found.long()


def batch_of(angles, classes=3):
    """Cosines of which row i has the angle ``angles[i]`` to its own class, and the labels."""
    label = torch.arange(len(angles)) % classes
    cosine = 0.4 * torch.sin(torch.arange(len(angles) * classes, dtype=torch.float64)).view(-1, classes)
    return cosine.scatter(1, label[:, None], torch.tensor(angles, dtype=torch.float64).cos()[:, None]), label


# --- Recorded numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_the_recorded_losses(name):
    arrays = np.load(RECORDED / "face.npz")
    embedding, weight, label = (golden(arrays, f"margin_heads/{x}", torch.float64) for x in ("emb", "weight", "label"))
    close(F.cross_entropy(HEADS[name](cosines(embedding, weight), label), label), NUMBERS[name])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), PRECISIONS)
def test_logits_and_gradients_as_recorded(shared, name, dtype, rtol, atol):
    arrays = np.load(shared / "golden/face/margin_heads.npz")
    embedding, weight = (golden(arrays, x, dtype).requires_grad_() for x in ("emb", "weight"))
    label, cosine = golden(arrays, "label", dtype), cosines(embedding, weight)
    close(cosine, arrays["cosine"], rtol, atol)
    logits = HEADS[name](cosine, label)
    close(logits, arrays[f"{name}_logits"], rtol, atol)
    loss = F.cross_entropy(logits, label)
    loss.backward()
    close(loss, arrays[f"{name}_loss"], rtol, atol)
    close(embedding.grad, arrays[f"{name}_grad_emb"], rtol, atol)
    close(weight.grad, arrays[f"{name}_grad_weight"], rtol, atol)


# --- Plain loops ------------------------------------------------------------------------------------------------------

ANGLES = [0.05, 0.6, 1.2, 1.9, 2.6, 2.65, 3.0, 3.1]  # from 2.6416 on is beyond π − m


def slow_logits(cosine, label, target, scale=64.0):
    return [[scale * (target(math.acos(v), i) if c == y else v) for c, v in enumerate(row)]
            for i, (row, y) in enumerate(zip(cosine.tolist(), label.tolist(), strict=True))]  # fmt: skip


def test_cosines_are_those_of_plain_loops_and_clipped():
    embedding, weight = rand(4, 3), rand(5, 3, seed=1)
    expected = [[sum(a * b for a, b in zip(x, w, strict=True)) / math.hypot(*x) / math.hypot(*w)
                 for w in weight.tolist()] for x in embedding.tolist()]  # fmt: skip
    close(cosines(embedding, weight), expected, 1e-13)
    many = rand(300, 7, dtype=torch.float32)
    assert cosines(many, many).abs().max() == 1
    assert cosines(torch.zeros(1, 3), weight).tolist() == [[0] * 5]
    assert cosines(embedding.float(), weight).dtype == torch.float64


@pytest.mark.parametrize("grad", ["ste", "exact"])
@pytest.mark.parametrize("margin", [0.5, 0.0, 0.3])
def test_arcface_adds_the_margin_to_the_angle(grad, margin):
    cosine, label = batch_of(ANGLES)
    expected = slow_logits(cosine, label, lambda angle, _: math.cos(angle + margin))
    close(arcface_logits(cosine, label, margin, grad=grad), expected, 1e-12)
    wide = slow_logits(cosine, label, lambda angle, _: math.cos(angle + margin)
                       if math.cos(angle) > math.cos(math.pi - margin)
                       else math.cos(angle) - margin * math.sin(margin))  # fmt: skip
    close(arcface_logits(cosine, label, margin, grad=grad, monotone=True), wide, 1e-12)


def test_the_older_arcface_falls_with_the_angle():
    angles = torch.linspace(0, math.pi, 500, dtype=torch.float64)
    logit = {}
    for monotone in (True, False):
        found = arcface_logits(angles.cos()[:, None], torch.zeros(500, dtype=torch.int64), monotone=monotone)[:, 0]
        logit[monotone] = found.diff()
    assert (logit[True] <= 1e-9).all() and (logit[False][-50:] > 0).all()


def test_every_row_may_have_its_own_margin():
    cosine, label = batch_of(ANGLES)
    margins = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    expected = slow_logits(cosine, label, lambda angle, i: math.cos(angle + margins[i].item()), 30.0)
    close(arcface_logits(cosine, label, margins, 30.0), expected, 1e-12)
    expected = slow_logits(cosine, label, lambda angle, i: math.cos(angle) - margins[i].item(), 30.0)
    close(cosface_logits(cosine, label, margins, 30.0), expected, 1e-12)
    narrow = arcface_logits(cosine.float(), label, margins.float())
    assert narrow.dtype == torch.float32


def test_cosface_takes_the_margin_from_the_cosine():
    cosine, label = batch_of(ANGLES)
    for grad in ("ste", "exact"):
        expected = slow_logits(cosine, label, lambda angle, _: math.cos(angle) - 0.35, 10.0)
        close(cosface_logits(cosine, label, 0.35, 10.0, grad), expected, 1e-12)


def slow_adaface(cosine, norm, label, state, training=True, margin=0.4, h=0.333, momentum=0.01):
    """Logits of one step; ``state`` is (mean, deviation) and moves."""
    norms = [min(max(v, 1e-3), 100) for v in norm.tolist()]
    if training and len(norms) > 1:
        mean = sum(norms) / len(norms)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in norms) / (len(norms) - 1))
        state[:] = [(1 - momentum) * state[0] + momentum * mean, (1 - momentum) * state[1] + momentum * deviation]
    quality = [min(max(h * (v - state[0]) / (state[1] + 1e-3), -1), 1) for v in norms]

    def target(angle, i):
        turned = min(max(angle - margin * quality[i], 1e-3), math.pi - 1e-3)
        return math.cos(turned) - (margin + margin * quality[i])

    return slow_logits(cosine, label, target), quality


@pytest.mark.parametrize("grad", ["ste", "exact"])
@pytest.mark.parametrize("settings", [{}, {"margin": 0.3, "h": 2.0, "momentum": 0.5}, {"h": -0.333}], ids=str)
def test_adaface_is_that_of_plain_loops_over_steps(settings, grad):
    head, state, clipped = AdaFace(**settings, grad=grad).double(), [20.0, 100.0], set()
    cosine, label = batch_of([0.002, *ANGLES, 3.139])
    for step in range(6):
        norm = (20 + 30 * rand(10, seed=step)).abs()
        norm[0], norm[9] = 300.0 if step % 2 else 0.0, 0.0 if step % 2 else 500.0
        if step > 2:
            norm[5] = 1e4
        expected, quality = slow_adaface(cosine, norm, label, state, **settings)
        close(head(cosine, norm, label), expected, 1e-11)
        close(head.norm_mean, state[0], 1e-13)
        close(head.norm_std, state[1], 1e-13)
        clipped |= {q for q in quality if abs(q) == 1}
    assert clipped == ({-1, 1} if settings.get("h") == 2.0 else set())
    head.eval()
    close(head(cosine, norm, label), slow_adaface(cosine, norm, label, state, False, **settings)[0], 1e-11)
    assert (head.norm_mean, head.norm_std) == (pytest.approx(state[0]), pytest.approx(state[1]))


def test_adaface_keeps_the_angle_in_its_range():
    """At either end the logit is constant, so nothing moves it."""
    head = AdaFace(grad="exact").double().eval()
    head.norm_std.fill_(1.0)
    cosine, label = batch_of([0.1, 0.1, 3.1, 3.1], 2)
    cosine.requires_grad_()
    logits = head(cosine, torch.tensor([99.0, 20, 0, 20]), label)
    own = logits.gather(1, label[:, None])[:, 0]
    expected = [math.cos(1e-3) - 0.8, math.cos(0.1) - 0.4, -math.cos(1e-3), math.cos(3.1) - 0.4]
    close(own, [64 * v for v in expected], 1e-12)
    own.sum().backward()
    assert cosine.grad.gather(1, label[:, None])[:, 0].tolist() == pytest.approx([0, 64, 0, 64])


def test_the_quality_of_an_image_sets_its_margin():
    """Of a long embedding the margin is CosFace's of 2 m after a turn by m; of a short one an angle alone."""
    head = AdaFace().double().eval()
    head.norm_std.fill_(1.0)
    cosine, label = batch_of([1.0, 1.0, 1.0], 1)
    logits = head(cosine, torch.tensor([100.0, 20.0, 0.001]), label)[:, 0] / 64
    close(logits, [math.cos(0.6) - 0.8, math.cos(1.0) - 0.4, math.cos(1.4)], 1e-12)


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arc_exact", "arc_fallback", "cosface", "ada"])
def test_exact_gradients_are_true_ones(name):
    label = torch.tensor([1, 0, 3, 3, 2])
    norm = 20 + rand(5, seed=2)
    ada = AdaFace(grad="exact").double().eval()
    head = (lambda c, y: ada(c, norm, y)) if name == "ada" else HEADS[name]
    inputs = rand(5, 6).requires_grad_(), rand(4, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda e, w: head(cosines(e, w), label), inputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["arcface", "monotone", "cosface", "adaface"])
def test_the_straight_way_gives_every_logit_the_slope_of_the_scale(head):
    cosine, label = batch_of(ANGLES)
    slopes, values = {}, {}
    for grad in ("ste", "exact"):
        own = cosine.clone().requires_grad_()
        call = {
            "arcface": lambda x: arcface_logits(x, label, grad=grad),  # noqa: B023
            "monotone": lambda x: arcface_logits(x, label, grad=grad, monotone=True),  # noqa: B023
            "cosface": lambda x: cosface_logits(x, label, grad=grad),  # noqa: B023
            "adaface": lambda x: AdaFace(grad=grad).double()(x, 10 + rand(8).abs(), label),  # noqa: B023
        }[head]
        values[grad] = call(own)
        values[grad].sum().backward()
        slopes[grad] = own.grad
    close(values["ste"], values["exact"], 1e-13)
    assert torch.equal(slopes["ste"], torch.full_like(cosine, 64.0))
    if head == "arcface":
        expected = [64 * math.sin(angle + 0.5) / math.sin(angle) for angle in ANGLES]
        close(slopes["exact"].gather(1, label[:, None])[:, 0], expected, 1e-9)
        others = torch.ones_like(cosine).scatter(1, label[:, None], 0).bool()
        assert (slopes["exact"][others] == 64).all()
    if head == "cosface":
        assert torch.equal(slopes["exact"], slopes["ste"])


@pytest.mark.parametrize("head", [*HEADS, "ada_ste", "ada_exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_of_zero_and_of_half_a_turn_are_finite(head, dtype):
    eps = torch.finfo(dtype).eps
    for value in (1.0, 1 - eps, 1 + eps, -1.0, -1 + eps, -1 - eps, 0.0):
        cosine = torch.full((2, 2), value, dtype=dtype, requires_grad=True)
        label = torch.tensor([0, 1])
        if head.startswith("ada"):
            logits = AdaFace(grad=head[4:])(cosine, torch.tensor([0.0, 1000.0], dtype=dtype), label)
        else:
            logits = HEADS[head](cosine, label)
        F.cross_entropy(logits, label).backward()
        assert logits.isfinite().all() and cosine.grad.isfinite().all()
        assert cosine.grad.abs().max() < 64 / math.sqrt(1e-7)


def test_the_length_of_an_embedding_does_not_matter_and_a_zero_row_sends_nothing():
    embedding, weight, label = rand(5, 6), rand(4, 6, seed=1), torch.tensor([1, 0, 3, 3, 2])
    embedding[2] = 0
    for head in HEADS.values():
        found = []
        for scale in (1.0, 50.0):
            own, centre = (scale * embedding).requires_grad_(), weight.clone().requires_grad_()
            loss = F.cross_entropy(head(cosines(own, centre), label), label)
            loss.backward()
            close((own.grad * own).sum(dim=1), torch.zeros(5))
            close((centre.grad * centre).sum(dim=1), torch.zeros(4))
            assert not own.grad[2].any() and own.grad[0].any()
            found.append(loss)
        close(found[0], found[1])


def test_a_label_of_another_rank_has_no_margin():
    cosine, label = batch_of(ANGLES)
    label[2], label[5] = -1, -1
    head = AdaFace(grad="exact").double()
    for call in (*HEADS.values(), lambda c, y: head(c, 10 + rand(8).abs(), y)):
        own = cosine.clone().requires_grad_()
        logits = call(own, label)
        close(logits[[2, 5]], 64 * cosine[[2, 5]], 1e-13)
        assert (logits[0] != 64 * cosine[0]).sum() == 1
        logits[[2, 5]].sum().backward()
        assert (own.grad[[2, 5]] == 64).all()


def test_of_adaface_no_gradient_goes_to_the_norm():
    norm = (10 + rand(8).abs()).requires_grad_()
    cosine, label = batch_of(ANGLES)
    logits = AdaFace(grad="exact")(cosine.requires_grad_(), norm, label)
    logits.sum().backward()
    assert norm.grad is None and cosine.grad is not None


# --- State, settings, precision ---------------------------------------------------------------------------------------


def test_adaface_begins_as_released_and_one_norm_moves_nothing():
    head = AdaFace()
    assert (head.norm_mean, head.norm_std) == (20, 100)
    head(torch.zeros(1, 2), torch.tensor([50.0]), torch.tensor([0]))
    assert (head.norm_mean, head.norm_std) == (20, 100)
    head(torch.zeros(2, 2), torch.tensor([50.0, 50.0]), torch.tensor([0, 1]))
    assert (head.norm_mean, head.norm_std) == (pytest.approx(20.3), pytest.approx(99))


def test_evaluation_moves_no_state_and_a_restored_adaface_goes_on_as_the_other():
    head, other = AdaFace(), AdaFace()
    steps = [(rand(6, 4, seed=i, dtype=torch.float32).tanh(), 15 + rand(6, seed=50 + i, dtype=torch.float32),
              torch.arange(6) % 4) for i in range(6)]  # fmt: skip
    for step in steps[:3]:
        head(*step)
    other.load_state_dict(copy.deepcopy(head.state_dict()))
    for step in steps[3:]:
        before = copy.deepcopy(head.state_dict())
        still = head.eval()(*step)
        assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
        moving = head.train()(*step)
        assert torch.equal(moving, other(*step)) and not torch.equal(moving, still)
    assert head.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: arcface_logits(rand(2, 3), torch.arange(3)), r"cosines \(B, C\) and labels \(B,\), got \(2, 3\) and "),
        (lambda: arcface_logits(rand(3), torch.arange(3)), r"got \(3,\) and \(3,\)"),
        (lambda: cosface_logits(rand(2, 3), torch.zeros(2, 1, dtype=torch.int64)), r"got \(2, 3\) and \(2, 1\)"),
        (lambda: arcface_logits(rand(2, 3), torch.arange(2), grad="true"), "grad must be ste or exact, got 'true'"),
        (lambda: cosface_logits(rand(2, 3), torch.arange(2), grad="true"), "grad must be ste or exact, got 'true'"),
        (lambda: AdaFace(grad="true")(rand(2, 3), rand(2), torch.arange(2)), "grad must be ste or exact, got 'true'"),
        (lambda: AdaFace()(rand(2, 3), rand(2, 1), torch.arange(2)), r"one norm for each of 2 rows, got \(2, 1\)"),
        (lambda: AdaFace()(rand(2, 3), rand(3), torch.arange(2)), r"one norm for each of 2 rows, got \(3,\)"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", [*HEADS, "ada_ste", "ada_exact"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_under_autocast_the_gradient_is_that_of_float32(name, kind):
    """For the same rounded embeddings: the embeddings' own type rounds the gradient once, and nothing else does."""
    label = torch.arange(16) % 10
    embedding = (3 * rand(16, 32, dtype=torch.float32)).to(kind)
    weight = (0.01 * rand(10, 32, seed=1, dtype=torch.float32)).requires_grad_()
    found = {}
    for under, own in ((True, embedding.clone()), (False, embedding.float())):
        own.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=under):
            cosine = cosines(own, weight)
            if name.startswith("ada"):
                logits = AdaFace(grad=name[4:])(cosine, own.float().norm(dim=1), label)
            else:
                logits = HEADS[name](cosine, label)
            assert logits.dtype == torch.float32
            loss = F.cross_entropy(logits, label)
        weight.grad = None
        loss.backward()
        found[under] = loss.detach(), own.grad.float(), weight.grad.clone()
    assert found[True][0] == found[False][0] and torch.equal(found[True][2], found[False][2])
    error = (found[True][1] - found[False][1]).norm(dim=1) / found[False][1].norm(dim=1)
    assert error.max() < 1e-2
    torch.testing.assert_close(found[True][1], found[False][1].to(kind).float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["arc_exact", "arc_ste", "cosface", "ada_ste", "ada_exact"])
def test_a_thousand_steps_under_autocast_stay_finite(name):
    """At scale 64, with embeddings from a bfloat16 layer; at times cosines are -1, or 1, where angles have no slope."""
    torch.manual_seed(0)
    layer, weight = nn.Linear(8, 16), nn.Parameter(0.01 * torch.randn(6, 16))
    ada = AdaFace(grad=name[4:]) if name.startswith("ada") else None
    optimizer = torch.optim.SGD([*layer.parameters(), weight], lr=0.1, momentum=0.9)
    faces, generator = rand(6, 8, dtype=torch.float32), torch.Generator().manual_seed(1)
    losses, at_ends = [], []
    for step in range(1000):
        label = torch.randint(6, (12,), generator=generator)
        on_centre = step == 0 or (step >= 500 and step % 50 == 0)
        image = faces[label] + (0.0 if on_centre else 0.05) * torch.randn(12, 8, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            if on_centre:
                weight.data.copy_(layer(faces) if step else -layer(faces))
            embedding = layer(image)
            assert embedding.dtype == torch.bfloat16
            cosine = cosines(embedding, weight)
            norm = embedding.detach().float().norm(dim=1)
            logits = ada(cosine, norm, label) if ada else HEADS[name](cosine, label)
            loss = F.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if on_centre:
            at_ends.append(cosine.detach().gather(1, label[:, None]).mean().item())
    found = torch.stack(losses)
    assert found.isfinite().all() and weight.isfinite().all() and layer.weight.isfinite().all()
    assert at_ends == pytest.approx([-1] + [1] * 10, abs=1e-6)
    assert found[400:500].mean() < found[:20].mean() / 4, "it learns"


# --- On a device ------------------------------------------------------------------------------------------------------


class Step(nn.Module):
    """Every head on what a student makes of a batch."""

    def __init__(self):
        super().__init__()
        self.student, self.weight = nn.Linear(6, 4), nn.Parameter(rand(5, 4, dtype=torch.float32))
        self.ada = nn.ModuleDict({grad: AdaFace(grad=grad) for grad in ("ste", "exact")})

    def forward(self, batch):
        embedding, label = self.student(batch["x"]), batch["label"]
        cosine = cosines(embedding, self.weight)
        logits = {name: head(cosine, label) for name, head in HEADS.items()}
        logits["own"] = arcface_logits(cosine, label, batch["margin"])
        for grad, head in self.ada.items():
            logits[f"ada {grad}"] = head(cosine, embedding.norm(dim=1), label)
        return SimpleNamespace(terms={name: F.cross_entropy(x, label) for name, x in logits.items()})


def test_no_head_waits_for_the_device():
    batch = {"x": rand(3, 6, dtype=torch.float32), "label": torch.arange(3), "margin": torch.full((3,), 0.3)}
    assert len(fake_cuda.run(Step(), batch).terms) == len(HEADS) + 3
