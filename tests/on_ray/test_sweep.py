"""Real sweeps on a real local cluster with a real MLflow store. The first test is the only one on Ray by default."""

import dataclasses
import io
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import on_ray, tracking
from orchestrator.launch import preparing, shelf, study
from orchestrator.launch.plan import Plan
from orchestrator.progress import Board, PreparationBar
from orchestrator.recipe import flat
from search_spaces._space import Float, SearchSpace


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def new_plan(place, recipe, space: SearchSpace, trials: int, **options) -> Plan:
    uri = tracking.tracking_uri(place.storage)
    options = {"concurrent": 2, "workers": 1, "gpus": 0.0} | options
    return shelf.new_plan("test", space, "test", "folder", {"d3still": recipe}, place, uri, trials, **options)


def prepared(plan: Plan, runner: on_ray.OnRay) -> Plan:
    return preparing.prepared(plan, runner, PreparationBar(quiet()))


def run(plan: Plan, runner: on_ray.OnRay, console: Console | None = None) -> list:
    return runner.sweep(plan, Board(console or quiet(), plan.metric, study.records(plan), plan.trials))


def assert_all_given_back(seconds: float = 10.0) -> None:
    import ray

    from orchestrator.on_ray.internals import worker_groups

    end = time.monotonic() + seconds
    while worker_groups() and time.monotonic() < end:
        time.sleep(0.2)
    assert worker_groups() == []
    assert ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


@pytest.mark.ray
def test_trials_end_on_two_workers(local_ray, tiny_place, tiny_recipe):
    """Completed on two workers, and failed; without Ray losses that are not finite are tested as well."""
    cells = {"good": {}, "broken": {"views": "recorded"}}
    space = SearchSpace(method="d3still", question="How can a trial end?", cells=cells, early_stopping=False)
    recipe = tiny_recipe(**{"train.epochs": 2})
    plan = prepared(new_plan(tiny_place, recipe, space, 2, concurrent=1, workers=2), local_ray)
    shutil.rmtree(plan.prepared_for({"cell": "broken"}).path("targets"))  # after the driver has looked
    ends = {r.point["cell"]: r for r in run(plan, local_ray)}
    expected = {"good": "completed", "broken": "failed"}
    assert {name: r.status for name, r in ends.items()} == expected, [r.message for r in ends.values()]
    assert "manifest.json cannot be read" in ends["broken"].message
    assert_all_given_back()
    _check_runs(plan, ends, recipe)


def test_an_ended_trial_keeps_no_statistics():
    from ray.tune.experiment import Trial

    from orchestrator.on_ray import internals

    trial = Trial("nobody", stub=True)
    trial.update_last_result({"epoch": 1, "val/map": 0.5, "training_iteration": 1})
    assert trial.metric_analysis["val/map"]["max"] == 0.5 and trial.metric_n_steps
    internals.forget_metrics(trial)
    assert not trial.metric_analysis and not trial.metric_n_steps
    assert trial.last_result["val/map"] == 0.5 and len(trial.run_metadata.get_json_state()) < 2000


def test_tune_passes_no_key_on():
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    from orchestrator.on_ray import internals

    internals.keep_secrets()
    assert ENV_VARS_TO_PROPAGATE and not [n for n in ENV_VARS_TO_PROPAGATE if n.startswith("AWS_")]


def _check_runs(plan: Plan, ends: dict, recipe) -> None:
    runs = {int(r.data.tags["orch.trial"]): r for r in tracking.runs_of(plan.tracking_uri, plan.tag)}
    assert len(runs) == 2
    good = runs[ends["good"].number]
    assert good.info.status == "FINISHED" and good.data.tags["orch.status"] == "completed"
    broken = runs[ends["broken"].number]
    assert broken.info.status == "FAILED" and "manifest.json" in broken.data.tags["orch.message"]
    assert good.data.params["beta"] == "0.2" and good.data.params["student.size"] == "[16, 16]"
    for tag in ("orch.method", "orch.benchmark", "orch.teacher_fingerprint", "orch.views"):
        assert good.data.tags[tag]
    inputs = {d.dataset.name for d in good.inputs.dataset_inputs}
    assert inputs >= {"folder train", "folder gallery", "folder gallery embeddings"}
    assert [step for step, _ in tracking.curve(plan.tracking_uri, good.info.run_id, "val/map")] == [1, 2]
    keys = set(good.data.metrics)
    assert {"loss/feature", "loss_weighted/feature", "train/learning_rate", "perf/images_per_s", "cost/macs"} <= keys
    assert len(tracking.file(plan.tracking_uri, good.info.run_id, "retrieval.png")) > 1000
    assert not [name for name in ends["good"].metrics if name.startswith("config/")]
    record = tracking.read_record(plan.tracking_uri, good.info.run_id)
    assert record.recipe == flat(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=0)))
    assert tracking.student_file(plan.tracking_uri, good.info.run_id).exists()
    with pytest.raises(ValueError, match="has no student"):
        tracking.student_file(plan.tracking_uri, broken.info.run_id)


def _stopped_early(runner: on_ray.OnRay, place, tiny_recipe) -> tuple[Plan, list]:
    """The rate itself is the metric: the first point has the largest, so every sampled one is stopped early."""
    space = SearchSpace(
        method="d3still",
        question="Who is stopped?",
        tune={"train.rate": Float(1e-4, 0.05)},
        start=({"train.rate": 0.05},),
        metric="train/learning_rate",
    )
    recipe = tiny_recipe(**{"train.epochs": 8, "warmup_epochs": 0, "constant_epochs": 8})
    plan = prepared(new_plan(place, recipe, space, 2, concurrent=1), runner)  # which is first decides who is stopped
    output = io.StringIO()
    records = run(plan, runner, Console(file=output, width=200))
    assert [(r.status, r.epochs) for r in records] == [("completed", 8), ("pruned", 2)], [r.message for r in records]
    assert_all_given_back()
    runs = tracking.runs_of(plan.tracking_uri, plan.tag)
    assert [r.data.tags["orch.status"] for r in runs] == ["completed", "pruned"]
    assert all(r.info.status == "FINISHED" for r in runs)
    assert "trial 1 pruned after epoch 2" in output.getvalue()
    assert {m: len(v) for m, v in study.Study(plan).rungs.recorded.items()} == {8: 1, 4: 1, 2: 2}
    return plan, records


@pytest.mark.slow
def test_a_weak_trial_is_stopped_early_and_the_finished_sweep_extended(local_ray, tiny_place, tiny_recipe):
    """The finished trials stay, and the rungs are those that they left."""
    plan, records = _stopped_early(local_ray, tiny_place, tiny_recipe)
    extended = run(dataclasses.replace(plan, trials=3), local_ray)
    assert [r.run_id for r in extended[:2]] == [r.run_id for r in records] and len(extended) == 3
    assert extended[2].status == "pruned"


@pytest.mark.slow
def test_numbers_on_ray_are_those_of_this_process(local_ray, tiny_place, tiny_recipe, monkeypatch):
    """With as many threads: sums are in another order with more."""
    import torch

    from orchestrator.launch.runner import InProcess

    space = SearchSpace(method="d3still", question="?", cells={"one": {}}, early_stopping=False)
    found = []
    threads = local_ray.capacity().cpus
    monkeypatch.setattr(torch, "get_num_threads", lambda: int(threads))
    for runner in (local_ray, InProcess()):
        plan = prepared(new_plan(tiny_place, tiny_recipe(), space, 1, concurrent=1), runner)
        (record,) = run(plan, runner)
        assert record.status == "completed", record.message
        found.append({k: v for k, v in record.metrics.items() if not k.startswith("perf/")})
    assert found[0] == found[1]


@pytest.mark.parametrize(("one_thread", "expected"), [(True, 1), (False, 2)])
def test_what_is_free_decides_no_bit_of_a_table(one_thread, expected, monkeypatch, tmp_path):
    """Sums of few images are in another order with more threads; other calls may use what is free."""
    import torch

    from orchestrator.on_ray import cluster

    before = torch.get_num_threads()
    monkeypatch.setattr(cluster, "_free_cpus", lambda: 2)
    monkeypatch.setattr(cluster, "resolved", lambda name: lambda values, device, progress: torch.get_num_threads())
    try:
        assert cluster._call("module:function", {}, "cpu", one_thread, str(tmp_path / "note")) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_pieces_side_by_side_are_those_of_one_thread_one_after_the_other(
    local_ray, tiny_recipe, own_place, monkeypatch, tmp_path
):
    import numpy as np
    import torch

    from orchestrator import cache, find
    from orchestrator.families.retrieval import data
    from orchestrator.launch.runner import InProcess
    from orchestrator.on_ray import cluster

    assert local_ray.capacity().calls == int(local_ray.capacity().cpus), "one piece for every CPU"
    monkeypatch.setattr(data, "SHARD_ROWS", 40)
    asked, call, before = [], cluster.call, torch.get_num_threads()
    monkeypatch.setattr(cluster, "call", lambda *given: asked.append(given[2]) or call(*given))
    recipe, found = tiny_recipe(views="clean"), []
    torch.set_num_threads(1)
    try:
        for runner in (local_ray, InProcess()):
            place = dataclasses.replace(own_place, storage=str(tmp_path / type(runner).__name__))
            plan = Plan("", "", "", "", {}, dataclasses.asdict(place), "", 1)
            need = find.method("d3still").needs(recipe, place)["targets"]
            ready = preparing.Preparation(plan, runner, PreparationBar(quiet())).meet("d3still", need)
            table = cache.open_rows(place.folder(ready.path))
            assert len(table.manifest["parts"]) == 3
            found.append(table(np.arange(len(table))))
    finally:
        torch.set_num_threads(before)
    assert asked.count(True) >= 3, "shards"
    np.testing.assert_array_equal(*found)


@pytest.mark.slow
def test_a_trial_that_cannot_fit_is_refused(local_ray):
    with pytest.raises(ValueError, match=r"a trial of 500 workers needs 500 CPUs, the cluster has"):
        local_ray.concurrent(500, 0.0, None)
    with pytest.raises(ValueError, match="GPUs"):
        local_ray.concurrent(1, 1000.0, None)


@pytest.mark.slow
def test_control_processes_import_only_what_they_use(local_ray):
    """Neither Tune's trial nor Train's controller may load what only workers need: seconds and half a gigabyte."""
    import ray

    @ray.remote(num_cpus=0)
    def loaded() -> list[str]:
        import sys

        import orchestrator.on_ray.internals
        import orchestrator.on_ray.trial  # noqa: F401

        return sorted({name.partition(".")[0] for name in sys.modules})

    heavy = {"torch", "torchvision", "timm", "mlflow", "matplotlib", "optuna", "sklearn"}
    fresh = loaded.options(runtime_env={"env_vars": {"A_PROCESS_OF": "its own"}})  # not one that has prepared something
    assert not heavy & set(ray.get(fresh.remote()))


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"HOME": "/proc/nobody"}, {"TMPDIR": "note"}])
def test_a_local_cluster_starts_wherever_it_is(environment, tmp_path):
    """A home that cannot be written; what somebody's ``ray start`` has noted in the temporary folder."""
    import os
    import subprocess
    import sys

    code = (
        "from orchestrator import on_ray\n"
        "with on_ray.connected(dashboard=False) as runner: print('started', runner.capacity().cpus > 0)"
    )
    own = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"MPLCONFIGDIR": str(tmp_path)} | environment
    with tempfile.TemporaryDirectory() as short:  # the names of Ray's sockets may not be long
        if "TMPDIR" in environment:
            own["TMPDIR"] = short
            (Path(short) / "ray").mkdir()
            (Path(short) / "ray" / "ray_current_cluster").write_text("127.0.0.1:6399")
        done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, timeout=300)
    assert "started True" in done.stdout, done.stderr[-500:]
