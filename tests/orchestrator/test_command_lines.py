"""The command lines as a user types them: one whole sweep, and every bad input as one line and exit code 2."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from orchestrator import (
    cache,
    checkpoint,
    command,
    evaluate,
    export,
    find,
    on_ray,
    report,
    sweep,
    teacher,
    tracking,
    train,
)
from orchestrator.reporting.trial_table import ranked
from search_spaces._space import SearchSpace

runner = CliRunner()


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "runs"


def call(cli, *arguments: str, code: int = 0):
    result = runner.invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def error(cli, *arguments: str) -> str:
    """The one line a user sees."""
    result = call(cli, *arguments, code=2)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def nothing_written(storage: Path) -> bool:
    """No sweep, no teacher, no half-built cache."""
    return (
        not any((storage / "sweeps").glob("*"))
        and not any(storage.rglob("*tmp*"))
        and not any((storage / "teachers").glob("[!.]*"))
    )


def test_a_sweep_its_report_and_what_can_be_done_with_its_record(
    local_ray, tiny_arguments, storage, tiny_root, tiny_teacher, tmp_path
):
    arguments = ["d3still_alpha", "--on", "folder", "--data-root", tiny_root, "--trials", 4,
                 *tiny_arguments(teacher_weights=tiny_teacher)]  # fmt: skip
    shown = call(sweep.main, *arguments).output
    assert "4 trials" in shown and "completed" in shown and "-m mlflow ui --backend-store-uri sqlite:///" in shown

    shown = call(report.main, "d3still_alpha").output
    folder = storage / "sweeps" / "d3still_alpha-folder-1"
    html = (folder / "report.html").read_text()
    for part in ("α", "Trials", "Best trial", "Cost of the student", "How to reproduce", "data:image/png;base64"):
        assert part in html
    assert "http://" not in html and "https://" not in html  # self-contained
    assert (folder / "report.md").read_text().startswith("# d3still_alpha on folder")
    plan = command.latest_plan("d3still_alpha")
    (summary,) = tracking.runs_of(plan.tracking_uri, plan.tag, "summary")
    assert summary.info.status == "FINISHED" and "summary/map" in summary.data.metrics
    assert tracking.artifact(plan.tracking_uri, summary.info.run_id, "report.html").exists()
    call(report.main, "d3still_alpha")  # again: the same summary run
    assert len(tracking.runs_of(plan.tracking_uri, plan.tag, "summary")) == 1

    best = ranked(on_ray.records(plan))[0]
    shown = call(evaluate.main, best.run_id).output
    for line in shown.splitlines():
        if "(logged" in line:
            found, logged = line.split()[1], line.split()[3].rstrip(")")
            assert float(found) == pytest.approx(float(logged), abs=1e-6)
    assert "val/map" in shown

    call(export.main, best.run_id, "--format", "safetensors", "--to", tmp_path / "out")
    call(export.main, best.run_id, "--format", "onnx", "--to", tmp_path / "onnx")
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    student, _ = checkpoint.load_model(weights)
    (graph,) = (tmp_path / "onnx").glob("*.onnx")
    code = (  # without this project
        "import sys, numpy, onnxruntime; s = onnxruntime.InferenceSession(sys.argv[1]);"
        "x = numpy.ones((3, 3, 16, 16), numpy.float32); print(s.run(None, {'images': x})[0].tolist())"
    )
    outside = subprocess.run([sys.executable, "-P", "-c", code, graph], capture_output=True, text=True, cwd=tmp_path)
    import torch

    expected = student(torch.ones(3, 3, 16, 16)).detach().numpy()
    np.testing.assert_allclose(np.array(json.loads(outside.stdout)), expected, atol=1e-4)

    assert "resume it without changes" in error(
        sweep.main, "d3still_alpha", "--on", "folder", "--resume", "--set", "beta=0.7"
    )
    dry = call(sweep.main, "d3still_alpha", "--on", "folder", "--resume", "--trials", "9", "--dry-run").output
    assert "d3still_alpha-folder-1: 4 of 9 trials are finished" in dry
    resumed = call(sweep.main, "d3still_alpha", "--on", "folder", "--resume").output
    assert "4 trials" in resumed and "started:" not in resumed  # nothing was left to do


def test_a_teacher_is_trained_once_and_found_again(local_ray, tiny_arguments, storage, tiny_root):
    arguments = ["d3still", "--on", "folder", "--data-root", tiny_root, *tiny_arguments()]
    first = call(teacher.main, *arguments).output
    assert "training it now" in first
    second = call(teacher.main, *arguments).output
    assert "training it now" not in second
    assert first.splitlines()[-1] == second.splitlines()[-1]
    key = Path(first.splitlines()[-1]).parent.name[:8]
    plan = command.latest_plan(f"teacher-{key}")
    (run,) = tracking.runs_of(plan.tracking_uri, plan.tag)
    assert run.data.tags["orch.method"] == "supervised" and run.info.status == "FINISHED"


def test_a_sweep_over_methods_and_its_report(local_ray, tiny_arguments, storage, tiny_root, monkeypatch):
    """Each cell trains its own method under one teacher, trained here with the classifier that VanillaKD needs."""
    cells = {"D3still": {}, "VanillaKD": {"method": "vanillakd"}, "CSD": {"method": "csd", "neighbours": "train"}}
    space = SearchSpace(
        method="d3still", question="Which?", cells=cells, fix={"evaluate_symmetric": True}, early_stopping=False
    )
    monkeypatch.setattr(find, "space", lambda name: space)
    arguments = ["asymmetric_baselines", "--on", "folder", "--data-root", tiny_root, *tiny_arguments()]
    assert "top_k is a field of d3still, csd only, not of every method" in error(sweep.main, *arguments)
    at = arguments.index("top_k=4")
    del arguments[at - 1 : at + 1]
    shown = call(sweep.main, *arguments).output
    assert shown.count("training it now") == 1 and "3 completed" in shown
    plan = command.latest_plan("asymmetric_baselines")
    runs = {r.data.tags["orch.point.cell"]: r for r in tracking.runs_of(plan.tracking_uri, plan.tag)}
    assert {name: r.data.tags["orch.method"] for name, r in runs.items()} == {
        "D3still": "d3still", "VanillaKD": "vanillakd", "CSD": "csd"}  # fmt: skip
    assert "loss/prediction" in runs["VanillaKD"].data.metrics and "beta" not in runs["VanillaKD"].data.params
    assert runs["CSD"].data.params["neighbours"] == "train" and runs["CSD"].data.tags["orch.neighbours_cache"]
    assert "(logged" in call(evaluate.main, runs["VanillaKD"].info.run_id).output
    call(report.main, "asymmetric_baselines")
    text = (storage / "sweeps" / "asymmetric_baselines-folder-1" / "report.md").read_text()
    for part in ("teacher on both sides", "| chance |", "table 4 B", "64.31 / 79.60", "not run",
                 "D3still authors' code", "the code uses λ1"):  # fmt: skip
        assert part in text
    resumed = call(sweep.main, "asymmetric_baselines", "--on", "folder", "--resume").output
    assert "started:" not in resumed


def test_a_sweep_of_token_pruning_and_its_report(
    local_ray, tiny_sureid, tiny_sureid_settings, storage, tiny_root, monkeypatch
):
    """A row without teacher and one with: pictures, throughput over accuracy, the score from the record."""
    cells = {"none": {"hts": False, "npkd": False, "noda": False}, "SUReID": {}}
    space = SearchSpace(method="sureid", question="What does it add?", cells=cells, early_stopping=False)
    monkeypatch.setattr(find, "space", lambda name: space)
    values = {**tiny_sureid_settings, "teacher_weights": tiny_sureid().teacher_weights}
    settings = [part for k, v in values.items() for part in ("--set", f"{k}={v}")]
    arguments = ["sureid_components", "--on", "folder", "--data-root", tiny_root, *settings]
    assert "hts is what this sweep varies" in error(sweep.main, *arguments, "--set", "hts=true")
    assert "keep_ratio must be above 0 and at most 1, got 1.2" in error(
        sweep.main, *arguments, "--set", "keep_ratio=1.2"
    )
    shown = call(sweep.main, *arguments).output
    assert "2 completed" in shown
    plan = command.latest_plan("sureid_components")
    runs = {r.data.tags["orch.point.cell"]: r for r in tracking.runs_of(plan.tracking_uri, plan.tag)}
    assert {"loss/ratio", "loss/feature", "train/kept_3", "train/gradient_norm"} <= set(runs["SUReID"].data.metrics)
    assert "procedural, 10 patches, seed 0" in runs["SUReID"].data.tags["orch.occluders"]
    assert runs["SUReID"].data.metrics["cost/macs"] != runs["none"].data.metrics["cost/macs"]
    pictures = tracking.pictures(plan.tracking_uri, runs["SUReID"].info.run_id)
    assert pictures == ["identities.png", "retrieval.png", "tokens.png", "views.png"]
    call(report.main, "sureid_components")
    text = (storage / "sweeps" / "sureid_components-folder-1" / "report.md").read_text()
    for part in ("teacher on both sides", "GMACs", "Accuracy and throughput", "table IV", "57.60", "1074", "not run"):
        assert part in text, part
    pruned, whole = (runs[name].info.run_id for name in ("SUReID", "none"))
    assert "(logged" in call(evaluate.main, pruned).output
    fewer = call(evaluate.main, pruned, "--set", "keep_ratio=0.5", "--set", "ap=trapezoid").output
    assert "keep_ratio 0.5 (trained with 0.7)" in fewer and "AP by trapezoids" in fewer and "GMACs" in fewer
    assert "keep_ratio has no effect here; what can be changed: ap" in error(
        evaluate.main, whole, "--set", "keep_ratio=0.5"
    )
    assert "epochs has no effect here" in error(export.main, pruned, "--set", "epochs=3")
    assert "selection_seed has no effect here" in error(evaluate.main, pruned, "--set", "selection_seed=3")
    assert "ap changes how a network is scored" in error(export.main, pruned, "--set", "ap=trapezoid")
    to = storage / "taken"
    call(export.main, pruned, "--to", to, "--set", "keep_ratio=0.5")
    (facts,) = (json.loads(p.read_text()) for p in to.glob(f"sureid-folder-{pruned[:8]}-keep_ratio-0.5.json"))
    assert facts["model"]["keep_ratio"] == 0.5 and facts["facts"]["not_as_trained"] == {"keep_ratio": 0.5}
    assert "metrics" not in facts["facts"]


def test_single_runs_finish_or_say_why_not(local_ray, tiny_arguments, storage, tiny_root, tiny_teacher):
    arguments = ["d3still", "--on", "folder", "--data-root", tiny_root]
    shown = call(train.main, *arguments, *tiny_arguments(teacher_weights=tiny_teacher, seed=3)).output
    assert "val/map" in shown and "MLflow run" in shown
    line = error(train.main, *arguments, *tiny_arguments(teacher_weights=tiny_teacher, learning_rate=1e30))
    assert "the loss is not finite in epoch" in line and "images: train/" in line


def test_a_damaged_cache_is_named_and_built_again(storage, tiny_recipe, tiny_place):
    method = find.method("d3still")
    first = method.prepare(tiny_recipe(), tiny_place)
    data = Path(tiny_place.folder("cache", first["gallery_cache"], "data.arrow"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(cache.DamagedCache, match=r"data.arrow has 100 bytes"):
        cache.open_rows(data.parent)
    with pytest.warns(UserWarning, match=r"is damaged: data.arrow has 100 bytes, expected .*; building it again"):
        again = method.prepare(tiny_recipe(), tiny_place)
    assert again == first and cache.open_rows(data.parent, verify=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["d3stil_beta_gamma"], "there is no sweep 'd3stil_beta_gamma'; did you mean d3still_beta_gamma"),
        (["d3still_beta_gamma", "--on", "omniglott"], "d3still has no recipe for 'omniglott'; did you mean omniglot"),
        (["d3still_beta_gamma", "--set", "alfa=3"], "no field 'alfa'; did you mean alpha"),
        (["d3still_beta_gamma", "--set", "alpha"], "--set needs FIELD=VALUE, got 'alpha'"),
        (["d3still_beta_gamma", "--set", "alpha=inf"], "alpha must be a number, got 'inf'"),
        (["d3still_beta_gamma", "--set", "alpha=3", "--set", "alpha=4"], "--set names alpha more than once"),
        (["d3still_beta_gamma", "--set", "student=resnet9"], "timm has no model 'resnet9'; did you mean resnet"),
        (["d3still_beta_gamma", "--set", "alpha=-3"], "alpha must be at least 0, got -3"),
        (["d3still_beta_gamma", "--set", "beta=0.1"], "beta is what this sweep varies"),
        (["d3still_ablation", "--set", "seed=7"], "seed is what this sweep varies"),
        (
            ["d3still_ablation", "--set", "evaluate_symmetric=no"],
            "evaluate_symmetric is what this sweep varies or fixes",
        ),
        (["d3still_beta_gamma", "--set", "top_k=1000"], r"top_k \(1000\) must be at most batch_size \(120\)"),
        (["d3still_top_k", "--set", "batch_size=30"], r"top_k \(40\) must be at most batch_size \(30\)"),
        (["d3still_beta_gamma", "--set", "constant_epochs=1"], "constant_epochs .* must not end before warmup"),
        (["asymmetric_baselines", "--set", "top_k=4"], r"top_k is a field of d3still, csd, rop only"),
        (["asymmetric_baselines", "--set", "batch_size=90"], r"top_k \(96\) must be at most batch_size \(90\)"),
        (["d3still_ablation", "--trials", "3"], "always runs in full"),
        (
            ["d3still_beta_gamma", "--on", "omniglot", "--data-root", "/nowhere"],
            "--data-root /nowhere is not a directory",
        ),
        (["d3still_alpha", "--resume"], "no sweep d3still_alpha on demo"),
    ],
)
def test_bad_words_are_refused_before_anything_starts(storage, arguments, message):
    import re

    assert re.search(message, error(sweep.main, *arguments))
    assert not storage.exists() or nothing_written(storage)


def test_a_data_set_that_is_not_there_says_how_it_must_look(local_ray, storage, tmp_path):
    line = error(sweep.main, "d3still_beta_gamma", "--on", "sop", "--data-root", tmp_path)
    assert "no Ebay_train.txt in" in line and "it must hold Ebay_train.txt and Ebay_test.txt" in line
    assert "sop: --data-root DIR is needed" in error(sweep.main, "d3still_beta_gamma", "--on", "sop", "--dry-run")
    assert nothing_written(storage)


def test_a_missing_and_an_incomplete_data_set(local_ray, storage, tmp_path):
    arguments = ["d3still_beta_gamma", "--on", "omniglot", "--data-root", tmp_path]
    assert "no images_background.zip in" in error(sweep.main, *arguments)
    for part in ("background", "evaluation"):
        with zipfile.ZipFile(tmp_path / f"images_{part}.zip", "w") as archive:
            archive.writestr(f"images_{part}/Greek/character01/0001_01.png", b"")
    assert "has 1 images of 1 characters, expected 19280 of 964" in error(sweep.main, *arguments)
    assert nothing_written(storage)


def test_a_truncated_image_stops_before_training(local_ray, tiny_arguments, storage, tiny_root, tmp_path):
    import shutil

    root = tmp_path / "data"
    shutil.copytree(tiny_root, root)
    victim = sorted((root / "train").rglob("*.png"))[3]
    victim.write_bytes(victim.read_bytes()[:200])
    line = error(sweep.main, "d3still_beta_gamma", "--on", "folder", "--data-root", root, *tiny_arguments())
    assert "1 of 96 images cannot be read: train/" in line and victim.name in line and "skip_unreadable=true" in line
    assert nothing_written(storage)


def test_a_teacher_of_another_architecture(local_ray, tiny_arguments, storage, tiny_root, tiny_teacher, tmp_path):
    arguments = ["d3still_beta_gamma", "--on", "folder", "--data-root", tiny_root]
    line = error(sweep.main, *arguments, *tiny_arguments(teacher_weights=tiny_teacher, teacher="resnet34"))
    assert "holds another architecture: backbone resnet18 instead of resnet34" in line
    line = error(sweep.main, *arguments, *tiny_arguments(teacher_weights=tmp_path / "no.safetensors"))
    assert "no weights at" in line
    assert nothing_written(storage)


def test_plans_of_the_first_version_are_read(tmp_path):
    old = {"folder": str(tmp_path), "space": "x", "title": "x", "benchmark": "demo", "method": "fitnet",
           "recipe": {"weight": 2.0}, "place": {}, "tracking_uri": "", "trials": 1}  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(old))
    plan = command.read_plan(tmp_path)
    assert (plan.method, plan.recipe) == ("fitnet", {"weight": 2.0})


def test_records_that_do_not_exist(storage):
    assert "no run fitnet on demo in" in error(train.main, "fitnet", "--resume")
    assert "has no run 'abc' with a record.json" in error(evaluate.main, "abc")
    assert "has no run 'abc' with a record.json" in error(export.main, "abc")
    assert "no sweep d3still_alpha" in error(report.main, "d3still_alpha")


def test_a_dry_run_writes_nothing(storage):
    shown = call(sweep.main, "d3still_beta_gamma", "--dry-run").output
    assert "'beta': 0.2, 'gamma': 0.1" in shown and "8 trials" in shown
    assert not storage.exists()


def test_the_flags_are_few_and_frozen():
    """Hyper-parameters never become flags: change this list only on purpose."""
    import typer

    flags = {p.opts[0] for p in typer.main.get_command(sweep.main).params if p.opts[0].startswith("--")}
    assert flags == {"--on", "--data-root", "--trials", "--concurrent", "--workers", "--gpus-per-worker", "--epochs",
                     "--set", "--resume", "--dry-run", "--list"}  # fmt: skip


def test_every_sweep_is_listed_with_its_question():
    shown = call(sweep.main, "--list").output
    assert all(name in shown for name in find.names("search_spaces"))


def test_tiny_settings_are_real_fields(tiny_settings):
    assert set(tiny_settings) <= set(on_ray.recipe_dict(find.recipe("d3still", "folder")))
