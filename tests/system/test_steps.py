"""The first training steps of every method on the demo are those that version 0.3.0 took.

``golden/training_steps.json`` holds 20 steps of every method and mode, recorded once with 0.3.0: every term and the
total of each step, sums of the student's parameters after the last, the teacher's and chance's metrics, and the
fingerprints of data and teacher. The teachers have random weights of a fixed seed.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.embedder import Embedder
from models.token_pruning import PrunedViT
from orchestrator import checkpoint, find, fit
from orchestrator.families.retrieval.recipe import embedder_config
from orchestrator.families.token_pruning.networks import student_config, teacher_training
from orchestrator.method import Progress, Where
from orchestrator.recipe import changed

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "training_steps.json").read_text())
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def demo_teachers(tmp_path_factory) -> dict[str, str]:
    """Family -> weights of a random teacher of its demo recipes: those of the record."""
    folder = tmp_path_factory.mktemp("demo-teachers")

    def seeded(method: str):
        recipe = find.recipe(method, "demo")
        torch.manual_seed(1234)
        return recipe, find.dataset(recipe.data.name)("", "test").train.num_identities

    recipe, classes = seeded("d3still")
    config = embedder_config(recipe.teacher.network, recipe.embedding_dim)
    checkpoint.save_model(folder, Embedder(replace(config, num_classes=classes)).eval(), {}, "asymmetric")
    recipe, classes = seeded("sureid")
    config = student_config(teacher_training(recipe)[1], classes)
    checkpoint.save_model(folder, PrunedViT(config).eval(), {}, "token_pruning")
    return {file.stem: str(file.with_suffix(".safetensors")) for file in folder.glob("*.json")}


def steps_of(experiment, count: int) -> list[dict[str, float]]:
    """Total and terms of the first steps, taken as the training loop takes them."""
    task, found, epoch = experiment.task.train(), [], 0
    while len(found) < count:
        epoch += 1
        for batch in itertools.islice(experiment.batches(epoch), count - len(found)):
            fit._set_rate(experiment, Progress(epoch, len(found), 0.0))
            losses = task(fit.to_device(batch, CPU))
            fit._step(experiment, losses)
            found.append({name: float(value) for name, value in {"total": losses.total, **losses.terms}.items()})
    return found


def compare(key: str, count: int, rel: float, demo_teachers, prepared, place) -> None:
    """Trains so many steps and compares everything that is recorded of them."""
    recorded = RECORDED[key]
    name, _, mode = key.partition(" ")
    method, recipe = find.method(name), find.recipe(name, "demo")
    settings = {"teacher.weights": demo_teachers[method.family]} if hasattr(recipe, "teacher") else {}
    recipe = changed(recipe, settings | ({"mode": mode} if mode else {}))
    method.check(recipe, 1)
    ready = prepared(name, recipe)
    told = ready.told()
    assert {k: told[k] for k in recorded["fingerprints"]} == recorded["fingerprints"]
    for kind in ("teacher_metrics", "chance_metrics"):
        assert {k: told.get(kind, {})[k] for k in recorded[kind]} == pytest.approx(recorded[kind], rel=1e-3, abs=1e-3)
    experiment = method.experiment(recipe, ready, Where(place, 0, 1, CPU))
    found = steps_of(experiment, count)
    assert set(found[0]) == set(recorded["terms"])
    for term, values in recorded["terms"].items():
        of_steps = [step[term] for step in found]
        assert of_steps == pytest.approx(values[:count], rel=rel, abs=1e-7), f"{term} of the first {count} steps"
    if count == len(recorded["terms"]["total"]):
        weights = torch.cat([p.detach().flatten().double() for p in experiment.task.student.parameters()])
        sums = [float(weights.sum()), float(weights.abs().sum())]
        assert sums == pytest.approx(recorded["parameters"], rel=rel)


def test_every_method_is_recorded():
    assert {key.partition(" ")[0] for key in RECORDED} == set(find.methods())


@pytest.mark.parametrize("key", RECORDED)
def test_the_first_steps_are_those_of_0_3(key, demo_teachers, prepared, tiny_place):
    """Other processors order sums in another way, which a few steps do not make visible."""
    compare(key, 3, 2e-4, demo_teachers, prepared, tiny_place)


@pytest.mark.slow
@pytest.mark.parametrize("key", RECORDED)
def test_twenty_steps_are_those_of_0_3(key, demo_teachers, prepared, tiny_place):
    compare(key, 20, 5e-3, demo_teachers, prepared, tiny_place)
