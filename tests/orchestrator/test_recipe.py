"""Recipes: names as people write them, values parsed and refused, and every recipe and space as it is published."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator import find
from orchestrator.families.asymmetric import AsymmetricRecipe
from orchestrator.launch import asked
from orchestrator.recipe import (
    Count,
    Network,
    Recipe,
    Teacher,
    changed,
    check_field,
    did_you_mean,
    differing,
    fields_of,
    flat,
    path_of,
    recipe_from,
    short,
    value_of,
)

RECIPES = [(method, name) for method in find.methods() for name in find.method(method).recipes]
FAMILY = [name for name in find.methods() if find.method(name).family == "asymmetric"]


@dataclass(frozen=True, kw_only=True)
class Toy(Recipe):
    student: Network = field(default_factory=Network)
    teacher: Teacher = field(default_factory=Teacher)
    beta: float = 0.5
    size_of_bank: Count = 8


def d3still():
    return find.recipe("d3still", "demo")


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("beta", "beta"),
        ("student.size", "student.size"),
        ("momentum", "train.momentum"),
        ("loader_workers", "run.loader_workers"),
        ("teacher.epochs", "teacher.train.epochs"),
        ("teacher.size", "teacher.network.size"),
        ("teacher.network.size", "teacher.network.size"),
        ("train.epochs", "train.epochs"),
        ("teacher.weights", "teacher.weights"),  # an exact path wins over teacher.network.weights
        ("data.name", "data.name"),
    ],
)
def test_a_name_is_any_part_of_its_path_that_is_its_own(name, path):
    assert path_of(Toy(), name) == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("size", "size is student.size or teacher.size; say which"),
        ("epochs", "epochs is train.epochs or teacher.epochs; say which"),
        ("name", "name is data.name or student.name or teacher.name; say which"),
        ("bta", "the recipe has no field 'bta'; did you mean beta?"),
        ("momentom", "the recipe has no field 'momentom'; did you mean momentum?"),
        ("teacher.momentum", "no field 'teacher.momentum'; did you mean"),
        ("student.epochs", "no field 'student.epochs'; did you mean"),
        ("student", "the recipe has no field 'student'"),  # a group is no field
        ("", "the recipe has no field ''"),
    ],
)
def test_what_is_ambiguous_or_unknown_is_refused_with_what_could_be_meant(name, message):
    with pytest.raises(ValueError) as error:
        path_of(Toy(), name)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("method", find.methods())
def test_the_shortest_name_of_every_field_means_that_field(method):
    recipe = find.recipe(method, "demo")
    paths = fields_of(recipe)
    assert [path_of(recipe, short(path, paths)) for path in paths] == list(paths)


def test_names_that_miss_entirely_list_everything():
    assert did_you_mean("xyz", ["b", "a"]) == "; there are: a, b"


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("beta", "0.3", 0.3), ("top_k", "12", 12), ("top_k", 12.0, 12), ("views", "clean", "clean"),
        ("coupled", "true", True), ("coupled", "no", False), ("student.size", "48x32", (48, 32)),
        ("student.size", "48,32", (48, 32)), ("student.size", [48, 32], (48, 32)), ("alpha", 50, 50.0),
        ("teacher.epochs", "20", 20),
    ],
)  # fmt: skip
def test_settings_are_parsed(name, text, value):
    recipe = changed(d3still(), {name: text})
    found = value_of(recipe, path_of(recipe, name))
    assert found == value and type(found) is type(value)
    assert check_field(d3still(), name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bta", "1", "no field 'bta'; did you mean beta"),
        ("beta", "-0.1", "beta must be at least 0, got -0.1"),
        ("beta", "much", "beta must be a number, got 'much'"),
        ("beta", "nan", "beta must be a number"),
        ("beta", True, "beta must be a number, got True"),
        ("top_k", "1", "top_k must be at least 2"),
        ("top_k", "2.5", "top_k must be a whole number"),
        ("top_k", True, "top_k must be a whole number"),
        ("flip", "1.5", "flip must be at least 0 and at most 1"),
        ("fraction", "0", "fraction must be above 0 and at most 1"),
        ("train.rate", "0", "train.rate must be above 0"),
        ("views", "none", "views must be one of 'online', 'recorded', 'clean'"),
        ("coupled", "maybe", "coupled must be true or false"),
        ("student.size", "64", "student.size must be 2 numbers"),
        ("student.size", "4x64", "student.size must be at least 8"),
        ("size", "64x64", "size is student.size or teacher.size; say which"),
    ],
)
def test_bad_settings_name_value_and_remedy(name, text, message):
    for refuse in (lambda: changed(d3still(), {name: text}), lambda: check_field(d3still(), name, text)):
        with pytest.raises(ValueError, match=message):
            refuse()


def test_a_field_is_set_once_however_it_is_written():
    with pytest.raises(ValueError, match=r"train.momentum is set twice"):
        changed(d3still(), {"momentum": 0.5, "train.momentum": 0.6})


def test_options_that_are_whole_numbers_are_read_from_text():
    recipe = changed(find.recipe("sureid", "demo"), {"keep_column": "0"})
    assert recipe.pruning.keep_column == 0 and isinstance(recipe.pruning.keep_column, int)


def test_files_become_absolute_where_they_are_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert changed(d3still(), {"teacher.weights": "t.safetensors"}).teacher.weights == str(tmp_path / "t.safetensors")
    assert changed(d3still(), {"student.weights": "~/s.pth"}).student.weights == str(Path("~/s.pth").expanduser())
    assert changed(d3still(), {"teacher.weights": ""}).teacher.weights == ""


def test_changing_a_recipe_leaves_the_old_one_and_every_other_field():
    base = d3still()
    then, other = flat(base), changed(base, {"teacher.epochs": 3, "beta": 1.0})
    assert flat(base) == then
    assert {k for k, v in flat(other).items() if v != then[k]} == {"teacher.train.epochs", "beta"}
    assert differing(other, base) == {"teacher.epochs": 3, "beta": 1.0}


def test_what_differs_is_named_as_shortly_as_possible():
    other = changed(Toy(), {"student.size": (32, 48), "momentum": 0.5, "teacher.rate": 1.0})
    assert differing(other, Toy()) == {"momentum": 0.5, "student.size": [32, 48], "teacher.rate": 1.0}
    assert differing(Toy(), Toy()) == {}
    assert differing(Toy(), Recipe())["beta"] == 0.5  # a field that the other does not have


@pytest.mark.parametrize(("method", "benchmark"), RECIPES)
def test_every_recipe_survives_its_record(method, benchmark):
    """Every value is inside its own range, and nothing of a recipe is outside its record."""
    recipe = find.recipe(method, benchmark)
    stored = json.loads(json.dumps(flat(recipe)))
    assert recipe_from(find.recipe(method, "demo"), stored) == recipe


def test_a_record_with_a_field_of_another_method_is_refused():
    with pytest.raises(ValueError, match="the recipe has no field 'gamm'; did you mean gamma"):
        recipe_from(d3still(), {"gamm": 1})
    with pytest.raises(ValueError, match="the recipe has no field 'momentum'"):  # a record holds whole paths
        recipe_from(d3still(), {"momentum": 0.5})


# --- Every recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", find.methods())
def test_every_method_says_what_it_is_and_measures(method):
    found = find.method(method)
    assert "demo" in found.recipes and found.paper and found.family and found.metrics
    assert len({m.name for m in found.metrics}) == len(found.metrics)
    found.check(found.recipes["demo"], 1)


def test_the_paper_s_recipes():
    for benchmark in ("inshop", "sop", "msmt17"):
        r = find.recipe("d3still", benchmark)
        assert (r.alpha, r.beta, r.gamma, r.top_k, r.margin, r.batch_size) == (100, 0.2, 0.1, 10, 0.1, 512)
        assert (r.student.name, r.student.size) == ("resnet18.tv_in1k", (64, 64))
        assert (r.teacher.network.name, r.teacher.network.size) == ("resnet101.tv_in1k", (256, 256))
        train, augment = r.train, r.augment
        assert (train.rate, train.momentum, train.weight_decay, train.epochs) == (0.01, 0.9, 5e-4, 120)
        assert (augment.flip, augment.erase) == (0.5, 0.5)
        assert (r.mode, r.views, r.embedding_dim, r.student.pretrained) == ("paper", "online", 512, True)
    repo = find.recipe("d3still", "cub200_repo")
    assert (repo.mode, repo.batch_size, repo.student.size, repo.augment.erase) == ("repo", 256, (128, 128), 0.0)
    assert (repo.alpha, repo.beta * 9, repo.gamma * 9) == pytest.approx((100, 5, 1))


# Weights of the authors' code by benchmark and method, from their configurations.
REPO = {
    "fitnet": {"weight": (2, 5, 2, 5)},
    "cckd": {"weight": (5, 10, 5, 5)},
    "csd": {"weight": (10, 20, 5, 10)},
    "raml": {"weight": (10, 20, 5, 10)},
    "rop": {"weight": (1, 2, 0.5, 1)},
    "pkt": {"weight": (30_000,) * 4},
    "rkd": {"distance": (25,) * 4, "angle": (50,) * 4},
    "vanillakd": {"weight": (1,) * 4, "temperature": (2,) * 4},
    "ugd": {"alpha": (2, 5, 1, 3), "beta": (2,) * 4, "batch_size": (96,) * 4},
    "d3still": {"alpha": (100, 200, 50, 100)},
}
PLACES = ("inshop_repo", "sop_repo_mobilenet", "msmt17_repo", "msmt17_repo_mobilenet")


@pytest.mark.parametrize("method", REPO)
def test_the_authors_weights(method):
    for name, values in REPO[method].items():
        assert tuple(getattr(find.recipe(method, p), name) for p in PLACES) == values
    r = find.recipe(method, "msmt17_repo_large")
    teacher, student = r.teacher.network, r.student
    assert (r.mode, teacher.size, teacher.pad, student.size, student.pad) == ("repo", (480, 240), 12, (160, 80), 4)
    assert find.recipe(method, "cub200_repo").augment.erase == 0 and r.augment.erase == 0.5


def test_special_weights_of_the_authors_code():
    assert find.recipe("cckd", "msmt17_repo_large").weight == 2
    assert find.recipe("ugd", "inshop_repo_swin").alpha == 5
    assert (find.recipe("csd", "inshop").top_k, find.recipe("csd", "inshop_repo").top_k) == (96, 256)
    swin = find.recipe("rop", "cub200_repo_swin")
    assert (swin.teacher.train.optimizer, swin.teacher.train.rate, swin.top_k) == ("adamw", 1e-4, 256)
    raml = find.method("raml")
    assert find.recipe("raml", "inshop").lambda2_slip is False and find.recipe("raml", "sop_repo").lambda2_slip is True
    assert raml.paper.endswith("WACV 2023")


@pytest.mark.parametrize("benchmark", list(find.method("fitnet").recipes))
def test_methods_of_a_family_share_every_setting_but_their_own(benchmark):
    """Equal budget: what is not a method's own number is the same for all of them."""
    shared = set(fields_of(AsymmetricRecipe()))
    shared -= {"double_losses", "together"} | ({"batch_size"} if "_repo" in benchmark else set())
    recipes = [{k: v for k, v in flat(find.recipe(m, benchmark)).items() if k in shared} for m in FAMILY]
    assert len(recipes) > 10 and all(r == recipes[0] for r in recipes)


# --- Values that are allowed alone, not together ----------------------------------------------------------------------


def test_a_data_set_without_reader_is_named():
    with pytest.raises(ValueError, match="no data set reader 'sob'; did you mean sop"):
        find.method("d3still").check(changed(d3still(), {"data.name": "sob"}), 1)


@pytest.mark.parametrize(
    ("method", "settings", "workers", "message"),
    [
        ("d3still", {"top_k": 600}, 1, r"top_k \(600\) must be at most batch_size \(120\)"),
        ("d3still", {"batch_size": 16}, 3, "a batch of 16 images cannot be shared evenly by 3 workers"),
        (
            "d3still",
            {"mode": "repo", "batch_size": 16, "top_k": 4, "labelled.identities_per_batch": 4,
             "labelled.images_per_identity": 2},
            16,
            "= 8 images cannot be shared evenly by 16 workers",
        ),
        ("d3still", {"alpha": 0, "beta": 0, "gamma": 0}, 1, "nothing to train on"),
        (
            "d3still",
            {"alpha": 0, "beta": 0, "gamma": 0, "mode": "repo", "cross_entropy": 0},
            1,
            "or only the triplet, which never reaches the neck",
        ),
        ("d3still", {"constant_epochs": 1}, 1, r"constant_epochs \(1\) must not end before warmup_epochs \(2\)"),
        ("d3still", {"views": "clean", "coupled": True}, 1, "coupled=true needs views=online or views=recorded"),
        ("supervised", {"cross_entropy": 0}, 1, "cross_entropy must be above 0: the triplet loss alone"),
        ("csd", {"top_k": 121}, 1, r"top_k \(121\) must be at most batch_size \(120\)"),
        ("aml", {"variant": "triplet"}, 1, "variant=triplet needs images of one identity in the batch; set together"),
        ("aml", {"variant": "triplet", "together": 2, "batch_size": 6}, 1, "has no 5 negatives"),
        ("aml", {"symmetric": True}, 1, "symmetric=true needs another variant"),
        ("aml", {"together": 7}, 1, "must hold several identities of together"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_go_together_are_refused(method, settings, workers, message):
    with pytest.raises(ValueError, match=message):
        find.method(method).check(changed(find.recipe(method, "demo"), settings), workers)


def test_neighbours_of_the_whole_set_may_be_more_than_the_batch():
    find.method("csd").check(changed(find.recipe("csd", "demo"), {"top_k": 121, "neighbours": "train"}), 1)


@pytest.mark.parametrize("method", FAMILY)
def test_every_method_refuses_a_batch_of_one(method):
    recipe = find.recipe(method, "demo")
    with pytest.raises(ValueError, match="batch_size must be at least 2, got 1"):
        changed(recipe, {"batch_size": 1})
    with pytest.raises(ValueError, match=r"leaves 60 workers fewer than 2 each|neighbours are taken"):
        find.method(method).check(changed(recipe, {"batch_size": 60}), 60)


# --- Names of files ---------------------------------------------------------------------------------------------------


def test_names_are_found_by_file_with_near_ones_named():
    assert {"d3still", "supervised", "sureid"} <= set(find.methods())
    assert {"demo", "omniglot", "folder"} <= set(find.datasets())
    for call, message in (
        (lambda: find.method("d3stil"), "no method 'd3stil'; did you mean d3still"),
        (lambda: find.space("d3still_beta"), "did you mean d3still_beta_gamma"),
        (lambda: find.dataset("omniglott"), "did you mean omniglot"),
        (lambda: find.dataset("images"), "no data set reader 'images'"),  # a file of the package without a reader
        (lambda: find.recipe("d3still", "sopp"), "did you mean sop"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- Spaces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", find.spaces())
def test_every_space_fits_its_methods(name):
    """Every row and every corner is accepted, and the paper's value is inside and first."""
    space = find.space(name)
    assert space.question and find._module("search_spaces", name).__doc__
    recipes, _ = asked.resolve(space, "demo", {}, None, "")
    assert set(recipes) == set(space.methods)
    # A table under a paper's name has that paper's full size somewhere; the demo decides nothing of it.
    full = next(b for b in ("sop", "occluded_duke", "cuhk_sysu", "ms1mv2") if b in find.method(space.method).recipes)
    paper = find.recipe(space.method, full)
    defaults = {name: value_of(paper, path_of(paper, name)) for name in space.tune}
    assert all(defaults[name] in bounds for name, bounds in space.tune.items())
    if space.start:
        assert dict(space.start[0]) == defaults
    known = {m.name for m in find.method(space.method).metrics}
    assert space.metric in known | {""} and set(space.picture) <= set(space.tune)


def test_every_compared_method_has_its_space():
    spaces, others = set(find.spaces()), set(FAMILY) - {"d3still"}
    assert {f"{method}_weight" for method in others} <= spaces
    assert set(find.space("asymmetric_baselines").methods) == set(FAMILY)


def test_a_cell_names_its_method():
    space = find.space("asymmetric_baselines")
    assert space.methods[0] == "d3still"
    point = {"cell": "CSD whole set", "seed": 1}
    assert space.method_of(point) == "csd"
    assert space.settings(point) == {"evaluate_symmetric": True, "neighbours": "train", "train.seed": 1}
    assert find.space("d3still_beta_gamma").methods == ("d3still",)


def test_recipes_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        d3still().train.epochs = 3
