"""What a resumed sweep asks, and who may drive it."""

import json
import zipfile

import pytest
from command.typed import error

from orchestrator import find, sweep
from orchestrator.launch import plan as plans
from orchestrator.launch import preparing, shelf
from orchestrator.launch.runner import driving
from orchestrator.launch.study import Study
from orchestrator.recipe import flat


def points(folder, interrupted_at: int = -1) -> list:
    """Nine points, each told a better value than the one before; a new driver takes over before one of them."""
    folder.mkdir()
    space = find.space("d3still_beta_gamma")
    recipes = {"d3still": flat(find.recipe("d3still", "demo"))}
    plan = plans.Plan(str(folder), "x", "x", "demo", recipes, {}, "", 9, space_data=plans.space_data(space))
    search, found = Study(plan), []
    for i in range(9):
        if i == interrupted_at:  # the trial before was running and is given again
            search = Study(plan)
            assert search.next() == found[-1]
            search.finish(i - 1, {"epoch": 3, "val/map": 0.1 * i})
        found.append(search.next())
        if i != interrupted_at - 1:
            search.finish(i, {"epoch": 3, "val/map": 0.1 * (i + 1)})
    assert search.next() is None
    return found


def test_suggestions_do_not_depend_on_when_a_sweep_was_interrupted(tmp_path):
    whole = points(tmp_path / "whole")
    assert whole == points(tmp_path / "interrupted", 7)
    assert [number for number, _ in whole] == list(range(9))
    assert len({tuple(point.items()) for _, point in whole}) == 9


def test_one_driver_at_a_time(swept, monkeypatch):
    """And it alone prepares."""
    plan = shelf.latest("d3still_alpha")
    monkeypatch.setattr(preparing, "prepared", lambda *arguments: pytest.fail("prepared beside another driver"))
    with driving(plan):
        line = error(sweep.main, "d3still_alpha", "--on", "folder", "--resume", "--in-process")
    assert "the sweep d3still_alpha-folder-1 is being run by process" in line


def test_plans_of_the_first_version_are_read(tmp_path):
    """They had one method, and its recipe had no groups."""
    folder = tmp_path / "sweeps" / "x-demo-1"
    folder.mkdir(parents=True)
    space = plans.space_data(plans.single("fitnet"))
    old = {"folder": str(folder), "space": "x", "title": "x", "benchmark": "demo", "method": "fitnet",
           "recipe": {"dataset": "demo", "weight": 2.0, "epochs": 7, "teacher_epochs": 3}, "place": {"storage": ""},
           "tracking_uri": "", "trials": 1, "space_data": space}  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(old))
    plan = shelf.read(folder)
    recipe = plan.base_recipe("fitnet")
    assert (recipe.weight, recipe.train.epochs, recipe.teacher.train.epochs) == (2.0, 7, 3)
    shelf.save(plan)
    assert shelf.read(folder) == plan and plan.format == plans.FORMAT


@pytest.mark.parametrize("files", [0, 1])
def test_a_missing_and_an_incomplete_data_set(swept, tmp_path, files):
    if files:
        for part in ("background", "evaluation"):
            with zipfile.ZipFile(tmp_path / f"images_{part}.zip", "w") as archive:
                archive.writestr(f"images_{part}/Greek/character01/0001_01.png", b"")
    line = error(sweep.main, "d3still_alpha", "--on", "omniglot", "--data-root", tmp_path, "--in-process", "--dry-run")
    expected = "has 1 images of 1 characters, expected 19280 of 964" if files else "no images_background.zip in"
    assert expected in line
