"""The family task: every method trains from every kind of teacher view; whole-set neighbours; local features."""

import dataclasses

import numpy as np
import pytest
import torch
from orchestrator.methods.asymmetric import Neighbours

from losses.csd import csd
from losses.similarity import nearest_similarities
from models.embedder import Embedder, EmbedderConfig
from orchestrator import cache, checkpoint, find
from orchestrator.evaluation import retrieval
from orchestrator.fit import fit, training_state
from orchestrator.method import recipe_dict
from orchestrator.methods import asymmetric, ugd

CPU = torch.device("cpu")
FAMILY = [m for m in find.methods() if m not in ("supervised", "sureid")]


def first_pairs(method, recipe, place):
    experiment = find.method(method).experiment(recipe, place, 0, 1, CPU)
    batch = next(iter(experiment.batches(1)))
    experiment.task.train()
    return experiment.task, experiment.task.pairs(batch["distill"]), batch["distill"]


@pytest.mark.parametrize("method", FAMILY)
def test_every_method_trains_and_evaluates(method, tiny_recipe, tiny_place):
    changes = {"aml": {"variant": "contrastive+", "together": 2}, "csd": {"neighbours": "train"}}.get(method, {})
    for views in ("clean", "recorded", "online"):
        recipe = tiny_recipe(method, views=views, num_views=2, epochs=2, evaluate_symmetric=True, **changes)
        facts = find.method(method).prepare(recipe, tiny_place)
        assert 0 < facts["chance_metrics"]["chance/map"] < 1
        history = fit(find.method(method).experiment(recipe, tiny_place, 0, 1, CPU), CPU)
        weights = find.method(method).experiment(recipe, tiny_place, 0, 1, CPU).task.weights
        terms = {k.removeprefix("loss/") for k in history[-1] if k.startswith("loss/")}
        assert terms and terms <= set(weights) and all(np.isfinite(v) for v in history[-1].values())
        assert {"val/map", "symmetric/map"} <= set(history[-1])


@pytest.mark.parametrize("method", FAMILY)
def test_a_batch_has_the_right_images_labels_and_teacher_rows(method, tiny_recipe, tiny_place):
    recipe = tiny_recipe(method)
    find.method(method).prepare(recipe, tiny_place)
    _, pairs, part = first_pairs(method, recipe, tiny_place)
    data = find.dataset("folder")(tiny_place.data_root)
    assert pairs.label_B.tolist() == data.train.labels[pairs.image_B.numpy()].tolist()
    assert part["names"] == [data.train.keys[i] for i in pairs.image_B.tolist()]
    assert pairs.student_BD.requires_grad and not pairs.teacher_BD.requires_grad


@pytest.mark.parametrize(
    ("method", "changes"), [*((m, {}) for m in FAMILY), *((m, {"neighbours": "train"}) for m in ("csd", "rop"))]
)
def test_losses_are_the_same_with_and_without_autocast(method, changes, tiny_recipe, tiny_place):
    """Products of similarities and class scores included: bfloat16 would change neighbours and gradients."""
    recipe = tiny_recipe(method, **changes)
    find.method(method).prepare(recipe, tiny_place)
    task, pairs, _ = first_pairs(method, recipe, tiny_place)
    with torch.autocast("cpu", torch.bfloat16):
        inside = task.method.terms(recipe, pairs)
    for name, term in task.method.terms(recipe, pairs).items():
        assert inside[name].dtype == torch.float32
        assert inside[name].item() == pytest.approx(term.item(), rel=1e-6), name


def test_batches_of_identities_hold_positives(tiny_recipe, tiny_place):
    recipe = tiny_recipe("aml", together=4)
    find.method("aml").prepare(recipe, tiny_place)
    _, pairs, _ = first_pairs("aml", recipe, tiny_place)
    assert set(torch.bincount(pairs.label_B).tolist()) == {0, 4}


def test_double_losses_are_float64(tiny_recipe, tiny_place):
    recipe = tiny_recipe("csd", double_losses=True)
    find.method("csd").prepare(recipe, tiny_place)
    task, pairs, _ = first_pairs("csd", recipe, tiny_place)
    assert pairs.student_BD.dtype == torch.float64
    assert task.method.terms(recipe, pairs)["context"].dtype == torch.float64


def test_raml_weights_follow_the_slip(tiny_recipe):
    weights = find.method("raml").experiment.args[0].weights
    assert weights(tiny_recipe("raml", weight=2.0)) == {"absolute": 2.0, "cross": 2 * 0.7482, "student": 2 * 0.6778}
    assert weights(tiny_recipe("raml", weight=2.0, lambda2_slip=True))["student"] == 2 * 0.7482


# --- Whole-training-set neighbours


def test_neighbours_equal_sorting_every_row():
    x = torch.randn(57, 6, generator=torch.Generator().manual_seed(0))
    x[7] = x[3]  # twins: ties in every row, everywhere
    x[20:40] = x[20]
    for count in (1, 5, 57):
        blocks = list(retrieval.neighbours(x, count, block_bytes=4 * 57 * 10))
        index, cosine = (np.concatenate(part) for part in zip(*blocks, strict=True))
        unit = torch.nn.functional.normalize(x, dim=1)
        similarity = unit @ unit.T
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :count]
        np.testing.assert_allclose(cosine, similarity.gather(1, order).numpy(), atol=1e-6)
        exact = [retrieval.neighbours(x, count, block_bytes=4 * 57)]  # one row a block: the same products again
        for block in exact:
            assert len(list(block)) == 57
        ties = similarity.numpy()[np.arange(57)[:, None], index]
        np.testing.assert_allclose(ties, cosine, atol=1e-6)
        assert all(len(set(row)) == count for row in index.tolist())
    with pytest.raises(ValueError, match="count must be between 1 and the 57 training images, got 58"):
        next(retrieval.neighbours(x, 58))


def test_equal_neighbours_come_in_order_of_their_index():
    x = torch.eye(4)[torch.tensor([0, 1, 0, 0, 1, 2])]
    index, _ = next(retrieval.neighbours(x, 2))
    assert index.tolist() == [[0, 2], [1, 4], [0, 2], [0, 2], [1, 4], [5, 0]]


def test_whole_set_similarities_equal_loops_and_the_batch_where_it_is_the_whole_set():
    g = torch.Generator().manual_seed(0)
    student = torch.randn(12, 5, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(12, 5, generator=g, dtype=torch.float64)
    index, cosine = map(torch.from_numpy, next(retrieval.neighbours(teacher.float(), 7)))
    table = Neighbours(teacher, index.long(), cosine.double())
    order = torch.tensor([3, 11, 0, 5])
    query, gallery = table.similarities(student[order], order, 4)
    s, t = (torch.nn.functional.normalize(x.detach(), dim=1) for x in (student, teacher))
    for row, i in enumerate(order.tolist()):
        nearest = sorted(range(12), key=lambda j: -(t[i] @ t[j]))[:4]
        assert query[row].tolist() == pytest.approx([(s[i] @ t[j]).item() for j in nearest], rel=1e-9)
        assert gallery[row].tolist() == pytest.approx([(t[i] @ t[j]).item() for j in nearest], rel=1e-6)
    everything = torch.arange(12)
    for a, b in zip(table.similarities(student, everything, 7), nearest_similarities(student, teacher, 7), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda x: table.similarities(x, order, 4)[0], student[order].detach().requires_grad_()
    )
    assert csd(student, teacher, 7).item() > 0


def test_neighbours_are_cached_once_and_shared_by_every_smaller_k(tiny_recipe, tiny_place):
    facts = [find.method(m).prepare(tiny_recipe(m, neighbours="train", top_k=k, views="online"), tiny_place)
             for m, k in (("csd", 5), ("rop", 30))]  # fmt: skip
    assert facts[0]["neighbours_cache"] == facts[1]["neighbours_cache"] and facts[0]["views"] == "clean"
    rows = cache.open_rows(f"{tiny_place.folder('cache')}/{facts[0]['neighbours_cache']}")
    assert rows.manifest["columns"]["index"]["shape"] == [96] and len(rows) == 96
    assert (rows(np.arange(96), "index")[:, 0] == np.arange(96)).all()
    assert "neighbours_cache" not in find.method("csd").prepare(tiny_recipe("csd"), tiny_place)
    with pytest.raises(ValueError, match=r"top_k \(97\) is more than the 96 training images"):
        find.method("csd").prepare(tiny_recipe("csd", neighbours="train", top_k=97), tiny_place)


# --- Class scores and local features


def test_a_teacher_without_its_classifier_is_refused(tiny_recipe, tiny_place, tmp_path):
    torch.manual_seed(7)
    teacher = Embedder(EmbedderConfig(backbone="resnet18", width=0.125, embedding_dim=16, image_size=(24, 24)))
    checkpoint.save_model(tmp_path, teacher, {}, "lone")
    for method in ("vanillakd", "ugd"):
        recipe = tiny_recipe(method, teacher_weights=str(tmp_path / "lone.safetensors"))
        with pytest.raises(ValueError, match=r"needs the teacher's classifier, and .*lone.classifier.safetensors does"):
            find.method(method).prepare(recipe, tiny_place)
    teacher.classifier = torch.nn.Linear(16, 9, bias=False)
    checkpoint.save_model(tmp_path, teacher, {}, "lone")
    with pytest.raises(ValueError, match=r"is \(9, 16\), this data set needs \(16, 16\)"):
        find.method("ugd").prepare(recipe, tiny_place)
    (tmp_path / "lone.classifier.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no matrix named weight"):
        find.method("ugd").prepare(recipe, tiny_place)
    find.method("fitnet").prepare(tiny_recipe("fitnet", teacher_weights=recipe.teacher_weights), tiny_place)


def test_logits_are_the_classifiers_of_both_networks(tiny_recipe, tiny_place):
    recipe = tiny_recipe("vanillakd")
    find.method("vanillakd").prepare(recipe, tiny_place)
    task, pairs, _ = first_pairs("vanillakd", recipe, tiny_place)
    student, teacher = pairs.logits()
    torch.testing.assert_close(student, task.student.classifier(pairs.student_BD))
    torch.testing.assert_close(teacher, task.teacher_classifier(pairs.teacher_BD))
    assert not teacher.requires_grad and "teacher_classifier.weight" not in training_state_of(task, recipe)
    assert task.student.classifier.weight.requires_grad


def training_state_of(task, recipe):
    from orchestrator.methods import embedding

    experiment = embedding.experiment(recipe, task, CPU, lambda epoch: iter(()), lambda task: {}, 1)
    return training_state(experiment, [], CPU)["task"]


def test_projectors_are_in_the_checkpoint_but_not_in_the_student(tiny_recipe, tiny_place):
    recipe = tiny_recipe("ugd")
    find.method("ugd").prepare(recipe, tiny_place)
    task, _, _ = first_pairs("ugd", recipe, tiny_place)
    assert "heads.0.1.weight" in training_state_of(task, recipe)
    assert not any("heads" in k for k in task.student.state_dict())
    assert task.student.classifier is None  # one that no loss trains would stop data parallelism
    assert len(find.method("ugd").prepare(recipe, tiny_place)["classifier_fingerprint"]) == 64
    alone = find.method("ugd").experiment(dataclasses.replace(recipe, beta=0.0), tiny_place, 0, 1, CPU).task
    assert alone.heads is None


def test_an_interrupted_run_with_projectors_ends_as_an_uninterrupted_one(tiny_recipe, tiny_place):
    recipe = tiny_recipe("ugd", views="recorded", num_views=2)
    find.method("ugd").prepare(recipe, tiny_place)
    states = []
    make = lambda: find.method("ugd").experiment(recipe, tiny_place, 0, 1, CPU)  # noqa: E731
    whole = make()
    fit(whole, CPU, on_epoch=lambda epoch, metrics, state: states.append(state()))
    resumed = make()
    fit(resumed, CPU, resume=states[0])
    expected = whole.task.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.task.state_dict().items())


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_100", "mobilenetv2_100"])
def test_maps_and_local_embeddings(backbone):
    torch.manual_seed(0)
    net = Embedder(EmbedderConfig(backbone=backbone, embedding_dim=16, image_size=(64, 32))).eval()
    images = torch.randn(3, 3, 64, 32)
    channels = {"resnet18": (64, 128, 256, 512), "mobilenetv3_small_100": (16, 24, 48, 576),
                "mobilenetv2_100": (24, 32, 96, 320)}[backbone]  # fmt: skip
    for stage, width in enumerate(channels, 1):
        embedding, stage_map = net.with_map(images, stage)
        assert stage_map.shape[1] == width
        torch.testing.assert_close(embedding, net(images), rtol=1e-5, atol=1e-5)
    embedding, (local, half) = net.local(images, (4, 1))
    assert local.shape == (3, 16, 16) and half.shape == (3, 1, 16)
    torch.testing.assert_close(half[:, 0], embedding, rtol=1e-4, atol=1e-5)  # one cell is the whole image
    torch.testing.assert_close(embedding, net(images), rtol=1e-5, atol=1e-5)
    features = net.backbone.forward_features(images)  # 4 × 2 positions (2 × 1): square grids repeat columns
    assert torch.equal(local.view(3, 4, 4, 16)[:, :, 0], local.view(3, 4, 4, 16)[:, :, 1])
    corner = features[:, :, 0, 0]
    torch.testing.assert_close(local[:, 0], net.neck(corner), rtol=1e-5, atol=1e-5)


def test_a_swin_teacher_has_local_embeddings():
    net = Embedder(EmbedderConfig(backbone="swinv2_tiny_window8_256", embedding_dim=16, image_size=(64, 64))).eval()
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 64)
        embedding, (local,) = net.local(images, (2,))
        torch.testing.assert_close(embedding, net(images), rtol=1e-5, atol=1e-5)
        assert local.shape == (1, 4, 16)
        net = Embedder(EmbedderConfig(backbone="test_vit", embedding_dim=16, image_size=(160, 160))).eval()
        with pytest.raises(ValueError, match="test_vit has no feature map"):
            net.local(torch.zeros(1, 3, 160, 160), (2,))


def test_cached_local_features_are_those_of_the_teacher(tiny_recipe, tiny_place):
    recipe = tiny_recipe("ugd")
    find.method("ugd").prepare(recipe, tiny_place)
    prepared = asymmetric._open(find.method("ugd").experiment.args[0], recipe, tiny_place)
    assert set(prepared.targets.manifest["columns"]) == {
        "value", "local", "local_half", "local_class", "local_half_class"}  # fmt: skip
    rows = [0, 41]
    from orchestrator.datasets.augmentation import normalised

    images = normalised(torch.as_tensor(
        asymmetric.embedding.frames(recipe, prepared.data.train, recipe.teacher_size, tiny_place)(rows)))  # fmt: skip
    expected = ugd.teacher_outputs(recipe, prepared.teacher, images)
    for name, column in (("embedding", "value"), ("local", "local"), ("local_half_class", "local_half_class")):
        torch.testing.assert_close(
            torch.from_numpy(prepared.targets(rows, column)), expected[name].detach(), rtol=1e-4, atol=1e-5
        )


def test_another_student_height_is_another_cache(tiny_recipe, tiny_place):
    facts = [
        find.method("ugd").prepare(tiny_recipe("ugd", student_size=f"{h}x{h}"), tiny_place)["target_cache"]
        for h in (16, 64)
    ]
    assert facts[0] != facts[1]
    assert find.method("fitnet").prepare(tiny_recipe("fitnet"), tiny_place)["target_cache"] not in facts


def test_preparations_are_shared_where_they_are_the_same():
    from orchestrator import on_ray

    keys = {m: on_ray.prepared_key(m, find.recipe(m, "omniglot")) for m in FAMILY}
    plain = ("d3still", "fitnet", "rkd", "pkt", "spkd", "cckd", "raml", "aml")
    assert len({keys[m] for m in plain}) == 1
    assert len({keys[m] for m in ("fitnet", "vanillakd", "ugd", "csd")}) == 4
    assert keys["csd"] == keys["rop"]
    assert "neighbours" in recipe_dict(find.recipe("csd", "omniglot"))
