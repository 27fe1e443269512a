"""What a sweep is, without running one: plans of two versions, and the study that decides what runs."""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from orchestrator import find
from orchestrator.launch import asked, before, shelf, study
from orchestrator.launch import plan as plans
from orchestrator.launch.study import Rungs, Study
from orchestrator.recipe import changed, differing, fields_of, flat, recipe_from
from search_spaces._space import Choice, Float, Int, SearchSpace

GOLDEN = Path(__file__).parents[1] / "golden"
OLD_RECIPES = json.loads((GOLDEN / "v030_recipes.json").read_text())
ALPHA = SearchSpace(
    method="fitnet", question="?", tune={"weight": Float(0.1, 10.0, log=True)}, start=({"weight": 2.0},), trials=4
)


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def planned(storage):
    """Makes the stored plan of a space on demo."""

    def make(space: SearchSpace = ALPHA, name: str = "mine", trials: int | None = None, **settings) -> plans.Plan:
        recipes, place = asked.resolve(space, "demo", settings, None, "")
        total = trials or (len(space.table()) if space.cells else space.trials)
        return shelf.new_plan(name, space, f"{name} on demo", "demo", recipes, place, "sqlite://", total, 4, 1, 0.0)

    return make


@pytest.fixture
def old(storage):
    """Puts a plan of version 0.3 into a storage."""

    def put(name: str, folder: str = "sweep-demo-1", root: Path = storage) -> Path:
        found = root / "sweeps" / folder
        found.mkdir(parents=True)
        (found / "plan.json").write_text((GOLDEN / f"{name}.json").read_text())
        return found

    return put


# --- Of version 0.3 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OLD_RECIPES)
def test_a_recipe_of_03_is_today_s(name):
    method, benchmark = name.split()
    template = find.recipe(method, benchmark)
    read = before.today(OLD_RECIPES[name], template)
    assert set(read) <= set(fields_of(template)), "every old name has a place"
    recipe = recipe_from(template, read)
    expected = {"student.pixels": "imagenet", "teacher.network.pixels": "imagenet", "patches.pixels": "half"}
    # One's own data have had their networks' own pixels only since 0.4: the record of 0.3 keeps what 0.3 did.
    kept = expected if benchmark == "folder" else {}
    assert flat(recipe) == {**flat(template), **{k: v for k, v in kept.items() if k in flat(template)}}
    assert before.is_old(OLD_RECIPES[name]) and not before.is_old(read)
    assert before.today(flat(template), template) == flat(template), "what is of today stays"


def test_a_changed_recipe_of_03_keeps_its_changes():
    values = {**OLD_RECIPES["d3still demo"], "teacher_epochs": 3, "seed": 7, "beta": 0.9, "student_size": [48, 32]}
    template = find.recipe("d3still", "demo")
    recipe = recipe_from(template, before.today(values, template))
    assert differing(recipe, template) == {
        "train.seed": 7, "student.size": [48, 32], "teacher.epochs": 3, "beta": 0.9
    }  # fmt: skip


def test_names_that_a_recipe_has_itself_are_left():
    d3still = find.recipe("d3still", "demo")
    values = {"cell": "x", "seed": 1, "method": "csd", "beta": 1, "student.size": "8x8", "epochs": 2, "erase": 0.1}
    assert before.renamed(values, d3still) == {
        "cell": "x", "seed": 1, "method": "csd", "beta": 1, "student.size": "8x8", "train.epochs": 2,
        "augment.erase": 0.1,
    }  # fmt: skip
    assert before.renamed({"erase": 0.1}, find.recipe("sureid", "demo")) == {"views.erase": 0.1}
    assert before.renamed({"no_such": 1}, d3still) == {"no_such": 1}


def test_a_space_of_03_varies_the_fields_of_today():
    data = {
        "tune": {"teacher_epochs": ["Int", {}], "beta": ["Float", {}]},
        "fix": {"student_size": [32, 32]},
        "cells": {"B": {"method": "csd", "teacher": "resnet50"}},
        "start": [{"teacher_epochs": 2, "beta": 1.0}],
        "picture": ["teacher_epochs", "beta"],
        "question": "?",
    }
    assert before.space_today(data, find.recipe("d3still", "demo")) == {
        "tune": {"teacher.train.epochs": ["Int", {}], "beta": ["Float", {}]},
        "fix": {"student.size": [32, 32]},
        "cells": {"B": {"method": "csd", "teacher.network.name": "resnet50"}},
        "start": [{"teacher.train.epochs": 2, "beta": 1.0}],
        "picture": ["teacher.train.epochs", "beta"],
        "question": "?",
    }


def test_a_plan_of_03_is_read_stored_and_read_again(old, storage):
    folder = old("v030_sweep", "d3still_beta_gamma-demo-1")
    plan = shelf.read(folder)
    recipe = plan.base_recipe("d3still")
    assert (recipe.student.size, recipe.student.width, recipe.train.epochs) == ((16, 16), 0.0625, 2)
    assert (recipe.teacher.train.epochs, recipe.teacher.network.width, recipe.views) == (1, 0.0625, "clean")
    assert plan.metric == "val/map" and plan.search_space == find.space("d3still_beta_gamma").__class__(
        **{**vars(find.space("d3still_beta_gamma")), "metric": "val/map"}
    )
    assert plan.recipe_of({"beta": 1.0, "gamma": 0.5})[1].gamma == 0.5
    (told,) = plan.told()
    assert told["teacher_metrics"]["val/map"] == 0.011771785740495163 and told["teacher"] == "resnet18@16"
    assert told["chance_metrics"]["val/rank1"] == 0.009375
    found = before.fingerprints(plan.facts)
    assert {role: len(known) for role, known in found.items()} == {
        "train": 1, "query": 1, "gallery": 1, "classes": 1, "teacher": 1
    }  # fmt: skip
    assert plan.format == plans.FORMAT
    shelf.save(plan)
    assert shelf.read(folder) == plan and json.loads((folder / "plan.json").read_text())["format"] == plans.FORMAT


def test_a_teacher_of_03_is_found_by_the_name_it_had(old):
    plan = shelf.read(old("v030_teacher", "teacher-cef3e3a6-demo-1"))
    (train,) = before.fingerprints(plan.facts)["train"]
    values = flat(plan.base_recipe("supervised"))
    assert before.teacher_folder(values, {"train": train}) == "cef3e3a621d2cb6d07ed59e4a476dca0"
    assert before.teacher_folder({**values, "run.loader_workers": 9}, {"train": train}).startswith("cef3e3a6")
    assert not before.teacher_folder({**values, "train.epochs": 9}, {"train": train}).startswith("cef3e3a6")
    assert before.teacher_folder({**values, "student.pixels": "half"}, {"train": train}) is None, "0.3 had no such"


def test_a_plan_of_02_had_one_method(old):
    folder = old("v030_teacher", "teacher-cef3e3a6-demo-1")
    data = json.loads((folder / "plan.json").read_text())
    ((data["method"], data["recipe"]),) = data.pop("recipes").items()
    (folder / "plan.json").write_text(json.dumps(data))
    assert shelf.read(folder).base_recipe("supervised").embedding_dim == 8


# --- Plans on disk ----------------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_stored(planned):
    plan = planned(**{"student.size": "48x32"})
    assert shelf.read(Path(plan.folder)) == plan
    assert (plan.sweep, plan.concurrent, plan.metric) == ("mine-demo-1", 4, "val/map")
    assert plan.base_recipe("fitnet").student.size == (48, 32) and plan.search_space == ALPHA
    assert plan.tag == f"mine-demo-1-{plan.key[:8]}" and planned().sweep == "mine-demo-2"


@pytest.mark.parametrize("name", find.spaces())
def test_every_space_survives_its_plan(name):
    space = find.space(name)
    stored = json.loads(json.dumps(plans.space_data(space)))
    plan = plans.Plan("", name, "", "demo", {}, {}, "", 1, space_data=stored)
    assert plan.search_space == space


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"format": plans.FORMAT + 1}), r"is of format 3, this version reads up to 2; update it to go on"),
        ('{"folder": "/x', r"plan.json cannot be read: "),
        ("[]", r"plan.json cannot be read: 'list' object has no attribute"),
        ('{"format": null}', r"plan.json cannot be read: "),
        ('{"format": 2}', r"plan.json cannot be read: KeyError\('method'\)|plan.json cannot be read: 'method'"),
        ('{"format": 2, "recipes": {}, "colour": 1}', r"plan.json cannot be read: .*colour"),
        ({"trials": None}, r"plan.json cannot be read: trials is None, expected int"),
        ({"trials": "x"}, r"plan.json cannot be read: trials is 'x', expected int"),
        ({"recipes": {}}, r"plan.json cannot be read: recipes have none of fitnet"),
        ({"space_data": {}}, r"plan.json cannot be read: 'start'"),
        ({"space_data": None}, r"plan.json cannot be read: space_data is None, expected dict"),
        ({"prepared": [1]}, r"plan.json cannot be read: prepared is \[1\], expected dict"),
        ({"prepared": {"all": {"teacher": {"x": 1}}}}, r"plan.json cannot be read: .*'x'"),
        ({"place": {"storage": 3}}, r"plan.json cannot be read: place.storage is 3, expected a path"),
    ],
)
def test_a_plan_that_cannot_be_read_says_why(storage, planned, text, message):
    folder = Path(planned().folder)
    if isinstance(text, dict):
        text = json.dumps(json.loads((folder / "plan.json").read_text()) | text)
    (folder / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        shelf.read(folder)
    assert "\n" not in str(error.value) and str(storage) in str(error.value)


def test_a_storage_that_was_moved_is_found_again(planned, storage, tmp_path):
    plan = dataclasses.replace(planned(), tracking_uri=f"sqlite:///{storage}/mlflow.db")
    shelf.save(plan)
    storage.rename(tmp_path / "elsewhere")
    moved = shelf.read(tmp_path / "elsewhere" / "sweeps" / plan.sweep)
    assert moved.folder == str(tmp_path / "elsewhere" / "sweeps" / plan.sweep)
    assert moved.place["storage"] == str(tmp_path / "elsewhere")
    assert moved.tracking_uri == f"sqlite:///{tmp_path}/elsewhere/mlflow.db" and moved.key == plan.key
    server = dataclasses.replace(moved, tracking_uri="http://server:5000")
    assert shelf._moved(server, tmp_path / "third" / "sweeps" / plan.sweep).tracking_uri == "http://server:5000"


def test_a_copied_storage_has_the_same_newest_sweep(planned, storage, tmp_path, monkeypatch):
    """Whatever order the copy has written its files in."""
    last = [planned() for _ in range(11)][-1]
    shelf.save(shelf.read(Path(planned(name="other").folder)))
    for path in sorted(storage.glob("sweeps/mine-*/plan.json")):
        shutil.copytree(path.parent, tmp_path / "copy" / "sweeps" / path.parent.name)
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", str(tmp_path / "copy"))
    assert last.sweep == "mine-demo-11" == shelf.latest("mine", "demo").sweep


@pytest.mark.parametrize("name", ["a%20b", "what?x", "a%2Fb"])
def test_a_storage_that_no_database_could_be_in_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", str(tmp_path / name))
    with pytest.raises(ValueError, match="set ORCHESTRATOR_STORAGE to another folder"):
        shelf.storage()
    for fine in ("100% of [it] #1", "ä b"):
        monkeypatch.setenv("ORCHESTRATOR_STORAGE", str(tmp_path / fine))
        assert shelf.storage() == str(tmp_path / fine)


def test_a_renamed_folder_is_not_taken_for_the_original(planned, storage, tmp_path):
    """A copied storage with a renamed sweep in it: what is done there must not be done to the original."""
    plan = planned()
    shutil.copytree(storage, tmp_path / "copy")
    renamed = (tmp_path / "copy" / "sweeps" / plan.sweep).rename(tmp_path / "copy" / "sweeps" / "mine-demo-7")
    with pytest.raises(ValueError, match=rf"it is the plan of {plan.sweep}; give the folder that name again"):
        shelf.read(renamed)


def test_a_damaged_plan_does_not_block_its_neighbours(planned):
    first, second, third = planned(), planned(), planned(name="other")
    damaged = Path(first.folder, "plan.json")
    damaged.write_text("{")
    os.utime(damaged, (first.created, first.created))
    with pytest.warns(UserWarning, match=rf"{first.sweep}/plan.json cannot be read: .*; left out"):
        assert [plan.sweep for plan in shelf.stored("mine")] == [second.sweep]
    assert shelf.latest("mine", "demo").key == second.key and shelf.latest("other").key == third.key
    Path(second.folder, "plan.json").write_text("{")
    with pytest.raises(ValueError, match=f"{second.sweep}/plan.json cannot be read"):
        shelf.latest("mine", "demo")


def test_the_newest_sweep_of_a_name_and_benchmark_is_the_latest(planned):
    first, second, other = planned(), planned(), planned(name="mine-too")
    assert [plan.sweep for plan in shelf.stored("mine")] == [first.sweep, second.sweep]
    assert shelf.latest("mine", "demo").key == second.key and shelf.latest("mine-too").key == other.key
    with pytest.raises(ValueError, match=r"no sweep mine on sop in .*; run python -m orchestrator.sweep mine first"):
        shelf.latest("mine", "sop")
    with pytest.raises(ValueError, match=r"no run fitnet in .*; run python -m orchestrator.train fitnet first"):
        shelf.latest("one", single="fitnet")


def test_a_resumed_sweep_must_be_asked_for_as_it_was(planned, tmp_path):
    plan = planned(**{"teacher.epochs": 3, "student.size": "48x32"})
    unchanged = {"teacher.train.epochs": "3", "student.size": [48, 32], "batch_size": 120}
    asked.check_unchanged(plan, unchanged, 24, "", 1, None)
    asked.check_unchanged(plan, {}, None, "", 1, 0.0)
    with pytest.raises(ValueError) as error:
        asked.check_unchanged(plan, {"teacher.epochs": 4, "student.width": 2}, 9, str(tmp_path), 2, 1.0)
    for part in (
        f"the sweep {plan.sweep} was started with teacher.epochs=3 (asked 4), ",
        "student.width=0.25 (asked 2.0)", "train.epochs=24 (asked 9)", "1 workers (asked 2)",
        "0.0 GPUs a worker (asked 1.0)", f"--data-root  (asked {tmp_path}); resume it without changes",
    ):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no field 'teacher_epochs'"):
        asked.check_unchanged(plan, {"teacher_epochs": 3}, None, "", 1, None)


# --- From names to a plan ---------------------------------------------------------------------------------------------

TABLE = SearchSpace(
    method="d3still",
    question="?",
    cells={"a": {"beta": 0.3}, "b": {"method": "csd", "neighbours": "train"}},
    seeds=(0, 1),
    fix={"evaluate_symmetric": True},
)


@pytest.mark.parametrize(
    ("space", "settings", "message"),
    [
        (ALPHA, {"weight": 3}, "weight is what this sweep varies or fixes; it cannot also be set to 3"),
        (TABLE, {"beta": 1}, "beta is a field of d3still only, not of every method of this sweep"),
        (TABLE, {"evaluate_symmetric": "no"}, "evaluate_symmetric is what this sweep varies or fixes"),
        (TABLE, {"train.seed": 4}, "train.seed is what this sweep varies or fixes; it cannot also be set to 4"),
        (TABLE, {"seed": 4}, "seed is train.seed or teacher.seed; say which"),
        (TABLE, {"neighbours": "batch"}, "neighbours is a field of csd only"),
        (ALPHA, {"wieght": 3}, "no field 'wieght'; did you mean weight"),
        (ALPHA, {"size": "8x8"}, "size is student.size or teacher.size; say which"),
        (ALPHA, {"batch_size": "many"}, "batch_size must be a whole number, got 'many'"),
        (TABLE, {"batch_size": 1}, r"batch_size must be at least 2, got 1 \(method d3still\)"),
        (TABLE, {"batch_size": 7, "together": 2}, r"batch_size \(7\) must hold several .* \(row a\)"),
    ],
)
def test_what_a_sweep_cannot_mean_is_refused(space, settings, message):
    with pytest.raises(ValueError, match=message):
        asked.resolve(space, "demo", settings, None, "")


def test_a_varied_field_is_the_sweep_s_however_it_is_written():
    space = dataclasses.replace(ALPHA, tune={"teacher.epochs": Int(1, 4)}, start=())
    for name in ("teacher.epochs", "teacher.train.epochs"):
        with pytest.raises(ValueError, match=f"{name} is what this sweep varies or fixes"):
            asked.resolve(space, "demo", {name: 2}, None, "")
    with pytest.raises(ValueError, match=r"train\.epochs is what this sweep varies or fixes"):
        asked.resolve(dataclasses.replace(ALPHA, fix={"train.epochs": 2}), "demo", {}, 3, "")


def test_edges_and_corners_of_a_space_are_tried_before_anything_starts():
    def resolved(**tune):
        return asked.resolve(SearchSpace(method="csd", question="?", tune=tune), "demo", {}, None, "")

    with pytest.raises(ValueError, match="top_k must be at least"):
        resolved(top_k=Int(0, 8))
    with pytest.raises(ValueError, match=r"top_k \(99\) must be at most batch_size \(60\)"):
        resolved(top_k=Int(4, 99), batch_size=Choice((60, 120)))
    with pytest.raises(ValueError, match="no recipe for 'sopp'; did you mean sop"):
        asked.resolve(ALPHA, "sopp", {}, None, "")
    with pytest.raises(ValueError, match="a batch of 120 images cannot be shared evenly by 7 workers"):
        asked.resolve(ALPHA, "demo", {}, None, "", workers=7)


def test_a_data_root_must_be_a_folder_and_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    _, place = asked.resolve(ALPHA, "demo", {}, 5, "data")
    assert place.data_root == str(tmp_path / "data")
    with pytest.raises(ValueError, match="--data-root dta is not a directory"):
        asked.resolve(ALPHA, "demo", {}, None, "dta")


def test_variants_are_rows_of_a_table_or_combinations_of_choices(planned):
    table = planned(TABLE)
    assert {name: method for name, (method, _) in plans.variants(table).items()} == {"a": "d3still", "b": "csd"}
    assert plans.variants(table)["a"][1].beta == 0.3 and plans.variants(table)["b"][1].neighbours == "train"
    assert plans.variant_of(TABLE, {"cell": "b", "seed": 1}) == "b" and plans.ranges(table) == []
    space = SearchSpace(
        method="csd", question="?",
        tune={"views": Choice(("clean", "online")), "student.size": Choice(((32, 32), (48, 48))), "top_k": Int(4, 8)},
    )  # fmt: skip
    plan = planned(space)
    found = plans.variants(plan)
    assert len(found) == 4
    point = {"views": "online", "student.size": "48x48", "top_k": 5}
    method, recipe = found[plans.variant_of(space, point)]
    assert (method, recipe.views, recipe.student.size) == ("csd", "online", (48, 48))
    ((name, method, low, high),) = plans.ranges(plan)
    assert (name, method, low.top_k, high.top_k) == ("top_k", "csd", 4, 8)
    assert list(plans.variants(planned())) == ["all"] and plans.variant_of(ALPHA, {"weight": 1.0}) == "all"


# --- The study --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 24, 120])
def test_rungs_decide_as_rays_do(epochs):
    """Also out of order, for trials that report late, skip epochs or say the same again, with ties and NaN."""
    from ray.tune.schedulers.async_hyperband import _Bracket

    class Trial:
        def __init__(self, number):
            self.trial_id = number

    drawn, stopped = random.Random(epochs), 0
    for _ in range(20):
        first = max(1, epochs // 4)
        rays = _Bracket(first, max(epochs, first + 1), 2, 0, stop_last_trials=False)
        ours = Rungs(epochs)
        assert list(ours.recorded) == [milestone for milestone, _ in rays._rungs]
        for _ in range(80):
            trial, epoch = drawn.randrange(8), drawn.randint(1, epochs)
            value = drawn.choice([drawn.random(), 0.5, float("nan")])
            expected = rays.on_result(Trial(trial), epoch, value)
            falls = ours.falls(trial, epoch, value)
            stopped += falls
            assert falls == (expected == "STOP")
        assert ours.recorded.keys() == dict(rays._rungs).keys()
        assert all(list(ours.recorded[m]) == list(values) for m, values in rays._rungs)
    assert stopped > 20, "where nobody stops nothing is shown"


@pytest.mark.parametrize("epochs", range(1, 200))
def test_rungs_are_where_rays_are(epochs):
    rungs = list(Rungs(epochs).recorded)
    assert rungs == sorted(rungs, reverse=True) and rungs[-1] == max(1, epochs // 4) and rungs[0] <= max(epochs, 2)


def test_given_points_come_first_and_sampled_ones_depend_on_seed_and_number_alone(planned):
    def points(plan, reopened: bool, values):
        found, search = [], Study(plan)
        while (given := search.next()) is not None:
            number, point = given
            found.append(point["weight"])
            search.report(number, 1, values(number))
            search.finish(number, {"val/map": values(number), "epoch": 1})
            search = Study(plan) if reopened else search
        return found

    whole = points(planned(), False, lambda number: 0.1 * number)
    assert whole[0] == 2.0 and len(set(whole)) == 4 and all(0.1 <= w <= 10 for w in whole)
    again = points(planned(), True, lambda number: -0.1 * number)
    assert again == whole, "a resumed sweep asks the same; while it samples at random, whatever came out"
    other = points(planned(**{"train.seed": 1}), False, lambda number: 0.1 * number)
    assert other[0] == 2.0 and not set(other[1:]) & set(whole)


@pytest.mark.parametrize("start", [(), ({"student.size": (48, 48)},)], ids=["sampled", "given"])
def test_a_space_may_vary_a_size(planned, start):
    space = SearchSpace(
        method="fitnet", question="Which size?", tune={"student.size": Choice(((32, 32), (48, 48)))}, start=start,
        trials=3,
    )  # fmt: skip
    plan = shelf.read(Path(planned(space).folder))
    search, found = Study(plan), []
    while (given := search.next()) is not None:
        _, recipe = plan.recipe_of(given[1])
        found.append(recipe.student.size)
        assert plans.variant_of(plan.search_space, given[1]) in plans.variants(plan)
        search.finish(given[0], {"val/map": 0.5, "epoch": 1})
    assert len(found) == 3 and set(found) <= {(32, 32), (48, 48)} and (not start or found[0] == (48, 48))


def test_a_driver_that_was_killed_is_followed_by_one_that_goes_on(planned, monkeypatch):
    monkeypatch.setattr(study.tracking, "runs_of", lambda uri, tag: [])
    plan = planned(trials=5)
    assert study.records(plan) == []
    search = Study(plan)
    first, second, third = (search.next() for _ in range(3))
    search.report(0, 1, 0.3)
    search.finish(0, {"val/map": 0.4, "epoch": 24})
    search.fail(1, "no memory")
    assert study.records(plan) != [] and search.left() == 3
    again = Study(plan)
    assert again.next() == third, "what was running comes first, under its number and with its point"
    number, _ = again.next()
    assert number == 3
    again.prune(2, {"val/map": 0.2, "epoch": 6})
    again.finish(3, {"val/map": float("nan"), "epoch": 24})
    number, _ = again.next()
    again.finish(number, {"val/map": 0.9, "epoch": 24})
    assert again.next() is None and again.left() == 0
    rows = study.records(plan)
    assert [(r.status, r.epochs, r.message) for r in rows] == [
        ("completed", 24, ""), ("failed", 0, "no memory"), ("pruned", 6, ""), ("failed", 0, "no finite val/map"),
        ("completed", 24, ""),
    ]  # fmt: skip
    assert [r.number for r in study.ranked(rows)] == [4, 0, 2, 1, 3]
    assert rows[1].point == second[1] and rows[0].point == first[1] and rows[2].value == 0.2


@pytest.mark.parametrize("killed_at", [0, 1, 4])
def test_a_kill_in_the_middle_of_a_new_point_leaves_a_whole_one(planned, monkeypatch, killed_at):
    """A study writes the parameters of a trial one by one; the next driver completes what is there."""
    monkeypatch.setattr(study.tracking, "runs_of", lambda uri, tag: [])
    bounds = {"weight": Float(0.1, 10.0, log=True), "train.rate": Float(1e-4, 0.1), "train.momentum": Float(0.1, 0.9)}
    space = SearchSpace(method="fitnet", question="?", tune=bounds, trials=2)

    def points(plan: plans.Plan, kill: int | None = None) -> list[dict]:
        left = iter([0] * kill if kill is not None else ())
        database = type(Study(plan).optuna._storage)
        whole = database.set_trial_param

        def until(*arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            whole(*arguments)

        if kill is not None:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(database, "set_trial_param", until)
                search = Study(plan)
                for _ in range(2):
                    search.next()
            assert all(len(record.point) == 3 for record in study.records(plan)), "as it will be"
        search = Study(plan)
        return [search.next(), search.next(), search.next()]

    expected = points(planned(space))
    assert expected[2] is None and len(expected[0][1]) == len(expected[1][1]) == 3
    assert points(planned(space), killed_at) == expected


def test_what_is_below_the_median_stops_but_never_what_the_paper_asks_for(planned):
    plan = planned(trials=4, **{"train.epochs": 8})
    search = Study(plan)
    for _ in range(4):
        search.next()
    assert not search.report(1, 2, 0.5) and not search.report(2, 2, 0.6)
    assert not search.report(0, 2, 0.1), "a given point fills the rung and goes on"
    assert search.report(3, 2, 0.2)
    assert not search.report(1, 8, 0.0), "nobody is stopped in the last epoch"
    search.prune(3, {"val/map": 0.2, "epoch": 2})
    again = Study(plan)
    assert again.rungs.recorded[2] == {3: 0.2}, "rungs of finished trials are rebuilt"
    table = planned(dataclasses.replace(TABLE, cells={"a": {}}), name="table")
    rows = Study(table)
    assert [rows.next()[1] for _ in range(2)] == [{"cell": "a", "seed": 0}, {"cell": "a", "seed": 1}]
    assert rows.next() is None and not rows.report(0, 6, 0.9) and not rows.report(1, 6, 0.1)


def test_a_row_is_told_by_its_own_recipe(planned):
    plan = planned(TABLE)
    method, recipe = plan.recipe_of({"cell": "b", "seed": 1})
    assert (method, recipe.neighbours, recipe.train.seed, recipe.evaluate_symmetric) == ("csd", "train", 1, True)
    assert recipe.train.epochs == 24
    assert changed(plan.base_recipe("csd"), {"neighbours": "train", "train.seed": 1}) == recipe
