"""``compare``: two runs, their rows with all seeds, and what cannot be compared."""

import re
from dataclasses import replace

import numpy as np
import pytest
from command.typed import call, error, settings, storage_at

from orchestrator import compare, evaluate, export, find, sweep, tracking
from orchestrator.evaluation import uncertainty
from orchestrator.launch import shelf, study, trial
from orchestrator.method import Metric, PairScores, Queries
from orchestrator.reporting import compared, scores, summary
from search_spaces._space import SearchSpace

TWO_ROWS = SearchSpace(method="d3still", question="Which?", cells={"near": {}, "far": {"alpha": 5.0}}, seeds=(0, 1))


@pytest.fixture(scope="module")
def table(tmp_path_factory, data) -> tuple:
    """A sweep of two rows and two seeds."""
    with storage_at(tmp_path_factory.mktemp("compared") / "runs"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(find, "space", lambda name: TWO_ROWS)
        call(sweep.main, "two rows", *data, *settings("d3still", alpha=None))
        plan = shelf.latest("two rows")
        yield plan, study.records(plan)


def test_a_run_stands_for_its_row(table):
    plan, records = table
    ids = {(r.point["cell"], r.point["seed"]): r.run_id for r in records}
    with storage_at(plan.where.storage):
        shown = call(compare.main, ids["near", 0], ids["far", 0]).output
        assert "near: 2 seed(s)" in shown and "far: 2 seed(s)" in shown and "One seed each" not in shown
        rows = [compared.row_of(plan.tracking_uri, ids[cell, 1]) for cell in ("near", "far")]
        for row, cell in zip(rows, ("near", "far"), strict=True):
            expected = [r.metrics["val/map"] for r in records if r.point["cell"] == cell]
            assert row.seeds("val/map") == pytest.approx(expected, abs=1e-9), "means of queries are the logged metrics"
        _, found = compared.differences(rows, 0, "val/map")
        assert found.over_seeds and found.value == pytest.approx(rows[1].mean("val/map") - rows[0].mean("val/map"))
        assert f"{100 * found.low:.2f} … {100 * found.high:.2f}" in " ".join(shown.split())
        alone = call(compare.main, ids["near", 0], ids["far", 1], "--alone", "--metric", "val/map").output
        assert "1 seed(s)" in alone and "say nothing about other seeds" in alone and "R1" not in alone and "R1" in shown


def test_the_best_row_and_what_is_told_apart_from_it(table):
    plan, records = table
    rows = [compared.row_of(plan.tracking_uri, r.run_id) for r in records if r.point["seed"] == 0]
    best, found = compared.from_best(rows, "val/map")
    assert found[best] is None and all(one.value <= 0 for one in found if one is not None)


def test_compare_and_a_report_say_the_same_of_the_same_rows(table):
    plan, records = table
    with storage_at(plan.where.storage):
        rows = [compared.row_of(plan.tracking_uri, r.run_id) for r in records if r.point["seed"] == 0]
        best, found = compared.from_best(rows, "val/map")
        ids = [rows[best].run_ids[0], rows[1 - best].run_ids[0]]
        shown = call(compare.main, *ids, "--metric", "val/map").output
    one = found[1 - best]
    report = summary.write_report(plan)[0].with_suffix(".md").read_text()
    for text in (shown, report):
        assert f"{100 * one.low:.2f} … {100 * one.high:.2f}" in text and f"{100 * one.detectable:.2f}" in text
    assert one.over_seeds and "Rows of one or two seeds are taken to vary as all of these do" in " ".join(shown.split())


def test_a_row_of_one_seed_has_the_spread_of_the_others(table):
    plan, records = table
    rows = [compared.row_of(plan.tracking_uri, r.run_id) for r in records if r.point["seed"] == 0]
    alone = compared.row_of(plan.tracking_uri, rows[1].run_ids[0], alone=True)
    _, found = compared.differences([rows[0], alone], 0, "val/map")
    assert found.over_seeds and not any(
        "One seed each" in line for line in compared.notes([rows[0], alone], "val/map", [None, found])
    )


def test_a_report_says_which_rows_are_told_apart(table):
    plan, _ = table
    html, _ = summary.write_report(plan)
    text = html.with_suffix(".md").read_text()
    part = text.partition("Which rows are told apart from the best")[2]
    assert "the best" in part and re.search(r"\| (not )?told apart \|", part) and "could be seen" in part
    assert "resamples of" in part and "of such comparisons would find" in part


def test_a_confirmed_table_without_the_chosen_row_says_so(table, monkeypatch):
    """The second choice is not called the chosen one while the first is still training."""
    plan, records = table
    first = next(iter(plan.search_space.cells))
    confirmed = replace(plan, confirms="a search")
    (section,) = compared.sections(confirmed, records)
    assert section.title.endswith("from the chosen one") and section.tables[0].rows[0][:1] == [first]
    cells = {"not yet": {}, **plan.search_space.cells}
    monkeypatch.setattr(type(plan), "search_space", property(lambda plan: replace(TWO_ROWS, cells=cells)))
    (section,) = compared.sections(confirmed, records)
    assert section.text == "Not known: the chosen row, not yet, has no completed run yet."


def test_a_report_says_why_rows_are_not_told_apart(table, monkeypatch):
    plan, records = table
    of_run, lacking = tracking.stored_queries, records[1].run_id
    monkeypatch.setattr(tracking, "stored_queries", lambda uri, one: None if one == lacking else of_run(uri, one))
    (section,) = compared.sections(plan, records)
    assert f"Not known: run {lacking} has no scores of single queries" in section.text
    other = next(r.run_id for r in records if r.point["cell"] == records[1].point["cell"] and r.run_id != lacking)
    with storage_at(plan.where.storage):
        line = error(compare.main, other, records[0].run_id)
    assert f"run {lacking} has no scores" in line and f"python -m orchestrator.evaluate {lacking} then does" in line
    monkeypatch.undo()
    monkeypatch.setattr(scores, "maximised", lambda plan: Metric("symmetric/map", "mAP, student on both sides"))
    (section,) = compared.sections(plan, records)
    assert "Not known: " in section.text and "that near has stored" in section.text


def test_a_point_that_was_tried_twice_with_one_seed_is_one_run(table, monkeypatch):
    plan, records = table
    monkeypatch.setattr(trial, "row_of", lambda tags: {"cell": "any"})
    for record in records:
        row = compared.row_of(plan.tracking_uri, record.run_id)
        assert len(row.run_ids) == 2, "of four runs with two seeds"
    with storage_at(plan.where.storage):  # two runs of one setting are one row, whichever are named
        assert "is named twice" in error(compare.main, *[r.run_id for r in records[:2]])


def test_three_rows_by_hand():
    """p and what could be seen allow for three comparisons; each row has the variance of its own seeds."""
    rng, identity_Q = np.random.default_rng(3), np.repeat(np.arange(50), 2)
    easy_Q, rows = rng.uniform(0.3, 0.7, 100), []
    for name, better, spread in (("a", 0.05, 0.001), ("b", 0.0, 0.02), ("c", 0.03, 0.001)):
        seeds_SQ = easy_Q + better + rng.normal(0, spread, (3, 1)) + rng.normal(0, 0.05, (3, 100))
        queries = tuple(Queries(identity_Q, {"val/map": seed_Q}) for seed_Q in seeds_SQ)
        rows.append(compared.Row(name, "demo", "d3still", ("1", "2", "3"), queries))
    best, found = compared.from_best(rows, "val/map")
    assert best == 0 and found[0] is None
    alone = []
    for row in rows[1:]:
        seeds = [[one.scores["val/map"].mean() for one in side.queries] for side in (row, rows[0])]
        shares = [np.var(side, ddof=1) / 3 for side in seeds]
        freedom = sum(shares) ** 2 / sum(share**2 / 2 for share in shares)
        sides = [np.mean([one.scores["val/map"] for one in side.queries], axis=0) for side in (row, rows[0])]
        alone.append(uncertainty.difference(*sides, identity_Q, uncertainty.Seeds(sum(shares), freedom), comparisons=3))
    smaller, larger = sorted(one.p for one in alone)
    holm = {smaller: 3 * smaller, larger: max(3 * smaller, 2 * larger)}  # of three pairs of rows
    for one, by_hand in zip(found[1:], alone, strict=True):
        assert one.p == pytest.approx(min(1.0, holm[by_hand.p])) and one.detectable == by_hand.detectable
        assert (one.value, one.low, one.high) == pytest.approx((by_hand.value, by_hand.low, by_hand.high))
    assert found[1].error > 2 * found[2].error, "b's seeds differ, and c's do not pay for it"
    assert "Every row has the variance of its own seeds." in compared.notes(rows, "val/map", found)


def test_of_equal_rows_few_are_told_apart_from_the_best():
    """Eight rows of one seed: with the seven comparisons alone 13 of 100 tables would find something."""
    found, identity_I = 0, np.arange(60)
    for number in range(100):
        value_KI = np.random.default_rng(number).normal(0, 1, (8, 60))
        rows = [
            compared.Row(str(k), "demo", "d3still", (str(k),), (Queries(identity_I, {"val/map": value_I}),))
            for k, value_I in enumerate(value_KI)
        ]
        _, differences = compared.from_best(rows, "val/map")
        found += any(one.told_apart for one in differences if one is not None)
    assert found / 100 <= 0.07


def test_runs_of_one_name_are_told_by_their_ids(table):
    plan, records = table
    ids = [r.run_id for r in records if r.point["cell"] == "near"]
    with storage_at(plan.where.storage):
        shown = call(compare.main, *ids, "--alone", "--metric", "val/map").output
    assert all(f"({run_id[:8]})" in shown for run_id in ids)


def test_the_mean_accuracy_of_several_sets_is_compared():
    """Influences of every set, as many times smaller as there are sets; people of two sets are two people."""
    rows = []
    for name, better in (("a", 0.0), ("b", 0.3)):
        sets = {}
        for number, of_set in enumerate(("lfw", "orl")):
            own = np.random.default_rng(number)
            same_P, people_P2 = own.random(400) < 0.5, own.integers(0, 40, (400, 2))
            score_P = own.normal(0, 0.5, 400) + same_P * (0.5 + better)
            sets[of_set] = PairScores(score_P.clip(-1, 1), same_P, people_P2)
        rows.append(compared.Row(name, "demo", "margin_softmax", (name,), pairs=(sets,)))
    assert all(row.has("val/accuracy") and not row.has("val/eer") for row in rows)
    means = [np.mean([row.mean(f"{name}/accuracy") for name in ("lfw", "orl")]) for row in rows]
    _, found = compared.differences(rows, 0, "val/accuracy")
    assert found.value == pytest.approx(means[1] - means[0])
    alone = [compared.differences(rows, 0, f"{name}/accuracy")[1].error for name in ("lfw", "orl")]
    assert found.error == pytest.approx(np.hypot(*alone) / 2, rel=0.02) and found.identities == 80
    assert "val/accuracy" in [metric.name for metric in rows[0].metrics]


def test_what_cannot_be_compared_is_one_line(table):
    plan, records = table
    with storage_at(plan.where.storage):
        assert "a comparison needs two or more" in error(compare.main, records[0].run_id)
        assert "has no run 'nobody'" in error(compare.main, records[0].run_id, "nobody")
        whole = summary.summarise(plan, records)
        assert "is of a whole sweep or campaign (summary); name one of its trials" in error(
            compare.main, records[0].run_id, whole
        )
        assert "is of a whole sweep or campaign (summary); name one of its trials" in error(evaluate.main, whole)
        assert "is named twice" in error(compare.main, records[0].run_id, records[0].run_id)
        ids = records[0].run_id, records[1].run_id
        line = error(compare.main, *ids, "--metric", "val/mop")
        assert "--metric val/mop has no scores of single queries" in line and "did you mean val/map" in line
        assert "; there are: val/map, " in error(compare.main, *ids, "--metric", "nonsense")


def test_a_storage_that_is_not_there_is_not_made(empty):
    for line in (error(compare.main, "a", "b"), error(evaluate.main, "a"), error(export.main, "a")):
        assert f"there is no {empty}/mlflow.db" in line and "set ORCHESTRATOR_STORAGE to where they are" in line
    assert not empty.exists()


def test_a_server_that_is_away_is_no_missing_run(empty, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for line in (error(compare.main, "a", "b"), error(evaluate.main, "a")):
        assert "MLFLOW_TRACKING_URI=http://127.0.0.1:9 does not answer" in line


def test_other_queries_are_refused(table):
    plan, records = table
    row = compared.row_of(plan.tracking_uri, records[0].run_id, alone=True)
    queries = row.queries[0]
    other = compared.Row("other", "folder", row.method, ("x",), (Queries(queries.identity_Q[:-1], {}),))
    with pytest.raises(ValueError, match="other on folder has scored other queries"):
        compared.check_same_queries([row, other])
    renamed = replace(row, title="another folder", data={**row.data, "query": "0" * 64})
    with pytest.raises(ValueError, match="another folder on folder has scored other queries"):
        compared.check_same_queries([row, renamed])
    faces = compared.Row("faces", "folder", "arcface", ("y",), pairs=({},))
    with pytest.raises(ValueError, match=r"faces \(arcface\) has scores of single pairs, .* of single queries"):
        compared.check_same_queries([row, faces])
    assert row.data.keys() == {"query", "gallery"}
    assert np.isfinite(queries.scores["val/map"]).any()


@pytest.mark.slow
def test_rates_of_pairs_are_compared(empty, monkeypatch):
    """Of face verification, with the pairs that its runs have stored."""
    rows = {"a": {}, "b": {"train.rate": 1e-4}}
    space = SearchSpace(method="margin_softmax", question="Which?", cells=rows, seeds=(0, 1))
    monkeypatch.setattr(find, "space", lambda name: space)
    small = settings("margin_softmax", **{"train.rate": None, "train.epochs": 1})
    call(sweep.main, "two faces", "--on", "demo", "--in-process", *small)
    plan = shelf.latest("two faces")
    records = study.records(plan)
    ids = {(r.point["cell"], r.point["seed"]): r.run_id for r in records}
    shown = call(compare.main, ids["a", 0], ids["b", 0]).output
    assert (
        "a: 2 seed(s)" in shown
        and "val/eer, less is better" in " ".join(shown.split())
        and "pairs that share one of 60 people" in shown
    )
    first, second = (compared.row_of(plan.tracking_uri, ids[cell, 1]) for cell in "ab")
    assert "resamples of 60 identities" in " ".join(shown.split()), "of the images that are searched with"
    for metric in ("val/accuracy", "val/tar_1e-2", "val/auc", "val/rank1", "val/rank5"):
        expected = [r.metrics[metric] for r in records if r.point["cell"] == "a"]
        assert first.seeds(metric) == pytest.approx(expected, abs=1e-6), "of what is stored, as it was logged"
        _, found = compared.differences([first, second], 0, metric)
        assert found.over_seeds and found.low <= found.value <= found.high
    assert "--metric val/accuracy_plain has no scores of single queries or pairs" in error(
        compare.main, ids["a", 0], ids["b", 0], "--metric", "val/accuracy_plain"
    )
    html, _ = summary.write_report(plan)
    assert "Which rows are told apart from the best" in html.with_suffix(".md").read_text()
