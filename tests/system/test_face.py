"""Face recognition as a whole: what is ready, what training sees, how sets are scored and shown, what is refused."""

import shutil

import numpy as np
import pytest
import torch
from families import face
from safetensors.torch import save_file
from tiny import met, preparation

from losses.margin_distillation import hardest_triplets
from models.mobilefacenet import MobileFaceNet
from orchestrator import figures, find
from orchestrator.datasets.faces import FaceData, Search, Templates, all_pairs, drawn_pairs
from orchestrator.datasets.images import Folder, ImageSet
from orchestrator.evaluation.verification import pair_scores, tar_at_far
from orchestrator.families.face import data, verify
from orchestrator.families.face.batches import FaceRequests
from orchestrator.families.face.job import FaceMethod, _teacher_training
from orchestrator.families.face.pictures import pictures
from orchestrator.families.face.recipe import FaceTrain, learning_rate, network_config, optimizer
from orchestrator.fit import fit
from orchestrator.method import Progress, Where
from orchestrator.methods import triplet_distillation
from orchestrator.needs import Place
from orchestrator.recipe import changed
from orchestrator.reporting import compared

CPU = torch.device("cpu")
FAMILY = [name for name in find.methods() if isinstance(find.method(name), FaceMethod)]


@pytest.fixture
def experiment(tiny_recipe, tiny_place, prepared):
    def make(name, **changes):
        recipe = tiny_recipe(name, **changes)
        find.method(name).check(recipe)
        return find.method(name).experiment(recipe, prepared(name, recipe), Where(tiny_place, 0, 1, CPU))

    return make


# --- What training sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [("unified_face", {"rpsd": 5.0}), ("face_kd", {}), ("adadistill", {}), ("feature_consistency", {})],
)
def test_stored_embeddings_of_the_teacher_are_those_of_the_live_one(name, changes, experiment):
    """The very face that the student sees: both mirror images are stored."""
    live, stored = (experiment(name, targets=targets, **changes) for targets in ("online", "cached"))
    assert live.task.teacher is not None and stored.task.teacher is None
    one, two = (next(iter(made.batches(2))) for made in (live, stored))
    assert one["mirrored"].any() and not one["mirrored"].all() and torch.equal(one["frames"], two["frames"])
    a, b = live.task.train()(one).terms, stored.task.train()(two).terms
    assert a.keys() == b.keys()
    for term in a:
        torch.testing.assert_close(a[term], b[term], rtol=1e-4, atol=1e-6)
    plain = {**two, "mirrored": ~two["mirrored"]}
    assert not torch.allclose(stored.task(plain).total, b["cls"] if len(b) == 1 else stored.task(two).total, rtol=1e-6)


def test_a_batch_is_shuffled_images_then_balanced_ones():
    labels = np.repeat(np.arange(6), 5)
    recipe = changed(find.recipe("ekd", "folder"), {"batch_size": 8, "balanced.identities": 4, "balanced.images": 3})
    requests = FaceRequests(labels, recipe.batch_size, recipe.balanced, 0.5, seed=3)
    epoch = list(requests(1, 0, 1))
    assert len(epoch) == requests.steps == 3 and requests.images_per_step == 20
    shuffled = np.concatenate([rows[:8] for rows, _ in epoch])
    assert len(np.unique(shuffled)) == 24  # every image at most once
    for rows, mirrored in epoch:
        people = labels[rows[8:]].reshape(4, 3)
        assert (people == people[:, :1]).all() and len(set(people[:, 0])) == 4 and len(np.unique(rows[8:])) == 12
        assert mirrored.dtype == bool and mirrored.shape == rows.shape
    halves = [list(requests(1, rank, 2)) for rank in range(2)]
    for whole, one, two in zip(epoch, *halves, strict=True):
        for w, a, b in zip(whole, one, two, strict=True):
            assert np.array_equal(w, np.concatenate([a[:4], b[:4], a[4:], b[4:]]))
    assert not np.array_equal(epoch[0][0], next(requests(2, 0, 1))[0])


def test_somebody_with_too_few_images_is_shown_twice():
    labels = np.array([0, 0, 0, 0, 1, 1])
    recipe = changed(find.recipe("ekd", "folder"), {"batch_size": 2, "balanced.identities": 2, "balanced.images": 4})
    rows, _ = next(FaceRequests(labels, 2, recipe.balanced, 0.0, 0)(1, 0, 1))
    of_one = rows[2:][labels[rows[2:]] == 1]
    assert len(of_one) == 4 and set(of_one) <= {4, 5}


def test_the_bank_takes_a_step_s_faces_after_the_step(experiment):
    made = experiment("unified_face", bank=20, batch_size=16)
    task, (one, two, *_) = made.task.train(), list(made.batches(1))
    losses = task(one)
    bank = task.memory["rpsd"]
    assert bank.count == 0 and losses.observed["mined_square_bank"] == 0
    with torch.no_grad():
        task.after_step(losses.kept)
        task.steps += 1
    assert bank.count == 16 and torch.equal(bank.sample_M[:16], one["image"])
    again = task(two)
    assert again.observed["mined_square_bank"] > 0 and bank.count == 16
    # The ramp is at 1/4, then 2/4, of the weight.
    assert losses.weights["rpsd"] == pytest.approx(12.5) and again.weights["rpsd"] == pytest.approx(25.0)


def test_before_its_step_the_bank_is_filled_and_not_used(experiment):
    used, unused = (experiment("unified_face", iled=0.0, cls=0.0, bank_from=step).task.train() for step in (0, 9))
    made = experiment("unified_face", iled=0.0, cls=0.0)
    one, two, *_ = made.batches(1)
    values = []
    for task in (used, unused):
        with torch.no_grad():
            task.after_step(task(one).kept)
            task.steps += 1
            values.append(float(task(two).terms["rpsd"]))
        assert task.memory["rpsd"].count == 16
    assert values[0] != values[1]


def test_a_student_of_another_width_learns_through_a_projector(tiny_recipe, tiny_place, prepared, tmp_path):
    wide = changed(tiny_recipe("unified_face"), {"teacher.embedding_dim": 24, "train.epochs": 1})
    recipe = changed(wide, {"teacher.weights": str(face.save_teacher(tmp_path, wide, 16))})
    method = find.method("unified_face")
    method.check(recipe)
    made = method.experiment(recipe, prepared("unified_face", recipe), Where(tiny_place, 0, 1, CPU))
    fit(made, CPU)
    assert made.task.memory["projector"].weight.shape == (24, 16)
    assert not any("projector" in name for name in made.task.student.deployed().state_dict())
    for name, words in (
        ("proxylesskd", "centres=teacher needs embeddings as wide as the teacher's 24, embedding_dim is 16"),
        ("adadistill", "class centres are as wide as the teacher's embedding, 24"),
    ):
        with pytest.raises(ValueError, match=words):
            find.method(name).check(changed(tiny_recipe(name), {"teacher.embedding_dim": 24}))
    with pytest.raises(ValueError, match="reference=cross compares student and teacher vectors, of widths 16 and 24"):
        method.check(changed(recipe, {"reference": "cross"}))


def test_a_public_checkpoint_teaches(tiny_recipe, own_place, tmp_path):
    """A plain state dict with the names of ArcFace's public code, under a wrapper's prefix."""
    base = tiny_recipe("unified_face")
    torch.manual_seed(3)
    teacher = MobileFaceNet(network_config(base.teacher.network, 16)).eval()
    theirs = {ours: public for public, ours in teacher.public_names().items()}
    stored = {}
    for name, value in teacher.state_dict().items():
        module, _, last = name.rpartition(".")
        stored[f"module.{theirs.get(module, module)}.{last}"] = value
    assert stored.keys() != {f"module.{name}" for name in teacher.state_dict()}
    torch.save(stored, tmp_path / "public.pt")
    recipe = changed(base, {"teacher.weights": str(tmp_path / "public.pt")})
    ready = met("unified_face", recipe, own_place)
    made = find.method("unified_face").experiment(recipe, ready, Where(own_place, 0, 1, CPU))
    faces = torch.randn(4, 3, 16, 16)
    assert torch.equal(made.task.teacher(faces), teacher(faces))
    assert ready.told()["teacher_metrics"]["val/accuracy"] > 0  # measured before any student is trained
    for file, words in (
        ("nowhere.pt", "teacher.weights: there is no file"),
        ("public.pt", r"holds another network.*asked for: mobilefacenet at 16×16 with embeddings of 16"),
    ):
        wrong = changed(recipe, {"teacher.weights": str(tmp_path / file), "teacher.network.width": 0.25})
        with pytest.raises(ValueError, match=words):
            find.method("unified_face").needs(wrong, own_place)
    scores = changed(tiny_recipe("face_kd"), {"teacher.weights": str(tmp_path / "public.pt")})
    with pytest.raises(ValueError, match=r"looks at the teacher's class centres, and there is no .*public\.classifier"):
        find.method("face_kd").needs(scores, own_place)
    save_file({"weight": torch.ones(16, 16)}, tmp_path / "public.classifier.safetensors")
    ready = met("face_kd", scores, own_place)
    made = find.method("face_kd").experiment(scores, ready, Where(own_place, 0, 1, CPU))
    assert torch.equal(made.task.teacher_centres.weight, torch.ones(16, 16))


def test_class_centres_are_drawn_alike_however_they_are_spread(experiment):
    made = experiment("margin_softmax")
    again = experiment("margin_softmax")
    assert torch.equal(made.task.student.classifier.weight, again.task.student.classifier.weight)
    assert made.task.student.classifier.weight.shape == (16, 16) and not made.task.sharded
    assert made.task.student.extras().keys() == {"classifier.weight"}  # stored: losses on class scores need a teacher's


def test_rates_are_those_of_the_recorded_schedules(shared):
    recorded = np.load(shared / "golden" / "face" / "schedules.npz")
    step = FaceTrain(rate=0.1)
    found = [learning_rate(step, Progress(int(e) + 1, 0, 0.0), 1) for e in recorded["epoch"]]
    np.testing.assert_allclose(found, recorded["step_lr"], rtol=1e-9)
    falling = FaceTrain(rate=0.1, schedule="polynomial", epochs=100, warmup_epochs=10)
    found = [learning_rate(falling, Progress(1, int(step), 0.0), 1) for step in recorded["it"]]
    np.testing.assert_allclose(found, recorded["poly_lr"], rtol=1e-9, atol=1e-12)


def test_weight_decay_may_leave_norms_alone(experiment):
    task = experiment("margin_softmax").task
    (everything,) = optimizer(FaceTrain(), task).param_groups
    decayed, others = optimizer(FaceTrain(decay_everything=False), task).param_groups
    assert len(everything["params"]) == len(decayed["params"]) + len(others["params"])
    assert others["weight_decay"] == 0 and all(p.ndim == 1 for p in others["params"]) and decayed["weight_decay"] > 0


# --- What is ready ----------------------------------------------------------------------------------------------------


def sets_of(root) -> FaceData:
    """Pairs and templates over the images of one's own faces."""
    listed = find.dataset("folder_faces")(str(root))
    images = listed.verification["val"].images
    unknown = ImageSet("templates", images.keys, np.full(len(images), -1), Folder(str(root)))
    template_N = np.repeat([7, 3, 90, 12, 55, 60, 61, 2], 3)
    rng = np.random.default_rng(0)
    first, second = (ids.ravel() for ids in np.meshgrid(np.unique(template_N), np.unique(template_N)))
    templates = Templates(
        unknown, template_N, np.tile([1, 1, 2], 8), rng.random(24), first, second, first == second,
        {"g1": Search(np.array([7, 3]), np.array([1, 2]), np.array([90, 12, 55]), np.array([1, 2, 9]))},
    )  # fmt: skip
    return FaceData(listed.train, {"lfw": drawn_pairs(images, 30, (1,)), "small": all_pairs(images), "ijbc": templates})


@pytest.fixture
def several_sets(tiny_root, monkeypatch):
    found = sets_of(tiny_root)
    monkeypatch.setattr(find, "listed", lambda name, data_root, part: found)
    data._described.cache_clear()
    data._contents.cache_clear()
    yield found
    data._described.cache_clear()
    data._contents.cache_clear()


def test_every_set_is_opened_from_tables_as_it_was_listed(several_sets, own_place, tiny_recipe, no_files):
    recipe = tiny_recipe("margin_softmax")
    ready = met("margin_softmax", recipe, own_place)
    no_files()
    opened = data.open_verification(ready, recipe.student.size).sets
    assert list(opened) == ["lfw", "small", "ijbc"]
    for name, one in several_sets.verification.items():
        assert list(opened[name].images.keys) == list(one.images.keys) and type(opened[name]) is type(one)
        for column in ("first_P", "second_P", "same_P"):
            assert np.array_equal(getattr(opened[name], column), getattr(one, column)), column
    assert (opened["lfw"].folds, opened["small"].folds) == (10, 0)
    ijbc, expected = opened["ijbc"], several_sets.verification["ijbc"]
    for column in ("template_N", "medium_N", "score_N"):
        assert np.array_equal(getattr(ijbc, column), getattr(expected, column))
    (search,) = ijbc.searches.values()
    assert search.gallery_T.tolist() == [7, 3] and search.probe_subject_T.tolist() == [1, 2, 9]
    made = find.method("margin_softmax").experiment(recipe, ready, Where(own_place, 0, 1, CPU))
    metrics = made.evaluate(made.task.eval()).metrics
    assert metrics["val/accuracy"] == metrics["lfw/accuracy"]  # the mean over the sets with folds
    assert metrics["small/accuracy"] == 1 - metrics["small/eer"] and "small/val_1e-3" not in metrics
    assert {"ijbc/tar_1e-1", "ijbc/tar_strict_1e-1", "ijbc/rank1", "ijbc/rank5", "ijbc/tpir_1e-1"} <= set(metrics)
    assert "ijbc/tar_1e-2" not in metrics  # 56 impostor pairs cannot measure it


def test_what_is_told_names_every_set(several_sets, own_place, tiny_recipe):
    told = met("margin_softmax", tiny_recipe("margin_softmax"), own_place).told()
    assert told["protocol"].startswith("train 96 images of 16 identities; lfw: 24 images, 30 genuine")
    assert all(f"{name}: 24 images" in told["protocol"] for name in ("lfw", "small", "ijbc"))
    assert set(told["chance_metrics"]) >= {"lfw/accuracy", "small/tar_1e-1", "ijbc/rank1"}


def test_templates_that_the_images_do_not_have_are_refused(several_sets):
    one = several_sets.verification["ijbc"]
    with pytest.raises(ValueError, match="1 times a template without any image is asked for, first 8"):
        Templates(one.images, one.template_N, one.medium_N, one.score_N, np.array([7, 8]), np.array([7, 3]),
                  np.array([True, False]))  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_a_trial_opens_what_is_ready_and_looks_at_no_image(name, tiny_recipe, prepared, tiny_place, no_files):
    recipe = tiny_recipe(name, targets="cached") if name != "margin_softmax" else tiny_recipe(name)
    ready = prepared(name, recipe)
    no_files()
    made = find.method(name).experiment(recipe, ready, Where(tiny_place, 0, 1, CPU))
    next(iter(made.batches(1)))
    assert "val/accuracy" in made.evaluate(made.task.eval()).metrics


def test_a_teacher_does_not_depend_on_what_is_verified_too_nor_on_the_student(tiny_recipe, tiny_place):
    def teacher_key(**changes):
        recipe = changed(tiny_recipe("unified_face"), {"teacher.weights": "", **changes})
        return find.method("unified_face").needs(recipe, tiny_place)["teacher"].key

    assert teacher_key() == teacher_key(
        show_faces="all", **{"student.width": 0.125, "head.margin": 0.1, "train.rate": 0.2}
    )
    assert teacher_key() != teacher_key(**{"teacher.train.epochs": 2})


def test_real_faces_are_verified_beside_one_s_own(shared, tiny_recipe, tmp_path, tiny_root, quick_disk):
    root = tmp_path / "root"
    shutil.copytree(tiny_root, root)
    shutil.copy(shared / "data" / "orl-faces" / "orl_faces.zip", root)
    place, recipe = Place(str(tmp_path / "runs"), str(root)), tiny_recipe("margin_softmax", verify="orl")
    method = find.method("margin_softmax")
    method.check(recipe)
    ready = met("margin_softmax", recipe, place)
    assert "orl: 200 images, 900 genuine and 19,000 impostor, no folds" in ready.told()["rule"]
    assert ready.told()["protocol"].startswith("train 96 images of 16 identities; val: 24 images")
    assert "Olivetti" in ready.told()["notice"]
    made = method.experiment(recipe, ready, Where(place, 0, 1, CPU))
    metrics = made.evaluate(made.task.eval()).metrics
    assert {"val/accuracy", "orl/tar_1e-2", "orl/tar_1e-3", "orl/eer", "orl/rank1"} <= set(metrics)
    assert 0 < metrics["orl/tar_1e-3"] <= metrics["orl/tar_1e-2"] < 1


# --- Scores and pictures ----------------------------------------------------------------------------------------------


def test_scores_are_of_the_sum_of_both_mirror_images(tiny_root):
    one = find.dataset("folder_faces")(str(tiny_root)).verification["val"]
    rng = np.random.default_rng(0)
    found = verify.Embedded(*rng.standard_normal((2, len(one.images), 8)))
    result = verify.scored({"val": found}, {"val": one})
    both = found.plain_ND + found.flipped_ND
    unit_ND = both / np.linalg.norm(both, axis=1, keepdims=True)
    score_P = np.array([unit_ND[a] @ unit_ND[b] for a, b in zip(one.first_P, one.second_P, strict=True)])
    np.testing.assert_allclose(result.found.scores["val"], score_P, atol=1e-12)
    assert result.metrics["val/tar_1e-1"] == tar_at_far(score_P, one.same_P, 0.1).tar
    plain_P = pair_scores(found.plain_ND, one.first_P, one.second_P)
    assert not np.allclose(plain_P, score_P)
    first = np.unique(one.images.identity, return_index=True)[1]
    others = np.setdiff1d(np.arange(len(both)), first)
    right = [
        one.images.identity[first[(unit_ND[p] @ unit_ND[first].T).argmax()]] == one.images.identity[p] for p in others
    ]
    assert result.metrics["val/rank1"] == pytest.approx(np.mean(right))


def test_agreement_with_the_teacher():
    rng = np.random.default_rng(0)
    own = verify.Embedded(*rng.standard_normal((2, 40, 8)))
    turned = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    same = verify.agreement(own, own)
    assert same["teacher_cosine"] == pytest.approx(1) and same["teacher_gram"] == pytest.approx(1)
    rotated = verify.agreement(own, verify.Embedded(own.plain_ND @ turned, own.flipped_ND @ turned))
    assert rotated["teacher_gram"] == pytest.approx(1) and abs(rotated["teacher_cosine"]) < 0.5
    wide = verify.agreement(own, verify.Embedded(*rng.standard_normal((2, 40, 5))))
    assert wide.keys() == {"teacher_gram"} and abs(wide["teacher_gram"]) < 0.2
    still = verify.Embedded(np.ones((40, 8)), np.ones((40, 8)))
    assert verify.agreement(still, own)["teacher_gram"] == 0


def test_chance_is_the_same_every_time(tiny_root):
    sets = find.dataset("folder_faces")(str(tiny_root)).verification
    assert verify.by_chance(sets) == verify.by_chance(sets) and abs(verify.by_chance(sets)["val/auc"] - 0.5) < 0.2


def test_pictures_are_drawn_and_show_faces_only_where_they_may(experiment, tiny_recipe, prepared, tiny_place):
    recipe = tiny_recipe("unified_face")
    ready = prepared("unified_face", recipe)
    made = experiment("unified_face")
    evaluation = made.evaluate(made.task.eval())
    method, where = find.method("unified_face"), Where(tiny_place, 0, 1, CPU)
    shown = method.pictures(made.task.student, recipe, ready, evaluation, where)
    assert set(shown) == {"roc", "scores_val", "teacher_val"}
    assert all(100 >= y >= 0 for line in shown["scores_val"].lines.values() for _, y in line)
    assert sum(y for _, y in shown["scores_val"].lines["genuine"]) == pytest.approx(100)
    faces = method.pictures(made.task.student, changed(recipe, {"show_faces": "own"}), ready, evaluation, where)
    assert set(faces) - set(shown) == {"hardest_val"} and faces["hardest_val"].images.shape[:2] == (4, 8)
    for picture in faces.values():
        figures.draw(picture)
    only_others = changed(recipe, {"show_faces": "own", "verify": "orl"})
    assert "hardest_val" in method.pictures(made.task.student, only_others, ready, evaluation, where)


def test_the_hardest_pairs_are_the_wrong_end_of_each_kind(tiny_root):
    one = find.dataset("folder_faces")(str(tiny_root)).verification["val"]
    score_P = np.where(one.same_P, 0.9, 0.1)
    genuine, impostor = int(np.flatnonzero(one.same_P)[3]), int(np.flatnonzero(~one.same_P)[5])
    score_P[genuine], score_P[impostor] = -0.5, 0.99
    frames = torch.arange(len(one.images), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    verified = data.Verified({"val": one}, {"val": lambda rows: frames[torch.as_tensor(rows)]})
    found = verify.Found({"val": verify.Embedded(*np.zeros((2, len(frames), 4)))}, {"val": score_P})
    sheet = pictures(verified, found, {}, ["val"])["hardest_val"]
    assert sheet.images[:2, 0, 0, 0, 0].tolist() == [one.first_P[genuine], one.second_P[genuine]]
    assert sheet.images[2:, 0, 0, 0, 0].tolist() == [one.first_P[impostor], one.second_P[impostor]]


# --- Recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "margin_softmax"])
def test_a_teacher_is_trained_as_the_benchmark_trains(name):
    """By its own recipe: that of another data set would have other falls, epochs and margins."""
    method = find.method(name)
    for benchmark, recipe in method.recipes.items():
        method.check(recipe)
        if method.distils(recipe):
            found, training = _teacher_training(recipe)
            base = find.recipe("margin_softmax", benchmark)
            assert found == benchmark and training.head == base.head and training.train.schedule == base.train.schedule
            assert training.train.epochs == recipe.teacher.train.epochs


def test_a_margin_is_its_kind_s_own_unless_it_is_given():
    head = find.recipe("margin_softmax", "ms1mv2").head
    assert (head.kind, head.m) == ("arcface", 0.5) and find.recipe("margin_softmax", "webface4m").head.m == 0.4
    assert find.recipe("adadistill", "ms1mv2").head.m == 0.45 and find.recipe("adadistill", "webface4m").head.m == 0.35
    cell = find.space("face_baselines").cells["AdaCosDistill"]
    assert (cell["head.kind"], cell["head.margin"]) == ("cosface", 0.35)
    plain = changed(find.recipe("margin_softmax", "ms1mv2"), {"head.margin": 0.0})
    assert plain.head.m == 0


def test_both_weights_of_gkd_grow_by_epochs(experiment):
    made = experiment("gkd", **{"grow_epochs": 2, "head.margin": 0.2})
    losses = made.task.train()(next(iter(made.batches(1))))
    assert losses.weights["primary"] == pytest.approx(4 / 12) and losses.weights["binary"] == pytest.approx(1 / 12)


def test_triplets_are_of_the_balanced_images(experiment, monkeypatch):
    seen = []

    def triplets(student_BD, label_B):
        seen.append(label_B)
        return hardest_triplets(student_BD, label_B)

    monkeypatch.setattr(triplet_distillation, "hardest_triplets", triplets)
    made = experiment("triplet_distillation", **{"balanced.identities": 4})
    batch = next(iter(made.batches(1)))
    made.task.train()(batch)
    assert torch.equal(seen[0], batch["label"][16:]) and len(seen[0]) == 8
    alone = experiment("triplet_distillation")
    alone.task.train()(next(iter(alone.batches(1))))
    assert len(seen[1]) == 16


def test_the_average_of_packs_is_that_of_published_tables(tiny_root):
    images = find.dataset("folder_faces")(str(tiny_root)).verification["val"].images
    names = ("lfw", "cfp_fp", "cfp_ff", "agedb_30", "calfw", "cplfw")
    sets = {name: drawn_pairs(images, 30, (seed,)) for seed, name in enumerate(names)}
    rows = [np.random.default_rng(seed).standard_normal((2, 24, 8)) for seed in range(len(names))]
    found = {name: verify.Embedded(*own) for name, own in zip(names, rows, strict=True)}
    metrics = verify.scored(found, sets).metrics
    five = [metrics[f"{name}/accuracy"] for name in names if name != "cfp_ff"]
    assert metrics["val/accuracy"] == pytest.approx(np.mean(five))
    assert metrics["val/accuracy"] != pytest.approx(np.mean([*five, metrics["cfp_ff/accuracy"]]))
    some = {name: sets[name] for name in ("lfw", "cfp_ff")}
    both = (metrics["lfw/accuracy"] + metrics["cfp_ff/accuracy"]) / 2
    assert verify.scored(found, some).metrics["val/accuracy"] == pytest.approx(both)
    alone = verify.scored({"small": found["lfw"]}, {"small": all_pairs(images)}).metrics
    assert alone["val/accuracy"] == alone["small/accuracy"]  # a sweep has something to maximise


def test_probes_of_every_set_are_told_one_by_one(tiny_root):
    """Their means are the metrics; people of two sets are two people, and of templates nobody is searched."""
    images = find.dataset("folder_faces")(str(tiny_root)).verification["val"].images
    sets = {"lfw": all_pairs(images), "orl": all_pairs(images)}
    rng = np.random.default_rng(0)
    found = {name: verify.Embedded(*rng.standard_normal((2, len(images), 8))) for name in sets}
    scored = verify.scored(found, sets)
    people = len(np.unique(images.identity))
    probes = len(images) - people
    for start, name in ((0, "lfw"), (probes, "orl")):
        for metric in (f"{name}/rank1", f"{name}/rank5"):
            score_Q = scored.queries.scores[metric]
            assert score_Q[start : start + probes].mean() == pytest.approx(scored.metrics[metric])
            assert np.isnan(score_Q).sum() == probes and len(score_Q) == 2 * probes
    assert 0 < scored.metrics["lfw/rank1"] < 1 and len(np.unique(scored.queries.identity_Q)) == 2 * people
    row = compared.Row("a", "demo", "margin_softmax", ("a",), (scored.queries,), (scored.pairs,))
    assert {"lfw/rank1", "orl/rank5", "lfw/eer", "val/accuracy"} <= {metric.name for metric in row.metrics}
    assert row.mean("orl/rank1") == pytest.approx(scored.metrics["orl/rank1"])
    _, equal = found = compared.differences([row, row], 0, "orl/rank1")
    assert equal.value == 0 and f"of {people} identities" in compared.notes([row, row], "orl/rank1", found)[0]


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("unified_face", {"teacher.network.size": "32x32"},
         r"teacher.size \(32, 32\) is not student.size \(16, 16\): the teacher sees the student's images; set both"),
        ("unified_face", {"iled": 0, "rpsd": 0, "cls": 0}, "nothing to train on: every loss weight is 0"),
        ("unified_face", {"head.kind": "cosface", "head.monotone": True}, "head.monotone is of arcface"),
        ("unified_face", {"head.sample": 0.5, "centres": "teacher"}, "head.sample=0.5 takes a sample of trained class"),
        ("face_kd", {"head.sample": 0.5}, "this method looks at all of them"),
        ("gkd", {"head.kind": "adaface"}, "margin_logits=true with head.kind=adaface: its margins follow"),
        ("face_kd", {"head.kind": "adaface", "margin_logits": True}, "margin_logits=true with head.kind=adaface"),
        ("unified_face", {"rpsd_miner": "random", "head.sample": 0.5}, "rpsd_miner=random with head.sample below 1"),
        ("adadistill", {"centres": "teacher"}, "AdaDistill makes class centres for the margin softmax itself"),
        ("proxylesskd", {"centres": "own"}, "centres=own has nothing of the teacher"),
        ("margin_distillation", {"head.kind": "cosface"}, "got teacher, 1 and cosface"),
        ("margin_distillation", {"least_margin": 0.6}, "least_margin 0.6 must not be above largest_margin 0.5"),
        ("triplet_distillation", {"least_margin": 0.6}, "least_margin 0.6 must not be above largest_margin 0.5"),
        ("ekd", {"balanced.identities": 1}, "balanced.identities is 1, which has nobody to be told from"),
        ("margin_softmax", {"student.name": "iresnet51"}, "student: there is no iresnet51; there are iresnet18"),
        ("margin_softmax", {"student.name": "mobilefacenet_x3"}, "mobilefacenet is there in the sizes x1, x2, large"),
        ("margin_softmax", {"student.name": "resnet18", "student.color": "bgr"}, "resnet18 sees RGB"),
        ("margin_softmax", {"student.size": "20x20"}, "student: image_size must be two multiples of 16"),
        ("margin_softmax", {"student.pretrained": "true"}, "there are no pretrained weights of mobilefacenet"),
        ("margin_softmax", {"student.weights": "/nowhere.pt"}, "student: weights: there is no file /nowhere.pt"),
        ("margin_softmax", {"verify": "lfw+lfw"}, "verify=lfw.lfw names a data set twice"),
        ("margin_softmax", {"verify": "lfv"}, "there is no data set reader 'lfv'; did you mean"),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together(name, changes, words, tiny_recipe):
    with pytest.raises(ValueError, match=words):
        find.method(name).check(tiny_recipe(name, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 200}, r"batch_size \(200\) is more than the 96 training images; lower it"),
        (
            {"batch_size": 32, "data.fraction": 0.25},
            r"more than the 24 training images; data.fraction is 0.25; lower it",
        ),
        (
            {"teacher.weights": "", "teacher.batch_size": 97},
            r"teacher.batch_size \(97\) is more than the 96 training images",
        ),
        ({"balanced.identities": 17}, "has 16 training identities, asked for are 17"),
        ({"data.name": "demo"}, "demo holds no faces that are verified"),
        ({"verify": "demo"}, "demo holds no faces that are verified"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_made(changes, words, tiny_recipe, tiny_place):
    name = "unified_face" if "teacher.batch_size" in changes else "margin_softmax"
    with pytest.raises(ValueError, match=words):
        find.method(name).needs(tiny_recipe(name, **changes), tiny_place)


def test_a_set_that_is_only_verified_on_trains_nobody(several_sets, tiny_recipe, own_place, monkeypatch):
    only = FaceData(None, several_sets.verification)
    monkeypatch.setattr(find, "listed", lambda name, data_root, part: only)
    with pytest.raises(ValueError, match="lfw is only verified on; train on another data set, with --set verify=lfw"):
        find.method("margin_softmax").needs(tiny_recipe("margin_softmax", **{"data.name": "lfw"}), own_place)
    with pytest.raises(ValueError, match="two verification sets are called lfw"):
        data.verification(changed(tiny_recipe("margin_softmax"), {}).data, "cfp", own_place)


def test_a_teacher_s_centres_of_other_classes_are_refused(tiny_recipe, tiny_place, own_place, tiny_root, tmp_path):
    """As in every method that looks at class scores: columns would mean other people."""
    root = tmp_path / "fewer"
    shutil.copytree(tiny_root, root)
    shutil.rmtree(root / "train" / "0003")
    place = Place(own_place.storage, str(root))
    needs = find.method("face_kd").needs(tiny_recipe("face_kd"), place)
    with pytest.raises(ValueError, match=r"is \(16, 16\), this data set needs \(15, 16\)"):
        preparation(place).meet("face_kd", needs["classifier"])


def test_a_network_of_timm_embeds_faces(experiment):
    made = experiment("margin_softmax", **{"student.name": "resnet10t", "student.size": "32x32", "student.width": 0.25})
    assert made.task.student.kind == "embedder" and made.task.student.pixels[0] == (0.5, 0.5, 0.5)
    assert made.task.student.deployed()(torch.zeros(2, 3, 32, 32)).shape == (2, 16)


def test_lists_and_pairs_are_stored_once_for_every_size(tiny_recipe, tiny_place):
    recipes = (tiny_recipe("margin_softmax", **{"student.size": size}) for size in ("16x16", "32x32"))
    small, large = (find.method("margin_softmax").needs(recipe, tiny_place) for recipe in recipes)
    assert small["val pairs"].key == large["val pairs"].key and small["val pixels"].key != large["val pixels"].key
