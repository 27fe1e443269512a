"""Two workers with half a batch each equal one worker with the whole batch: losses, gradients, state, embeddings.

Two processes are started once and do everything; the tests look at what each of them has found.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import cases, family_of
from torch import nn

from orchestrator import distributed, find, shards
from orchestrator.families.retrieval import search
from orchestrator.fit import _forward, fit, to_device
from orchestrator.method import Evaluation, Experiment, Losses, Task, Where
from orchestrator.needs import Place, Prepared
from orchestrator.recipe import flat, recipe_from

CPU = torch.device("cpu")
Job = tuple[str, dict[str, Any], dict[str, Any]]  # method, flat recipe, what is prepared for it
# Follows a step, or is made before it.
STATE = (
    "bank_ND", "label_N", "table_KD", "queue_QD", "position", "teacher_MD", "student_MD", "label_M", "sample_M", "ptr",
    "count", "iled.mean", "iled.deviation", "centre_CD", "threshold_K", "norm_mean", "norm_std",
)  # fmt: skip
CASES = {case.id: case for case in cases(quick=True)}


def experiment(job: Job, place: Place, rank: int, world: int) -> Experiment:
    method, values, roles = job
    recipe = recipe_from(find.recipe(method, "folder"), values)
    return find.method(method).experiment(recipe, Prepared.of(place, roles), Where(place, rank, world, CPU))


def first_step(job: Job, place: Place, rank: int, world: int) -> dict[str, Any]:
    """Loss, terms and gradients of the first step in float64, with batch norms frozen that are of one worker."""
    made = experiment(job, place, rank, world)
    if made.start_epoch is not None:
        with torch.no_grad():
            made.start_epoch(made.task.eval(), 1)
    task = made.task.double().train()
    for module in task.modules():
        if family_of(job[0]).NORMS_PER_WORKER and isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    in_double(task)
    forward = _forward(task, made, CPU)  # it must live until the backward pass
    losses = forward(to_device(next(iter(made.batches(1))), CPU))
    losses.total.backward()
    with torch.no_grad():
        task.after_step(losses.kept)
    return {
        "norm": shards.gradient_norm(task),
        "sharded": {name: [rows.start, rows.stop] for name, (_, rows) in task.sharded_parameters().items()},
        "total": losses.total.detach(),
        "terms": {name: term.detach() for name, term in losses.terms.items()},
        "state": {name: rows for name, rows in task.named_buffers() if name.endswith(STATE)},
        "gradient": {name: p.grad for name, p in task.named_parameters() if p.grad is not None},
    }


def in_double(task: Task) -> None:
    """Makes every view of a task float64, as its networks are."""

    def double(augment):
        return lambda *arguments: augment(*arguments).double()

    for name in [name for name in vars(task) if name.startswith("augment")]:
        own = getattr(task, name)
        setattr(task, name, tuple(map(double, own)) if isinstance(own, tuple) else double(own))


def numbers(history):
    return [{k: v for k, v in metrics.items() if not k.startswith("perf/")} for metrics in history]


def whole_run(job: Job, place: Place, rank: int, world: int) -> dict[str, Any]:
    """Two epochs with real batch norms, and the second one again from the state of rank 0 after the first."""
    made, states = experiment(job, place, rank, world), []
    history, _ = fit(made, CPU, on_epoch=lambda epoch, metrics, state: states.append(state()))
    first = [states[0]]
    dist.broadcast_object_list(first, 0)
    again = experiment(job, place, rank, world)
    resumed, _ = fit(again, CPU, resume=first[0])
    weights, found = made.task.state_dict(), again.task.state_dict()
    same = all(torch.equal(value, weights[name]) for name, value in found.items())
    return {"history": numbers(history), "resumed": numbers(resumed), "same": same, "weights": weights}


class Bank(Task):
    """Stores what it has embedded in the last steps, as a memory bank does."""

    def __init__(self, gathers: bool):
        super().__init__(nn.Linear(3, 2))
        self.gathers, self.seen = gathers, []
        self.register_buffer("rows", torch.zeros(8, 2))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def forward(self, batch):
        self.seen.append(self.rows.clone())
        own = self.student(batch["x"])
        return Losses({"size": distributed.gather(own).square().sum()}, {"size": 1.0}, kept={"own": own.detach()})

    def after_step(self, kept):
        rows = distributed.gather_without_gradient(kept["own"]) if self.gathers else kept["own"]
        self.rows[(self.place + torch.arange(len(rows))) % len(self.rows)] = rows
        self.place += len(rows)


def bank(gathers: bool, rank: int, world: int) -> dict[str, Any]:
    """Three steps of four images."""
    torch.manual_seed(0)
    task, x = Bank(gathers), torch.arange(36.0).reshape(3, 4, 3) / 36
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    made = Experiment(
        task, torch.optim.SGD(task.parameters(), lr=0.01), 1, lambda progress: 0.01,
        lambda epoch: ({"x": step[own]} for step in x), lambda task: Evaluation({"val/x": 1.0}),
    )  # fmt: skip
    try:
        fit(made, CPU)
    except RuntimeError as error:
        return {"error": str(error), "seen": task.seen}
    return {"rows": task.rows, "place": task.place, "steps": task.steps, "seen": task.seen}


def gathered(rank: int) -> dict[str, Any]:
    """Embedding of seven images by two ranks, and the gradient through a gather."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    net.pixels = ((0.5,) * 3, (0.5,) * 3)
    rows = torch.arange(7 * 12).reshape(7, 3, 2, 2).to(torch.uint8)
    embedded = search.embed(net, lambda i: rows[torch.as_tensor(i)], 7, CPU, batch=2)
    local = torch.full((2, 3), float(rank), requires_grad=True)
    together = distributed.gather(local)
    (together * torch.arange(12.0).reshape(4, 3)).sum().backward()
    return {"embedded": embedded, "gathered": together.detach(), "gradient": local.grad,
            "largest": distributed.largest(rank)}  # fmt: skip


def everything(
    rank: int, world: int, file: str, jobs: dict[str, Job], run: Job, spread: Job, place: Place, out: str
) -> None:
    """All that two processes do together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    found = {
        "steps": {name: first_step(job, place, rank, world) for name, job in jobs.items()},
        "run": whole_run(run, place, rank, world),
        "spread": whole_run(spread, place, rank, world),
        "bank": bank(True, rank, world),
        "own rows": bank(False, rank, world),
        "gathered": gathered(rank),
    }
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def jobs(request, tiny_recipe, prepared) -> dict[str, Job]:
    made = {}
    # The two processes do no more than is compared: in the default suite little.
    compared = [item for item in request.session.items if item.name.startswith("test_two_workers_equal_one[")]
    asked = {item.callspec.params["name"] for item in compared}
    for name in sorted(asked):
        method, changes = CASES[name].values
        recipe = tiny_recipe(method, **changes)
        find.method(method).check(recipe, 2)
        made[name] = (method, flat(recipe), prepared(method, recipe).plain())
    return made


@pytest.fixture(scope="module")
def ranks(jobs, tiny_recipe, prepared, tiny_place, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe = tiny_recipe("d3still", mode="repo", **{"train.epochs": 2, "run.checkpoint_every": 1})
    run = ("d3still", flat(recipe), prepared("d3still", recipe).plain())
    recipe = tiny_recipe("margin_softmax", **{"train.epochs": 2, "run.checkpoint_every": 1, "head.sample": 0.9})
    spread = ("margin_softmax", flat(recipe), prepared("margin_softmax", recipe).plain())
    arguments = (2, str(folder / "meet"), jobs, run, spread, tiny_place, str(folder / "out"))
    torch.multiprocessing.spawn(everything, arguments, nprocs=2)
    return [torch.load(folder / f"out.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=case.marks) for name, case in CASES.items()])
def test_two_workers_equal_one(name, ranks, jobs, tiny_place):
    """A loss over half a batch would have other neighbours, means and weights."""
    expected = first_step(jobs[name], tiny_place, 0, 1)
    assert expected["total"] > 0
    for rank in ranks:
        found = rank["steps"][name]
        assert found["terms"].keys() == expected["terms"].keys()
        torch.testing.assert_close(found["total"], expected["total"], rtol=1e-5, atol=0)
        for term, value in expected["terms"].items():
            torch.testing.assert_close(found["terms"][term], value, rtol=1e-5, atol=1e-9, msg=term)
        for state, value in expected["state"].items():
            torch.testing.assert_close(found["state"][state], value, rtol=1e-9, atol=1e-12, msg=state)
        torch.testing.assert_close(found["norm"], expected["norm"], rtol=1e-5, atol=0)
        assert found["gradient"].keys() == expected["gradient"].keys()
        for parameter, gradient in expected["gradient"].items():
            if parameter in found["sharded"]:
                gradient = gradient[slice(*found["sharded"][parameter])]
            allowed = 1e-5 * float(gradient.abs().max()) + 1e-12
            torch.testing.assert_close(found["gradient"][parameter], gradient, rtol=1e-5, atol=allowed, msg=parameter)


def test_two_workers_train_evaluate_and_resume_exactly(ranks):
    one, two = (rank["run"] for rank in ranks)
    assert one["same"] and two["same"]
    assert one["history"] == two["history"] == one["resumed"] == two["resumed"]
    assert all(torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())


def test_class_centres_that_are_spread_over_workers_are_stored_and_resumed_whole(ranks):
    """A checkpoint holds the rows of both; when training ends rank 0 has them all, and so has what is stored of it."""
    one, two = (rank["spread"] for rank in ranks)
    assert one["same"] and two["same"]
    assert one["history"] == two["history"] == one["resumed"] == two["resumed"]
    centres = "student.classifier.weight"
    whole, own = one["weights"].pop(centres), two["weights"].pop(centres)
    assert len(whole) == 16 and torch.equal(whole[8:], own) and whole.std(dim=1).min() > 0.01
    assert all(torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())


def test_a_bank_of_gathered_rows_is_that_of_one_worker(ranks):
    alone = bank(True, 0, 1)
    for rank in ranks:
        found = rank["bank"]
        torch.testing.assert_close(found["rows"], alone["rows"])
        assert found["place"] == alone["place"] == 12 and found["steps"] == alone["steps"] == 3
    assert torch.equal(ranks[0]["bank"]["rows"], ranks[1]["bank"]["rows"])


def test_an_update_that_is_not_gathered_fails_and_names_its_buffer(ranks):
    for rank in ranks:
        assert rank["own rows"]["error"].startswith("the buffer rows differs between ranks")


def test_buffers_are_not_sent_in_every_step(ranks):
    """Every rank still sees its own rows of the steps before: a bank may be half a gigabyte."""
    one, two = (rank["own rows"]["seen"] for rank in ranks)
    assert len(one) == 3 and torch.equal(one[0], two[0])
    assert all(not torch.equal(a, b) for a, b in zip(one[1:], two[1:], strict=True))
    assert all(not torch.equal(a, b) for a, b in pairwise(two))


def test_gathering_keeps_order_and_routes_the_gradient(ranks):
    for number, rank in enumerate(ranks):
        found = rank["gathered"]
        assert found["embedded"].shape == (7, 5) and found["largest"] == 1.0
        assert found["gathered"][:, 0].tolist() == [0, 0, 1, 1]
        # Twice this rank's rows: averaging over two ranks halves it again.
        assert torch.equal(found["gradient"], 2 * torch.arange(12.0).reshape(4, 3)[2 * number : 2 * number + 2])
    assert torch.equal(ranks[0]["gathered"]["embedded"], ranks[1]["gathered"]["embedded"])


def test_alone_everything_is_the_identity():
    x = torch.ones(2, requires_grad=True)
    assert distributed.gather(x) is x and distributed.largest(2.0) == 2.0
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    distributed.check_equal_buffers(nn.BatchNorm1d(3))
