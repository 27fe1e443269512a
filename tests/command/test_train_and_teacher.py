"""``train`` and ``teacher``: single runs that finish, fail, are interrupted; a teacher that is trained once."""

import shutil
from pathlib import Path

import pytest
from command.typed import call, error, settings, storage_at

from orchestrator import teacher, tracking, train
from orchestrator.launch import shelf, study
from orchestrator.progress import Board


def test_a_single_run_ends_with_its_metrics(data, trained):
    shown = call(train.main, "fitnet", *data, *settings("fitnet", **{"train.epochs": 1}), "--set", "seed=3").output
    assert "val/map" in shown and "MLflow run" in shown and "trained now" not in shown
    plan = shelf.latest("train-fitnet", single="fitnet")
    (record,) = study.records(plan)
    assert record.point == {"cell": "run", "seed": 3} and record.run_id in shown
    again = call(train.main, "fitnet", "--on", "folder", "--resume", "--in-process").output
    assert "started:" not in again and f"MLflow run {record.run_id}" in again
    assert "was started with seed=3; resume it without changes" in error(
        train.main, "fitnet", "--on", "folder", "--resume", "--in-process", "--set", "seed=4"
    )


def test_a_run_without_a_teacher_that_was_interrupted_goes_on(data, monkeypatch):
    whole = Board.epoch

    def epoch(self, number, reached, value):
        whole(self, number, reached, value)
        if reached == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Board, "epoch", epoch)
        arguments = settings("supervised", **{"run.checkpoint_every": 1, "train.epochs": 2})
        line = error(train.main, "supervised", *data, *arguments, code=130)
    assert line == "interrupted; the same command with --resume goes on"
    plan = shelf.latest("train-supervised", single="supervised")
    (run,) = tracking.runs_of(plan.tracking_uri, plan.tag)
    assert run.info.status == "RUNNING"
    shown = call(train.main, "supervised", "--on", "folder", "--resume", "--in-process").output
    assert f"MLflow run {run.info.run_id}" in shown
    assert [step for step, _ in tracking.curve(plan.tracking_uri, run.info.run_id, "train/loss")] == [1, 2]


def test_a_loss_that_is_not_finite_is_one_line(data, trained):
    line = error(train.main, "fitnet", *data, *settings("fitnet", **{"train.rate": 1e30, "train.epochs": 2}))
    assert "the run failed: the loss is not finite in epoch" in line and "images: train/" in line


def test_what_is_not_there(empty):
    assert "no run fitnet on demo in" in error(train.main, "fitnet", "--resume")
    assert "there is no method 'fitnett'; did you mean fitnet" in error(train.main, "fitnett")
    assert "there is no method 'sop'" in error(teacher.main, "sop")


def test_a_teacher_is_trained_once_and_found_again(data, trained, storage):
    assert trained.count("trained now, kept for all sweeps") == 1
    again = call(teacher.main, "d3still", *data, *settings("d3still")).output
    assert "trained now" not in again and "trial 0" not in again
    assert again.splitlines()[-1] == trained.splitlines()[-1]
    path = Path(again.splitlines()[-1].removeprefix("teacher: "))
    assert path.is_file() and path.with_suffix(".classifier.safetensors").is_file()
    plan = shelf.latest(f"teacher-{path.parent.name[:8]}")
    (run,) = tracking.runs_of(plan.tracking_uri, plan.tag)
    assert run.data.tags["orch.method"] == "supervised" and run.info.status == "FINISHED"
    # Another method under the same teacher, and how fast it runs, make no other one.
    other = settings("fitnet", **{"run.loader_workers": 1, "train.rate": 0.01})
    assert call(teacher.main, "fitnet", *data, *other).output.splitlines()[-1] == trained.splitlines()[-1]


@pytest.mark.parametrize(
    "damage", ["cut off", "other bits", "no classifier", "no weights", "no description", "", "[]", '{"facts": null}']
)
def test_a_damaged_teacher_is_fetched_from_its_run(data, trained, storage, tmp_path, damage):
    copy = Path(shutil.copytree(storage, tmp_path / "runs"))
    path = copy / Path(trained.splitlines()[-1].removeprefix("teacher: ")).relative_to(storage)
    files = {file: file.read_bytes() for file in path.parent.glob("teacher*")}
    assert len(files) == 3
    if damage == "cut off":
        path.write_bytes(files[path][:-100])
    elif damage == "other bits":
        path.write_bytes(files[path][:-1] + bytes([files[path][-1] ^ 1]))
    elif not damage.startswith("no"):
        path.with_suffix(".json").write_text(damage)
    else:
        suffix = {"no classifier": ".classifier.safetensors", "no weights": ".safetensors", "no description": ".json"}
        path.with_suffix(suffix[damage]).unlink()
    with storage_at(copy):
        shown = call(teacher.main, "d3still", *data, *settings("d3still")).output
    assert "trained now" not in shown and "started:" not in shown
    assert damage == "no description" or "fetched again from its MLflow run" in shown
    assert all(file.read_bytes() == content for file, content in files.items() if file.suffix == ".safetensors")
    assert path.with_suffix(".json").stat().st_size > 100


def test_a_damaged_teacher_whose_run_is_gone_is_an_error_with_a_remedy(data, trained, storage, tmp_path):
    copy = Path(shutil.copytree(storage, tmp_path / "runs"))
    path = copy / Path(trained.splitlines()[-1].removeprefix("teacher: ")).relative_to(storage)
    weights = path.read_bytes()
    path.write_bytes(b"")
    for student in copy.rglob("student.safetensors"):
        student.unlink()
    with storage_at(copy):
        line = error(teacher.main, "d3still", *data, *settings("d3still"))
        assert "is damaged:" in line and "cannot be fetched" in line
        assert line.endswith(f"remove {path.parent} to train it anew")
        shutil.rmtree(path.parent)
        assert "trained now" in call(teacher.main, "d3still", *data, *settings("d3still")).output
    assert path.read_bytes() == weights, "the same recipe on the same data"


def test_a_recipe_that_trains_no_teacher(empty, data, trained):
    assert "this recipe of supervised trains no teacher" in error(
        teacher.main, "supervised", *data, *settings("supervised")
    )
    given = settings("d3still", **{"teacher.weights": trained.splitlines()[-1].removeprefix("teacher: ")})
    assert "this recipe of d3still trains no teacher" in error(teacher.main, "d3still", *data, *given)


@pytest.mark.parametrize("given", ["seed=-1", "seed=x", "train.seed=1.5"])
def test_a_wrong_seed(empty, given):
    assert "train.seed must be" in error(train.main, "supervised", "--in-process", "--set", given)
