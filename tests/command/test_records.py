"""``evaluate``, ``export`` and ``report``: what can be done with the record of a run alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command.typed import call, error, replaced, settings, storage_at

from models.network import rebuild
from orchestrator import checkpoint, evaluate, export, report, tracking, train
from orchestrator.launch import shelf, study


def scores(shown: str) -> dict[str, tuple[float, float]]:
    """Metric -> what was measured again, and what was logged."""
    lines = [line.split() for line in shown.splitlines() if "(logged" in line]
    return {name: (float(found), float(logged.rstrip(")"))) for name, found, _, logged in lines}


@pytest.fixture(scope="module")
def pruned(storage, data, teachers) -> str:
    """The run of a network that drops tokens, under a teacher that is given as a file."""
    with storage_at(storage):
        arguments = settings("sureid", **{"teacher.weights": teachers("sureid")})
        call(train.main, "sureid", *data, *arguments)
        (record,) = study.records(shelf.latest("train-sureid", single="sureid"))
    return record.run_id


def test_a_student_is_scored_again_as_it_was(best, root, tmp_path):
    """Also where its data lie elsewhere now."""
    elsewhere = shutil.copytree(root, tmp_path / "elsewhere")
    for more in ([], ["--data-root", elsewhere]):
        shown = call(evaluate.main, best.run_id, *more).output
        assert "d3still on folder: images/identities: train" in shown and "GMACs" in shown
        again = scores(shown)
        assert {"val/map", "val/rank1", "val/minp"} <= set(again)
        assert all(found == pytest.approx(logged, abs=1e-6) for found, logged in again.values())
        assert again["val/map"][1] == pytest.approx(best.value, abs=1e-6)
    shown = call(evaluate.main, best.run_id, "--set", "ap=trapezoid").output
    assert "ap trapezoid (trained with precision)" in shown
    assert scores(shown)["val/map"][0] != scores(shown)["val/map"][1]


def test_other_data_or_a_teacher_that_is_gone_are_refused_when_a_student_is_scored(best, root, trained):
    first, *_, last = sorted((root / "query").rglob("*.png"))
    with replaced(first, last.read_bytes()):
        assert "the query is not the one of the record" in error(evaluate.main, best.run_id)
    teacher = Path(trained.splitlines()[-1].removeprefix("teacher: "))
    away = teacher.parent.with_name("away")
    teacher.parent.rename(away)
    try:
        assert "(logged" in call(evaluate.main, best.run_id).output  # its gallery embeddings are there
    finally:
        away.rename(teacher.parent)


def test_a_cache_that_is_damaged_is_named_and_made_again(best, storage):
    plan = shelf.latest("d3still_alpha")
    rows = storage / plan.prepared["all"]["gallery embeddings"]["path"]
    file = next(rows.rglob("data.arrow"))
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.warns(UserWarning, match="data.arrow has 100 bytes, expected .*; building it again"):
        shown = call(evaluate.main, best.run_id).output
    assert all(found == pytest.approx(logged, abs=1e-6) for found, logged in scores(shown).values())
    assert file.read_bytes() == whole


def test_a_network_is_scored_and_exported_with_fewer_tokens(pruned, tmp_path):
    assert "(logged" in call(evaluate.main, pruned).output
    fewer = call(evaluate.main, pruned, "--set", "keep_ratio=0.5", "--set", "ap=trapezoid").output
    assert "keep_ratio 0.5 (trained with 0.7)" in fewer
    assert "train.epochs has no effect here; what can be changed: ap, " in error(
        export.main, pruned, "--set", "train.epochs=3"
    )
    assert "selection_seed has no effect here" in error(evaluate.main, pruned, "--set", "selection_seed=3")
    assert "keep_ratio must be above 0 and at most 1, got 1.2" in error(
        evaluate.main, pruned, "--set", "keep_ratio=1.2"
    )
    assert "ap changes how a network is scored" in error(export.main, pruned, "--set", "ap=trapezoid")
    call(export.main, pruned, "--to", tmp_path, "--set", "keep_ratio=0.5")
    (stored,) = (json.loads(p.read_text()) for p in tmp_path.glob(f"sureid-folder-{pruned[:8]}-keep_ratio-0.5.json"))
    assert stored["model"]["keep_ratio"] == 0.5 and stored["facts"]["not_as_trained"] == {"keep_ratio": 0.5}
    assert "metrics" not in stored["facts"]


def test_a_student_is_taken_away(best, tmp_path):
    """As weights that are rebuilt from the JSON beside them, and as a graph that runs without this project."""
    import onnxruntime

    call(export.main, best.run_id, "--format", "safetensors", "--to", tmp_path / "weights")
    shown = call(export.main, best.run_id, "--format", "onnx", "--to", tmp_path / "graph").output
    assert "ONNX Runtime and torch differ by at most" in shown
    (weights,), (graph,) = (tmp_path / "weights").glob("*.safetensors"), (tmp_path / "graph").glob("*.onnx")
    student, facts = checkpoint.load_model(weights)
    assert facts["run_id"] == best.run_id and facts["metrics"]["val/map"] == best.value
    stored = json.loads(weights.with_suffix(".json").read_text())
    rebuilt = rebuild(stored["kind"], stored["model"]).eval()
    rebuilt.load_state_dict(student.state_dict())
    images = torch.ones(3, 3, 16, 16)
    expected = student(images).detach().numpy()
    np.testing.assert_array_equal(rebuilt(images).detach().numpy(), expected)
    session = onnxruntime.InferenceSession(graph)
    (ours,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert json.loads(graph.with_suffix(".json").read_text())["input"]["size"] == [16, 16]
    assert not list((tmp_path / "graph").glob("*.safetensors"))


def test_a_report_is_one_file_and_has_one_summary_run(swept, best, tmp_path):
    shown = call(report.main, "d3still_alpha", "--to", tmp_path).output
    html = (tmp_path / "report.html").read_text()
    for part in ("α", "Trials", "Best trial", "Cost of the student", "How to reproduce", "data:image/png;base64"):
        assert part in html, part
    assert "http://" not in html and "https://" not in html  # self-contained
    assert (tmp_path / "report.md").read_text().startswith("# d3still_alpha on folder")
    assert {"training.png", "retrieval.png"} <= {p.name for p in (tmp_path / "figures").iterdir()}
    plan = shelf.latest("d3still_alpha")
    (summary,) = tracking.runs_of(plan.tracking_uri, plan.tag, "summary")
    assert summary.info.run_id in shown and summary.info.status == "FINISHED"
    assert summary.data.metrics["summary/map"] == best.value and "teacher/map" in summary.data.metrics
    assert summary.data.tags["orch.best_run"] == best.run_id
    assert tracking.file(plan.tracking_uri, summary.info.run_id, "report.html").decode() == html
    call(report.main, "d3still_alpha", "--on", "folder", "--to", tmp_path)  # again: the same summary run
    assert len(tracking.runs_of(plan.tracking_uri, plan.tag, "summary")) == 1


def test_records_that_do_not_exist(swept, empty):
    assert "no sweep d3still_alpha in" in error(report.main, "d3still_alpha")
    assert f"there is no {empty}/mlflow.db" in error(evaluate.main, "abc")
    tracking.client(tracking.tracking_uri(str(empty)))
    assert "has no run 'abc'; the run id is in the table" in error(evaluate.main, "abc")
    assert "has no run 'abc'; the run id is in the table" in error(export.main, "abc")
