"""The loop: an interrupted run ends like an uninterrupted one, bit for bit; a bad loss says where it was."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator import checkpoint, find
from orchestrator.fit import NonFiniteLoss, fit, training_state
from orchestrator.methods import embedding

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"


def experiment(recipe, place):
    return find.method("d3still").experiment(recipe, place, 0, 1, CPU)


def numbers(history):
    return [{k: v for k, v in h.items() if not k.startswith("perf/")} for h in history]


def weights(task):
    return {k: v.clone() for k, v in task.state_dict().items() if not k.startswith("teacher.")}


@pytest.fixture(params=["clean", "recorded", "online", "repo"])
def recipe(request, tiny_recipe):
    """Every way of training, with dropout-free nets; ``repo`` has two batches a step."""
    if request.param == "repo":
        return tiny_recipe(mode="repo", clip_norm=1.0)
    return tiny_recipe(views=request.param, num_views=2, coupled=request.param == "recorded")


def test_interrupted_after_any_epoch_equals_uninterrupted(recipe, tiny_place, tmp_path):
    states = {}

    def keep(epoch, metrics, state):
        checkpoint.save(tmp_path / f"{epoch}.pt", state())
        states[epoch] = tmp_path / f"{epoch}.pt"

    whole = experiment(recipe, tiny_place)
    history = fit(whole, CPU, on_epoch=keep)
    assert len(history) == 3
    for epoch in (1, 2, 3):
        torch.manual_seed(999)  # whatever the new process did before
        again = experiment(recipe, tiny_place)
        resumed = fit(again, CPU, resume=checkpoint.load(states[epoch]))
        assert numbers(resumed) == numbers(history)
        for name, value in weights(whole.task).items():
            assert torch.equal(value, weights(again.task)[name]), name


def test_training_lowers_the_loss_and_logs_raw_and_weighted_terms(tiny_recipe, tiny_place):
    history = fit(experiment(tiny_recipe(epochs=6, constant_epochs=6), tiny_place), CPU)
    assert history[-1]["train/loss"] < history[0]["train/loss"]
    for h in history:
        assert h["loss_weighted/feature"] == pytest.approx(100 * h["loss/feature"], rel=1e-5)
        total = sum(v for k, v in h.items() if k.startswith("loss_weighted/"))
        assert total == pytest.approx(h["train/loss"], rel=1e-5)
        assert h["perf/images_per_s"] > 0 and h["perf/peak_memory_mib"] > 0


def test_a_weight_of_zero_removes_its_term(tiny_recipe, tiny_place):
    history = fit(experiment(tiny_recipe(beta=0, gamma=0, epochs=1), tiny_place), CPU)
    assert {k for k in history[0] if k.startswith("loss/")} == {"loss/feature"}


def test_evaluation_only_every_so_often_but_always_last(tiny_recipe, tiny_place):
    history = fit(experiment(tiny_recipe(evaluate_every=2), tiny_place), CPU)
    assert ["val/map" in h for h in history] == [False, True, True]


def test_the_teacher_never_moves(tiny_recipe, tiny_place):
    ex = experiment(tiny_recipe(views="online", epochs=1), tiny_place)
    before = {k: v.clone() for k, v in ex.task.teacher.state_dict().items()}
    fit(ex, CPU)
    assert not ex.task.teacher.training and all(p.grad is None for p in ex.task.teacher.parameters())
    assert all(torch.equal(v, ex.task.teacher.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is not None for p in ex.task.student.parameters())


def test_a_loss_that_is_not_finite_says_where_it_was(tiny_recipe, tiny_place, tmp_path):
    kept = []
    ex = experiment(tiny_recipe(), tiny_place)
    method = ex.task.method

    def breaks(recipe, pairs):
        found = method.terms(recipe, pairs)
        if len(kept) == 1:
            found["feature"] = found["feature"] * float("nan")
        return found

    ex.task.method = dataclasses.replace(method, terms=breaks)
    with pytest.raises(
        NonFiniteLoss, match=r"not finite in epoch 2, step 1: feature = nan, .*images: train/0\d+/.* and 8 more"
    ):
        fit(ex, CPU, on_epoch=lambda epoch, metrics, state: kept.append(state()))
    assert len(kept) == 1 and kept[0]["epoch"] == 1


def test_a_state_of_another_network_or_world_is_refused(tiny_recipe, tiny_place):
    ex = experiment(tiny_recipe(epochs=1), tiny_place)
    state = training_state(ex, [], CPU)
    with pytest.raises(ValueError, match="of 2 workers, this run has 1"):
        fit(ex, CPU, resume={**state, "generators": state["generators"].repeat(2, 1)})
    state["task"].pop("student.neck.2.weight")
    with pytest.raises(ValueError, match=r"another network: 1 tensors do not fit, first student.neck.2.weight"):
        fit(ex, CPU, resume=state)


def test_bfloat16_trains_and_its_loss_is_float32(tiny_recipe, tiny_place):
    history = fit(experiment(tiny_recipe(precision="bfloat16"), tiny_place), CPU)
    reference = fit(experiment(tiny_recipe(), tiny_place), CPU)
    assert history[0]["train/loss"] == pytest.approx(reference[0]["train/loss"], rel=0.05)


@pytest.mark.parametrize("name", ["lr_default", "lr_adamw"])
def test_recorded_learning_rates(name):
    hyper = next(c for c in json.loads((GOLDEN / "d3still.json").read_text())["cases"] if c["id"] == name)["hyper"]
    recipe = embedding.EmbeddingRecipe(
        dataset="demo", learning_rate=hyper["base_lr"], epochs=hyper["max_epochs"], warmup_epochs=hyper["warmup"],
        constant_epochs=hyper["delay"], least_rate=hyper["eta_min"],
    )  # fmt: skip
    with np.load(GOLDEN / "d3still.npz") as stored:
        expected = stored[f"{name}/lr"]
    found = [embedding.learning_rate(recipe, e) for e in range(1, 121)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_checkpoints_are_plain_and_damage_is_one_line(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"x": torch.ones(2), "y": [1, {"z": 2.0}]})
    assert checkpoint.load(tmp_path / "a.pt")["y"] == [1, {"z": 2.0}]
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint .*b.pt cannot be read") as error:
        checkpoint.load(tmp_path / "b.pt")
    assert "\n" not in str(error.value)
    torch.save({"f": Path}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(tmp_path / "c.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt", "c.pt"]


def test_students_are_stored_without_classifier_and_loaded_by_architecture(tmp_path):
    from dataclasses import replace

    from models.embedder import Embedder, EmbedderConfig

    config = EmbedderConfig(backbone="resnet18", width=0.125, embedding_dim=8, image_size=(16, 16), num_classes=3)
    net = Embedder(config).eval()
    checkpoint.save_model(tmp_path, net, {"note": 1})
    loaded, facts = checkpoint.load_model(tmp_path / "student.safetensors", config)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), net(x)) and facts == {"note": 1} and loaded.classifier is None
    with pytest.raises(ValueError, match="holds another architecture: embedding_dim 8 instead of 9"):
        checkpoint.load_model(tmp_path / "student.safetensors", replace(config, embedding_dim=9))
    (tmp_path / "student.json").unlink()
    with pytest.raises(ValueError, match=r"another architecture than expected: \d+ of \d+ tensors fit, the first"):
        checkpoint.load_model(tmp_path / "student.safetensors", replace(config, backbone="resnet34"))
    with pytest.raises(ValueError, match="its architecture is unknown"):
        checkpoint.load_model(tmp_path / "student.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        checkpoint.load_model(tmp_path / "broken.safetensors", config)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        checkpoint.load_model(tmp_path / "nothing.safetensors")
