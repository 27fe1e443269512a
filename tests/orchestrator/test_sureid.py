"""SUReID as a whole: the total, two views, resuming with its noise, the teacher, pictures, export, wrong input."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from losses.sureid import feature_term
from losses.triplet import batch_hard_triplet, camera_triplet
from models.token_pruning import PrunedViT, gumbel_noise
from orchestrator import checkpoint, export, figures, find, on_ray, published
from orchestrator.datasets.images import check_labels
from orchestrator.fit import fit, training_state
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.method import Losses, Place, changed, recipe_dict
from orchestrator.methods import embedding, sureid_training
from orchestrator.reporting import printed

CPU = torch.device("cpu")
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "sureid.npz")
METHOD = find.method("sureid")


@pytest.fixture
def recipe(tiny_sureid):
    return tiny_sureid


@pytest.fixture(scope="module")
def place(tiny_root, tmp_path_factory):
    """One storage for all tests here: caches are made once."""
    return Place(storage=str(tmp_path_factory.mktemp("sureid")), data_root=str(tiny_root))


def first(recipe, place):
    """Task and first batch of a prepared recipe."""
    METHOD.check(recipe, 1)
    METHOD.prepare(recipe, place)
    experiment = METHOD.experiment(recipe, place, 0, 1, CPU)
    experiment.task.train()
    return experiment.task, next(iter(experiment.batches(1)))


def numbers(history):
    return [{k: v for k, v in h.items() if not k.startswith("perf/")} for h in history]


# --- The total ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta", "name"), [(1.0, 1.0, "total_default"), (2.0, 1.0, "total_alpha2_beta1")])
def test_the_total_is_eq_14(recipe, place, alpha, beta, name):
    """The recorded parts, weighed as the task weighs its terms."""
    task, batch = first(recipe(alpha=alpha, beta=beta), place)
    losses = task(batch)
    distillation, ratio, identity, triplet = (float(v) for v in GOLDEN["id_and_total_loss/parts"])
    # L_KD is one number there; here it is the feature term, the logit term has the weight λ beside it.
    parts = {"feature": distillation, "logit": 0.0, "ratio": ratio, "identity": identity, "triplet": triplet}
    total = Losses({k: torch.tensor(v, dtype=torch.float64) for k, v in parts.items()}, losses.weights).total
    assert set(losses.terms) == set(parts)
    assert total.item() == pytest.approx(float(GOLDEN[f"id_and_total_loss/{name}"]), rel=1e-13)
    assert losses.weights["logit"] == pytest.approx(0.1 * alpha)


def test_the_terms_are_those_of_both_views_together(recipe, place):
    task, batch = first(recipe(), place)
    losses = task(batch)
    settings, student = task.recipe, task.student
    views = [a(batch["frames"], d, o, "half") for a, d, o in zip(task.augment, batch["draws"], batch["overlays"],
                                                                  strict=True)]  # fmt: skip
    images, label = torch.cat(views), batch["label"].repeat(2)
    out = student.trained(images, gumbel_noise(batch["uniform"]))
    taught = task.teacher.trained(images).feature_BD
    own, other = student.classifier(student.after_neck(out.feature_BD)), task.teacher.classifier(taught)
    expected = {
        "identity": torch.nn.functional.cross_entropy(own, label),
        "triplet": batch_hard_triplet(out.feature_BD, label, None),
        "feature": feature_term(out.feature_BD, taught),
        "logit": (other.softmax(1) * (other.log_softmax(1) - own.log_softmax(1))).sum(1).mean(),
        "ratio": sum((settings.keep_ratio ** (s + 1) - out.masks_BSN[:, s].mean(1)) ** 2 for s in range(3)).mean() / 3,
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses.terms[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert losses.observed["feature_mean"] == pytest.approx(expected["feature"].item() / 32, rel=1e-5)
    assert losses.observed["kept_1"] == pytest.approx(float(out.masks_BSN[:, 0].mean()))


@pytest.mark.parametrize(
    ("changes", "terms", "views"),
    [
        ({"hts": False, "npkd": False, "noda": False}, {"identity", "triplet"}, 1),
        ({"npkd": False, "noda": False}, {"identity", "triplet", "ratio"}, 1),
        ({"noda": False, "views_without_noda": 2}, {"identity", "triplet", "ratio", "feature", "logit"}, 2),
        ({"logit_weight": 0.0}, {"identity", "triplet", "ratio", "feature"}, 2),
        ({"beta": 0.0}, {"ratio", "feature", "logit"}, 2),
        ({"alpha": 0.0, "npkd": False}, {"identity", "triplet"}, 2),
        ({"beta": 0.0, "logit_weight": 0.0, "ratio_weight": 0.0}, {"feature"}, 2),
        ({"align": "st_linear"}, {"identity", "triplet", "ratio", "feature", "logit"}, 2),
        ({"teacher_view": "clean"}, {"identity", "triplet", "ratio", "feature", "logit"}, 2),
        ({"noda_triplet": "per_view", "triplet_mining": "camera", "triplet_form": "margin"},
         {"identity", "triplet", "ratio", "feature", "logit"}, 2),
        ({"neck": "none", "label_smoothing": 0.1}, {"identity", "triplet", "ratio", "feature", "logit"}, 2),
    ],
)  # fmt: skip
def test_every_part_can_be_switched_off_and_everything_left_trains(recipe, place, changes, terms, views):
    task, batch = first(recipe(**changes), place)
    losses = task(batch)
    losses.total.backward()
    assert set(losses.terms) == terms and len(batch["draws"]) == views
    assert (task.teacher is None) == (not task.recipe.npkd)
    # Whatever has no gradient would stop data parallelism; without α or L_ratio the predictors learn from the rest.
    lacking = [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []


def test_per_view_mining_is_the_mean_of_both_views(recipe, place):
    task, batch = first(recipe(noda_triplet="per_view", triplet_mining="camera"), place)
    losses = task(batch)
    views = [a(batch["frames"], d, o, "half") for a, d, o in zip(task.augment, batch["draws"], batch["overlays"],
                                                                  strict=True)]  # fmt: skip
    feature = task.student.trained(torch.cat(views), gumbel_noise(batch["uniform"])).feature_BD
    each = [camera_triplet(f, batch["label"], batch["camera"]) for f in feature.chunk(2)]
    torch.testing.assert_close(losses.terms["triplet"], (each[0] + each[1]) / 2)


def test_autocast_leaves_the_losses_in_float32(recipe, place):
    task, batch = first(recipe(), place)
    with torch.autocast("cpu", torch.bfloat16):
        losses = task(batch)
    assert all(term.dtype == torch.float32 for term in losses.terms.values())
    plain = task(batch)
    assert losses.terms["identity"].item() == pytest.approx(plain.terms["identity"].item(), rel=0.1)


# --- Training -------------------------------------------------------------------------------------------------------


def test_interrupted_with_noise_and_drop_path_equals_uninterrupted(recipe, place):
    settings = recipe(drop_path=0.3, epochs=3, backbone_frozen_epochs=1, optimizer="adamw")
    METHOD.prepare(settings, place)
    states, whole = [], METHOD.experiment(settings, place, 0, 1, CPU)
    history = fit(whole, CPU, on_epoch=lambda epoch, metrics, state: states.append(state()))
    assert not any(name.startswith("teacher") for name in states[0]["task"])
    for epoch in (1, 2):
        torch.manual_seed(999)  # whatever the new process did before
        again = METHOD.experiment(settings, place, 0, 1, CPU)
        assert numbers(fit(again, CPU, resume=states[epoch - 1])) == numbers(history)
        for name, value in again.task.state_dict().items():
            assert torch.equal(value, whole.task.state_dict()[name]), name
    assert {"train/kept_1", "train/gradient_norm", "val/rank3"} <= set(history[-1])


def test_the_teacher_never_moves(recipe, place):
    settings = recipe(epochs=1)
    METHOD.prepare(settings, place)
    experiment = METHOD.experiment(settings, place, 0, 1, CPU)
    before = {k: v.clone() for k, v in experiment.task.teacher.state_dict().items()}
    fit(experiment, CPU)
    assert all(torch.equal(v, experiment.task.teacher.state_dict()[k]) for k, v in before.items())
    assert not experiment.task.teacher.training


def test_rates_of_parameters(recipe, place):
    settings = recipe(bias_rate_scale=2.0, backbone_rate_scale=0.01, epochs=1, warmup_epochs=0)
    METHOD.prepare(settings, place)
    experiment = METHOD.experiment(settings, place, 0, 1, CPU)
    names = {id(p): n for n, p in experiment.task.named_parameters()}
    found = {names[id(p)]: g for g in experiment.optimizer.param_groups for p in g["params"]}
    fit(experiment, CPU)
    rate = experiment.learning_rate(1)
    scales = {
        "student.backbone.blocks.0.mlp.fc1.weight": 0.01,
        "student.backbone.norm.bias": 0.02,
        "student.predictors.0.input.weight": 1.0,
        "student.predictors.0.input.bias": 2.0,
    }
    for name, scale in scales.items():
        assert found[name]["lr"] == pytest.approx(rate * scale), name
    assert found["student.reweight"]["weight_decay"] == 0 and "student.neck.bias" not in found


def test_both_views_are_of_the_same_images_and_the_second_is_occluded(recipe, place):
    task, batch = first(recipe(), place)
    assert len(batch["frames"]) == 8 and batch["uniform"].shape == (16, 3, 8, 2)
    patched, pasted = ((o[:, 3] > 0).float().mean((1, 2)) for o in batch["overlays"])
    assert (pasted >= 1 / 3 - 1e-6).all() and (pasted <= 0.5 + 1e-6).all()
    assert (patched == 0).any()
    assert [a.occlude for a in task.augment] == [False, True]


def test_a_clean_teacher_view_is_the_plain_image(recipe, place):
    task, batch = first(recipe(teacher_view="clean"), place)
    plain = embedding.model_input(task.teacher, batch["frames"], CPU)
    torch.testing.assert_close(batch["teacher"], task.teacher.trained(plain).feature_BD, rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_stays_for_its_epochs(recipe, place):
    settings = recipe(backbone_frozen_epochs=1, epochs=2, warmup_epochs=0)
    METHOD.prepare(settings, place)
    experiment = METHOD.experiment(settings, place, 0, 1, CPU)
    seen = [{n: p.detach().clone() for n, p in experiment.task.named_parameters() if p.requires_grad}]
    fit(experiment, CPU, on_epoch=lambda epoch, metrics, state: seen.append(
        {n: p.detach().clone() for n, p in experiment.task.named_parameters() if p.requires_grad}))  # fmt: skip
    backbone = [n for n in seen[0] if n.startswith("student.backbone.")]
    assert all(torch.equal(seen[0][n], seen[1][n]) for n in backbone)
    assert not torch.equal(seen[0]["student.classifier.weight"], seen[1]["student.classifier.weight"])
    assert not any(torch.equal(seen[1][n], seen[2][n]) for n in backbone if n.endswith("weight"))


def test_networks_that_are_told_the_camera(recipe, place, tmp_path):
    """Teacher, student, evaluation, pictures and export see the same cameras; the two are 1 and 2 in the data."""
    told = {"camera_weight": 3.0, "patch_stride": 6}
    training = sureid_training.teacher_training(recipe(**told))
    torch.manual_seed(4)
    config = sureid_training.student_config(training, num_classes=16, cameras=2)
    checkpoint.save_model(tmp_path, PrunedViT(config), {}, "teacher")
    settings = recipe(**told, teacher_weights=str(tmp_path / "teacher.safetensors"))
    task, batch = first(settings, place)
    assert set(batch["camera"].tolist()) == {0, 1} and task.student.num_tokens == 10
    task(batch).total.backward()
    assert (task.student.cameras.grad != 0).any(dim=1).all()
    swapped = task({**batch, "camera": 1 - batch["camera"]})
    assert swapped.terms["feature"].item() != pytest.approx(task(batch).terms["feature"].item(), rel=1e-4)

    student = task.student.eval()
    found = METHOD.evaluate(student, settings, place)
    data = embedding.load_data(settings, place)
    sides = {}
    for side, images in data.sets().items():
        frames = embedding.frames(settings, images, settings.student_size, place, resize="bicubic")
        with torch.no_grad():
            pixels = embedding.model_input(student, frames(np.arange(len(images))), CPU)
            sides[side] = student(pixels, torch.from_numpy(images.camera - 1))
    assert found == embedding.score(settings, data, sides["query"], sides["gallery"]).log("val")
    assert set(METHOD.pictures(student, settings, place)) == {"retrieval", "identities", "views", "tokens"}
    assert export.export_onnx(student, tmp_path / "student.onnx") < 1e-4
    checkpoint.save_model(tmp_path, student, {})
    stored, _ = checkpoint.load_model(tmp_path / "student.safetensors")
    assert torch.equal(stored.cameras, student.cameras) and any("tensor cameras" in a for a in stored.architecture)


def test_cameras_that_the_training_set_does_not_have(recipe, place, monkeypatch):
    load = find.dataset("folder")

    def with_cameras(query, gallery, name="folder/gallery"):
        def changed_data(data_root, evaluate_on):
            data = load(data_root, evaluate_on)
            sides = {"query": query(data.query.camera), "gallery": gallery(data.gallery.camera)}
            sides = {side: dataclasses.replace(getattr(data, side), camera=camera) for side, camera in sides.items()}
            sides["gallery"] = dataclasses.replace(sides["gallery"], name=name)
            return dataclasses.replace(data, **sides, camera_filter=sides["query"].camera is not None)

        monkeypatch.setattr(find, "dataset", lambda name: changed_data)

    told = recipe(camera_weight=3.0, npkd=False)
    with_cameras(lambda camera: camera, lambda camera: camera + 5)
    with pytest.raises(ValueError, match="folder/gallery has camera 6, folder/train has not; set camera_weight to 0"):
        METHOD.prepare(told, place)
    with_cameras(lambda camera: camera, lambda camera: camera, "other/gallery")  # the same numbers, other cameras
    with pytest.raises(ValueError, match="other/gallery is of other data than folder/train; set camera_weight to 0"):
        METHOD.prepare(told, place)
    with_cameras(lambda camera: None, lambda camera: None)
    with pytest.raises(ValueError, match="needs known cameras, and folder/query has no cameras"):
        METHOD.prepare(told, place)


@pytest.mark.parametrize("source", ["folder", "train_crops"])
def test_other_sets_of_occluders(recipe, place, tiny_root, source):
    settings = recipe(occluders=source, occluder_folder=str(tiny_root / "train" / "0000"), occluder_count=6)
    facts = METHOD.prepare(settings, place)
    assert facts["occluders"].startswith("folder, 6 patches" if source == "folder" else "training, 6 patches")
    assert len(facts["occluders_fingerprint"]) == 64


# --- What comes out ---------------------------------------------------------------------------------------------------


def test_student_file_export_and_pictures(recipe, place, tmp_path):
    settings = recipe()
    METHOD.prepare(settings, place)
    student = METHOD.experiment(settings, place, 0, 1, CPU).task.student.eval()
    checkpoint.save_model(tmp_path, student, {})
    stored, _ = checkpoint.load_model(tmp_path / "student.safetensors")
    assert isinstance(stored, PrunedViT) and stored.classifier is None
    assert checkpoint.load_classifier(tmp_path / "student.safetensors").weight.shape == (16, 32)
    frames = torch.randn(3, 3, 32, 16)
    with torch.no_grad():
        assert torch.equal(stored(frames), student(frames))
    assert METHOD.evaluate(stored, settings, place)["val/map"] > 0
    assert export.export_onnx(stored, tmp_path / "student.onnx") < 1e-4
    found = METHOD.pictures(student, settings, place)
    assert set(found) == {"retrieval", "identities", "views", "tokens"}
    assert found["tokens"].rows[1:] == ("stage 1: 5", "stage 2: 3", "stage 3: 2")
    for picture in found.values():
        figures.draw(picture).savefig(tmp_path / "picture.png")
    # What is whitened is what was dropped: 5, 3 and 2 of 8 patches of 8 × 8 pixels are left as they were.
    images = found["tokens"].images
    for stage, left in ((1, 5), (2, 3), (3, 2)):
        same = (images[stage] == images[0]).all(-1).reshape(-1, 4, 8, 2, 8).all((2, 4))
        assert (same.sum((1, 2)) == left).all()


def test_a_student_keeps_more_or_fewer_tokens_than_in_training(recipe, place):
    settings = recipe()
    METHOD.prepare(settings, place)
    student = METHOD.experiment(settings, place, 0, 1, CPU).task.student.eval()
    frames = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        fewer = checkpoint.reconfigured(copy.deepcopy(student), {"keep_ratio": 0.5, "ap": "trapezoid"})
        assert fewer.counts == (4, 2, 1) and [p.shape[1] for p in fewer.gathered(frames)[1]] == [4, 2, 1]
        whole = checkpoint.reconfigured(copy.deepcopy(student), {"keep_ratio": 1.0})
        expected = whole.backbone.forward_features(frames)[:, 0]
        torch.testing.assert_close(whole(frames), expected)
    assert METHOD.after_training(settings) == {
        "ap", "keep_ratio", "rounding", "token_order", "selection", "inference"}  # fmt: skip
    assert "selection_seed" in METHOD.after_training(recipe(selection="random"))
    assert METHOD.after_training(recipe(hts=False)) == {"ap"}


@pytest.mark.parametrize("other", [{"selection": "attention"}, {"selection": "random"}, {"inference": "threshold"}])
def test_other_choices_of_tokens_are_exported(recipe, place, tmp_path, other):
    METHOD.prepare(recipe(), place)
    student = METHOD.experiment(recipe(), place, 0, 1, CPU).task.student.eval()
    assert export.export_onnx(checkpoint.reconfigured(student, other), tmp_path / "student.onnx") < 1e-4


def test_a_teacher_with_other_classes_is_refused(recipe, place, tmp_path):
    settings = recipe()
    model, _ = checkpoint.load_model(settings.teacher_weights)
    model.classifier = checkpoint.load_classifier(settings.teacher_weights)
    checkpoint.save_model(tmp_path, model, {"classes_fingerprint": "another"}, "teacher")
    settings = changed(settings, {"teacher_weights": str(tmp_path / "teacher.safetensors")})
    with pytest.raises(ValueError, match=r"the classes of .* are not the identities of folder/train"):
        METHOD.prepare(settings, place)
    model.classifier = torch.nn.Linear(32, 9, bias=False)
    checkpoint.save_model(tmp_path, model, {}, "teacher")
    with pytest.raises(ValueError, match=r"needs the teacher's classifier, a matrix 'weight' \(16, 32\)"):
        METHOD.prepare(settings, place)
    METHOD.prepare(changed(settings, {"logit_weight": 0.0}), place)


def test_the_teacher_s_recipe_depends_on_no_field_of_the_student(recipe):
    teacher = sureid_training.teacher_training
    one = recipe()
    assert teacher(one) == teacher(recipe(keep_ratio=0.5, learning_rate=0.5, drop_path=0.2, epochs=9, student_width=64))
    assert teacher(one) == teacher(recipe(occluder_seed=5)) != teacher(recipe(teacher_noda=True))
    assert teacher(recipe(loader_workers=3, precision="float32")).precision == "float32"
    trained = teacher(find.recipe("sureid", "occluded_duke"))
    assert (trained.student, trained.epochs, trained.triplet_mining, trained.neck) == (
        "vit_base_patch16_224.orig_in21k_ft_in1k", 120, "camera", "none")  # fmt: skip
    assert not (trained.hts or trained.npkd or trained.noda) and METHOD.teacher(trained, None) is None


def test_benchmarks_of_the_same_images_share_a_teacher_and_other_occluders_make_another(recipe, place, tiny_root):
    def folder(**changes):
        return METHOD.teacher_folder(recipe(teacher_weights="", **changes), place, lambda *step: None)

    assert folder() == folder(occluder_seed=3, keep_ratio=0.5) != folder(teacher_seed=1)
    crossing = [find.recipe("sureid", name) for name in ("occluded_reid", "partial_reid")]
    trainings = {dataclasses.replace(sureid_training.teacher_training(r), dataset="one") for r in crossing}
    assert len(trainings) == 1  # the name of the data set is left out of the folder's name
    seen = set()
    for identity in ("0000", "0001"):  # the same settings, other pictures in the folder
        pictures = str(tiny_root / "train" / identity)
        seen.add(folder(teacher_noda=True, occluders="folder", occluder_folder=pictures))
    assert len(seen) == 2


def test_batches_are_the_same_from_worker_processes(recipe, place):
    batches = []
    for workers in (0, 2):
        settings = recipe(loader_workers=workers)
        METHOD.prepare(settings, place)
        batches.append(list(METHOD.experiment(settings, place, 0, 1, CPU).batches(1)))
    assert len(batches[0]) == len(batches[1]) > 1
    for one, two in zip(*batches, strict=True):
        assert one["names"] == two["names"]
        torch.testing.assert_close(one["overlays"], two["overlays"], rtol=0, atol=0)
        assert torch.equal(one["uniform"], two["uniform"])


def test_a_record_is_scored_without_its_teacher_and_occluders(recipe, place, tmp_path):
    settings = recipe(occluders="folder", occluder_folder=str(tmp_path / "gone"))
    student = METHOD.experiment(recipe(), place, 0, 1, CPU).task.student
    assert METHOD.evaluate(student, settings, place)["val/map"] > 0
    assert "teacher_metrics" not in METHOD.prepare(METHOD.for_evaluation(settings), place)


# --- Published numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["components", "keep_ratio", "alignment", "noda"])
def test_ours_stands_beside_the_row_of_the_same_networks(table):
    """Every row of our sweep that the paper has finds the printed one, with its student and its teacher."""
    name = f"sureid_{table}"
    space, recipe = find.space(name), find.recipe("sureid", "occluded_duke")
    plan = Plan(
        folder="", space=name, title="", benchmark="occluded_duke", recipes={"sureid": recipe_dict(recipe)}, place={},
        tracking_uri="", trials=1, space_data=on_ray.space_data(space), facts={"prepared": {}},
    )  # fmt: skip
    scores = {"val/map": 0.5, "val/rank1": 0.6}
    done = [
        TrialRecord(n, "completed", {"cell": cell, "seed": 0}, 1, 0.5, scores, "") for n, cell in enumerate(space.cells)
    ]
    rows = published.beside(name, "occluded_duke")
    found = {p.row: printed.ours(plan, done, p) for p in rows if p.student != published.OWN_NETWORK}
    assert set(found.values()) == {"50.00 / 60.00"} and set(found) - {"SUReID"} <= set(space.cells)
    (others,) = {printed.ours(plan, done, p) for p in rows if p.student == published.OWN_NETWORK} or {"not run"}
    assert others == "not run"


# --- Wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_ratio": 0}, "keep_ratio must be above 0 and at most 1, got 0"),
        ({"keep_ratio": 1.2}, "keep_ratio must be above 0 and at most 1, got 1.2"),
        ({"student_size": "30x16"}, "not whole patches"),
        ({"stages": "2x1x4"}, "stages must rise"),
        ({"stages": "1x2x9"}, "stages must rise"),
        ({"student": "resnet18"}, "no plain vision transformer"),
        ({"student": "vit_tinny_patch16_224"}, "did you mean vit_tiny"),
        ({"beta": 0.0, "npkd": False}, "nothing to train on"),
        ({"alpha": 0.0}, "set npkd to false as well"),
        ({"dataset": "sop"}, "no benchmark of sureid has the data set 'sop'"),
        ({"occluders": "folder"}, "needs occluder_folder"),
        ({"occluders": "folder", "occluder_folder": "/nowhere"}, "no folder of occluders at /nowhere"),
        ({"weights": "/nowhere.pth"}, "weights: there is no file /nowhere.pth"),
        ({"teacher_start": "/nowhere.pth", "teacher_weights": ""}, "teacher_start: there is no file /nowhere.pth"),
        ({"pretrained": True}, "set pretrained to false"),
        ({"teacher_pretrained": True, "teacher_weights": ""}, "set teacher_pretrained to false"),
        ({"stages": "2x4"}, "3 numbers such as 64x64x64"),
        ({"student_width": 66}, "of width 66 and 2 heads|divisible by 4"),
        ({"evaluate_neck": "after", "neck": "none"}, "evaluate_neck=after needs"),
        ({"views_without_noda": 3}, "at most 2"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"backbone_frozen_epochs": 2}, r"backbone_frozen_epochs \(2\) must be below epochs \(2\)"),
        ({"selection": "random", "hts": False}, "selection=random chooses among tokens, and hts is off"),
        ({"selection_seed": 5}, "selection_seed=5 is of selection=random"),
        ({"selection": "attention", "inference": "threshold"}, "needs selection=predictor, got attention"),
        ({"patch_stride": 9}, "patch_stride must be at most the patch of 8×8 pixels, got 9"),
    ],
)
def test_wrong_recipes_are_refused_before_anything_starts(recipe, changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        METHOD.check(recipe(**changes), 1)


def test_a_choice_among_whole_numbers_is_read_from_text(recipe):
    assert recipe(keep_column="0").keep_column == 0
    with pytest.raises(ValueError, match="keep_column must be one of 1, 0, got '2'"):
        recipe(keep_column="2")


def test_more_identities_than_there_are(recipe, place):
    with pytest.raises(ValueError, match=r"identities_per_batch \(17\) is more than the 16 identities of folder/train"):
        METHOD.prepare(recipe(identities_per_batch=17), place)


def test_workers_that_do_not_divide_the_batch(recipe):
    with pytest.raises(ValueError, match="cannot be shared evenly by 3 workers"):
        METHOD.check(recipe(), 3)


def test_an_empty_folder_of_occluders(recipe, place, tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        METHOD.check(recipe(occluders="folder", occluder_folder=str(tmp_path)))
    with pytest.raises(ValueError, match="holds no image"):
        METHOD.prepare(recipe(occluders="folder", occluder_folder=str(tmp_path)), place)


def test_the_camera_triplet_needs_cameras(recipe, place, monkeypatch):
    load = find.dataset("folder")

    def without_cameras(data_root, evaluate_on):
        data = load(data_root, evaluate_on)
        sides = {side: dataclasses.replace(images, camera=None) for side, images in data.sets().items()}
        return dataclasses.replace(data, **sides, camera_filter=False)

    monkeypatch.setattr(find, "dataset", lambda name: without_cameras)
    METHOD.prepare(recipe(), place)
    with pytest.raises(ValueError, match="needs cameras, and folder/train has none"):
        METHOD.prepare(recipe(triplet_mining="camera"), place)


def test_a_label_outside_the_classes():
    check_labels(np.arange(16), 16)
    for labels in (np.array([3, 99]), np.array([-1, 3])):
        with pytest.raises(ValueError, match=r"labels must be 0 to 15, the classes of the classifier, got -?\d+ to"):
            check_labels(labels, 16)


def test_a_state_of_another_network_is_refused(recipe, place):
    settings = recipe(epochs=1)
    METHOD.prepare(settings, place)
    state = training_state(METHOD.experiment(settings, place, 0, 1, CPU), [], CPU)
    other = METHOD.experiment(recipe(epochs=1, hts=False), place, 0, 1, CPU)
    with pytest.raises(ValueError, match="another network"):
        fit(other, CPU, resume=state)
