"""What a recipe says of its teacher reaches the teacher's training, and starting weights reach the networks."""

import pytest
import torch
from safetensors.torch import save_file

from orchestrator import checkpoint, find
from orchestrator.method import Where
from orchestrator.recipe import flat, recipe_from

CPU = torch.device("cpu")
TAUGHT = ["d3still", "sureid"]  # one method for each family that has a teacher


@pytest.fixture
def need(tiny_recipe, tiny_place):
    """Makes the need for the teacher of a tiny recipe that has no weights yet."""

    def teacher(method, **changes):
        recipe = tiny_recipe(method, **{"teacher.weights": "", **changes})
        return find.method(method).needs(recipe, tiny_place)["teacher"]

    return teacher


def training(need):
    """Method and recipe of the training that meets a need."""
    method, benchmark, values = need.trial
    recipe = recipe_from(find.recipe(method, benchmark), values)
    find.method(method).check(recipe, 1)
    return method, recipe


@pytest.mark.parametrize("method", TAUGHT)
def test_how_things_run_is_the_user_s_word_for_the_teacher_too(method, need):
    asked = {"run.loader_workers": 3, "run.pixel_cache": "off", "train.precision": "float32", "data.fraction": 0.5}
    _, recipe = training(need(method, **asked))
    assert {path: flat(recipe)[path] for path in asked} == asked
    assert need(method).trial[2]["train.precision"] == "auto"


@pytest.mark.parametrize("method", TAUGHT)
def test_only_what_decides_the_weights_names_the_teacher(method, need):
    own = {"train.rate": 0.5, "train.epochs": 9, "train.seed": 3, "student.width": 0.25 if method == "d3still" else 64}
    for changes in ({"run.loader_workers": 3}, {"run.pixel_cache": "on"}, {"train.evaluate_every": 7}, own):
        assert need(method, **changes).key == need(method).key, changes
    for changes in ({"teacher.train.rate": 0.5}, {"teacher.train.epochs": 2}, {"teacher.train.seed": 4},
                    {"train.precision": "float32"}):  # fmt: skip
        assert need(method, **changes).key != need(method).key, changes


@pytest.mark.parametrize("method", TAUGHT)
def test_a_teacher_has_no_teacher(method, need, tiny_place):
    own, recipe = training(need(method))
    assert "teacher" not in find.method(own).needs(recipe, tiny_place)


def test_a_teacher_of_few_identities_has_a_batch_that_they_fill(need):
    """16 identities cannot fill the 16 x 6 of the papers four times over; the teacher's batch is its own."""
    changes = {"teacher.identities_per_batch": 3, "teacher.images_per_identity": 5}
    for batch in ({}, {"labelled.identities_per_batch": 8}):
        method, recipe = training(need("d3still", **changes, **batch))
        assert method == "supervised" and recipe.labelled.images == 15
    _, recipe = training(need("sureid", **{"labelled.identities_per_batch": 3, "labelled.images_per_identity": 5}))
    assert recipe.labelled.images == 15


def test_the_teacher_of_sureid_has_nothing_of_the_student():
    method = find.method("sureid")
    from orchestrator.families.token_pruning.networks import teacher_training

    _, trained = teacher_training(find.recipe("sureid", "occluded_duke"))
    assert (trained.student.name, trained.train.epochs, trained.labelled.triplet_mining, trained.labelled.neck) == (
        "vit_base_patch16_224.orig_in21k_ft_in1k", 120, "camera", "none")  # fmt: skip
    assert not (trained.hts or trained.npkd or trained.noda)
    crossing = [teacher_training(method.recipes[name])[1] for name in ("occluded_reid", "partial_reid")]
    assert len({str({k: v for k, v in flat(r).items() if k != "data.name"}) for r in crossing}) == 1


def test_other_occluders_make_another_teacher_where_it_is_trained_with_them(need, tiny_root):
    assert need("sureid").key == need("sureid", occluder_seed=3, keep_ratio=0.5).key
    assert need("sureid", **{"teacher.noda": True}).key != need("sureid").key
    folders = [str(tiny_root / "train" / identity) for identity in ("0000", "0001")]
    seen = {
        need("sureid", occluders="folder", occluder_folder=folder, **{"teacher.noda": True}).key for folder in folders
    }
    assert len(seen) == 2  # the same settings, other pictures in the folder


# --- Weights to start from


def first_network(method, recipe, place, prepared):
    made = find.method(method).experiment(recipe, prepared(method, recipe), Where(place, 0, 1, CPU))
    return made.task.student


@pytest.fixture
def started(tiny_recipe, tiny_place, prepared, tmp_path):
    """A state dict of the backbone of a method's student, every tensor of it new, and its file."""

    def make(method, more=(), **changes):
        net = first_network(method, tiny_recipe(method, **changes), tiny_place, prepared).backbone
        state = {k: v * 0.5 + 0.25 if v.is_floating_point() else v for k, v in net.state_dict().items()}
        file = tmp_path / f"{method}-start.safetensors"
        save_file({**{k: v.contiguous() for k, v in state.items()}, **dict(more)}, file)
        return state, str(file)

    return make


# The position embedding of a file is that of a square of patches.
SQUARE = {"sureid": {"student.size": "16x16"}, "d3still": {"student.size": "24x24"}}


@pytest.mark.parametrize("method", ["d3still", "supervised", "sureid"])
def test_a_student_starts_from_a_local_file(method, started, tiny_recipe, tiny_place, prepared):
    """Where a file is named no weights of timm are asked for: networks of this width have none."""
    own = {"npkd": False, **SQUARE["sureid"]} if method == "sureid" else {}
    state, file = started(method, **own)
    recipe = tiny_recipe(method, **own, **{"student.weights": file, "student.pretrained": True})
    find.method(method).check(recipe, 1)
    found = first_network(method, recipe, tiny_place, prepared).backbone.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("method", TAUGHT)
def test_a_teacher_starts_from_a_local_file(method, started, need, tiny_place, prepared):
    without = {"npkd": False} if method == "sureid" else {}
    state, file = started(method, **SQUARE[method], **without)
    wanted = need(method, **SQUARE[method], **{"teacher.network.weights": file})
    assert wanted.key != need(method).key
    own, recipe = training(wanted)
    assert recipe.student.weights == file
    found = first_network(own, recipe, tiny_place, prepared).backbone.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_what_does_not_fit_is_one_line(started, tiny_recipe, tiny_place, prepared, tmp_path):
    _, file = started("d3still", more={"extra.weight": torch.zeros(2)})
    with pytest.warns(UserWarning, match="1 of its tensors are not used, such as extra.weight") as caught:
        first_network("d3still", tiny_recipe(**{"student.weights": file}), tiny_place, prepared)
    assert not any("\n" in str(warning.message) for warning in caught)
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    _, odd = started("sureid", more={"extra.weight": torch.zeros(2)})
    for method, other, words in (
        ("d3still", str(tmp_path / "other.safetensors"), "holds another network: 0 of"),
        ("sureid", odd, r"sureid-start\.safetensors do not fit: 1 tensors differ, first extra\.weight"),
    ):
        with pytest.raises(ValueError, match=words) as refused:
            first_network(method, tiny_recipe(method, **{"student.weights": other}), tiny_place, prepared)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", TAUGHT)
@pytest.mark.parametrize("field", ["student.weights", "teacher.network.weights"])
def test_a_file_that_is_not_there_is_named_before_anything_starts(method, field, tiny_recipe):
    recipe = tiny_recipe(method, **{"teacher.weights": "", field: "/nowhere.safetensors"})
    with pytest.raises((ValueError, FileNotFoundError), match=r"/nowhere\.safetensors"):
        find.method(method).check(recipe, 1)


# --- Its classifier


def refused(method, recipe, place, prepared, words):
    with pytest.raises(ValueError, match=words):
        prepared(method, recipe, place=place)


@pytest.mark.parametrize("method", ["vanillakd", "ugd"])
def test_a_teacher_without_its_classifier_is_refused(method, tiny_recipe, tiny_place, prepared, tiny_teacher, tmp_path):
    teacher, _ = checkpoint.load_model(tiny_teacher)
    recipe = tiny_recipe(method, **{"teacher.weights": str(tmp_path / "lone.safetensors")})
    checkpoint.save_model(tmp_path, teacher, {}, "lone")
    words = r"needs the teacher's classifier, and .*lone\.classifier\.safetensors does"
    refused(method, recipe, tiny_place, prepared, words)
    save_file({"weight": torch.zeros(9, 16)}, tmp_path / "lone.classifier.safetensors")
    refused(method, recipe, tiny_place, prepared, r"is \(9, 16\), this data set needs \(16, 16\)")
    (tmp_path / "lone.classifier.safetensors").write_bytes(b"nothing")
    refused(method, recipe, tiny_place, prepared, "holds no matrix named weight")
    other = tiny_recipe("fitnet", **{"teacher.weights": recipe.teacher.weights})
    assert "classifier" not in prepared("fitnet", other)


def test_a_teacher_of_other_classes_is_refused(tiny_sureid, tiny_place, prepared, tmp_path):
    model, _ = checkpoint.load_model(tiny_sureid().teacher.weights)
    model.classifier = checkpoint.load_classifier(tiny_sureid().teacher.weights)
    checkpoint.save_model(tmp_path, model, {"classes_fingerprint": "another"}, "other")
    recipe = tiny_sureid(**{"teacher.weights": str(tmp_path / "other.safetensors")})
    refused("sureid", recipe, tiny_place, prepared, r"the classes of .* are not the identities of folder/train")
    model.classifier = torch.nn.Linear(32, 9, bias=False)
    checkpoint.save_model(tmp_path, model, {}, "nine")
    nine = {"teacher.weights": str(tmp_path / "nine.safetensors")}
    words = r"needs the teacher's classifier, a matrix 'weight' \(16, 32\)"
    refused("sureid", tiny_sureid(**nine), tiny_place, prepared, words)
    assert "teacher" in prepared("sureid", tiny_sureid(**nine, logit_weight=0.0))
