"""``sweep --select-on validation``: chosen on held-out identities, confirmed on test, and never mixed."""

import shutil

import pytest
from command.typed import call, error, settings

from orchestrator import report, sweep, tracking
from orchestrator.launch import confirming, shelf, study
from orchestrator.launch import plan as plans
from orchestrator.reporting import scores
from search_spaces._space import Float, SearchSpace

CHOSEN = ("--select-on", "validation", "--confirm", 2, "--seeds", 2)


@pytest.fixture
def confirmed(empty, data) -> str:
    """What a search of three trials and its confirmation printed."""
    return call(sweep.main, "d3still_alpha", *data, "--trials", 3, *CHOSEN, *settings("d3still")).output


def test_the_best_of_a_search_are_trained_again_and_scored_once_on_test(confirmed, data):
    search, table = shelf.latest("d3still_alpha"), shelf.latest("d3still_alpha_confirmed")
    assert "the best 2 are trained again on the whole training set, seeds 1, 2, and scored once on test" in confirmed
    assert f"confirmed as {table.sweep}" in confirmed and "(validation)" in confirmed
    recipes = [plan.recipes["d3still"] for plan in (search, table)]
    assert [recipe["data.part"] for recipe in recipes] == ["validation", "test"]
    assert recipes[1] == {**recipes[0], "data.part": "test", "train.evaluate_every": recipes[0]["train.epochs"]}
    for run in (r.run_id for r in study.records(table)):
        looks = tracking.client(table.tracking_uri).get_metric_history(run, "val/map")
        assert [look.step for look in looks] == [recipes[0]["train.epochs"]], "once, at the end"

    found = study.ranked(study.records(search))
    assert [cell["alpha"] for cell in table.search_space.cells.values()] == [r.point["alpha"] for r in found[:2]]
    done = study.records(table)
    assert len(done) == 4 and {r.status for r in done} == {"completed"} and {r.point["seed"] for r in done} == {1, 2}

    # Held-out people are not in the search's training set, nor did its teacher see them; all are in the other one's.
    held, whole = (_identities(plan) for plan in (search, table))
    assert held["query"] < whole["train"] and not held["query"] & held["train"]
    assert held["train"] | held["query"] == whole["train"] and not whole["query"] & whole["train"]
    teachers = {next(iter(plan.prepared.values()))["teacher"]["fingerprint"] for plan in (search, table)}
    assert len(teachers) == 2

    again = call(sweep.main, "d3still_alpha", *data, "--resume").output
    assert shelf.latest("d3still_alpha_confirmed").sweep == table.sweep and "confirmed as" in again
    assert study.records(table) == done
    line = error(sweep.main, "d3still_alpha", *data, "--resume", "--trials", 5)
    assert "have been scored on test, so its search is over" in line

    page = call(report.main, "d3still_alpha").output.split()[1]
    text = open(page.replace(".html", ".md")).read()
    assert text.index("Confirmed on test") < text.index("Trials") and "val" in text
    rows = [line for line in text.splitlines() if line.startswith("| α=") or line.startswith("| alpha=")]
    assert any(" ± " in row for row in rows)
    answer = study.records(table)[0].run_id
    assert answer in text and f"orchestrator.export {answer}" in text, "the student that saw the whole training set"
    assert "Which rows are told apart from the chosen one" in text
    assert text.index("told apart") < text.index("The search, on held-out identities")
    run = next(r for r in tracking.runs_of(search.tracking_uri, search.tag, "summary"))
    assert run.data.tags["orch.choice"] == scores.choice(search) and "validation" in scores.choice(search)


@pytest.mark.slow
def test_a_search_of_the_same_name_is_not_confirmed_by_an_older_one(confirmed, data):
    """Names of sweeps come again where a folder is removed; what they are known by does not."""
    older = shelf.latest("d3still_alpha")
    shutil.rmtree(older.folder)
    call(sweep.main, "d3still_alpha", *data, "--trials", 2, *CHOSEN, *settings("d3still", beta=0.9))
    search = shelf.latest("d3still_alpha")
    assert search.sweep == older.sweep and search.tag != older.tag
    found = confirming.stored(search)
    assert found.recipes["d3still"]["beta"] == 0.9 and found.sweep.endswith("-2")


@pytest.mark.slow
def test_a_search_that_is_killed_before_its_confirmation_goes_on(empty, data, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(confirming, "confirmation", killed)
        call(sweep.main, "d3still_alpha", *data, "--trials", 3, *CHOSEN, *settings("d3still"), code=130)
    assert confirming.stored(shelf.latest("d3still_alpha")) is None
    shown = call(report.main, "d3still_alpha").output
    assert "Not yet" in open(shown.split()[1]).read()
    call(sweep.main, "d3still_alpha", *data, "--resume")
    assert len(study.records(confirming.stored(shelf.latest("d3still_alpha")))) == 4


def test_selecting_on_test_is_said_wherever_it_is_shown(swept):
    plan = shelf.latest("d3still_alpha")
    assert "selected on test" in swept and "selected on test" in scores.choice(plan)
    page = call(report.main, "d3still_alpha").output.split()[1]
    assert open(page).read().count("selected on test") == 2  # above the trials, and on top


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--select-on", "train"), "--select-on must be test or validation, got 'train'"),
        (("--confirm", 2), "--confirm and --seeds follow a search on held-out identities; add --select-on validation"),
        (("--select-on", "test", "--seeds", 2), "add --select-on validation"),
        (
            (*CHOSEN, "--set", "part=test"),
            "--select-on validation says which part is scored; leave --set part=test away",
        ),
        ((*CHOSEN, "--confirm", 9, "--trials", 8), "--confirm 9: the search has 8 points; ask for 8 or fewer"),
        ((*CHOSEN, "--resume"), "a sweep goes on as it was started"),
    ],
)
def test_what_does_not_fit_is_refused(empty, data, arguments, message):
    assert message in error(sweep.main, "d3still_alpha", *data, *arguments)
    assert not empty.exists()


def test_a_dry_run_says_what_follows(empty, data):
    shown = call(sweep.main, "d3still_alpha", *data, *CHOSEN, "--dry-run", *settings("d3still")).output
    assert "then             the best 2 are trained again" in shown and "part=validation" in shown
    assert not empty.exists()


def _record(number: int, point: dict, value: float | None, status: str = "completed") -> plans.TrialRecord:
    return plans.TrialRecord(number, status, point, 3, value, {}, "")


def _plan(space: SearchSpace) -> plans.Plan:
    return plans.Plan("", "own", "", "demo", {}, {}, "", 4, space_data=plans.space_data(space))


def test_the_best_are_means_over_seeds_and_of_completed_trials_alone():
    cells = {"a": {"alpha": 1.0}, "b": {"alpha": 2.0}, "c": {"alpha": 3.0}}
    plan = _plan(SearchSpace(method="d3still", question="?", cells=cells, seeds=(0, 1)))
    values = {("a", 0): 0.1, ("a", 1): 0.5, ("b", 0): 0.4, ("b", 1): 0.4, ("c", 0): 0.9}
    rows = [_record(n, {"cell": c, "seed": s}, v) for n, ((c, s), v) in enumerate(values.items())]
    rows[-1] = _record(4, {"cell": "c", "seed": 0}, 0.9, "failed")
    found = confirming.best(plan, rows, 3)
    assert list(found) == ["b", "a"] and found["a"] == ({"alpha": 1.0}, pytest.approx(0.3))

    tuned = _plan(SearchSpace(method="d3still", question="?", tune={"alpha": Float(1, 9)}))
    rows = [_record(0, {"alpha": 2.0}, 0.5), _record(1, {"alpha": 2.0}, 0.5), _record(2, {"alpha": 3.0}, 0.5),
            _record(3, {"alpha": 4.0}, 0.7, "pruned")]  # fmt: skip
    found = confirming.best(tuned, rows, 9)
    assert [settings["alpha"] for settings, _ in found.values()] == [2.0, 3.0]  # a point twice is one point
    assert len(confirming.best(tuned, rows, 1)) == 1 and confirming.best(tuned, rows[3:], 1) == {}


def _identities(plan: plans.Plan) -> dict[str, set[str]]:
    """Names of the classes of every side, from the keys of its images: "train/003/…"."""
    from orchestrator.families.retrieval import data as retrieval
    from orchestrator.needs import Prepared

    roles = next(iter(plan.prepared.values()))
    prepared = Prepared.of(plan.where, roles)
    return {
        side: {key.rsplit("/", 1)[0] for key in retrieval.open_images(plan.where, prepared[side]).keys}
        for side in ("train", "query")
    }
