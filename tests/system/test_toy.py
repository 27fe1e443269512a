"""A system of its own goes through every command, with no file of the product edited or named in it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from safetensors.torch import load_file
from toy import workers
from typer.testing import CliRunner

from orchestrator import checkpoint, evaluate, export, report, sweep, teacher, tracking
from orchestrator.launch import ledger, shelf, study
from orchestrator.launch.plan import Plan
from orchestrator.progress import Board

SWEEP = ("toy_sweep", "--on", "two_sizes", "--in-process")


def command(module, *words: str):
    return CliRunner().invoke(module.main, list(words))


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch, toy.added():
        patch.setenv("ORCHESTRATOR_STORAGE", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(os, "cpu_count", lambda: 1)  # threads cost more than such networks
        yield folder


@pytest.fixture(scope="module")
def swept(storage) -> SimpleNamespace:
    """An uninterrupted sweep: what it said, its plan, its records and its best run."""
    said = command(sweep, *SWEEP)
    assert said.exit_code == 0, said.output
    plan = shelf.latest("toy_sweep")
    records = study.records(plan)
    return SimpleNamespace(said=said.output, plan=plan, records=records, best=study.ranked(records)[0].run_id)


def students(plan: Plan) -> dict[int, dict[str, torch.Tensor]]:
    done = [r for r in study.records(plan) if r.status == "completed"]
    return {r.number: load_file(tracking.student_file(plan.tracking_uri, r.run_id)) for r in done}


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def test_a_sweep_prepares_trains_stops_early_and_logs_what_the_method_says(swept):
    assert swept.said.count("trained now, kept for all sweeps") == 1
    assert "teacher on both sides, the tutor: Found" in swept.said
    states = [r.status for r in swept.records]
    assert len(states) == 4 and states[:2] == ["completed"] * 2 and "pruned" in states[2:], states
    logged = tracking.client(swept.plan.tracking_uri).get_run(swept.records[0].run_id)
    for name in ("clusters/count", "loss/told", "train/boxes", "perf/start_epoch_s"):
        assert [step for step, _ in tracking.curve(swept.plan.tracking_uri, swept.records[0].run_id, name)] == [
            1,
            2,
            3,
            4,
        ]
    assert logged.data.params["scenes.train"] == "12" and logged.data.metrics["cost/macs"] > 0
    assert command(sweep, *SWEEP, "--dry-run").output.count("to be made") == 0, "everything is ready for the next one"


def test_a_sweep_that_is_killed_goes_on_to_the_same_bits(swept, monkeypatch):
    shown = Board.epoch

    def killed(board, number, epoch, value):
        if (number, epoch) == (1, 3):
            raise KeyboardInterrupt
        shown(board, number, epoch, value)

    monkeypatch.setattr(Board, "epoch", killed)
    assert command(sweep, *SWEEP).exit_code == 130
    plan = shelf.latest("toy_sweep")
    assert plan.key != swept.plan.key and [r.status for r in study.records(plan)] == ["completed", "running"]
    monkeypatch.undo()
    said = command(sweep, *SWEEP, "--resume")
    assert said.exit_code == 0, said.output
    for ours, theirs in zip(study.records(plan), swept.records, strict=True):
        assert (ours.status, ours.epochs) == (theirs.status, theirs.epochs)
        assert numbers(ours.metrics) == numbers(theirs.metrics)
    resumed, straight = students(plan), students(swept.plan)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[n][k], straight[n][k]) for n in straight for k in straight[n])


def test_the_report_shows_the_methods_own_metrics_and_pictures(swept, tmp_path):
    said = command(report, "toy_sweep", "--to", str(tmp_path))
    assert said.exit_code == 0, said.output
    html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "Found" in html and "| Found | Pixels off |" in markdown
    assert "The teacher on both sides, the tutor, reaches Found" in markdown
    assert "measured on two_sizes under “every box against all other boxes”" in markdown
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"lambda_bank.png", "tau.png", "heat_map.png", "training.png", "boxes.png"}


def test_a_stored_student_scores_as_it_was_logged(swept):
    said = command(evaluate, swept.best)
    assert said.exit_code == 0, said.output
    for name in ("toy/found", "toy/off"):
        (line,) = (line for line in said.output.splitlines() if name in line)
        now, then = line.replace("(logged", "").replace(")", "").split()[1:]
        assert now == then


def test_export_writes_weights_and_bank_and_refuses_a_graph_in_one_sentence(swept, tmp_path):
    said = command(export, swept.best, "--to", str(tmp_path))
    assert said.exit_code == 0, said.output
    (file,) = tmp_path.glob("*.json")
    network, facts = checkpoint.load_model(file.with_suffix(".safetensors"))
    assert network.bank is None and "image_size" not in json.loads(file.read_text())["model"]
    assert facts["protocol"] == "every box against all other boxes"
    bank = checkpoint.load_extras(file.with_suffix(".safetensors"))
    assert (bank["bank.owner_M"] >= 0).any() and bank["bank.rows_MD"].shape == (64, 8)
    refused = command(export, swept.best, "--format", "onnx", "--to", str(tmp_path))
    assert refused.exit_code == 2 and not list(tmp_path.glob("*.onnx"))
    assert "toy.network has no ONNX file: it takes a list of images of different size" in refused.output


def test_the_teacher_is_trained_once(swept):
    other = ("toy", "--on", "two_sizes", "--in-process", "--set", "tutor.channels=4")
    first, second = command(teacher, *other), command(teacher, *other)
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    assert "trained now" in first.output and "trained now" not in second.output
    assert first.output.splitlines()[-1] == second.output.splitlines()[-1]
    weights = second.output.splitlines()[-1].removeprefix("teacher: ")
    assert checkpoint.load_model(weights)[0].config.channels == 4


def test_changed_data_and_a_damaged_table_are_noticed_whatever_they_are_called(swept):
    newest = Path(shelf.latest("toy_sweep").folder) / "plan.json"
    stored = newest.read_text()
    other = json.loads(stored)
    other["prepared"]["all"]["scenes"]["fingerprint"] = "f" * 64
    newest.write_text(json.dumps(other))
    said = command(sweep, *SWEEP, "--resume")
    newest.write_text(stored)
    assert said.exit_code == 2 and "the scenes is not the one of the record: ffffffffffff then" in said.output
    ready = swept.plan.prepared_for({})["scenes"]
    table = Path(swept.plan.where.folder(ready.path)) / "data.arrow"
    whole = table.read_bytes()
    table.write_bytes(whole[:-1])
    assert ledger.look_up(swept.plan.where, ready.key) is None
    table.write_bytes(whole)
    assert ledger.look_up(swept.plan.where, ready.key, verify=True) == ready


@pytest.mark.slow
def test_two_workers_are_one(swept, tmp_path):
    prepared = swept.plan.prepared_for({})
    given = (2, str(tmp_path), prepared.place, prepared.plain())
    other = torch.multiprocessing.spawn(workers.second, given, nprocs=1, join=False)
    workers.work(0, *given)
    other.join()
    made = workers.experiment(prepared, 0, 1)
    before = {name: value.clone() for name, value in made.task.state_dict().items()}
    alone = workers.trained(made)
    for rank in range(2):
        both = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert both["metrics"] == pytest.approx(alone["metrics"], abs=1e-9)
        for ours, theirs in zip(both["history"], alone["history"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9)
        for name, value in alone["task"].items():
            torch.testing.assert_close(both["task"][name], value, rtol=0, atol=1e-9, msg=name)
        assert "the buffer student.bank.rows_MD differs between ranks" in both["refused"], "the bank was sent"
    changed = {name for name, value in alone["task"].items() if not torch.equal(value, before[name])}
    state = {"student.bank.rows_MD", "student.bank.owner_M", "student.bank.position", "cluster_N", "steps"}
    assert state <= changed <= set(alone["stored"]), "what changes is in the checkpoint"
    assert not any(name.startswith("teacher.") for name in alone["stored"])


def test_a_term_is_absent_from_steps_without_a_told_identity(swept):
    made = workers.experiment(swept.plan.prepared_for({}), 0, 1)
    terms = [set(made.task(batch).terms) for epoch in (1, 2, 3) for batch in made.batches(epoch)]
    assert {"box", "bank", "tutor"} in terms and {"box", "bank", "tutor", "told"} in terms
