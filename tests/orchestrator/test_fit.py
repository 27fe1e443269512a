"""The loop, on a toy of a few numbers: rates, banks, absent terms, checkpoints, and resumes bit for bit."""

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orchestrator import checkpoint, distributed, fit
from orchestrator.families.retrieval.recipe import EmbedderTrain, learning_rate
from orchestrator.fit import NonFiniteLoss, to_device, training_state
from orchestrator.method import Evaluation, Experiment, Losses, Progress, Task

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"
STEPS, ITEMS, WIDTH = 3, 8, 4


class Toy(Task):
    """A student with dropout and a batch norm, a live teacher, a trained module beside it, and a bank."""

    def __init__(self, breaks_at: int = -1):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, WIDTH))
        super().__init__(student, nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)))
        self.teacher_context = nn.Linear(WIDTH, WIDTH)
        self.classifier = nn.Linear(WIDTH, 2)
        self.register_buffer("bank", torch.zeros(5, WIDTH))
        self.register_buffer("position", torch.tensor(0))
        self.breaks_at = breaks_at
        self.seen = []  # (is the gradient on, rows kept, steps before) of every after_step

    def forward(self, batch):
        own = self.student(batch["x"])
        with torch.no_grad():
            taught = self.teacher(batch["x"])
        terms = {"match": F.mse_loss(self.teacher_context(own).float(), taught.float())}
        if "label" in batch:
            terms["labelled"] = F.cross_entropy(self.classifier(own).float(), batch["label"])
        if int(self.steps) == self.breaks_at:
            terms["match"] = terms["match"] * float("nan")
        spread = own.detach().float().std()
        return Losses(terms, {"match": 2.0, "labelled": 0.5}, {"spread": spread}, {"rows": own.detach()[:2]})

    def after_step(self, kept):
        self.seen.append((torch.is_grad_enabled(), kept["rows"].clone(), int(self.steps)))
        for row in kept["rows"]:
            self.bank[self.position % len(self.bank)] = row
            self.position += 1


def batches(epoch: int, labelled=lambda step: step != 1):
    for step in range(STEPS):
        drawn = torch.Generator().manual_seed(1000 * epoch + step)
        batch = {
            "x": torch.randn(ITEMS, WIDTH, generator=drawn),
            "names": [f"{epoch}/{step}/{i}" for i in range(ITEMS)],
        }
        yield batch | ({"label": torch.randint(0, 2, (ITEMS,), generator=drawn)} if labelled(step) else {})


class Noting(torch.optim.SGD):
    """Remembers the rates that its steps were taken with."""

    def step(self, closure=None):
        self.__dict__.setdefault("rates", []).append([group["lr"] for group in self.param_groups])
        return super().step(closure)


def evaluated(task):
    assert not task.training and not task.student.training and not torch.is_grad_enabled()
    return Evaluation({"val/bank": float(task.bank.abs().sum())}, found="what pictures need")


def toy(task: Task | None = None, optimizer=None, **settings) -> Experiment:
    task = task or Toy()
    parameters = [p for p in task.parameters() if p.requires_grad]
    usual = {
        "epochs": 4, "rate": lambda progress: 0.1 / progress.epoch, "batches": batches, "evaluate": evaluated,
        "steps_per_epoch": STEPS, "checkpoint_every": 1, "items_per_step": ITEMS,
    }  # fmt: skip
    return Experiment(task, optimizer or Noting(parameters, lr=1.0, momentum=0.9), **{**usual, **settings})


def run(experiment: Experiment, resume=None):
    """History, evaluation, and the states that were handed out by epoch."""
    states = {}

    def keep(epoch, metrics, state):
        if state is not None:
            states[epoch] = state()

    history, evaluation = fit.fit(experiment, CPU, resume, keep)
    return history, evaluation, states


def numbers(history):
    return [{k: v for k, v in h.items() if not k.startswith("perf/")} for h in history]


# --- Resuming ---------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    optimizer: type
    options: dict
    settings: dict


def clustered(task: Task, epoch: int) -> dict[str, float]:
    """Work before an epoch whose result a later epoch needs."""
    task.bank += task.student(torch.ones(1, WIDTH))[0] * epoch
    return {"clusters/count": float(epoch)}


@pytest.mark.parametrize(
    "case",
    [
        Case(torch.optim.SGD, {"momentum": 0.9}, {}),
        Case(torch.optim.AdamW, {}, {"clip_norm": 0.1, "rate": lambda p: 0.01 * (1 + p.step + p.within)}),
        Case(torch.optim.AdamW, {}, {"start_epoch": clustered, "evaluate_every": 3}),
        Case(torch.optim.SGD, {}, {"precision": "bfloat16"}),
    ],
    ids=["sgd", "clipped, rate by step", "clustered", "bfloat16"],
)
def test_resumed_from_any_checkpoint_equals_uninterrupted(case, tmp_path):
    def made():
        task = Toy()
        return toy(task, case.optimizer([p for p in task.parameters() if p.requires_grad], lr=1.0, **case.options),
                   **case.settings)  # fmt: skip

    torch.manual_seed(5)
    whole = made()
    history, evaluation, states = run(whole)
    assert sorted(states) == [1, 2, 3, 4]
    for epoch, state in states.items():
        checkpoint.save(tmp_path / "state.pt", state)
        torch.manual_seed(999)  # whatever the new process did before
        again = made()
        resumed, found, _ = run(again, checkpoint.load(tmp_path / "state.pt"))
        assert numbers(resumed) == numbers(history), f"resumed after epoch {epoch}"
        assert found.metrics == evaluation.metrics and found.found == evaluation.found
        for name, value in whole.task.stored().items():
            assert torch.equal(value, again.task.stored()[name]), name


def test_without_the_generator_a_resume_would_draw_otherwise():
    """What makes the test above able to fail: dropout draws from torch's own generator."""
    torch.manual_seed(5)
    history, _, states = run(toy())
    other = torch.Generator().manual_seed(6).get_state()
    resumed, _, _ = run(toy(), {**states[2], "generators": other[None]})
    assert numbers(resumed)[:2] == numbers(history)[:2] and numbers(resumed) != numbers(history)
    assert states[2]["generators"].shape == (1, len(other))


def test_a_resume_after_the_last_epoch_evaluates_and_trains_nothing():
    history, evaluation, states = run(toy())

    def never(epoch):
        raise AssertionError("trained again")

    again = toy(batches=never)
    resumed, found, handed = run(again, states[4])
    assert found == evaluation and resumed == history and handed == {}


def test_a_state_is_a_snapshot():
    experiment = toy(epochs=1)
    state = training_state(experiment, [{"a": 1.0}], fit._generators(CPU))
    before = {name: value.clone() for name, value in state["task"].items()}
    run(experiment)
    assert all(torch.equal(state["task"][name], value) for name, value in before.items())
    assert state["history"] == [{"a": 1.0}] and state["epoch"] == 1
    assert not state["optimizer"]["state"], "momentum that came later is not in it"


def test_a_state_holds_what_changes_and_nothing_frozen():
    task = toy().task
    stored = set(task.stored())
    assert {"bank", "position", "steps", "teacher_context.weight", "student.1.running_mean"} <= stored
    assert not any(name.startswith("teacher.") for name in stored)


def test_a_state_of_03_has_no_steps():
    history, _, states = run(toy())
    del states[2]["task"]["steps"]
    experiment = toy()
    resumed, _, _ = run(experiment, states[2])
    assert numbers(resumed) == numbers(history)
    assert experiment.task.steps == 2 * STEPS  # those since the resume


def test_a_state_of_another_network_or_number_of_workers_is_refused():
    _, _, states = run(toy(epochs=1))
    state = states[1]
    with pytest.raises(ValueError, match="of 2 workers, this run has 1; resume with the same number"):
        run(toy(), {**state, "generators": state["generators"].repeat(2, 1)})
    state["task"].pop("student.0.weight")
    with pytest.raises(ValueError, match=r"another network: 1 tensors do not fit, first student\.0\.weight"):
        run(toy(), state)


# --- Rates ------------------------------------------------------------------------------------------------------------


def test_the_rate_is_asked_before_every_step():
    asked = []

    def rate(progress: Progress) -> float:
        asked.append(progress)
        return 1e-3 * (progress.step + 10 * progress.within)

    experiment = toy(epochs=2, rate=rate)
    history, _, states = run(experiment)
    expected = [Progress(e, (e - 1) * STEPS + s, s / STEPS) for e in (1, 2) for s in range(STEPS)]
    assert asked == expected
    rates = [1e-3 * (p.step + 10 * p.within) for p in expected]
    assert [r[0] for r in experiment.optimizer.rates] == rates
    assert [h["train/learning_rate"] for h in history] == pytest.approx([np.mean(rates[:3]), np.mean(rates[3:])])
    asked.clear()
    run(toy(epochs=2, rate=rate), states[1])
    assert asked == expected[STEPS:], "a resume goes on where the schedule stood"


def test_without_a_known_length_a_step_is_counted_within_its_epoch():
    asked = []
    run(toy(epochs=2, steps_per_epoch=0, rate=lambda p: asked.append(p) or 0.1))
    assert asked == [Progress(e, s, 0.0) for e in (1, 2) for s in range(STEPS)]


def test_groups_scale_the_rate_and_may_rest_at_first():
    task = Toy()
    groups = [
        {"params": task.student.parameters(), "rate_scale": 0.5, "frozen_epochs": 1},
        {"params": task.teacher_context.parameters()},
    ]
    before = task.student[0].weight.clone()
    experiment = toy(task, Noting(groups, lr=1.0), epochs=2, rate=lambda p: 0.2)
    weights = []
    fit.fit(experiment, CPU, on_epoch=lambda *_: weights.append(task.student[0].weight.clone()))
    assert experiment.optimizer.rates == [[0.0, 0.2]] * STEPS + [[0.1, 0.2]] * STEPS
    assert torch.equal(weights[0], before) and not torch.equal(weights[1], before)


@pytest.mark.parametrize("name", ["lr_default", "lr_adamw"])
def test_recorded_learning_rates(name):
    hyper = next(c for c in json.loads((GOLDEN / "d3still.json").read_text())["cases"] if c["id"] == name)["hyper"]
    train = EmbedderTrain(
        rate=hyper["base_lr"], epochs=hyper["max_epochs"], warmup_epochs=hyper["warmup"],
        constant_epochs=hyper["delay"], least_rate=hyper["eta_min"],
    )  # fmt: skip
    with np.load(GOLDEN / "d3still.npz") as stored:
        expected = stored[f"{name}/lr"]
    found = [learning_rate(train, Progress(e, 0, 0.0)) for e in range(1, 121)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


# --- An epoch ---------------------------------------------------------------------------------------------------------


def test_work_before_an_epoch_is_logged_timed_and_sees_a_resting_task():
    seen = []

    def start(task, epoch):
        seen.append((epoch, task.training, task.student.training, torch.is_grad_enabled(), int(task.steps)))
        time.sleep(0.2)
        return {"clusters/count": 10.0 * epoch}

    history, _, _ = run(toy(epochs=2, start_epoch=start))
    assert seen == [(1, False, False, False, 0), (2, False, False, False, STEPS)]
    assert [h["clusters/count"] for h in history] == [10.0, 20.0]
    for h in history:
        assert 0.2 <= h["perf/start_epoch_s"] <= h["perf/epoch_s"]
        assert h["perf/images_per_s"] > STEPS * ITEMS / (h["perf/epoch_s"] - 0.2 + 0.01), "its time is not training's"
    assert "perf/start_epoch_s" not in run(toy(epochs=1))[0][0]


def test_what_a_step_kept_is_handed_on_without_gradient():
    experiment = toy(epochs=1)
    run(experiment)
    seen = experiment.task.seen
    assert [(grad, steps) for grad, _, steps in seen] == [(False, 0), (False, 1), (False, 2)]
    rows = torch.cat([rows for _, rows, _ in seen])
    assert torch.equal(experiment.task.bank, torch.stack([rows[5], *rows[1:5]])) and experiment.task.position == 6
    assert experiment.task.steps == STEPS


def test_a_term_is_averaged_over_the_steps_that_have_it():
    def never_trains(progress):
        return 0.0

    task = Toy()
    task.student[2].p = 0.0
    (history,), _, _ = run(toy(task, epochs=1, rate=never_trains))
    reference = Toy()
    reference.student[2].p = 0.0
    reference.train()
    with torch.no_grad():
        losses = [reference(batch) for batch in batches(1)]
    labelled = [float(found.terms["labelled"]) for found in losses if "labelled" in found.terms]
    assert len(labelled) == STEPS - 1
    assert history["loss/labelled"] == pytest.approx(np.mean(labelled), rel=1e-6)
    assert history["loss_weighted/labelled"] == pytest.approx(0.5 * np.mean(labelled), rel=1e-6)
    assert history["loss_weighted/match"] == pytest.approx(2 * history["loss/match"], rel=1e-6)
    assert history["train/loss"] == pytest.approx(np.mean([float(found.total) for found in losses]), rel=1e-6)
    assert history["train/spread"] == pytest.approx(np.mean([float(f.observed["spread"]) for f in losses]), rel=1e-6)


def test_training_lowers_the_loss():
    history, _, _ = run(toy(epochs=12, rate=lambda p: 0.05))
    assert history[-1]["train/loss"] < 0.8 * history[0]["train/loss"]
    assert all(h["perf/images_per_s"] > 0 and h["perf/peak_memory_mib"] > 0 for h in history)


def test_evaluation_only_every_so_often_but_always_last():
    history, evaluation, _ = run(toy(epochs=5, evaluate_every=2))
    assert ["val/bank" in h for h in history] == [False, True, False, True, True]
    assert evaluation.metrics == {"val/bank": history[-1]["val/bank"]} and evaluation.found == "what pictures need"


def test_frozen_modules_never_move():
    task = Toy()
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    context = task.teacher_context.weight.clone()
    run(toy(task))
    assert all(p.grad is None for p in task.teacher.parameters())
    assert all(torch.equal(value, task.teacher.state_dict()[name]) for name, value in before.items())
    assert not torch.equal(task.teacher_context.weight, context)


def test_gradients_are_clipped_to_a_norm_and_the_whole_norm_is_logged():
    def moved(**settings):
        task = Toy()
        before = torch.cat([p.detach().flatten().clone() for p in task.parameters() if p.requires_grad])
        parameters = [p for p in task.parameters() if p.requires_grad]
        experiment = toy(task, torch.optim.SGD(parameters, lr=1.0), epochs=1, rate=lambda p: 1.0,
                         batches=lambda epoch: list(batches(epoch))[:1], **settings)  # fmt: skip
        torch.manual_seed(1)
        history, _, _ = run(experiment)
        after = torch.cat([p.detach().flatten() for p in task.parameters() if p.requires_grad])
        return float((after - before).norm()), history[0]["train/gradient_norm"]

    (free, norm), (clipped, same) = moved(), moved(clip_norm=0.01)
    assert free == pytest.approx(norm, rel=1e-4) and norm > 0.02
    assert clipped == pytest.approx(0.01, rel=1e-3) and same == pytest.approx(norm, rel=1e-6)


def test_networks_run_in_bfloat16_and_losses_do_not():
    task, found = Toy(), []
    task.student[3].register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    history, _, _ = run(toy(task, epochs=1, precision="bfloat16"))
    assert set(found) == {torch.bfloat16} and task.student[3].weight.dtype == torch.float32
    exact, _, _ = run(toy(epochs=1))
    assert history[0]["loss/match"] == pytest.approx(exact[0]["loss/match"], rel=0.3)


def test_an_epoch_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="epoch 1 has no batch; is the training set smaller than one batch"):
        run(toy(batches=lambda epoch: iter(())))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_loss_that_is_not_finite_says_where_it_was(step):
    """Also in the first and in the last step, although a loss is looked at one step late."""
    states = {}

    def nested(epoch):
        for batch in batches(epoch):
            yield {**batch, "plain": {"names": ["another"]}}

    experiment = toy(Toy(breaks_at=STEPS + step), batches=nested)
    with pytest.raises(NonFiniteLoss) as error:
        fit.fit(experiment, CPU, on_epoch=lambda epoch, metrics, state: states.setdefault(epoch, state()))
    shown = ", ".join(f"2/{step}/{i}" for i in range(8)) + " and 1 more"
    assert str(error.value).startswith(f"the loss is not finite in epoch 2, step {step + 1}: match = nan")
    assert str(error.value).endswith(f"images: {shown}") and "\n" not in str(error.value)
    assert list(states) == [1] and all(torch.isfinite(v).all() for v in states[1]["task"].values())


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "epochs", "expected"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (3, 6, [3, 6]), (9, 4, [4])]
)
def test_a_checkpoint_every_so_many_epochs_and_after_the_last(every, epochs, expected):
    assert sorted(run(toy(epochs=epochs, checkpoint_every=every))[2]) == expected


def test_a_checkpoint_when_a_kill_would_cost_more_than_five_minutes(monkeypatch):
    now, seconds = [0.0], [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0] + time.perf_counter())
    monkeypatch.setattr(fit, "time", clock)

    def slow(epoch):
        now[0] += seconds[0]
        return batches(epoch)

    for seconds[0], expected in ((120.0, [2, 4, 6, 8]), (200.0, list(range(1, 9))), (400.0, list(range(1, 9)))):
        assert sorted(run(toy(epochs=8, batches=slow, checkpoint_every=0))[2]) == expected
    assert sorted(run(toy(epochs=3, checkpoint_every=0))[2]) == [3], "seconds alone are no reason"


# --- Data parallel ----------------------------------------------------------------------------------------------------


@pytest.fixture
def parallel(monkeypatch):
    """DistributedDataParallel around a task, in a group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def wrapped(experiment: Experiment):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "world_size", lambda: 2)
            return fit._forward(experiment.task.train(), experiment, CPU)

    yield wrapped
    torch.distributed.destroy_process_group()


def test_parameters_without_a_gradient_are_an_error_unless_they_are_announced(parallel):
    def two_steps(unused: bool) -> None:
        forward = parallel(toy(unused_parameters=unused))
        for batch in batches(1, labelled=lambda step: False):  # the classifier gets no gradient
            forward(to_device(batch, CPU)).total.backward()

    two_steps(True)
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        two_steps(False)


def test_frozen_modules_and_buffers_are_not_sent(parallel, monkeypatch):
    made = []
    real = fit.DistributedDataParallel

    class Noted(real):
        def __init__(self, module, **settings):
            made.append((set(getattr(module, "_ddp_params_and_buffers_to_ignore", ())), settings["broadcast_buffers"]))
            super().__init__(module, **settings)

        _set_params_and_buffers_to_ignore_for_model = staticmethod(real._set_params_and_buffers_to_ignore_for_model)

    monkeypatch.setattr(fit, "DistributedDataParallel", Noted)
    task = Toy()
    parallel(toy(task))
    ((left_out, broadcast),) = made
    assert left_out == {f"teacher.{name}" for name in task.teacher.state_dict()} and broadcast is False


def test_batches_are_moved_with_all_that_is_in_them():
    moved = to_device({"a": torch.ones(1), "b": [torch.ones(2), ("x", torch.ones(3))], "names": ["n"], "c": 1}, CPU)
    assert moved["b"][1][1].shape == (3,) and moved["names"] == ["n"] and moved["c"] == 1


def test_a_gpu_gets_a_batch_while_the_step_before_is_computed(monkeypatch):
    """With the device's calls noted instead of made: who sends, who waits for what, and in which order."""
    told: list[str] = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            return told[-1]

        def wait_event(self, event):
            told.append(f"{self.name} waits for {event!r}")

    entered = []

    @contextlib.contextmanager
    def on(stream):
        entered.append(stream.name)
        yield
        entered.pop()

    def moved(batch, device):
        told.append(f"{entered[-1]} sends {batch['number']}")
        return batch

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("own"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("step"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(fit, "to_device", moved)
    for batch in fit.sent_ahead(({"number": number} for number in range(3)), torch.device("cuda")):
        assert not entered, "the step is computed on its own stream"
        told.append(f"step {batch['number']}")
    sends = [f"own sends {number}" for number in range(3)]
    waits = [f"step waits for {sent!r}" for sent in sends]
    assert told == [sends[0], sends[1], waits[0], "step 0", sends[2], waits[1], "step 1", waits[2], "step 2"]
    assert list(fit.sent_ahead(iter(()), torch.device("cuda"))) == []


def test_on_the_host_no_batch_is_made_before_its_step():
    made = []
    batches = (made.append(number) or {"number": number} for number in range(3))
    for number, batch in enumerate(fit.sent_ahead(batches, CPU)):
        assert batch == {"number": number} and made == list(range(number + 1))
