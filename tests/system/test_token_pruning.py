"""What only SUReID has: the total of eq. 14, two views, token noise, cameras, occluders, and choices of tokens."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from losses.sureid import feature_term
from losses.triplet import batch_hard_triplet, camera_triplet
from models.token_pruning import PrunedViT, gumbel_noise
from orchestrator import cache, checkpoint, figures, find
from orchestrator.datasets.images import check_labels
from orchestrator.families.retrieval import data, search
from orchestrator.families.token_pruning.networks import student_config, teacher_training
from orchestrator.fit import fit
from orchestrator.method import Losses, Progress, Where
from orchestrator.onnx_file import export_onnx

CPU = torch.device("cpu")
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "sureid.npz")
METHOD = find.method("sureid")


@pytest.fixture(scope="session")
def experiment(tiny_place, prepared):
    def make(recipe):
        METHOD.check(recipe, 1)
        return METHOD.experiment(recipe, prepared("sureid", recipe), Where(tiny_place, 0, 1, CPU))

    return make


@pytest.fixture(scope="session")
def first(experiment):
    """Task and first batch of a recipe."""

    def make(recipe):
        made = experiment(recipe)
        return made.task.train(), next(iter(made.batches(1)))

    return make


def views_of(task, batch):
    parts = zip(task.augment, batch["draws"], batch["overlays"], strict=True)
    return torch.cat([augment(batch["frames"], draws, overlay, "half") for augment, draws, overlay in parts])


# --- The total --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta", "name"), [(1.0, 1.0, "total_default"), (2.0, 1.0, "total_alpha2_beta1")])
def test_the_total_is_eq_14(tiny_sureid, first, alpha, beta, name):
    """The recorded parts, weighed as the task weighs its terms."""
    task, batch = first(tiny_sureid(alpha=alpha, beta=beta))
    losses = task(batch)
    distillation, ratio, identity, triplet = (float(v) for v in GOLDEN["id_and_total_loss/parts"])
    # L_KD is one number there; here it is the feature term, the logit term has the weight λ beside it.
    parts = {"feature": distillation, "logit": 0.0, "ratio": ratio, "identity": identity, "triplet": triplet}
    total = Losses({k: torch.tensor(v, dtype=torch.float64) for k, v in parts.items()}, losses.weights).total
    assert set(losses.terms) == set(parts)
    assert total.item() == pytest.approx(float(GOLDEN[f"id_and_total_loss/{name}"]), rel=1e-13)
    assert losses.weights["logit"] == pytest.approx(0.1 * alpha)


def test_the_terms_are_those_of_both_views_together(tiny_sureid, first):
    task, batch = first(tiny_sureid())
    losses, student, label = task(batch), task.student, batch["label"].repeat(2)
    images = views_of(task, batch)
    out = student.trained(images, gumbel_noise(batch["uniform"]))
    taught = task.teacher.trained(images).feature_BD
    own, other = student.classifier(student.after_neck(out.feature_BD)), task.teacher.classifier(taught)
    kept = task.recipe.pruning.keep_ratio
    expected = {
        "identity": torch.nn.functional.cross_entropy(own, label),
        "triplet": batch_hard_triplet(out.feature_BD, label, None),
        "feature": feature_term(out.feature_BD, taught),
        "logit": (other.softmax(1) * (other.log_softmax(1) - own.log_softmax(1))).sum(1).mean(),
        "ratio": sum((kept ** (s + 1) - out.masks_BSN[:, s].mean(1)) ** 2 for s in range(3)).mean() / 3,
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses.terms[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert losses.observed["feature_mean"] == pytest.approx(expected["feature"].item() / 32, rel=1e-5)
    assert losses.observed["kept_1"] == pytest.approx(float(out.masks_BSN[:, 0].mean()))


ALL = {"identity", "triplet", "ratio", "feature", "logit"}


@pytest.mark.parametrize(
    ("changes", "terms", "views"),
    [
        ({"hts": False, "npkd": False, "noda": False}, {"identity", "triplet"}, 1),
        ({"npkd": False, "noda": False}, {"identity", "triplet", "ratio"}, 1),
        ({"noda": False, "views_without_noda": 2}, ALL, 2),
        ({"logit_weight": 0.0}, ALL - {"logit"}, 2),
        ({"beta": 0.0}, {"ratio", "feature", "logit"}, 2),
        ({"alpha": 0.0, "npkd": False}, {"identity", "triplet"}, 2),
        ({"beta": 0.0, "logit_weight": 0.0, "ratio_weight": 0.0}, {"feature"}, 2),
        ({"align": "st_linear"}, ALL, 2),
        ({"noda_triplet": "per_view", "triplet_mining": "camera", "triplet_form": "margin"}, ALL, 2),
        ({"labelled.neck": "none", "label_smoothing": 0.1}, ALL, 2),
    ],
)
def test_every_part_can_be_switched_off_and_everything_left_trains(tiny_sureid, first, changes, terms, views):
    task, batch = first(tiny_sureid(**changes))
    losses = task(batch)
    losses.total.backward()
    assert set(losses.terms) == terms and len(batch["draws"]) == views
    assert (task.teacher is None) == (not task.recipe.npkd)
    # Whatever has no gradient would stop data parallelism; without α or L_ratio the predictors learn from the rest.
    assert [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None] == []


def test_per_view_mining_is_the_mean_of_both_views(tiny_sureid, first):
    task, batch = first(tiny_sureid(noda_triplet="per_view", triplet_mining="camera"))
    losses = task(batch)
    feature = task.student.trained(views_of(task, batch), gumbel_noise(batch["uniform"])).feature_BD
    each = [camera_triplet(f, batch["label"], batch["camera"]) for f in feature.chunk(2)]
    torch.testing.assert_close(losses.terms["triplet"], (each[0] + each[1]) / 2)


def test_autocast_leaves_the_losses_in_float32(tiny_sureid, first):
    task, batch = first(tiny_sureid())
    with torch.autocast("cpu", torch.bfloat16):
        losses = task(batch)
    assert all(term.dtype == torch.float32 for term in losses.terms.values())
    assert losses.terms["identity"].item() == pytest.approx(task(batch).terms["identity"].item(), rel=0.1)


# --- Training ---------------------------------------------------------------------------------------------------------


def test_rates_of_parameters(tiny_sureid, experiment):
    own = {"bias_rate_scale": 2.0, "backbone_rate_scale": 0.01, "train.epochs": 1, "train.warmup_epochs": 0}
    made = experiment(tiny_sureid(**own))
    names = {id(p): n for n, p in made.task.named_parameters()}
    found = {names[id(p)]: group for group in made.optimizer.param_groups for p in group["params"]}
    fit(made, CPU)
    rate = made.rate(Progress(1, 0, 0.0))
    scales = {
        "student.backbone.blocks.0.mlp.fc1.weight": 0.01,
        "student.backbone.norm.bias": 0.02,
        "student.predictors.0.input.weight": 1.0,
        "student.predictors.0.input.bias": 2.0,
    }
    for name, scale in scales.items():
        assert found[name]["lr"] == pytest.approx(rate * scale), name
    assert found["student.reweight"]["weight_decay"] == 0 and "student.neck.bias" not in found


def test_a_frozen_backbone_stays_for_its_epochs(tiny_sureid, experiment):
    made = experiment(tiny_sureid(backbone_frozen_epochs=1, **{"train.epochs": 2, "train.warmup_epochs": 0}))

    def now(*told):
        seen.append({n: p.detach().clone() for n, p in made.task.named_parameters() if p.requires_grad})

    seen = []
    now()
    fit(made, CPU, on_epoch=now)
    backbone = [n for n in seen[0] if n.startswith("student.backbone.")]
    assert all(torch.equal(seen[0][n], seen[1][n]) for n in backbone)
    assert not torch.equal(seen[0]["student.classifier.weight"], seen[1]["student.classifier.weight"])
    assert not any(torch.equal(seen[1][n], seen[2][n]) for n in backbone if n.endswith("weight"))


def test_shares_of_kept_tokens_are_logged(tiny_sureid, experiment):
    history, _ = fit(experiment(tiny_sureid(**{"train.epochs": 1})), CPU)
    assert {"train/kept_1", "train/gradient_norm", "val/rank3"} <= set(history[-1])


def test_both_views_are_of_the_same_images_and_the_second_is_occluded(tiny_sureid, first):
    task, batch = first(tiny_sureid())
    assert len(batch["frames"]) == 8 and batch["uniform"].shape == (16, 3, 8, 2)
    patched, pasted = ((o[:, 3] > 0).float().mean((1, 2)) for o in batch["overlays"])
    assert (pasted >= 1 / 3 - 1e-6).all() and (pasted <= 0.5 + 1e-6).all()
    assert (patched == 0).any()
    assert [a.occlude for a in task.augment] == [False, True]


def test_a_clean_teacher_view_is_the_plain_image(tiny_sureid, first):
    task, batch = first(tiny_sureid(teacher_view="clean"))
    plain = search.model_input(task.teacher, batch["frames"], CPU)
    torch.testing.assert_close(batch["teacher"], task.teacher.trained(plain).feature_BD, rtol=1e-4, atol=1e-5)


# --- Cameras ----------------------------------------------------------------------------------------------------------


def test_networks_that_are_told_the_camera(tiny_sureid, first, tiny_place, prepared, tmp_path):
    """Teacher, student, evaluation, pictures and export see the same cameras; the two are 1 and 2 in the data."""
    told = {"camera_weight": 3.0, "patch_stride": 6}
    torch.manual_seed(4)
    config = student_config(teacher_training(tiny_sureid(**told))[1], num_classes=16, cameras=2)
    checkpoint.save_model(tmp_path, PrunedViT(config), {}, "teacher")
    recipe = tiny_sureid(**told, **{"teacher.weights": str(tmp_path / "teacher.safetensors")})
    task, batch = first(recipe)
    assert set(batch["camera"].tolist()) == {0, 1} and task.student.num_tokens == 10
    task(batch).total.backward()
    assert (task.student.cameras.grad != 0).any(dim=1).all()
    swapped = task({**batch, "camera": 1 - batch["camera"]})
    assert swapped.terms["feature"].item() != pytest.approx(task(batch).terms["feature"].item(), rel=1e-4)

    student, ready, where = task.student.eval(), prepared("sureid", recipe), Where(tiny_place, 0, 1, CPU)
    found = METHOD.score(student, recipe, ready, where)
    opened, sides = data.open_data(ready), {}
    for side in ("query", "gallery"):
        images = getattr(opened, side)
        frames = cache.open_rows(ready.path(f"{side} pixels"))(np.arange(len(images)))
        with torch.no_grad():
            pixels = search.model_input(student, frames, CPU)
            sides[side] = student(pixels, torch.from_numpy(images.camera - 1))
    assert found.metrics == search.score(recipe.ap, opened, sides["query"], sides["gallery"]).log("val")
    assert set(METHOD.pictures(student, recipe, ready, found, where)) == {"retrieval", "identities", "views", "tokens"}
    checkpoint.save_model(tmp_path, student, {})
    stored, _ = checkpoint.load_model(tmp_path / "student.safetensors")
    assert torch.equal(stored.cameras, student.cameras) and any("tensor cameras" in a for a in stored.architecture)


def with_sides(monkeypatch, change) -> None:
    """Changes what the reader of the tiny data set lists: side, images -> images."""
    load = find.dataset("folder")

    def changed(data_root, evaluate_on):
        found = load(data_root, evaluate_on)
        sides = {side: change(side, images) for side, images in found.sets().items()}
        return dataclasses.replace(found, **sides, camera_filter=sides["query"].camera is not None)

    monkeypatch.setattr(find, "listed", lambda name, data_root, part: changed(data_root, part))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"camera": lambda camera: camera + 5}, "folder/gallery has camera 6, folder/train has not; set camera_weight"),
        ({"name": lambda name: "other/gallery"}, "other/gallery is of other data than folder/train; set camera_weight"),
        ({"camera": lambda camera: None}, "needs known cameras, and folder/query has no cameras"),
    ],
)
def test_cameras_that_the_training_set_does_not_have(tiny_sureid, tiny_place, monkeypatch, other, words):
    def change(side, images):
        if side == "train" or (side == "query" and words.startswith(("folder", "other"))):
            return images
        return dataclasses.replace(images, **{name: of(getattr(images, name)) for name, of in other.items()})

    with_sides(monkeypatch, change)
    with pytest.raises(ValueError, match=words):
        METHOD.needs(tiny_sureid(camera_weight=3.0, npkd=False), tiny_place)


def test_the_camera_triplet_needs_cameras(tiny_sureid, tiny_place, monkeypatch):
    with_sides(monkeypatch, lambda side, images: dataclasses.replace(images, camera=None))
    METHOD.needs(tiny_sureid(), tiny_place)
    with pytest.raises(ValueError, match="needs cameras, and folder/train has none"):
        METHOD.needs(tiny_sureid(triplet_mining="camera"), tiny_place)


# --- Occluders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "train_crops"])
def test_other_sets_of_occluders(tiny_sureid, tiny_root, prepared, source):
    own = {"occluders": source, "occluder_folder": str(tiny_root / "train" / "0000"), "occluder_count": 6}
    told = prepared("sureid", tiny_sureid(**own)).told()
    assert told["occluders"].startswith("folder, 6 patches" if source == "folder" else "training, 6 patches")
    assert len(told["occluders_fingerprint"]) == 64


def test_a_student_is_scored_without_its_teacher_and_occluders(tiny_sureid, experiment, tiny_place, prepared, tmp_path):
    student = experiment(tiny_sureid()).task.student
    recipe = tiny_sureid(occluders="folder", occluder_folder=str(tmp_path / "gone"))
    ready = prepared("sureid", recipe, "score")
    assert METHOD.score(student, recipe, ready, Where(tiny_place, 0, 1, CPU)).metrics["val/map"] > 0
    assert "teacher_metrics" not in ready.told()


# --- What comes out ---------------------------------------------------------------------------------------------------


def test_dropped_tokens_are_whitened_in_the_picture(tiny_sureid, experiment, tiny_place, prepared, tmp_path):
    recipe, where = tiny_sureid(), Where(tiny_place, 0, 1, CPU)
    student, ready = experiment(recipe).task.student.eval(), prepared("sureid", recipe)
    found = METHOD.pictures(student, recipe, ready, METHOD.score(student, recipe, ready, where), where)
    assert set(found) == {"retrieval", "identities", "views", "tokens"}
    assert found["tokens"].rows[1:] == ("stage 1: 5", "stage 2: 3", "stage 3: 2")
    figures.draw(found["tokens"]).savefig(tmp_path / "picture.png")
    # What is whitened is what was dropped: 5, 3 and 2 of 8 patches of 8 × 8 pixels are left as they were.
    images = found["tokens"].images
    for stage, left in ((1, 5), (2, 3), (3, 2)):
        same = (images[stage] == images[0]).all(-1).reshape(-1, 4, 8, 2, 8).all((2, 4))
        assert (same.sum((1, 2)) == left).all()


def test_a_student_keeps_more_or_fewer_tokens_than_in_training(tiny_sureid, experiment, tmp_path):
    student = experiment(tiny_sureid()).task.student.eval()
    frames = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        fewer = checkpoint.reconfigured(copy.deepcopy(student), {"keep_ratio": 0.5, "ap": "trapezoid"})
        assert fewer.counts == (4, 2, 1) and [p.shape[1] for p in fewer.gathered(frames)[1]] == [4, 2, 1]
        whole = checkpoint.reconfigured(copy.deepcopy(student), {"keep_ratio": 1.0})
        expected = whole.backbone.forward_features(frames)[:, 0]
        torch.testing.assert_close(whole(frames), expected)
    names = ("keep_ratio", "rounding", "token_order", "selection", "inference")
    pruning = {f"pruning.{name}" for name in names}
    assert METHOD.after_training(tiny_sureid()) == {"ap", *pruning}
    assert "pruning.selection_seed" in METHOD.after_training(tiny_sureid(selection="random"))
    assert METHOD.after_training(tiny_sureid(hts=False)) == {"ap"}


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"selection": "attention"}, {"selection": "random"}, {"inference": "threshold"}])
def test_other_choices_of_tokens_after_training_are_exported(tiny_sureid, experiment, tmp_path, other):
    student = experiment(tiny_sureid()).task.student.eval()
    assert export_onnx(checkpoint.reconfigured(student, other), tmp_path / "student.onnx") < 1e-4


def test_a_label_outside_the_classes():
    check_labels(np.arange(16), 16)
    for labels in (np.array([3, 99]), np.array([-1, 3])):
        with pytest.raises(ValueError, match=r"labels must be 0 to 15, the classes of the classifier, got -?\d+ to"):
            check_labels(labels, 16)
