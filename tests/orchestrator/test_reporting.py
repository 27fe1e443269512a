"""Reports and tables from stored plans and records: nothing is trained here and no cluster is started."""

import dataclasses
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from orchestrator import find, published, reporting, tracking
from orchestrator.launch import study
from orchestrator.launch.plan import Plan, TrialRecord, space_data
from orchestrator.method import Metric
from orchestrator.needs import Ready
from orchestrator.recipe import Recipe, changed, fields_of, flat
from orchestrator.reporting import printed, provenance, scores, summary, trial_table

TEACHER = {
    "teacher": "ResNet101@256",
    "teacher_fingerprint": "x",
    "teacher_metrics": {"val/map": 0.5, "val/rank1": 0.6},
    "chance_metrics": {"val/map": 0.01, "val/rank1": 0.02},
    "protocol": "query against gallery",
}


def told_by(told: dict) -> dict:
    """What is ready of a variant, as a plan stores it."""
    return Ready("", "references", "", "", told).plain()


def make_plan(folder: Path | str, name: str, benchmark: str, prepared: dict | None = None, **settings) -> Plan:
    """A stored sweep of a space; settings are what the command line set."""
    space = find.space(name)
    base = {m: changed(find.recipe(m, benchmark), {**space.fix, **settings}) for m in space.methods}
    return Plan(
        folder=str(folder),
        space=name,
        title=f"{name} on {benchmark}",
        benchmark=benchmark,
        recipes={m: flat(recipe) for m, recipe in base.items()},
        place={"storage": str(Path(folder).parent), "data_root": "/data"},
        tracking_uri=tracking.tracking_uri(str(Path(folder).parent)),
        trials=len(space.table()) if space.cells else 8,
        facts={"version": "0"},
        prepared={
            name: {"references": told_by(told)}
            for name, told in ({"a": TEACHER} if prepared is None else prepared).items()
        },
        space_data=space_data(space),
    )


def record(number: int, point: dict, status: str = "completed", **metrics: float) -> TrialRecord:
    """A trial whose metrics are keywords with "_" in place of "/"; the first one is its value."""
    named = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return TrialRecord(number, status, point, 3, next(iter(named.values()), None), named, "", seconds=60.0)


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory) -> Path:
    """One database for all reports: to make one takes seconds."""
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture
def stored(monkeypatch):
    """Gives records the runs that a real sweep would have logged, and hands them to the report."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def store(plan: Plan, records: list[TrialRecord], macs: list[float]) -> list[TrialRecord]:
        uri = plan.tracking_uri
        experiment = tracking.experiment(uri, plan.title, plan.place["storage"], "")
        logged = []
        for r, cost in zip(records, macs, strict=True):
            tags = {"orch.sweep": plan.tag, "orch.kind": "trial", "orch.trial": str(r.number)}
            run_id = tracking.run(uri, experiment, f"{plan.tag}/{r.number}", f"trial {r.number}", tags, {})
            log = tracking.EpochLog(uri, run_id)
            for epoch in (1, 2, 3):
                log(epoch, {"train/loss": 1 / epoch, "loss_weighted/pairs": 1 / epoch, **r.metrics})
            costs = {"cost/macs": cost, "cost/parameters": 2e6, "cost/cpu_images_per_s": 1e9 / cost}
            tracking.log_values(uri, run_id, costs)
            tracking.log_figure(uri, run_id, Figure(figsize=(1, 1)), "retrieval.png")
            logged.append(dataclasses.replace(r, run_id=run_id))
        monkeypatch.setattr(study, "records", lambda of: logged)
        return logged

    return store


def test_the_report_of_tuned_fields(tmp_path, sweeps, stored):
    plan = make_plan(sweeps / "d3still_beta_gamma-inshop-1", "d3still_beta_gamma", "inshop", alpha=50)
    points = [*plan.search_space.start, {"beta": 1.1, "gamma": 0.7}, {"beta": 0.03, "gamma": 1.9}]
    records = [record(n, dict(p), val_map=0.1 + n / 100, val_rank1=0.2, val_minp=0.05) for n, p in enumerate(points)]
    records[5] = dataclasses.replace(records[5], status="pruned")
    records[6] = dataclasses.replace(records[6], status="failed", message="the loss is not finite", value=None)
    stored(plan, records, [1e9] * 7)
    html, run_id = summary.write_report(plan, str(tmp_path / "out"))
    assert "http://" not in (text := html.read_text()) and "https://" not in text, "one file, nothing outside it"
    assert text.count("data:image/png;base64") == 5
    text = html.with_suffix(".md").read_text()
    for part in (
        "7 of 8 trials (5 completed, 1 stopped early, 1 failed). Best: β=0.2 γ=0.3, mAP 14.00 (selected on test, as",
        "The teacher on both sides, ResNet101@256, reaches mAP 50.00.",
        "measured on inshop under “query against gallery”",
        "## β at γ=0.1",
        "| 0.1 | 63.88 | 51.00 | 19.09 |",
        "figure 3; ResNet101@256 → ResNet18@64; msmt17: the default β is not the best one here",
        "| trial | β | γ | status | epochs | mAP | R1 | mINP | minutes | MLflow run |",
        "failed: the loss is not finite",
        "| ResNet18@64 | 1.0000 | 2.000 | 1 |",
        "--on inshop --set alpha=50.0 --data-root DIR --trials 8",
    ):
        assert part in text, part
    pictures = {"beta.png", "gamma.png", "heat_map.png", "training.png", "retrieval.png"}
    assert {p.name for p in (html.parent / "figures").iterdir()} == pictures
    (run,) = tracking.runs_of(plan.tracking_uri, plan.tag, "summary")
    assert run.info.run_id == run_id and run.info.status == "FINISHED"
    assert run.data.metrics["summary/map"] == pytest.approx(0.14) and run.data.metrics["teacher/rank1"] == 0.6
    assert tracking.file(plan.tracking_uri, run_id, "report.html")
    assert summary.write_report(plan)[1] == run_id, "again: the same summary run"


def test_the_report_of_a_table(sweeps, stored):
    plan = make_plan(sweeps / "sureid_components-occluded_duke-1", "sureid_components", "occluded_duke")
    points = [{"cell": cell, "seed": seed} for seed in (0, 1) for cell in plan.search_space.cells]
    records = [
        record(n, p, val_map=0.4 + n / 100, val_rank1=0.5, val_rank3=0.6, val_rank5=0.7) for n, p in enumerate(points)
    ]
    stored(plan, records, [2e9 if p["cell"] == "none" else 1e9 for p in points])
    plan = dataclasses.replace(plan, space_data={**plan.space_data, "compare": "retrieval"})
    html, _ = summary.write_report(plan)
    assert {f"retrieval_{place}.png" for place in range(len(plan.search_space.cells))} <= {
        p.name for p in (html.parent / "figures").iterdir()
    }
    assert "<figcaption>retrieval of HTS + NPKD, seed 0</figcaption>" in html.read_text()
    text = html.with_suffix(".md").read_text()
    for part in (
        "Best: SUReID, mAP 46.50.",
        "| row | seeds | mAP | R1 | R3 | R5 | GMACs | images/s, CPU |",
        "| none | 2 | 42.50 ± 3.54 | 50.00 ± 0.00 | 60.00 ± 0.00 | 70.00 ± 0.00 | 2.0000 | 0 |",
        "| teacher on both sides, ResNet101@256 |  | 50.00 | 60.00 |",
        "| chance |  | 1.00 | 2.00 |",
        "## Accuracy and throughput",
        "## Retrieval of every row",
        "occluded_duke, mAP / R1 | images/s, their GPU | ours | note |",
        "| HTS + NPKD | 53.20 / 64.80 |  |  | 1585 | 44.50 ± 3.54 / 50.00 ± 0.00 |  |",
        "partial_reid, R1 / R3",
    ):
        assert part in text, part


def test_a_sweep_without_a_completed_trial_has_no_report(tmp_path, monkeypatch):
    plan = make_plan(tmp_path / "d3still_alpha-demo-1", "d3still_alpha", "demo")
    monkeypatch.setattr(study, "records", lambda of: [record(0, {"alpha": 1.0}, "failed")])
    with pytest.raises(ValueError, match="d3still_alpha-demo-1 has no completed trial yet"):
        summary.write_report(plan)


def test_the_table_in_the_terminal():
    plan = make_plan("/x", "d3still_alpha", "demo")
    records = [
        record(0, {"alpha": 1.0}, val_map=0.25, val_rank1=0.5),
        record(1, {"alpha": 2.5}, val_map=0.75, val_rank1=0.5),
        dataclasses.replace(record(2, {"alpha": 9.0}, "failed"), message="no memory"),
    ]
    console = Console(width=120, record=True)
    console.print(trial_table.trial_table(plan, records))
    lines = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in console.export_text().splitlines()]
    lines = [line for line in lines if len(line) > 1]
    assert lines[0][:7] == ["trial", "alpha", "status", "epochs", "val/map", "val/rank1", "minutes"]
    assert [line[0] for line in lines[1:]] == ["1", "0", "2"]
    assert lines[1][1:6] == ["2.5", "completed", "3", "0.7500", "0.5000"] and lines[3][2] == "failed: no memory"


def test_ours_stand_beside_the_same_networks_and_sides_only():
    """A row of one network on both sides is never compared with a search across networks."""
    plan = make_plan("/x", "asymmetric_baselines", "inshop")
    measured = {"val_map": 0.1, "val_rank1": 0.2, "symmetric_map": 0.3, "symmetric_rank1": 0.4}
    done = [record(n, {"cell": cell, "seed": 0}, **measured) for n, cell in enumerate(("student alone", "RKD"))]
    found = {
        (p.row, p.student, p.teacher): printed.ours(plan, done, p)
        for p in published.beside("asymmetric_baselines", "inshop")
        if p.benchmark == "inshop"
    }
    assert found["RKD", "ResNet18@64", "ResNet101@256"] == "10.00 / 20.00"
    assert found["student alone", "ResNet18@64", published.BOTH_SIDES] == "30.00 / 40.00"
    assert found["student alone", "MobileNetV2@64", published.BOTH_SIDES] == "not run"
    assert found[published.TEACHER, "ResNet101@256", published.BOTH_SIDES] == "50.00 / 60.00"
    assert found[published.TEACHER, "SwinV2-T@256", published.BOTH_SIDES] == "not run"
    assert found["D3still", "ResNet18@64", "ResNet101@256"] == "not run"


def test_what_the_command_line_set_is_named():
    assert provenance.changed_settings(make_plan("/x", "asymmetric_baselines", "inshop")) == []
    plan = make_plan("/x", "asymmetric_baselines", "inshop", **{"train.epochs": 1, "student.size": (32, 48)})
    assert sorted(provenance.changed_settings(plan)) == ["student.size=32x48", "train.epochs=1"]


def test_every_teacher_is_a_reference_once():
    other = {**TEACHER, "teacher": "SwinV2-T@256", "teacher_fingerprint": "y", "teacher_metrics": {"val/map": 0.7}}
    plan = make_plan("/x", "d3still_networks", "inshop", {"a": TEACHER, "b": other, "c": TEACHER, "d": {}})
    assert [(r.kind, r.network, r.metrics["val/map"]) for r in provenance.references(plan)] == [
        ("teacher", "ResNet101@256", 0.5),
        ("chance", "", 0.01),
        ("teacher", "SwinV2-T@256", 0.7),
    ]


def test_a_method_has_its_own_metrics(sweeps, stored, monkeypatch):
    """Rates at a false accept rate and milliseconds, without an mAP anywhere."""
    own = (Metric("faces/tar_1e-4", "TAR@1e-4"), Metric("faces/ms", "ms per pair", percent=False))
    monkeypatch.setattr(find.method("sureid"), "metrics", own, raising=False)
    prepared = {"a": {"teacher": "R100@112", "teacher_metrics": {"faces/tar_1e-4": 0.9}}}
    plan = make_plan(sweeps / "sureid_noda-demo-1", "sureid_noda", "demo", prepared)
    plan = dataclasses.replace(plan, space_data={**plan.space_data, "metric": "faces/tar_1e-4"})
    cells = plan.search_space.cells
    measured = {"faces_tar_1e-4": 0.5, "faces_ms": 3.25}
    records = [record(n, {"cell": cell, "seed": 0}, **measured) for n, cell in enumerate(cells)]
    stored(plan, records, [1e9] * len(records))
    text = summary.write_report(plan)[0].with_suffix(".md").read_text()
    ours = text[: text.index("## Published")]
    assert "| row | seeds | TAR@1e-4 | ms per pair |" in ours and "| 50.00 | 3.25 |" in ours
    assert "| teacher on both sides, R100@112 |  | 90.00 |  |" in ours and "reaches TAR@1e-4 90.00" in ours
    assert "mAP" not in ours and "All our numbers are measured on demo" in ours
    plan = dataclasses.replace(plan, space_data={**plan.space_data, "metric": "faces/tar_1e4"})
    with pytest.raises(ValueError, match=r"maximises 'faces/tar_1e4', which .* did you mean faces/tar_1e-4\?"):
        scores.maximised(plan)


def test_reports_name_no_metric_and_no_recipe_field():
    """What a method calls its scores and its numbers is the method's own business."""
    names = {m.name for method in find.methods() for m in find.method(method).metrics}
    names |= {name.rpartition("/")[2] for name in names}
    shared = set(fields_of(Recipe()))  # what every job has may be read
    paths = {path for method in find.methods() for path in fields_of(find.recipe(method, "demo"))} - shared
    names |= paths | {path.rpartition(".")[2] for path in paths} | {path.partition(".")[0] for path in paths}
    sources = sorted(Path(reporting.__file__).parent.glob("*.py"))
    written = {word for path in sources for word in re.findall(r'"([\w/.]+)"', path.read_text())}
    # A kind of reference and the key of its name among the prepared facts; the heading of a column.
    assert written & names <= {"teacher", "epochs"}
