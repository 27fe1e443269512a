"""The contract: losses add up, a task stores all but what it names as frozen, needs are their content."""

import json

import pytest
import torch
from torch import nn

from orchestrator import find, published
from orchestrator.method import Losses, Method, Task
from orchestrator.needs import Need, Place, Prepared, Ready, digest, streamed_digest


class Banked(Task):
    """A task whose names begin alike: only what ``frozen`` names exactly is frozen."""

    frozen = frozenset({"teacher", "reference"})

    def __init__(self, teacher: nn.Module | None):
        super().__init__(nn.Linear(2, 2), teacher)
        self.teacher_context = nn.Linear(2, 2)
        self.reference = None
        self.register_buffer("teacher_bank", torch.zeros(3, 2))
        self.register_buffer("reference_position", torch.tensor(0))


def test_losses_weigh_named_terms():
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)
    losses = Losses({"a": a, "b": b}, {"a": 0.5, "b": 2.0, "off": 9.0}, observed={"seen": torch.tensor(100.0)})
    assert losses.total.item() == 7.0
    losses.total.backward()
    assert a.grad.item() == 0.5
    assert Losses({"a": a}, {"a": 1.0}).kept == {} and Losses({"a": a}, {"a": 1.0}).observed == {}


def test_no_term_is_no_loss():
    with pytest.raises(ValueError, match="a step without any loss term has nothing to train on"):
        _ = Losses({}, {"a": 1.0}).total


def test_only_what_is_named_exactly_is_frozen():
    task = Banked(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    task.reference = nn.Dropout()
    task.train()
    assert not task.teacher.training and not task.reference.training
    assert task.student.training and task.teacher_context.training
    assert not any(p.requires_grad for p in task.teacher.parameters())
    assert all(p.requires_grad for p in task.teacher_context.parameters())
    assert set(task.stored()) == {
        "student.weight", "student.bias", "teacher_context.weight", "teacher_context.bias", "teacher_bank",
        "reference_position", "steps",
    }  # fmt: skip
    assert task.eval().train(False).training is False


def test_a_task_without_teacher_stores_everything():
    task = Banked(None)
    assert task.frozen_modules() == [] and set(task.stored()) == set(task.state_dict())
    assert task.steps.dtype == torch.int64 and task.steps.item() == 0


@pytest.mark.parametrize("name", find.methods())
def test_a_method_is_its_file_s_instance(name):
    method = find.method(name)
    assert isinstance(method, Method) and method is find.method(name)
    own = [m for m in find.methods() if find.method(m).family == method.family]
    assert len({find.method(m).metrics for m in own}) == 1, "methods of a family measure the same"
    student, teacher = method.networks(method.recipes["demo"])
    assert (
        student
        and teacher
        and (teacher == published.NO_TEACHER) == (name in ("margin_softmax", "rsiamnet", "supervised"))
    )


# --- Needs ------------------------------------------------------------------------------------------------------------


def test_a_need_is_what_it_is_made_from():
    index = Need("index", {"name": "demo"}, how={"root": "/a"}, title="the index of demo")
    pixels = Need("pixels", {"size": [8, 8]}, {"index": index}, network=True)
    elsewhere = Need("pixels", {"size": [8, 8]}, {"index": Need("index", {"name": "demo"}, how={"root": "/b"})})
    assert pixels.key == elsewhere.key and len(pixels.key) == 32
    others = [
        Need("crops", {"size": [8, 8]}, {"index": index}),
        Need("pixels", {"size": [8, 9]}, {"index": index}),
        Need("pixels", {"size": [8, 8]}, {"images": index}),
        Need("pixels", {"size": [8, 8]}, {"index": Need("index", {"name": "sop"})}),
        Need("pixels", {"size": [8, 8]}),
    ]
    assert len({need.key for need in [pixels, *others]}) == 6


def test_a_need_travels_as_plain_values():
    index = Need("index", {"name": "demo"}, how={"root": "/a"}, title="the index")
    pixels = Need("pixels", {"size": [8, 8]}, {"index": index}, network=True)
    again = Need.of(json.loads(json.dumps(pixels.plain())))
    assert again == pixels and again.key == pixels.key
    assert (again.network, again.after["index"].how, again.after["index"].title) == (True, {"root": "/a"}, "the index")


def test_what_is_ready_is_found_where_the_storage_is_now():
    ready = Ready("k", "pixels", "cache/pixels-1", "f", {"protocol": "p"})
    prepared = Prepared(Place("/x"), {"train pixels": ready, "teacher": Ready("l", "teacher", "t", "g", {"run": "r"})})
    assert prepared.path("train pixels") == "/x/cache/pixels-1" and prepared.told() == {"protocol": "p", "run": "r"}
    moved = Prepared.of(Place("/y"), json.loads(json.dumps(prepared.plain())))
    assert dict(moved) == dict(prepared) and moved.path("teacher") == "/y/t" and len(moved) == 2


def test_place_joins_paths():
    assert Place("/x").folder("cache", "y") == "/x/cache/y"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_streamed_digest_is_that_of_the_whole(size):
    lists = [["a", 'ü"\\', ""], [1, -2, 3], [], [[1.5, None], {"k": True}]]
    blocks = [[values[i : i + size] for i in range(0, len(values), size)] for values in lists]
    assert streamed_digest(*blocks) == digest(lists)
    assert streamed_digest() == digest([]) and streamed_digest([[], ["a"], []]) == digest([["a"]])
