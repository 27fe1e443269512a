"""Training of every method: its steps, its gradients, and a run that is interrupted and goes on."""

import numpy as np
import pytest
import tiny
import torch

from orchestrator import checkpoint, find, tables
from orchestrator.fit import fit
from orchestrator.method import Where

CPU = torch.device("cpu")


def numbers(history):
    """Metrics without how long they took."""
    return [{k: v for k, v in metrics.items() if not k.startswith("perf/")} for metrics in history]


@pytest.fixture
def experiment(tiny_recipe, tiny_place, prepared):
    """Makes the experiment of a method's tiny recipe."""

    def make(method, **changes):
        recipe = tiny_recipe(method, **changes)
        find.method(method).check(recipe, 1)
        return find.method(method).experiment(recipe, prepared(method, recipe), Where(tiny_place, 0, 1, CPU))

    return make


def test_a_step_gives_every_term_a_weight_and_everything_that_trains_a_gradient(case_method, case, experiment):
    """What has no gradient would stop data parallelism; the teacher and its classifier have none."""
    made = experiment(case_method, **case)
    task = made.task.train()
    losses = task(next(iter(made.batches(1))))
    assert losses.terms and losses.terms.keys() == losses.weights.keys()
    assert all(term.isfinite() and term.ndim == 0 for term in losses.terms.values())
    losses.total.backward()
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert not any(name.startswith(("teacher.", "teacher_classifier.")) for name in trained)
    assert {p for group in made.optimizer.param_groups for p in group["params"]} == set(trained.values())


@pytest.mark.parametrize("views", ["clean", "recorded", "online"])
@pytest.mark.parametrize("method", ["d3still", "ugd", "vanillakd"])
def test_the_teacher_is_shown_in_three_ways(method, views, experiment):
    """An epoch and its evaluation, whichever place the teacher's outputs come from."""
    made = experiment(method, views=views, evaluate_symmetric=True, **{"train.epochs": 1})
    (metrics,), _ = fit(made, CPU)
    assert {k.removeprefix("loss/") for k in metrics if k.startswith("loss/")} <= set(made.task.weights)
    assert all(np.isfinite(v) for v in metrics.values()) and {"val/map", "symmetric/map"} <= set(metrics)


RESUMED = [
    ("d3still", {"views": "recorded", "coupled": True}),
    ("supervised", {"train.optimizer": "adamw"}),
    ("rsiamnet", {"bank_momentum": 0.5}),  # clusters and memory are made anew before the second epoch
    ("unified_face", {"bank": 20, "iled_miner": "adaptive"}),  # running values and a bank that wraps
    ("margin_softmax", {"head.kind": "adaface", "head.sample": 0.9}),  # norms, and classes drawn on the device
    ("ddps", {}),  # table, queue and position of its memory
    ("sureid", {"drop_path": 0.3, "backbone_frozen_epochs": 1, "train.optimizer": "adamw", "train.epochs": 3}),
]
RESUMED_SLOW = [
    ("d3still", {"views": "clean"}),
    ("d3still", {"views": "online"}),
    ("d3still", {"mode": "repo", "clip_norm": 1.0}),
    ("ugd", {"views": "recorded"}),  # projectors of its own
    ("ekd", {"balanced.identities": 4}),  # thresholds
    ("adadistill", {}),  # class centres
]


@pytest.mark.parametrize(
    ("method", "changes"),
    [*RESUMED, *(pytest.param(*case, marks=pytest.mark.slow) for case in RESUMED_SLOW)],
    ids=lambda value: str(value),
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one_bit_for_bit(method, changes, experiment, tmp_path):
    def keep(epoch, metrics, state):
        checkpoint.save(tmp_path / f"{epoch}.pt", state())

    changes = {"run.checkpoint_every": 1, "train.epochs": 2, **changes}
    whole = experiment(method, **changes)
    before = {k: v.clone() for module in whole.task.frozen_modules() for k, v in module.state_dict().items()}
    history, _ = fit(whole, CPU, on_epoch=keep)
    after = {k: v for module in whole.task.frozen_modules() for k, v in module.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # the teacher never moves
    expected = whole.task.stored()
    assert not any(name.startswith("teacher") for name in expected)
    for epoch in range(1, whole.epochs):
        torch.manual_seed(999)  # whatever the new process did before
        again = experiment(method, **changes)
        resumed, _ = fit(again, CPU, resume=checkpoint.load(tmp_path / f"{epoch}.pt"))
        assert numbers(resumed) == numbers(history)
        assert all(torch.equal(value, again.task.stored()[name]) for name, value in expected.items())


def test_an_evaluation_after_the_last_epoch_is_made_again(experiment, tmp_path):
    """Killed between the last checkpoint and the end: nothing is left to train, and pictures need what was found."""
    states = []
    history, first = fit(experiment("sureid"), CPU, on_epoch=lambda epoch, metrics, state: states.append(state))
    again, evaluation = fit(experiment("sureid"), CPU, resume=states[-1]())
    assert numbers(again) == numbers(history) and evaluation.metrics == first.metrics
    torch.testing.assert_close(evaluation.found.query_QD, first.found.query_QD, rtol=0, atol=0)


def test_a_state_of_another_network_is_refused(experiment):
    states = []
    fit(experiment("sureid", **{"train.epochs": 1}), CPU, on_epoch=lambda *told: states.append(told[2]))
    with pytest.raises(ValueError, match="another network"):
        fit(experiment("sureid", **{"train.epochs": 2}, hts=False), CPU, resume=states[0]())


@pytest.mark.parametrize("method", ["d3still", "sureid", "supervised"])
def test_batches_are_the_same_from_worker_processes(method, experiment):
    """Images are decoded by processes where pixels are not cached."""
    changes = {"run.pixel_cache": "off"}
    batches = [list(experiment(method, **changes, **{"run.loader_workers": n}).batches(1)) for n in (0, 2)]
    assert len(batches[0]) == len(batches[1]) > 1
    assert all(_equal(one, two) for one, two in zip(*batches, strict=True))


def _equal(one, two) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_equal(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(_equal, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


ON_DEVICE = [
    ("d3still", {"views": "recorded", "coupled": True}),
    ("d3still", {"views": "online"}),
    ("csd", {}),  # neighbours in the whole training set
    ("supervised", {}),
    ("unified_face", {}),
]


@pytest.mark.parametrize(("method", "changes"), ON_DEVICE, ids=lambda value: str(value))
def test_tables_on_the_device_change_no_number(method, changes, experiment, monkeypatch):
    made = []
    resident = tables.Resident.__init__

    def noted(self, *arguments, **beside):
        made.append(set(beside))
        resident(self, *arguments, **beside)

    monkeypatch.setattr(tables.Resident, "__init__", noted)
    found = []
    for choice in ("on", "device"):
        one = experiment(method, **{"run.pixel_cache": choice, "train.epochs": 2, **changes})
        assert (made[:1] == [{"label"}]) == (choice == "device"), "labels live where the frames do"
        history, _ = fit(one, CPU)
        found.append((numbers(history), one.task.stored()))
    (on_host, weights), (on_device, others) = found
    assert on_host == on_device and all(torch.equal(value, others[name]) for name, value in weights.items())


OF_SCENES = {"person_search", "weak_search"}


@pytest.mark.parametrize("method", ["ddps", "rsiamnet"])
def test_a_step_whose_shapes_are_not_known_is_not_compiled(method, experiment):
    with pytest.raises(ValueError, match=r"run.compile=true: how many people a scene has .*; use false"):
        experiment(method, **{"run.compile": True})


@pytest.mark.parametrize("method", ["sureid", "ddps", "rsiamnet"])
def test_frames_that_stay_on_the_host_are_not_asked_to_the_device(method, experiment):
    with pytest.raises(ValueError, match=r"run.pixel_cache=device: .* on the host.*; use on"):
        experiment(method, **{"run.pixel_cache": "device"})


def compiled_cases():
    """Of every method whose step has one shape its first case; one in the default suite."""
    quick = {"d3still": {"views": "recorded"}}
    yield from (pytest.param(*case, id=case[0]) for case in quick.items())
    for name in find.methods():
        if name not in quick and find.method(name).family not in OF_SCENES:
            changes = tiny.family_of(name).CASES.get(name, ({},))[0]
            yield pytest.param(name, changes, marks=pytest.mark.slow, id=name)


@pytest.mark.parametrize(("method", "changes"), compiled_cases())
def test_a_compiled_step_is_captured_whole_and_once(method, changes, experiment, monkeypatch):
    """Without its code generator, which needs minutes: what is captured is the same."""
    from torch._dynamo import reset, utils

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compiled(module, backend="eager"))
    reset()
    utils.counters.clear()
    graphs = []
    settings = {"train.epochs": 3, **changes}
    plain, _ = fit(experiment(method, **settings), CPU)
    history, _ = fit(
        experiment(method, **{"run.compile": True, **settings}), CPU,
        on_epoch=lambda *told: graphs.append(utils.counters["stats"]["unique_graphs"]),
    )  # fmt: skip
    assert not utils.counters["graph_break"] and not utils.counters["unimplemented"]
    assert graphs == [1, 1, 1]
    for one, other in zip(numbers(plain), numbers(history), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
