"""What comes out of training: scores, pictures, and the student as files."""

import pytest
import torch

from orchestrator import checkpoint, figures, find
from orchestrator.evaluation import cost
from orchestrator.families.retrieval.search import Found
from orchestrator.method import Where
from orchestrator.needs import Prepared
from orchestrator.onnx_file import export_onnx

CPU = torch.device("cpu")
KINDS = ["d3still", "sureid"]  # one method for each kind of network


@pytest.fixture(scope="session")
def student_of(tiny_recipe, prepared, tiny_place):
    """An untrained student with batch statistics of its own, its recipe, and how it is scored."""

    def make(method, **changes):
        recipe = tiny_recipe(method, **changes)
        where, ready = Where(tiny_place, 0, 1, CPU), prepared(method, recipe)
        made = find.method(method).experiment(recipe, ready, where)
        made.task.train()
        made.task(next(iter(made.batches(1))))
        return made, recipe, ready, where

    return make


@pytest.mark.parametrize("method", find.methods())
def test_a_stored_student_scores_as_the_experiment_did(method, student_of, prepared, tmp_path):
    made, recipe, _, where = student_of(method)
    with torch.no_grad():
        expected = made.evaluate(made.task.eval())
    checkpoint.save_model(tmp_path, made.task.student, {"note": 1})
    stored, facts = checkpoint.load_model(tmp_path / "student.safetensors")
    assert (
        facts["note"] == 1 and getattr(stored, "classifier", None) is None and type(stored) is type(made.task.student)
    )
    alone = prepared(method, recipe, "score")  # without training images and the teacher's file
    with torch.no_grad():
        found = find.method(method).score(stored, recipe, alone, where)
    assert found.metrics == pytest.approx(dict(expected.metrics), abs=1e-9)
    names = {metric.name for metric in find.method(method).metrics}
    assert find.method(method).metrics[0].name in found.metrics and set(found.metrics) & names
    # Rates are fractions; how near the teacher is are a cosine and a correlation.
    assert all((-1 if "/teacher_" in name else 0) <= value <= 1 for name, value in found.metrics.items())


def test_the_student_on_both_sides_is_scored_too(student_of):
    made, recipe, ready, where = student_of("d3still", evaluate_symmetric=True)
    metrics = find.method("d3still").score(made.task.student, recipe, ready, where).metrics
    assert metrics["symmetric/map"] != metrics["val/map"]


@pytest.mark.parametrize("method", ["d3still", "supervised", "sureid"])
def test_pictures_are_drawn_from_what_the_evaluation_found(method, student_of, tmp_path):
    made, recipe, ready, where = student_of(method)
    student, found = made.task.student.eval(), find.method(method)
    evaluation = found.score(student, recipe, ready, where)
    assert isinstance(evaluation.found, Found) and evaluation.found.query_QD.shape[0] == 12
    pictures = found.pictures(student, recipe, ready, evaluation, where)
    assert "retrieval" in pictures
    for name, picture in pictures.items():
        figures.draw(picture).savefig(tmp_path / f"{name}.png")
    panel = pictures["retrieval"]
    assert panel.results.shape[:2] == panel.correct.shape and panel.results.dtype == panel.query.dtype


@pytest.mark.parametrize("method", find.methods())
def test_chance_and_the_teacher_s_own_score_are_told(method, tiny_recipe, prepared):
    told = prepared(method, tiny_recipe(method)).told()
    assert 0 < told["chance_metrics"][find.method(method).metrics[0].name] < 1
    assert ("teacher_metrics" in told) == hasattr(tiny_recipe(method), "teacher")
    assert (
        find.method(method)
        .networks(tiny_recipe(method))[0]
        .startswith(("resnet1", "ResNet18", "vit", "ViT", "MobileFaceNet"))
    )


def exported(method, student_of, folder, **changes) -> float:
    made, *_ = student_of(method, **changes)
    return export_onnx(made.task.student.eval(), folder / "student.onnx")


@pytest.mark.parametrize("method", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_a_student_is_exported(method, student_of, tmp_path):
    assert exported(method, student_of, tmp_path) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("supervised", {}),
        ("ugd", {}),
        ("d3still", {"student.name": "mobilenetv3_small_100", "student.width": 1.0, "student.size": "32x32"}),
        ("sureid", {"hts": False}),
        ("sureid", {"pruning.selection": "attention"}),
        ("sureid", {"pruning.selection": "random"}),
        ("sureid", {"inference": "threshold"}),
        ("sureid", {"camera_weight": 3.0, "patch_stride": 6, "npkd": False}),
    ],
)
def test_every_other_network_is_exported(method, changes, student_of, tmp_path):
    assert exported(method, student_of, tmp_path, **changes) < 1e-4


@pytest.mark.parametrize("method", KINDS)
def test_the_cost_of_a_student_is_measured_by_its_parts(method, student_of):
    made, *_ = student_of(method)
    found = cost.logged(made.task.student.eval())
    assert found and all(value > 0 for value in found.values() if isinstance(value, int | float))


def test_what_is_prepared_survives_the_record(student_of, tiny_place):
    """A trial is replayed from plain values."""
    made, recipe, ready, where = student_of("d3still")
    again = find.method("d3still").experiment(recipe, Prepared.of(tiny_place, ready.plain()), where)
    one, two = (next(iter(e.batches(2)))["distill"]["frames"] for e in (made, again))
    assert torch.equal(one, two)
