"""What ``check`` refuses before anything starts: values that are allowed alone but not together."""

import pytest

from orchestrator import find
from orchestrator.recipe import changed

FAMILY = [name for name in find.methods() if find.method(name).family == "asymmetric"]


def refused(method, recipe, words, workers=1):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        find.method(method).check(recipe, workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", find.methods())
def test_workers_that_cannot_share_the_batch(method, tiny_recipe):
    changes = {"mode": "repo"} if method in FAMILY else {}
    refused(method, tiny_recipe(method, **changes), r"images cannot be shared evenly by 3 workers", workers=3)


@pytest.mark.parametrize("method", FAMILY)
def test_a_batch_of_one(method):
    recipe = find.recipe(method, "demo")
    with pytest.raises(ValueError, match="batch_size must be at least 2, got 1"):
        changed(recipe, {"batch_size": 1})
    words = r"leaves 60 workers fewer than 2 each|neighbours are taken"
    refused(method, changed(recipe, {"batch_size": 60}), words, workers=60)


@pytest.mark.parametrize("method", find.methods())
def test_a_data_set_without_reader(method, tiny_recipe):
    refused(method, tiny_recipe(method, **{"data.name": "foldr"}), "no data set reader 'foldr'; did you mean folder")


@pytest.mark.parametrize("method", find.methods())
def test_a_network_that_nobody_knows(method, tiny_recipe):
    name = "vit_tinny_patch16_224" if method == "sureid" else "resnet188"
    near = "vit_tiny" if method == "sureid" else "resnet18"
    refused(method, tiny_recipe(method, **{"student.name": name, "student.width": 1}), f"did you mean .*{near}")


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("d3still", {"top_k": 17}, r"top_k \(17\) must be at most batch_size \(16\)"),
        ("d3still", {"alpha": 0, "beta": 0, "gamma": 0}, "nothing to train on"),
        ("d3still", {"alpha": 0, "beta": 0, "gamma": 0, "mode": "repo", "cross_entropy": 0},
         "or only the triplet, which never reaches the neck"),
        ("d3still", {"coupled": True, "views": "clean"}, "coupled=true needs views=online or views=recorded"),
        ("d3still", {"together": 7}, r"batch_size \(16\) must hold several identities of together \(7\)"),
        ("supervised", {"cross_entropy": 0}, "cross_entropy must be above 0: the triplet loss alone"),
        ("csd", {"top_k": 17}, r"top_k \(17\) must be at most batch_size \(16\)"),
        ("aml", {"variant": "triplet"}, "variant=triplet needs images of one identity in the batch; set together"),
        ("aml", {"variant": "triplet", "together": 2, "batch_size": 6}, "has no 5 negatives"),
        ("aml", {"symmetric": True}, "symmetric=true needs another variant"),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together(method, changes, words, tiny_recipe):
    refused(method, tiny_recipe(method, **changes), words)


def test_more_neighbours_than_the_batch_may_come_from_the_training_set(tiny_recipe, tiny_place):
    find.method("csd").check(tiny_recipe("csd", neighbours="train", top_k=17))
    with pytest.raises(ValueError, match=r"top_k \(97\) is more than the 96 training images"):
        find.method("csd").needs(tiny_recipe("csd", neighbours="train", top_k=97), tiny_place)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student.size": "30x16"}, "not whole patches"),
        ({"stages": "2x1x4"}, "stages must rise"),
        ({"stages": "1x2x9"}, "stages must rise"),
        ({"student.name": "resnet18"}, "no plain vision transformer"),
        ({"beta": 0.0, "npkd": False}, "nothing to train on"),
        ({"alpha": 0.0}, "set npkd to false as well"),
        ({"data.name": "sop"}, "no benchmark of sureid has the data set 'sop'"),
        ({"occluders": "folder"}, "needs occluder_folder"),
        ({"occluders": "folder", "occluder_folder": "/nowhere"}, "no folder of occluders at /nowhere"),
        ({"student.pretrained": True}, "set student.pretrained to false"),
        ({"teacher.pretrained": True, "teacher.weights": ""}, "set teacher.network.pretrained to false"),
        ({"student.width": 66}, "of width 66 and 2 heads|divisible by 4"),
        ({"evaluate_neck": "after", "labelled.neck": "none"}, "evaluate_neck=after needs"),
        ({"backbone_frozen_epochs": 2}, r"backbone_frozen_epochs \(2\) must be below epochs \(2\)"),
        ({"selection": "random", "hts": False}, "selection=random chooses among tokens, and hts is off"),
        ({"selection_seed": 5}, "selection_seed=5 is of selection=random"),
        ({"selection": "attention", "inference": "threshold"}, "needs selection=predictor, got attention"),
        ({"patch_stride": 9}, "patch_stride must be at most the patch of 8×8 pixels, got 9"),
    ],
)
def test_token_pruning_that_cannot_be(changes, words, tiny_sureid):
    refused("sureid", tiny_sureid(**changes), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_ratio": 0}, "keep_ratio must be above 0 and at most 1, got 0"),
        ({"keep_ratio": 1.2}, "keep_ratio must be above 0 and at most 1, got 1.2"),
        ({"stages": "2x4"}, "3 numbers such as 64x64x64"),
        ({"views_without_noda": 3}, "at most 2"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"keep_column": "2"}, "keep_column must be one of 1, 0, got '2'"),
    ],
)
def test_values_outside_their_range(changes, words, tiny_sureid):
    with pytest.raises(ValueError, match=words):
        tiny_sureid(**changes)


def test_a_choice_among_whole_numbers_is_read_from_text(tiny_sureid):
    assert tiny_sureid(keep_column="0").pruning.keep_column == 0


def test_more_identities_than_there_are(tiny_sureid, tiny_place):
    recipe = tiny_sureid(**{"labelled.identities_per_batch": 17})
    with pytest.raises(ValueError, match=r"identities_per_batch \(17\) is more than the 16 identities of folder/train"):
        find.method("sureid").needs(recipe, tiny_place)


def test_an_empty_folder_of_occluders(tiny_sureid, tiny_place, tmp_path):
    recipe = tiny_sureid(occluders="folder", occluder_folder=str(tmp_path))
    refused("sureid", recipe, "holds no image")
    with pytest.raises(ValueError, match="holds no image"):
        find.method("sureid").needs(recipe, tiny_place)
