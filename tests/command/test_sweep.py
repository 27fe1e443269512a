"""``sweep``: what it lists and plans, how trials end, and how it is resumed."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import typer
from command.conftest import SPACES
from command.typed import call, error, nothing_written, replaced, settings, storage_at

from orchestrator import evaluate, find, report, sweep, tracking
from orchestrator.launch import plan as plans
from orchestrator.launch import shelf, study
from orchestrator.progress import Board


def records(name: str) -> list[plans.TrialRecord]:
    return study.records(shelf.latest(name))


def ends(name: str) -> list[tuple[str, int]]:
    """Status and epochs of every trial."""
    return [(r.status, r.epochs) for r in records(name)]


def test_every_sweep_is_listed_with_its_question():
    shown = call(sweep.main, "--list").output
    for name in find.spaces():
        assert any(line.split()[0] == name and find.space(name).question in line for line in shown.splitlines())


def test_the_flags_are_few_and_frozen():
    """Hyper-parameters never become flags: change this list only on purpose."""
    flags = {p.opts[0] for p in typer.main.get_command(sweep.main).params if p.opts[0].startswith("--")}
    assert flags == {"--on", "--data-root", "--trials", "--concurrent", "--workers", "--gpus-per-worker", "--epochs",
                     "--set", "--select-on", "--confirm", "--seeds", "--resume", "--in-process", "--dry-run",
                     "--list"}  # fmt: skip


def test_a_dry_run_shows_the_plan_by_groups_and_writes_nothing(empty, data):
    """What differs from the paper has a star; what is not there will be made."""
    shown = call(sweep.main, "d3still_alpha", *data, "--dry-run", *settings("d3still")).output
    groups = {line.split()[0]: line for line in shown.splitlines()}
    assert "alpha 5 … 1000 log; first (α=100) (α=50) (α=200); 8 trials × 3 epochs" in groups["varies"]
    assert "embedding_dim=8* " in groups["d3still"] and "alpha=100.0 " in groups["d3still"]
    assert "(* = not the paper's)" in groups["d3still"]
    assert "epochs=3* " in groups["train"] and "momentum=0.9 " in groups["train"]
    assert "size=16×16* " in groups["student"] and "epochs=1* " in groups["teacher.train"]
    assert "teacher resnet18 at 16×16" in groups["to"] and "ready" not in groups
    assert not empty.exists()


def test_a_dry_run_says_what_is_ready(data, swept):
    shown = call(sweep.main, "d3still_alpha", *data, "--dry-run", *settings("d3still")).output
    (ready,) = [line for line in shown.splitlines() if line.startswith("  ready ")]
    assert "teacher resnet18 at 16×16" in ready and "to be made" not in shown
    shown = call(sweep.main, "d3still_alpha", *data, "--dry-run", *settings("d3still", **{"student.size": "20x20"}))
    (made,) = [line for line in shown.output.splitlines() if line.startswith("  to be made ")]
    assert "pixels 20×20 of train" in made and "teacher resnet18" not in made


def test_a_sweep_says_what_it_did_and_records_it(swept):
    for part in ("2 trials, 1 at once", "images/identities: train 96/16", "teacher on both sides", "trial 1 completed",
                 "2 completed, 0 stopped early, 0 failed", "-m mlflow ui --backend-store-uri sqlite:///",
                 "python -m orchestrator.report d3still_alpha --on folder"):  # fmt: skip
        assert part in swept, part
    assert "trained now" not in swept  # the teacher was there
    plan, found = shelf.latest("d3still_alpha"), records("d3still_alpha")
    assert [r.point for r in found] == [{"alpha": 100.0}, {"alpha": 50.0}]
    assert all(r.run_id in swept for r in found)
    run = tracking.runs_of(plan.tracking_uri, plan.tag)[0]
    assert run.info.status == "FINISHED" and run.data.tags["orch.status"] == "completed"
    assert run.data.params["student.size"] == "[16, 16]" and run.data.params["beta"] == "0.2"
    for tag in ("orch.method", "orch.benchmark", "orch.teacher_fingerprint", "orch.version", "orch.protocol"):
        assert run.data.tags[tag]
    assert {"folder train", "folder gallery", "folder teacher"} <= {i.dataset.name for i in run.inputs.dataset_inputs}
    assert [step for step, _ in tracking.curve(plan.tracking_uri, run.info.run_id, "val/map")] == [1, 2, 3]
    keys = set(run.data.metrics)
    assert {"loss/feature", "loss_weighted/feature", "train/learning_rate", "perf/images_per_s", "cost/macs"} <= keys
    assert len(tracking.file(plan.tracking_uri, run.info.run_id, "retrieval.png")) > 100
    record = tracking.read_record(plan.tracking_uri, run.info.run_id)
    assert record.recipe == {**plan.recipes["d3still"], "alpha": 100.0}
    assert record.place == plan.where and record.prepared["teacher"]["fingerprint"]


def test_weak_trials_are_stopped_early(data, trained, monkeypatch):
    """The learning rate is the score: the first point has the largest, so every sampled one is stopped."""
    method = type(find.method("d3still"))
    made = method.experiment

    def experiment(self, recipe, prepared, where):
        trained = made(self, recipe, prepared, where)

        def evaluate(task):
            evaluation = trained.evaluate(task)
            return dataclasses.replace(evaluation, metrics={**evaluation.metrics, "val/map": recipe.train.rate})

        return dataclasses.replace(trained, evaluate=evaluate)

    monkeypatch.setattr(method, "experiment", experiment)
    arguments = settings("d3still", **{"train.rate": None, "train.epochs": 4})
    shown = call(sweep.main, "rates", *data, "--trials", 3, *arguments).output
    assert ends("rates") == [("completed", 4), ("pruned", 1), ("pruned", 1)]
    assert "1 completed, 2 stopped early, 0 failed" in shown and "trial 1 pruned after epoch 1" in shown
    plan = shelf.latest("rates")
    runs = tracking.runs_of(plan.tracking_uri, plan.tag)
    assert [r.data.tags["orch.status"] for r in runs] == ["completed", "pruned", "pruned"]
    assert all(r.info.status == "FINISHED" for r in runs)


def test_a_table_with_seeds_in_which_a_row_explodes(data, trained):
    """A loss that is not finite ends its trial, named with step and images; the others go on."""
    shown = call(sweep.main, "ends", *data, *settings("d3still", **{"train.rate": None, "train.epochs": 2})).output
    assert "2 completed, 0 stopped early, 2 failed" in shown and "rows: good, explodes; seeds 0, 1; 4 trials" in shown
    found = {(r.point["cell"], r.point["seed"]): r for r in records("ends")}
    ended = {"good": "completed", "explodes": "failed"}
    assert {point: r.status for point, r in found.items()} == {(c, s): ended[c] for c in ended for s in (0, 1)}
    assert found["good", 0].metrics["train/loss"] != found["good", 1].metrics["train/loss"]
    message = found["explodes", 1].message
    assert "the loss is not finite in epoch" in message and "images: train/" in message
    plan = shelf.latest("ends")
    status = {r.info.run_id: r.info.status for r in tracking.runs_of(plan.tracking_uri, plan.tag)}
    assert status[found["explodes", 0].run_id] == "FAILED" and status[found["good", 0].run_id] == "FINISHED"
    with pytest.raises(ValueError, match="has no student"):
        tracking.student_file(plan.tracking_uri, found["explodes", 0].run_id)
    before = records("ends")
    resumed = call(sweep.main, "ends", "--on", "folder", "--resume", "--in-process").output
    assert "started:" not in resumed and records("ends") == before  # a failed trial is not tried again
    assert "4 trials; only a larger number can be asked for" in error(
        sweep.main, "ends", "--on", "folder", "--resume", "--trials", 9
    )


def test_a_combination_that_the_method_refuses_ends_its_trial_alone(data, trained):
    arguments = settings("d3still", batch_size=15, **{"train.epochs": 1})
    shown = call(sweep.main, "refused", *data, "--trials", 5, *arguments).output
    for r in records("refused"):
        assert r.status == ("failed" if r.point["together"] == 2 else "completed")
        assert (r.message == "batch_size (15) must hold several identities of together (2) images") == (
            r.status == "failed"
        )
    assert {r.status for r in records("refused")} == {"failed", "completed"} and "must hold several" in shown


@pytest.fixture(scope="module")
def interrupted(storage, data, swept):
    """A sweep that somebody stopped in epoch 2 of its second trial: its line, and what was recorded until then."""
    with storage_at(storage) as patch:
        whole = Board.epoch

        def epoch(self, number, reached, value):
            whole(self, number, reached, value)
            if (number, reached) == (1, 2):
                raise KeyboardInterrupt

        patch.setattr(Board, "epoch", epoch)
        patch.setattr(find, "space", SPACES.get)
        arguments = ["interrupted", *data, "--trials", 2, *settings("d3still", **{"run.checkpoint_every": 1})]
        return error(sweep.main, *arguments, code=130), records("interrupted")


def test_a_sweep_that_was_interrupted_goes_on_to_the_same_numbers(interrupted):
    """From the last checkpoint, into the same run; then more trials can be asked for."""
    line, before = interrupted
    assert line == "interrupted; the same command with --resume goes on"
    assert [(r.status, r.epochs) for r in before] == [
        ("completed", 3),
        ("running", 1),
    ]  # the checkpoint and the MLflow run hold epoch 2
    resume = ["interrupted", "--on", "folder", "--resume", "--in-process"]
    assert "interrupted-folder-1: 1 of 2 trials are finished" in call(sweep.main, *resume, "--dry-run").output
    shown = call(sweep.main, *resume).output
    assert shown.count("started:") == 1 and "trial 1 completed after epoch 3" in shown
    found, plan = records("interrupted"), shelf.latest("interrupted")
    assert [r.run_id for r in found] == [r.run_id for r in before] and found[0] == before[0]
    for ours, whole in zip(found, records("d3still_alpha"), strict=True):
        assert {k: v for k, v in ours.metrics.items() if not k.startswith("perf/")} == {
            k: v for k, v in whole.metrics.items() if not k.startswith("perf/")}  # fmt: skip
    assert [step for step, _ in tracking.curve(plan.tracking_uri, found[1].run_id, "train/loss")] == [1, 2, 3]

    assert "only a larger number can be asked for" in error(sweep.main, *resume, "--trials", 1)
    assert "of 3 trials are finished" in call(sweep.main, *resume, "--trials", 3, "--dry-run").output
    shown = call(sweep.main, *resume, "--trials", 3).output
    assert shown.count("started:") == 1 and ends("interrupted") == [("completed", 3)] * 3
    assert [r.run_id for r in records("interrupted")[:2]] == [r.run_id for r in found]
    again = call(sweep.main, *resume).output  # the number that was asked for last is what it has now
    assert "3 trials" in again and "started:" not in again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "beta=0.7"], "was started with beta=0.2 (asked 0.7); resume it without changes"),
        (["--epochs", "9"], "epochs=3 (asked 9)"),
        (["--data-root", "."], "--data-root"),
        (["--workers", "2"], "1 workers (asked 2)"),
        (["--gpus-per-worker", "1"], "0.0 GPUs a worker (asked 1.0)"),
        (["--set", "alfa=0.7"], "no field 'alfa'; did you mean alpha"),
        (["--trials", "1"], "has 2 trials; only a larger number"),
    ],
)
def test_a_sweep_is_resumed_without_changes(swept, arguments, message):
    assert message in error(sweep.main, "d3still_alpha", "--on", "folder", "--resume", "--in-process", *arguments)


def test_what_was_given_again_unchanged_is_no_change(data, swept):
    shown = call(sweep.main, "d3still_alpha", *data, "--resume", "--epochs", 3, "--set", "beta=0.20").output
    assert "started:" not in shown and "2 completed" in shown


def test_another_teacher_is_refused_when_a_sweep_is_resumed(data, trained, tmp_path):
    teacher = Path(trained.splitlines()[-1].removeprefix("teacher: "))
    given = shutil.copytree(teacher.parent, tmp_path / "mine") / teacher.name
    arguments = settings("d3still", **{"train.epochs": 1, "teacher.weights": given})
    call(sweep.main, "given", *data, "--trials", 1, *arguments)
    resume = ["given", "--on", "folder", "--resume", "--in-process", "--trials", 2]
    with replaced(given, given.read_bytes()[:-4] + b"\0\0\0\0"):
        assert "the teacher is not the one of the record" in error(sweep.main, *resume)
    assert ends("given") == [("completed", 1)]
    call(sweep.main, *resume)
    assert ends("given") == [("completed", 1)] * 2


def test_other_data_are_refused_when_a_sweep_is_resumed(data, root, trained, storage):
    """The line names what has changed; where it is as it was, the sweep goes on; a damaged teacher is mended."""
    arguments = settings("d3still", **{"train.epochs": 1})
    call(sweep.main, "fingerprints", *data, "--trials", 1, *arguments)
    resume = ["fingerprints", "--on", "folder", "--resume", "--in-process", "--trials", 2]
    for role in ("train", "query", "gallery"):
        first, *_, last = sorted((root / role).rglob("*.png"))
        with replaced(first, last.read_bytes()):
            assert f"the {role} is not the one of the record" in error(sweep.main, *resume)
    teacher_folders = list((storage / "teachers").glob("[!.]*"))
    (teacher,) = (storage / "teachers").glob("*/teacher.safetensors")
    weights = teacher.read_bytes()
    assert ends("fingerprints") == [("completed", 1)]
    teacher.write_bytes(weights[:-4] + b"\0\0\0\0")
    shown = call(sweep.main, *resume).output
    assert "fetched again from its MLflow run" in shown and teacher.read_bytes() == weights
    assert ends("fingerprints") == [("completed", 1)] * 2 and "trained now" not in shown
    assert list((storage / "teachers").glob("[!.]*")) == teacher_folders  # nor was one on the other data


def test_a_method_in_every_row(data, trained, monkeypatch):
    """Each row trains its own method under one teacher, which has the classifier that VanillaKD needs."""
    cells = {"D3still": {}, "VanillaKD": {"method": "vanillakd"}, "CSD": {"method": "csd", "neighbours": "train"}}
    space = dataclasses.replace(
        find.space("asymmetric_baselines"), cells=cells, fix={"evaluate_symmetric": True}, seeds=(0,)
    )
    monkeypatch.setattr(find, "space", lambda name: space)
    arguments = ["asymmetric_baselines", *data, *settings("d3still", "vanillakd", "csd", **{"train.epochs": 1})]
    assert "top_k is a field of d3still, csd only, not of every method" in error(
        sweep.main, *arguments, "--set", "top_k=4"
    )
    shown = call(sweep.main, *arguments).output
    assert "trained now" not in shown and "3 completed" in shown
    plan = shelf.latest("asymmetric_baselines")
    runs = {r.data.tags["orch.point.cell"]: r for r in tracking.runs_of(plan.tracking_uri, plan.tag)}
    assert {name: r.data.tags["orch.method"] for name, r in runs.items()} == {
        "D3still": "d3still", "VanillaKD": "vanillakd", "CSD": "csd"}  # fmt: skip
    assert "loss/prediction" in runs["VanillaKD"].data.metrics and "beta" not in runs["VanillaKD"].data.params
    assert runs["CSD"].data.params["neighbours"] == "train" and "symmetric/map" in runs["CSD"].data.metrics
    assert "(logged" in call(evaluate.main, runs["VanillaKD"].info.run_id).output
    call(report.main, "asymmetric_baselines")
    text = Path(plan.folder, "report.md").read_text()
    for part in ("teacher on both sides", "| chance", "table 4 B", "64.31 / 79.60", "not run",
                 "D3still authors' code", "the code uses λ1"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["d3stil_beta_gamma"], "there is no sweep 'd3stil_beta_gamma'; did you mean d3still_beta_gamma"),
        (["d3still_beta_gamma", "--on", "omniglott"], "d3still has no recipe for 'omniglott'; did you mean omniglot"),
        (["d3still_beta_gamma", "--set", "alfa=3"], "no field 'alfa'; did you mean alpha"),
        (["d3still_beta_gamma", "--set", "alpha"], "--set needs FIELD=VALUE, got 'alpha'"),
        (["d3still_beta_gamma", "--set", "alpha=inf"], "alpha must be a number, got 'inf'"),
        (["d3still_beta_gamma", "--set", "alpha=3", "--set", "alpha=4"], "--set names alpha more than once"),
        (["d3still_beta_gamma", "--set", "train.rate=3", "--set", "rate=4"], "rate is train.rate or teacher"),
        (["d3still_beta_gamma", "--set", "width=0.5"], "width is student.width or teacher.width; say which"),
        (["d3still_beta_gamma", "--set", "alpha=-3"], "alpha must be at least 0, got -3"),
        (["d3still_beta_gamma", "--set", "student.size=16"], "student.size must be 2 numbers such as 64x64, got '16'"),
        (["d3still_beta_gamma", "--set", "beta=0.1"], "beta is what this sweep varies"),
        (["d3still_ablation", "--set", "train.seed=7"], "train.seed is what this sweep varies"),
        (["d3still_ablation", "--set", "evaluate_symmetric=no"], "evaluate_symmetric is what this sweep varies"),
        (["d3still_beta_gamma", "--set", "top_k=1000"], "top_k (1000) must be at most batch_size (120)"),
        (["d3still_top_k", "--set", "batch_size=30"], "top_k (40) must be at most batch_size (30)"),
        (["d3still_beta_gamma", "--set", "constant_epochs=1"], "constant_epochs (1) must not end before warmup"),
        (["asymmetric_baselines", "--set", "top_k=4"], "top_k is a field of d3still, csd, rop only"),
        (["asymmetric_baselines", "--set", "batch_size=90"], "top_k (96) must be at most batch_size (90)"),
        (["d3still_ablation", "--trials", "3"], "always runs in full"),
        (["d3still_alpha", "--on", "omniglot", "--data-root", "/no"], "--data-root /no is not a directory"),
        (["d3still_alpha", "--on", "folder", "--resume"], "no sweep d3still_alpha on folder"),
        (["unknown metric"], "maximises 'val/ma', which its methods do not have; did you mean val/map"),
        (["sop", "--on", "sop"], "there is no sweep 'sop'"),
    ],
)
def test_bad_words_are_refused_before_anything_starts(empty, arguments, message):
    assert message in error(sweep.main, *arguments)
    assert nothing_written(empty)


def test_more_than_this_process_has_is_refused(data, swept):
    known = len(shelf.stored("d3still_alpha"))
    for arguments, message in (
        (["--workers", "2"], "--in-process runs one worker, this run has --workers 2; leave one of them away"),
        (["--gpus-per-worker", "64"], "--gpus-per-worker 64: this process sees no GPU"),
    ):
        assert message in error(sweep.main, "d3still_alpha", *data, *settings("d3still"), *arguments)
    assert len(shelf.stored("d3still_alpha")) == known


def test_data_that_are_not_there_say_how_they_must_look(swept, tmp_path):
    (tmp_path / "data").mkdir()
    arguments = ["d3still_beta_gamma", "--on", "sop", "--in-process"]
    line = error(sweep.main, *arguments, "--data-root", tmp_path / "data")
    assert "no Ebay_train.txt in" in line and "it must hold Ebay_train.txt and Ebay_test.txt" in line
    assert "sop: --data-root DIR is needed" in error(sweep.main, *arguments, "--dry-run")


def test_an_image_that_is_cut_off_stops_the_sweep_before_training(data, root, trained):
    victim = sorted((root / "train").rglob("*.png"))[3]
    with replaced(victim, victim.read_bytes()[:200]):
        line = error(sweep.main, "d3still_beta_gamma", *data, *settings("d3still"))
    assert "1 of 96 images cannot be read: train/" in line and victim.name in line and "skip_unreadable=true" in line
    assert not records("d3still_beta_gamma")
