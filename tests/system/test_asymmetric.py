"""What only asymmetric retrieval has: batches, precision, neighbours of the whole set, class scores, local features."""

import numpy as np
import pytest
import torch
from families.asymmetric import CASES

from losses.csd import csd
from losses.similarity import nearest_similarities
from orchestrator import cache, checkpoint, find
from orchestrator.datasets.augmentation import normalised
from orchestrator.evaluation import retrieval
from orchestrator.families.asymmetric.pairs import Neighbours
from orchestrator.method import Where
from orchestrator.methods import ugd

CPU = torch.device("cpu")
FAMILY = [name for name in find.methods() if find.method(name).family == "asymmetric"]


@pytest.fixture(scope="session")
def first_pairs(tiny_recipe, tiny_place, prepared):
    """Task, outputs of both networks and first distillation batch of a method's tiny recipe."""

    def make(method, **changes):
        recipe = tiny_recipe(method, **changes)
        made = find.method(method).experiment(recipe, prepared(method, recipe), Where(tiny_place, 0, 1, CPU))
        part = next(iter(made.batches(1)))["distill"]
        return made.task, made.task.train().pairs(part), part

    return make


@pytest.mark.parametrize("method", FAMILY)
def test_a_batch_has_the_right_images_labels_and_teacher_rows(method, first_pairs, tiny_place):
    _, pairs, part = first_pairs(method)
    train = find.dataset("folder")(tiny_place.data_root).train
    assert pairs.label_B.tolist() == train.labels[pairs.image_B.numpy()].tolist()
    assert part["names"] == [train.keys[i] for i in pairs.image_B.tolist()]
    assert pairs.student_BD.requires_grad and not pairs.teacher_BD.requires_grad


def test_the_teacher_s_rows_are_its_embeddings_of_these_images(first_pairs, tiny_recipe, prepared):
    _, pairs, part = first_pairs("fitnet")
    recipe = tiny_recipe("fitnet")
    teacher, _ = checkpoint.load_model(recipe.teacher.weights)
    found = prepared("fitnet", tiny_recipe("fitnet", views="online"))
    frames = cache.open_rows(found.path("teacher train pixels"))(part["image"].numpy())
    with torch.no_grad():
        expected = teacher.eval()(normalised(torch.as_tensor(frames), teacher.pixels))
    torch.testing.assert_close(pairs.teacher_BD, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "changes"),
    [(m, {"views": "clean", **c}) for m in FAMILY for c in CASES.get(m, ({},)) if c.get("views") != "online"],
    ids=lambda value: str(value),
)
def test_losses_are_the_same_with_and_without_autocast(method, changes, first_pairs):
    """Products of similarities and class scores included: bfloat16 would change neighbours and gradients."""
    changes = {name: value for name, value in changes.items() if name != "coupled"}
    task, pairs, _ = first_pairs(method, **changes)
    with torch.autocast("cpu", torch.bfloat16):
        inside = task.method.terms(task.recipe, pairs)
    for name, term in task.method.terms(task.recipe, pairs).items():
        assert inside[name].dtype == (torch.float64 if task.recipe.double_losses else torch.float32)
        assert inside[name].item() == pytest.approx(term.item(), rel=1e-6), name


def test_batches_of_identities_hold_positives(first_pairs):
    _, pairs, _ = first_pairs("aml", together=4)
    assert set(torch.bincount(pairs.label_B).tolist()) == {0, 4}


def test_double_losses_are_float64(first_pairs):
    task, pairs, _ = first_pairs("csd", double_losses=True)
    assert pairs.student_BD.dtype == torch.float64
    assert task.method.terms(task.recipe, pairs)["context"].dtype == torch.float64


def test_raml_weights_follow_the_slip(tiny_recipe):
    weights = find.method("raml").distillation.weights
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


def test_neighbours_are_of_the_training_set_in_order(tiny_recipe, prepared):
    ready = prepared("csd", tiny_recipe("csd", neighbours="train", top_k=5, views="online"))
    assert ready.told()["views"] == "clean"
    rows = cache.open_rows(ready.path("neighbours"))
    assert rows.manifest["columns"]["index"]["shape"] == [96] and len(rows) == 96
    assert (rows(np.arange(96), "index")[:, 0] == np.arange(96)).all()


# --- Class scores and local features


def test_logits_are_the_classifiers_of_both_networks(first_pairs):
    task, pairs, _ = first_pairs("vanillakd")
    student, teacher = pairs.logits()
    torch.testing.assert_close(student, task.student.classifier(pairs.student_BD))
    torch.testing.assert_close(teacher, task.teacher_classifier(pairs.teacher_BD))
    assert not teacher.requires_grad and "teacher_classifier.weight" not in task.stored()
    assert task.student.classifier.weight.requires_grad


def test_projectors_are_in_the_checkpoint_but_not_in_the_student(first_pairs, tiny_recipe, prepared):
    task, _, _ = first_pairs("ugd")
    assert "heads.0.1.weight" in task.stored()
    assert not any("heads" in k for k in task.student.state_dict())
    assert task.student.classifier is None  # one that no loss trains would stop data parallelism
    assert len(prepared("ugd", tiny_recipe("ugd")).told()["classifier_fingerprint"]) == 64
    assert first_pairs("ugd", beta=0.0)[0].heads is None


def test_cached_local_features_are_those_of_the_teacher(tiny_recipe, prepared):
    recipe = tiny_recipe("ugd")
    ready = prepared("ugd", recipe)
    targets = cache.open_rows(ready.path("targets"))
    assert set(targets.manifest["columns"]) == {"value", "local", "local_half", "local_class", "local_half_class"}
    online = prepared("ugd", tiny_recipe("ugd", views="online"))
    rows = [0, 41]
    frames = cache.open_rows(online.path("teacher train pixels"))(rows)
    teacher, _ = checkpoint.load_model(ready.path("teacher"))
    teacher.classifier = checkpoint.load_classifier(ready.path("classifier"))
    with torch.no_grad():
        expected = ugd.teacher_outputs(recipe, teacher.eval(), normalised(torch.as_tensor(frames), teacher.pixels))
    for name, column in (("embedding", "value"), ("local", "local"), ("local_half_class", "local_half_class")):
        torch.testing.assert_close(torch.from_numpy(targets(rows, column)), expected[name], rtol=1e-4, atol=1e-5)
