"""Killed drivers and killed preparations: whole processes with SIGKILL, so they are slow."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator import leases, tracking
from orchestrator.launch import shelf, study

pytestmark = [pytest.mark.slow, pytest.mark.night]
ROOT = Path(__file__).parents[2]

# Runs a sweep that is killed in the middle of one kind of preparation.
DYING = """
import os, signal, sys
from orchestrator import checkpoint
from orchestrator.launch import preparing
kind, sys.argv[1:] = sys.argv[1], sys.argv[2:]
make = preparing.make

def dying(*progress):
    os.kill(os.getpid(), signal.SIGKILL)

preparing.make = lambda values, device, progress: make(
    values, device, dying if values["need"]["kind"] == kind else progress
)
if kind == "teacher":
    save = checkpoint.save

    def save_once(path, state):
        save(path, state)
        dying()

    checkpoint.save = save_once
from orchestrator.sweep import main
main()
"""


def environment(storage: Path) -> dict[str, str]:
    own = {**os.environ, "ORCHESTRATOR_STORAGE": str(storage), "PYTHONPATH": str(ROOT)}
    own.pop("RAY_ADDRESS", None)
    return own


def start(storage: Path, *arguments: str, code: str = "") -> subprocess.Popen:
    command = [sys.executable, *(("-c", code) if code else ("-m", "orchestrator.sweep")), *arguments]
    return subprocess.Popen(
        command, env=environment(storage), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, seconds: float = 600) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def table(storage: Path, name: str):
    """Trial number -> (point, status, value, epochs), its metrics, and the MLflow runs."""
    (folder,) = storage.glob(f"sweeps/{name}-*")
    plan = shelf.read(folder)
    records = study.records(plan)
    rows = {r.number: (r.point, r.status, r.value, r.epochs) for r in records}
    metrics = {r.number: {k: v for k, v in r.metrics.items() if not k.startswith("perf/")} for r in records}
    return plan, rows, metrics, tracking.runs_of(plan.tracking_uri, plan.tag)


def wait_for(condition, seconds: float, process: subprocess.Popen) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def settings(tiny_root, tiny_arguments) -> list[str]:
    """A small table of one row whose teacher is trained on the way."""
    own = tiny_arguments(**{"teacher.epochs": 3, "train.epochs": 2, "run.checkpoint_every": 1})
    return ["d3still_alpha", "--on", "folder", "--data-root", str(tiny_root), "--trials", "1", "--in-process", *own]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> dict:
    """The table of a sweep that nobody killed."""
    storage = tmp_path_factory.mktemp("whole")
    finish(start(storage, *settings))
    return table(storage, "d3still_alpha")[2]


@pytest.mark.parametrize("kind", ["index", "pixels", "teacher", "embeddings", "embedding shard"])
def test_a_killed_preparation_keeps_what_it_had_finished(kind, settings, whole, tmp_path):
    storage = tmp_path / "runs"
    code = DYING
    if kind == "embedding shard":
        code = "from orchestrator.families.retrieval import data\ndata.SHARD_ROWS = 30\n" + code
    killed = start(storage, kind, *settings, code=code)
    output, _ = killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL, output
    assert list(storage.glob("sweeps/d3still_alpha-*/plan.json")), "the plan is stored before anything is prepared"
    ready = {path.name: path.stat().st_mtime_ns for path in storage.glob("ready/*.json")}
    assert ready or kind == "index"

    output = finish(start(storage, "d3still_alpha", "--on", "folder", "--resume", "--in-process"))
    if kind == "teacher":
        assert "its training was interrupted and goes on" in output
    for name, stamp in ready.items():  # what was finished was not made again
        assert (storage / "ready" / name).stat().st_mtime_ns == stamp
    assert table(storage, "d3still_alpha")[2] == whole
    teachers = {p.name for p in storage.glob("sweeps/teacher-*")}
    assert len(teachers) == 1
    plan, rows, _, runs = table(storage, "teacher")
    assert [row[1] for row in rows.values()] == ["completed"] and len(runs) == 1
    steps = [step for step, _ in tracking.curve(plan.tracking_uri, runs[0].info.run_id, "train/loss")]
    assert steps == [1, 2, 3]


# A sweep whose teacher's training waits for a file before it begins.
PATIENT = """
import sys, time
from pathlib import Path
from orchestrator.launch import runner
go, sys.argv[1:] = Path(sys.argv[1]), sys.argv[2:]
sweep = runner.InProcess.sweep

def patient(self, plan, board):
    while plan.space.startswith("teacher-") and not go.exists():
        time.sleep(0.1)
    return sweep(self, plan, board)

runner.InProcess.sweep = patient
from orchestrator.sweep import main
main()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_two_sweeps_that_want_one_teacher_train_it_once(killed, settings, tmp_path):
    """One trains it, the other says for whom it waits and goes on; with the holder killed, the other takes over."""
    storage, go, said = tmp_path / "runs", tmp_path / "go", tmp_path / "second.txt"
    first = start(storage, str(go), *settings, code=PATIENT)
    wait_for(lambda: list(storage.glob("leases/teacher-*")), 240, first)
    with open(said, "w") as output:
        command = [sys.executable, "-u", "-m", "orchestrator.sweep", *settings]
        second = subprocess.Popen(command, env=environment(storage), stdout=output, stderr=subprocess.STDOUT)
    wait_for(lambda: f"waiting for process {first.pid} on" in said.read_text(), 240, first)
    if killed:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    go.touch()
    assert second.wait(600) == 0, said.read_text()
    if not killed:
        finish(first)
    trained = [line for line in said.read_text().splitlines() if "trained now" in line or "goes on" in line]
    assert len(trained) == int(killed)
    assert len(list(storage.glob("teachers/*/teacher.json"))) == 1
    assert len(list(storage.glob("sweeps/teacher-*"))) == 1
    paths = [str(path).rpartition("-")[0] for path in (*storage.glob("**/*.lease-*"), *storage.glob("leases/*"))]
    left = [holder for path in paths if (holder := leases.read(path))]  # the killed sweep's own
    assert len(left) == int(killed) and all(holder.is_gone for holder in left)


FINISHED = "select count(*) from trials where state in ('COMPLETE', 'PRUNED')"
INSIDE = (
    "select count(*) from trial_intermediate_values v join trials t on t.trial_id = v.trial_id "
    "where t.state = 'RUNNING'"
)


def counted(storage: Path, query: str) -> int:
    databases = list(storage.glob("sweeps/d3still_alpha-*/study.db"))
    if not databases:
        return 0
    try:
        with sqlite3.connect(f"file:{databases[0]}?mode=ro", uri=True) as connection:
            return connection.execute(query).fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_kill_nine_in_mid_sweep_then_resume_equals_an_uninterrupted_sweep(
    tmp_path, tiny_root, tiny_teacher, tiny_arguments
):
    own = {"teacher.weights": tiny_teacher, "train.epochs": 8, "constant_epochs": 4, "run.checkpoint_every": 1}
    asked = ["d3still_alpha", "--on", "folder", "--data-root", str(tiny_root), "--trials", "5", "--concurrent", "1"]
    asked += tiny_arguments(**own)
    finish(start(tmp_path / "whole", *asked))

    killed = start(tmp_path / "killed", *asked)
    # In the middle of the second trial.
    storage = tmp_path / "killed"
    wait_for(lambda: counted(storage, FINISHED) >= 1 and counted(storage, INSIDE) >= 3, 300, killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    _, rows, _, _ = table(storage, "d3still_alpha")
    finished = {n for n, row in rows.items() if row[1] in ("completed", "pruned")}
    assert finished and len(finished) < 5
    time.sleep(8)  # the killed cluster's processes end by themselves

    output = finish(start(storage, "d3still_alpha", "--on", "folder", "--resume"))
    for number in finished:
        assert f"trial {number} started" not in output
    plan, rows, metrics, runs = table(storage, "d3still_alpha")
    _, expected, expected_metrics, _ = table(tmp_path / "whole", "d3still_alpha")
    assert rows == expected
    assert metrics == expected_metrics
    assert sorted(int(r.data.tags["orch.trial"]) for r in runs) == [0, 1, 2, 3, 4]
    assert all(r.info.status == "FINISHED" for r in runs)
    for run in runs:  # every epoch once, also those around the kill
        steps = [step for step, _ in tracking.curve(plan.tracking_uri, run.info.run_id, "val/map")]
        epochs = rows[int(run.data.tags["orch.trial"])][3]
        # A trial that is stopped early may have logged one more epoch than the scheduler saw.
        assert steps in (list(range(1, epochs + 1)), list(range(1, epochs + 2)))


@pytest.mark.parametrize("dashboard", [True, False])
def test_stopped_trials_give_their_resources_back(tmp_path, tiny_root, tiny_teacher, tiny_settings, dashboard):
    code = f"""
import io, ray, time
from rich.console import Console
from orchestrator import find, on_ray, tracking
from orchestrator.launch import preparing, shelf, study
from orchestrator.needs import Place
from orchestrator.on_ray.internals import worker_groups
from orchestrator.progress import Board, PreparationBar
from orchestrator.recipe import changed
from search_spaces._space import Float, SearchSpace
space = SearchSpace(method="d3still", question="?", tune={{"train.rate": Float(1e-4, 0.05)}},
                    start=({{"train.rate": 0.05}},), metric="train/learning_rate")
place = Place({str(tmp_path / "runs")!r}, {str(tiny_root)!r})
settings = {dict(tiny_settings)!r} | {{"teacher.weights": {str(tiny_teacher)!r}, "train.epochs": 8,
    "train.warmup_epochs": 0, "train.constant_epochs": 8}}
recipe = changed(find.recipe("d3still", "folder"), settings)
quiet = Console(file=io.StringIO())
plan = shelf.new_plan("x", space, "x", "folder", {{"d3still": recipe}}, place, tracking.tracking_uri(place.storage),
                      4, 2, 1, 0.0)
with on_ray.connected(dashboard={dashboard}) as runner:
    plan = preparing.prepared(plan, runner, PreparationBar(quiet))
    records = runner.sweep(plan, Board(quiet, plan.metric, study.records(plan), plan.trials))
    print([r.status for r in records])
    time.sleep(1)
    print(worker_groups(), ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=environment(tmp_path / "runs")
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 2, ran.stderr
    assert lines[0].count("pruned") >= 2 and "failed" not in lines[0]
    assert lines[1] == "[] True"
