"""Sweeps on a real local cluster with a real MLflow store: ends, failures, early stops, resources, resume."""

import dataclasses
import io
import time

import optuna
import pytest
import ray
from rich.console import Console

from orchestrator import find, on_ray, tracking
from orchestrator.method import changed, recipe_dict
from orchestrator.on_ray import Plan, StudySearch
from search_spaces._space import Float, SearchSpace


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def make_plan(tmp_path, place, recipe, space, trials, title="test", **options) -> Plan:
    facts = find.method("d3still").prepare(recipe, place)
    return Plan(
        folder=str(tmp_path / "runs" / "sweeps" / "test-folder-1"), space="test", title=title, benchmark="folder",
        recipes={"d3still": recipe_dict(recipe)}, place=dataclasses.asdict(place),
        tracking_uri=tracking.tracking_uri(place.storage), trials=trials, space_data=on_ray.space_data(space),
        facts={"prepared": {on_ray.prepared_key("d3still", recipe): facts}}, **options,
    )  # fmt: skip


def assert_all_given_back(seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while on_ray._worker_groups() and time.monotonic() < end:
        time.sleep(0.2)
    assert on_ray._worker_groups() == []
    assert ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


def test_every_way_a_trial_can_end(local_ray, tmp_path, tiny_place, tiny_recipe, monkeypatch):
    """completed, retried and failed, not finite and failed at once; then nothing is left to resume."""
    cells = {
        "good": {},
        "broken": {"teacher_weights": str(tmp_path / "missing.safetensors")},
        "explodes": {"learning_rate": 1e30},
    }
    space = SearchSpace(method="d3still", question="How can a trial end?", cells=cells, early_stopping=False)
    plan = make_plan(tmp_path, tiny_place, tiny_recipe(), space, 3, concurrent=2)
    records = on_ray.run_sweep(plan, quiet())
    ends = {r.point["cell"]: r for r in records}
    assert {name: r.status for name, r in ends.items()} == {
        "good": "completed",
        "broken": "failed",
        "explodes": "failed",
    }
    assert "no weights at" in ends["broken"].message
    assert (
        "the loss is not finite in epoch" in ends["explodes"].message and "images: train/" in ends["explodes"].message
    )
    assert_all_given_back()

    runs = {int(r.data.tags["orch.trial"]): r for r in tracking.runs_of(plan.tracking_uri, plan.tag)}
    assert len(runs) == 3
    good = runs[ends["good"].number]
    assert good.info.status == "FINISHED" and good.data.tags["orch.status"] == "completed"
    assert runs[ends["broken"].number].info.status == "FAILED"
    assert "no weights at" in runs[ends["broken"].number].data.tags["orch.message"]
    assert good.data.params["beta"] == "0.2" and good.data.params["student_size"] == "[16, 16]"
    for tag in ("orch.method", "orch.benchmark", "orch.teacher_fingerprint", "orch.gallery_cache", "orch.views"):
        assert good.data.tags[tag]
    assert {d.dataset.name for d in good.inputs.dataset_inputs} >= {"folder-train", "folder-gallery", "embeddings"}
    assert [step for step, _ in tracking.curve(plan.tracking_uri, good.info.run_id, "val/map")] == [1, 2, 3]
    keys = set(good.data.metrics)
    assert {"loss/feature", "loss_weighted/feature", "train/learning_rate", "perf/images_per_s", "cost/macs"} <= keys
    assert tracking.artifact(plan.tracking_uri, good.info.run_id, "retrieval.png").stat().st_size > 1000
    record = tracking.read_record(plan.tracking_uri, good.info.run_id)
    assert record.recipe == recipe_dict(tiny_recipe()) and record.place == tiny_place
    assert tracking.student_file(plan.tracking_uri, good.info.run_id).exists()
    with pytest.raises(ValueError, match="has no student"):
        tracking.student_file(plan.tracking_uri, runs[ends["broken"].number].info.run_id)

    again = on_ray.run_sweep(plan, quiet())
    assert [dataclasses.replace(r, seconds=0) for r in again] == [dataclasses.replace(r, seconds=0) for r in records]
    assert len(tracking.runs_of(plan.tracking_uri, plan.tag)) == 3


def test_early_stopped_trials_are_pruned_and_give_everything_back(local_ray, tmp_path, tiny_place, tiny_recipe):
    """The rate itself is the metric: the first point has the largest, so every sampled one is stopped early."""
    space = SearchSpace(
        method="d3still", question="Who is stopped?", tune={"learning_rate": Float(1e-4, 0.05)},
        start=({"learning_rate": 0.05},), metric="train/learning_rate",
    )  # fmt: skip
    plan = make_plan(tmp_path, tiny_place, tiny_recipe(epochs=8, warmup_epochs=0, constant_epochs=8), space, 3)
    output = io.StringIO()
    records = on_ray.run_sweep(plan, Console(file=output, width=200))
    assert [r.status for r in records] == ["completed", "pruned", "pruned"]
    assert [r.epochs for r in records] == [8, 2, 2]
    assert_all_given_back()
    states = [t.state for t in on_ray.open_study(plan).trials]
    assert states == [optuna.trial.TrialState.COMPLETE, *[optuna.trial.TrialState.PRUNED] * 2]
    runs = tracking.runs_of(plan.tracking_uri, plan.tag)
    assert [r.data.tags["orch.status"] for r in runs] == ["completed", "pruned", "pruned"]
    assert all(r.info.status == "FINISHED" for r in runs)
    assert "trial 1 pruned after epoch 2" in output.getvalue()
    # A resumed sweep starts from the same rungs.
    rungs = on_ray.EarlyStopping(StudySearch(plan), 8).rungs()
    assert rungs == {2: 3, 4: 1, 8: 1}
    # And it can be extended: the finished trials stay.
    longer = dataclasses.replace(plan, trials=4)
    extended = on_ray.run_sweep(longer, quiet())
    assert [r.run_id for r in extended[:3]] == [r.run_id for r in records] and len(extended) == 4


def test_suggestions_do_not_depend_on_when_a_sweep_was_interrupted(tmp_path, tiny_place, tiny_recipe, monkeypatch):
    space = find.space("d3still_beta_gamma")
    monkeypatch.setattr(tracking, "curve", lambda *arguments: [])
    job = {"run_id": ""}
    monkeypatch.setattr(on_ray, "trial_job", lambda plan, space, number, point: {"number": number, **point, **job})

    def points(folder: str, interrupt_at: int) -> list:
        plan = Plan(folder=str(tmp_path / folder), space="x", title="x", benchmark="folder",
                    recipes={"d3still": {"seed": 0}}, place={}, tracking_uri="",
                    trials=9, space_data=on_ray.space_data(space))  # fmt: skip
        (tmp_path / folder).mkdir()
        search, found = StudySearch(plan), []
        for i in range(9):
            if i == interrupt_at:  # a new driver; the trial before was running and is suggested again
                search = StudySearch(plan)
                assert search.suggest("again")["job"] == found[-1]
                search.on_trial_complete("again", {"ended": True, "epoch": 3, "val/map": 0.1 * i})
            found.append(search.suggest(f"t{i}")["job"])
            if i != interrupt_at - 1:
                search.on_trial_complete(f"t{i}", {"ended": True, "epoch": 3, "val/map": 0.1 * (i + 1)})
        assert search.suggest("one more") == StudySearch.FINISHED
        return found

    assert points("whole", -1) == points("interrupted", 7)


def test_a_trial_that_cannot_fit_is_refused(local_ray):
    with pytest.raises(ValueError, match=r"a trial of 500 workers needs 500 CPUs, the cluster has"):
        on_ray.check_resources(500, 0.0, None)
    with pytest.raises(ValueError, match="GPUs"):
        on_ray.check_resources(1, 1000.0, None)


def test_one_driver_at_a_time(tmp_path, tiny_place, tiny_recipe):
    space = SearchSpace(method="d3still", question="?", cells={"a": {}})
    plan = make_plan(tmp_path, tiny_place, tiny_recipe(), space, 1)
    with on_ray._only_driver(plan), pytest.raises(ValueError, match="is being run by another process"):
        on_ray.run_sweep(plan, quiet())


def test_two_workers_on_ray(local_ray, tmp_path, tiny_place, tiny_recipe):
    """The same trial through Ray Train with two real workers."""
    if ray.cluster_resources()["CPU"] < 2:
        pytest.skip("needs two CPUs")
    space = SearchSpace(method="d3still", question="?", cells={"two": {}}, early_stopping=False)
    plan = make_plan(tmp_path, tiny_place, changed(tiny_recipe(), {"epochs": 2}), space, 1, workers=2)
    (record,) = on_ray.run_sweep(plan, quiet())
    assert (record.status, record.epochs) == ("completed", 2), record.message
    assert_all_given_back()
