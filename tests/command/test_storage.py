"""A storage folder that was moved, one that version 0.3.0 has written, and one that others use at the same time."""

import functools
import json
import shutil
import threading
import time
import zipfile
from pathlib import Path

import pytest
from command.conftest import SPACES
from command.typed import call, error, replaced, storage_at

from orchestrator import artifacts, evaluate, export, find, leases, report, store, sweep
from orchestrator.datasets import demo
from orchestrator.launch import shelf, study

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_storage_that_was_moved_is_used_where_it_is(storage, swept, best, root, tmp_path):
    """Reports, scores, exports and more trials; the old place stays away."""
    there = shutil.copytree(storage, tmp_path / "there")
    hidden = storage.with_name("hidden")
    storage.rename(hidden)
    try:
        with storage_at(there):
            shown = call(evaluate.main, best.run_id).output
            assert f"{best.value:.6f}   (logged {best.value:.6f})" in shown
            call(export.main, best.run_id, "--to", tmp_path / "out")
            assert list((tmp_path / "out").glob("*.safetensors"))
            assert str(there) in call(report.main, "d3still_alpha").output
            plan = shelf.latest("d3still_alpha")
            resume = ["d3still_alpha", "--on", "folder", "--resume", "--in-process", "--trials", 3]
            shown = call(sweep.main, *resume).output
            assert shown.count("started:") == 1 and "trained now" not in shown and "decoding" not in shown
            found = study.records(shelf.latest("d3still_alpha"))
            assert [r.status for r in found] == ["completed"] * 3
            assert found[best.number].run_id == best.run_id
            assert "(logged" in call(evaluate.main, found[2].run_id).output
            picture = artifacts.kept(plan.tracking_uri, found[2].run_id, "retrieval.png")
            assert picture.is_relative_to(there)
        assert not storage.exists()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
        hidden.rename(storage)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory, quick_disk) -> Path:
    """What version 0.3.0 has written: d3still_beta_gamma on demo, three trials of two epochs."""
    folder = tmp_path_factory.mktemp("old") / "runs"
    with zipfile.ZipFile(GOLDEN / "v030_storage.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def drawn_once():
    """The pictures of demo, each drawn once: index and pixels both read all of them."""
    return functools.cache(demo.render)


@pytest.fixture
def old(unpacked, drawn_once):
    with storage_at(unpacked) as patch:
        patch.setattr(demo, "render", drawn_once)
        yield unpacked


# From the log of 0.3.0's ``evaluate`` of trial 0.
LOGGED = {"val/map": 0.013926, "val/rank1": 0.009375, "val/rank3": 0.025, "val/rank5": 0.034375,
          "val/rank10": 0.065625, "val/minp": 0.010367}  # fmt: skip


@pytest.mark.slow
def test_a_sweep_of_the_version_before_is_read_scored_and_taken_away(old, tmp_path):
    plan = shelf.latest("d3still_beta_gamma")
    found = study.records(plan)
    assert [(r.status, r.epochs) for r in found] == [("completed", 2)] * 3
    assert [round(r.value, 4) for r in found] == [0.0139, 0.0131, 0.0149]
    assert found[2].point == {"beta": 0.3, "gamma": 0.1}
    shown = call(evaluate.main, found[0].run_id).output
    for name, value in LOGGED.items():
        (line,) = [line.split() for line in shown.splitlines() if line.split()[0] == name]
        assert float(line[1]) == pytest.approx(value, abs=1e-6) and float(line[3].rstrip(")")) == value
    assert "GMACs              0.000762" in shown
    call(export.main, found[0].run_id, "--to", tmp_path)
    assert list(tmp_path.glob("d3still-demo-*.safetensors"))
    call(report.main, "d3still_beta_gamma", "--to", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert all(r.run_id in text for r in found) and "mAP 1.18" in text  # the teacher's


@pytest.mark.slow
def test_a_sweep_of_the_version_before_goes_on_with_its_teacher(old):
    """One more trial; the teacher of then is found by what it was made from, and another one is refused."""
    resume = ["d3still_beta_gamma", "--resume", "--in-process", "--trials", 4]
    teachers = contents(old / "teachers")
    (weights,) = (old / "teachers").glob("*/teacher.safetensors")
    with replaced(weights, weights.read_bytes()[:-4] + b"\0\0\0\0"):
        assert "the teacher is not the one of the record" in error(sweep.main, *resume)
    before = study.records(shelf.latest("d3still_beta_gamma"))
    assert len(before) == 3
    shown = call(sweep.main, *resume).output
    found = study.records(shelf.latest("d3still_beta_gamma"))
    assert found[:3] == before and [r.status for r in found] == ["completed"] * 4
    assert shown.count("started:") == 1 and "trial 3 started:" in shown and "trained now" not in shown
    assert contents(old / "teachers") == teachers
    assert "(logged" in call(evaluate.main, found[3].run_id).output


def holder(**values) -> str:
    return json.dumps({"host": "another-host", "pid": 4711, "began": "1", "since": time.time(), **values})


def test_what_a_process_on_another_host_holds_is_left_to_it_while_it_is_heard(storage, swept, monkeypatch):
    """Its sweep goes on here once it has been silent for long enough, with a line that says so."""
    monkeypatch.setattr(leases, "SILENT_SECONDS", 1.0)
    lease = Path(shelf.latest("d3still_alpha").folder) / "driver.lease"
    (own,) = lease.parent.glob("driver.lease-*")
    other = lease.with_name(f"driver.lease-{int(own.name.rpartition('-')[2]) + 1}")
    stop = threading.Event()

    def living() -> None:
        beats = 0
        while not stop.wait(0.1):
            beats += 1
            store.write(str(other), holder(beats=beats).encode())

    store.write(str(other), holder().encode())
    thread = threading.Thread(target=living)
    thread.start()
    try:
        line = error(sweep.main, "d3still_alpha", "--on", "folder", "--resume", "--in-process")
    finally:
        stop.set()
        thread.join()
    assert "the sweep d3still_alpha-folder-1 is being run by process 4711 on another-host, since" in line
    with pytest.warns(
        UserWarning, match=r"held by process 4711 on another-host, since .*, not heard for \d+ s: taken over"
    ):
        call(sweep.main, "d3still_alpha", "--on", "folder", "--resume", "--in-process")


def test_a_plan_of_a_newer_version_is_not_guessed_at(empty, monkeypatch):
    monkeypatch.setattr(find, "space", lambda name: SPACES["rates"])
    folder = empty / "sweeps" / "newer-folder-1"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"format": 9, "whatever": 1}))
    for command, more in ((sweep.main, ["--on", "folder", "--resume"]), (report.main, [])):
        line = error(command, "newer", *more)
        assert f"{folder / 'plan.json'} is of format 9, this version reads up to 2; update it to go on" in line
    (folder / "plan.json").write_text("{")
    assert "plan.json cannot be read" in error(report.main, "newer")
