"""The contract: settings are parsed and refused by field; every recipe and space is valid; names are found."""

import dataclasses

import pytest

from orchestrator import find
from orchestrator.method import Losses, Place, changed, did_you_mean, recipe_dict, recipe_from
from orchestrator.methods import asymmetric


def d3still():
    return find.recipe("d3still", "demo")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("beta", "0.3", 0.3), ("top_k", "12", 12), ("views", "clean", "clean"), ("coupled", "true", True),
        ("student_size", "48x32", (48, 32)), ("student_size", [48, 32], (48, 32)), ("alpha", 50, 50.0),
    ],
)  # fmt: skip
def test_settings_are_parsed(name, text, value):
    assert getattr(changed(d3still(), {name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bta", "1", "no field 'bta'; did you mean beta"),
        ("beta", "-0.1", "beta must be at least 0, got -0.1"),
        ("beta", "much", "beta must be a number, got 'much'"),
        ("beta", "nan", "beta must be a number"),
        ("top_k", "1", "top_k must be at least 2"),
        ("top_k", "2.5", "top_k must be a whole number"),
        ("flip", "1.5", "flip must be at least 0 and at most 1"),
        ("learning_rate", "0", "learning_rate must be above 0"),
        ("views", "none", "views must be one of 'online', 'recorded', 'clean'"),
        ("coupled", "maybe", "coupled must be true or false"),
        ("student_size", "64", "student_size must be 2 numbers"),
        ("student_size", "4x64", "student_size must be at least 8"),
    ],
)
def test_bad_settings_name_value_and_remedy(name, text, message):
    with pytest.raises(ValueError, match=message):
        changed(d3still(), {name: text})


@pytest.mark.parametrize("method", find.methods())
def test_every_recipe_is_valid_and_survives_its_record(method):
    found = find.method(method)
    assert "demo" in found.recipes and found.paper
    for recipe in found.recipes.values():
        assert recipe_from(recipe, recipe_dict(recipe)) == recipe
        assert changed(recipe, recipe_dict(recipe)) == recipe  # every default is inside its own range
        assert found.prepared_by <= {f.name for f in dataclasses.fields(recipe)}
    found.check(found.recipes["demo"], 1)


def test_the_paper_s_recipes():
    for benchmark in ("inshop", "sop", "msmt17"):
        r = find.recipe("d3still", benchmark)
        assert (r.alpha, r.beta, r.gamma, r.top_k, r.margin, r.batch_size) == (100, 0.2, 0.1, 10, 0.1, 512)
        assert (r.student, r.student_size, r.teacher, r.teacher_size) == (
            "resnet18.tv_in1k", (64, 64), "resnet101.tv_in1k", (256, 256))  # fmt: skip
        assert (r.flip, r.erase, r.learning_rate, r.momentum, r.weight_decay, r.epochs) == (
            0.5,
            0.5,
            0.01,
            0.9,
            5e-4,
            120,
        )
        assert (r.mode, r.views, r.embedding_dim, r.pretrained) == ("paper", "online", 512, True)
    repo = find.recipe("d3still", "cub200_repo")
    assert (repo.mode, repo.batch_size, repo.student_size, repo.erase) == ("repo", 256, (128, 128), 0.0)
    assert (repo.alpha, repo.beta * 9, repo.gamma * 9) == pytest.approx((100, 5, 1))


def test_top_k_above_the_batch_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="top_k \\(600\\) must be at most batch_size \\(512\\)"):
        find.method("d3still").check(dataclasses.replace(find.recipe("d3still", "sop"), dataset="demo", top_k=600), 1)


def test_batches_must_divide_and_something_must_be_trained(tiny_recipe):
    check = find.method("d3still").check
    with pytest.raises(ValueError, match="a batch of 16 images cannot be shared evenly by 3 workers"):
        check(tiny_recipe(), 3)
    with pytest.raises(ValueError, match="= 8 images cannot be shared evenly by 16 workers"):
        check(tiny_recipe(mode="repo"), 16)
    with pytest.raises(ValueError, match="nothing to train on"):
        check(tiny_recipe(alpha=0, beta=0, gamma=0), 1)
    with pytest.raises(ValueError, match="cross_entropy must be above 0: the triplet loss alone"):
        recipe = find.recipe("supervised", "demo")
        find.method("supervised").check(changed(recipe, {"cross_entropy": 0}), 1)
    with pytest.raises(ValueError, match="or only the triplet, which never reaches the neck"):
        check(tiny_recipe(alpha=0, beta=0, gamma=0, mode="repo", cross_entropy=0), 1)


def test_files_become_absolute_where_they_are_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert changed(d3still(), {"teacher_weights": "t.safetensors"}).teacher_weights == str(tmp_path / "t.safetensors")


def test_a_data_set_without_reader_is_named():
    with pytest.raises(ValueError, match="no data set reader 'sob'; did you mean sop"):
        find.method("d3still").check(dataclasses.replace(find.recipe("d3still", "sop"), dataset="sob"), 1)


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
    assert (r.mode, r.teacher_size, r.teacher_pad, r.student_size, r.student_pad) == (
        "repo", (480, 240), 12, (160, 80), 4)  # fmt: skip
    assert find.recipe(method, "cub200_repo").erase == 0 and r.erase == 0.5


def test_special_weights_of_the_authors_code():
    assert find.recipe("cckd", "msmt17_repo_large").weight == 2
    assert find.recipe("ugd", "inshop_repo_swin").alpha == 5
    assert (find.recipe("csd", "inshop").top_k, find.recipe("csd", "inshop_repo").top_k) == (96, 256)
    swin = find.recipe("rop", "cub200_repo_swin")
    assert (swin.teacher_optimizer, swin.teacher_learning_rate, swin.top_k) == ("adamw", 1e-4, 256)
    raml = find.method("raml")
    assert find.recipe("raml", "inshop").lambda2_slip is False and find.recipe("raml", "sop_repo").lambda2_slip is True
    assert raml.paper.endswith("WACV 2023")


@pytest.mark.parametrize("benchmark", list(find.method("fitnet").recipes))
def test_methods_of_a_family_share_every_setting_but_their_own(benchmark):
    """Equal budget: what is not a method's own number is the same for all of them."""
    shared = {f.name for f in dataclasses.fields(asymmetric.AsymmetricRecipe)}
    shared -= {"double_losses", "together"} | ({"batch_size"} if "_repo" in benchmark else set())
    family = [m for m in find.methods() if m not in ("supervised", "sureid")]
    recipes = [{k: v for k, v in recipe_dict(find.recipe(m, benchmark)).items() if k in shared} for m in family]
    assert all(r == recipes[0] for r in recipes)


@pytest.mark.parametrize("method", [m for m in find.methods() if m not in ("supervised", "sureid")])
def test_every_method_refuses_a_batch_of_one(method):
    recipe = find.recipe(method, "demo")
    with pytest.raises(ValueError, match="batch_size must be at least 2, got 1"):
        changed(recipe, {"batch_size": 1})
    with pytest.raises(ValueError, match=r"leaves 60 workers fewer than 2 each|neighbours are taken"):
        find.method(method).check(changed(recipe, {"batch_size": 60}), 60)


def test_neighbours_and_tuples_that_cannot_be_had_are_refused():
    csd, aml = find.recipe("csd", "demo"), find.recipe("aml", "demo")
    with pytest.raises(ValueError, match=r"top_k \(121\) must be at most batch_size \(120\)"):
        find.method("csd").check(changed(csd, {"top_k": 121}), 1)
    find.method("csd").check(changed(csd, {"top_k": 121, "neighbours": "train"}), 1)
    with pytest.raises(ValueError, match="variant=triplet needs images of one identity in the batch; set together"):
        find.method("aml").check(changed(aml, {"variant": "triplet"}), 1)
    with pytest.raises(ValueError, match="has no 5 negatives"):
        find.method("aml").check(changed(aml, {"variant": "triplet", "together": 2, "batch_size": 6}), 1)
    with pytest.raises(ValueError, match="symmetric=true needs another variant"):
        find.method("aml").check(changed(aml, {"symmetric": True}), 1)
    with pytest.raises(ValueError, match="must hold several identities of together"):
        find.method("aml").check(changed(aml, {"together": 7}), 1)


def test_names_are_found_by_file_with_near_ones_named():
    assert {"d3still", "supervised"} <= set(find.methods())
    assert {"demo", "omniglot", "folder"} <= set(find.datasets())
    for call, message in (
        (lambda: find.method("d3stil"), "no method 'd3stil'; did you mean d3still"),
        (lambda: find.space("d3still_beta"), "did you mean d3still_beta_gamma"),
        (lambda: find.dataset("omniglott"), "did you mean omniglot"),
        (lambda: find.recipe("d3still", "sopp"), "did you mean sop"),
        (lambda: find.method("asymmetric"), "no method 'asymmetric'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert did_you_mean("xyz", ["b", "a"]) == "; there are: a, b"


@pytest.mark.parametrize("name", find.names("search_spaces"))
def test_every_space_fits_its_methods(name):
    space = find.space(name)
    assert space.question and find._module("search_spaces", name).__doc__
    for point in space.table():
        recipe = changed(find.recipe(space.method_of(point), "demo"), space.settings(point))
        find.method(space.method_of(point)).check(recipe, 1)
    defaults = recipe_dict(find.recipe(space.method, "occluded_duke" if space.method == "sureid" else "sop"))
    for field, bounds in space.tune.items():
        assert defaults[field] in bounds, "the paper's value must be inside the space"
    if space.start:
        assert dict(space.start[0]) == {field: defaults[field] for field in space.tune}


def test_every_compared_method_has_its_space():
    spaces = set(find.names("search_spaces"))
    own = set(find.methods()) - {"supervised", "d3still", "sureid"}
    assert {f"{method}_weight" for method in own} <= spaces
    assert set(find.space("asymmetric_baselines").methods) == own | {"d3still"}


def test_a_cell_names_its_method():
    space = find.space("asymmetric_baselines")
    assert space.methods[0] == "d3still"
    point = {"cell": "CSD whole set", "seed": 1}
    assert space.method_of(point) == "csd"
    assert space.settings(point) == {"evaluate_symmetric": True, "neighbours": "train", "seed": 1}
    assert find.space("d3still_beta_gamma").methods == ("d3still",)


def test_losses_weigh_named_terms():
    assert Losses({"a": 2.0, "b": 3.0}, {"a": 0.5, "b": 2.0}).total == 7.0


def test_place_joins_paths():
    assert Place("/x").folder("cache", "y") == "/x/cache/y"
