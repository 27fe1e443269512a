"""A sweep whose driver is killed, and sweeps with Ray's dashboard: whole processes, so they are slow."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def start(storage: Path, tiny_root: Path, settings: list[str], *more: str) -> subprocess.Popen:
    arguments = ["d3still_alpha", "--on", "folder"]
    if "--resume" not in more:
        arguments += ["--data-root", str(tiny_root), "--trials", "5", "--concurrent", "1"]
        arguments += settings
    environment = {**os.environ, "ORCHESTRATOR_STORAGE": str(storage)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen([sys.executable, "-m", "orchestrator.sweep", *arguments, *more], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def table(storage: Path):
    """Trial number -> (params, state, value, epochs), and the MLflow runs."""
    from orchestrator import command, on_ray, tracking

    os.environ["ORCHESTRATOR_STORAGE"] = str(storage)
    plan = command.latest_plan("d3still_alpha")
    records = on_ray.records(plan)
    rows = {r.number: (r.point, r.status, r.value, r.epochs) for r in records}
    metrics = {r.number: {k: v for k, v in r.metrics.items() if not k.startswith("perf/")} for r in records}
    return plan, rows, metrics, tracking.runs_of(plan.tracking_uri, plan.tag)


def wait_for(condition, seconds: float, process: subprocess.Popen):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def study(storage: Path, query: str) -> int:
    databases = list(storage.glob("sweeps/*/study.db"))
    if not databases:
        return 0
    try:
        with sqlite3.connect(f"file:{databases[0]}?mode=ro", uri=True) as connection:
            return connection.execute(query).fetchone()[0]
    except sqlite3.OperationalError:
        return 0


FINISHED = "select count(*) from trials where state in ('COMPLETE', 'PRUNED')"
INSIDE = (
    "select count(*) from trial_intermediate_values v join trials t on t.trial_id = v.trial_id "
    "where t.state = 'RUNNING'"
)


def test_kill_nine_in_mid_sweep_then_resume_equals_an_uninterrupted_sweep(
    tmp_path, tiny_root, tiny_teacher, tiny_arguments, monkeypatch
):
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", "")
    settings = tiny_arguments(teacher_weights=tiny_teacher, epochs=8, constant_epochs=4)
    whole = start(tmp_path / "whole", tiny_root, settings)
    output, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, output

    killed = start(tmp_path / "killed", tiny_root, settings)
    # In the middle of the second trial.
    wait_for(lambda: study(tmp_path / "killed", FINISHED) >= 1 and study(tmp_path / "killed", INSIDE) >= 3, 300, killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    _, rows, _, _ = table(tmp_path / "killed")
    finished = {n for n, row in rows.items() if row[1] in ("completed", "pruned")}
    assert finished and len(finished) < 5
    time.sleep(8)  # the killed cluster's processes end by themselves

    resumed = start(tmp_path / "killed", tiny_root, settings, "--resume")
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, output
    for number in finished:
        assert f"trial {number} started" not in output
    plan, rows, metrics, runs = table(tmp_path / "killed")
    _, expected, expected_metrics, _ = table(tmp_path / "whole")
    assert rows == expected
    assert metrics == expected_metrics
    assert sorted(int(r.data.tags["orch.trial"]) for r in runs) == [0, 1, 2, 3, 4]
    assert all(r.info.status == "FINISHED" for r in runs)
    from orchestrator import tracking

    for run in runs:  # every epoch once, also those around the kill
        steps = [step for step, _ in tracking.curve(plan.tracking_uri, run.info.run_id, "val/map")]
        epochs = rows[int(run.data.tags["orch.trial"])][3]
        # A trial that is stopped early may have logged one more epoch than the scheduler saw.
        assert steps in (list(range(1, epochs + 1)), list(range(1, epochs + 2)))


@pytest.mark.parametrize("dashboard", [True, False])
def test_stopped_trials_give_their_resources_back(tmp_path, tiny_root, tiny_teacher, tiny_settings, dashboard):
    code = f"""
import dataclasses, io, ray, time
from rich.console import Console
from orchestrator import find, on_ray, tracking
from orchestrator.method import Place, changed, recipe_dict
from search_spaces._space import Float, SearchSpace
space = SearchSpace(method="d3still", question="?", tune={{"learning_rate": Float(1e-4, 0.05)}},
                    start=({{"learning_rate": 0.05}},), metric="train/learning_rate")
place = Place({str(tmp_path / "runs")!r}, {str(tiny_root)!r})
recipe = changed(find.recipe("d3still", "folder"), {{**{tiny_settings!r}, "teacher_weights": {str(tiny_teacher)!r},
                 "epochs": 8, "warmup_epochs": 0, "constant_epochs": 8}})
plan = on_ray.Plan(folder=place.storage + "/sweeps/x-folder-1", space="x", title="x", benchmark="folder",
    recipes={{"d3still": recipe_dict(recipe)}}, place=dataclasses.asdict(place),
    tracking_uri=tracking.tracking_uri(place.storage), trials=4,
    facts={{"prepared": {{on_ray.prepared_key("d3still", recipe): find.method("d3still").prepare(recipe, place)}}}},
    space_data=on_ray.space_data(space), concurrent=2)
with on_ray.cluster(dashboard={dashboard}):
    started = time.monotonic()
    records = on_ray.run_sweep(plan, Console(file=io.StringIO()))
    print([r.status for r in records])
    time.sleep(1)
    print(on_ray._worker_groups(), ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2]
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 2, ran.stderr
    assert lines[0].count("pruned") >= 2 and "failed" not in lines[0]
    assert lines[1] == "[] True"
