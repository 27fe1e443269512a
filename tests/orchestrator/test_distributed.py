"""Two workers with half a batch each equal one worker with the whole batch: loss, gradient, embeddings."""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from orchestrator import distributed, find
from orchestrator.fit import fit, to_device
from orchestrator.method import Place, recipe_dict, recipe_from
from orchestrator.methods import embedding

CPU = torch.device("cpu")


def join(rank: int, world: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)


def first_steps(rank: int, world: int, file: str, jobs: dict[str, tuple[str, dict]], place: Place, out: str) -> None:
    """Loss, terms and student gradient of every job's first step with batch norms frozen."""
    if world > 1:
        join(rank, world, file)
    found = {}
    for name, (method, values) in jobs.items():
        recipe = recipe_from(find.recipe(method, "folder"), values)
        experiment = find.method(method).experiment(recipe, place, rank, world, CPU)
        task = experiment.task.double()
        task.train()
        for module in task.modules():
            if method != "sureid" and isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.eval()  # its statistics are per worker (not SUReID's); everything else must be exact
        step = DistributedDataParallel(task) if world > 1 else task
        in_double(task)
        losses = step(to_device(next(iter(experiment.batches(1))), CPU))
        losses.total.backward()
        found[name] = {
            "total": losses.total.detach(),
            "terms": {k: v.detach() for k, v in losses.terms.items()},
            "gradient": {k: p.grad for k, p in task.named_parameters() if p.grad is not None},
        }
    if rank == 0:
        torch.save(found, out)
    if world > 1:
        dist.destroy_process_group()


def in_double(task) -> None:
    """Makes every view of a task float64, as its networks are."""

    def double(augment):
        return lambda *arguments: augment(*arguments).double()

    many = isinstance(task.augment, tuple)
    task.augment = tuple(map(double, task.augment)) if many else double(task.augment)


def whole_run(rank: int, world: int, file: str, values: dict, place: Place, out: str) -> None:
    """Evaluation after training, with real batch norms: only that all ranks agree and nothing hangs."""
    join(rank, world, file)
    recipe = recipe_from(find.recipe("d3still", "folder"), values)
    experiment = find.method("d3still").experiment(recipe, place, rank, world, CPU)
    states = []
    history = fit(experiment, CPU, on_epoch=lambda epoch, metrics, state: states.append(state()))
    again = find.method("d3still").experiment(recipe, place, rank, world, CPU)
    resumed = fit(again, CPU, resume=states[0])
    weights = experiment.task.state_dict()
    same = all(torch.equal(v, weights[k]) for k, v in again.task.state_dict().items())
    torch.save(
        {"history": history, "same": same, "metrics_same": numbers(history) == numbers(resumed)}, f"{out}.{rank}"
    )
    dist.destroy_process_group()


def numbers(history):
    return [{k: v for k, v in h.items() if not k.startswith("perf/")} for h in history]


def share(rank: int, world: int, file: str, out: str) -> None:
    join(rank, world, file)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    net.pixels = "imagenet"
    rows = torch.arange(7 * 12).reshape(7, 3, 2, 2).to(torch.uint8)
    embedded = embedding.embed(net, lambda i: rows[torch.as_tensor(i)], 7, CPU, batch=2)
    local = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = distributed.gather(local)
    (gathered * torch.arange(12.0).reshape(4, 3)).sum().backward()
    torch.save({"embedded": embedded, "gathered": gathered.detach(), "gradient": local.grad,
                "largest": distributed.largest(rank)}, f"{out}.{rank}")  # fmt: skip
    dist.destroy_process_group()


def run(function, world, tmp_path, *arguments):
    file, out = str(tmp_path / f"meet-{world}-{os.urandom(4).hex()}"), str(tmp_path / f"out-{world}")
    if world == 1:
        function(0, 1, file, *arguments, out)
    else:
        torch.multiprocessing.spawn(function, (world, file, *arguments, out), nprocs=world)
    return out


JOBS = {
    "d3still": ("d3still", {"beta": 0.3, "gamma": 0.2}),
    "d3still repo": ("d3still", {"mode": "repo"}),
    "d3still online": ("d3still", {"views": "online", "pairwise": 1.0, "differential": 1.0}),
    "fitnet": ("fitnet", {}),
    "vanillakd": ("vanillakd", {}),
    "rkd": ("rkd", {}),
    "pkt": ("pkt", {}),
    "spkd": ("spkd", {}),
    "cckd neighbour": ("cckd", {}),
    "cckd kernel": ("cckd", {"form": "kernel"}),
    "csd": ("csd", {}),
    "csd whole set": ("csd", {"neighbours": "train", "top_k": 20}),
    "raml": ("raml", {}),
    "rop": ("rop", {}),
    "rop whole set": ("rop", {"neighbours": "train", "top_k": 20}),
    "aml regression": ("aml", {}),
    "aml contrastive": ("aml", {"variant": "contrastive+", "together": 2}),
    "aml triplet symmetric": ("aml", {"variant": "triplet", "together": 2, "symmetric": True}),
    "ugd": ("ugd", {"student_size": "32x32"}),
    "ugd online repo": ("ugd", {"views": "online", "mode": "repo"}),
}


# Whole-batch parts of SUReID: both triplets over both views, class scores, masks, and the decisions of the noise.
SUREID_JOBS = {
    "sureid": {"clip_norm": 1.0},
    "sureid per view": {"noda_triplet": "per_view", "triplet_mining": "camera", "align": "st_linear"},
    "sureid cameras": {"camera_weight": 3.0, "patch_stride": 6, "npkd": False},
    "sureid clean teacher": {"teacher_view": "clean", "noda": False, "reweight": "pool"},
}


def test_two_workers_equal_one(tiny_recipe, tiny_sureid, tiny_place, tmp_path):
    """For every method: a loss over half a batch would have other neighbours, means and weights."""
    assert {method for method, _ in JOBS.values()} == set(find.methods()) - {"supervised", "sureid"}
    jobs = {}
    recipes = {name: (method, tiny_recipe(method, **changes)) for name, (method, changes) in JOBS.items()}
    recipes |= {name: ("sureid", tiny_sureid(**changes)) for name, changes in SUREID_JOBS.items()}
    for name, (method, recipe) in recipes.items():
        find.method(method).check(recipe, 2)
        find.method(method).prepare(recipe, tiny_place)
        jobs[name] = method, recipe_dict(recipe)
    two = torch.load(run(first_steps, 2, tmp_path, jobs, tiny_place), weights_only=True)
    torch.multiprocessing.spawn(first_steps, (1, "", jobs, tiny_place, str(tmp_path / "one")), nprocs=1)
    one = torch.load(tmp_path / "one", weights_only=True)
    for name, expected in one.items():
        found = two[name]
        assert expected["total"] > 0 and set(found["terms"]) == set(expected["terms"]), name
        torch.testing.assert_close(found["total"], expected["total"], rtol=1e-5, atol=0, msg=name)
        for term, value in expected["terms"].items():
            torch.testing.assert_close(found["terms"][term], value, rtol=1e-5, atol=1e-9, msg=f"{name}: {term}")
        own = {k.removeprefix("module."): v for k, v in found["gradient"].items()}
        assert set(own) == set(expected["gradient"]), name
        for k, gradient in expected["gradient"].items():
            allowed = 1e-5 * float(gradient.abs().max()) + 1e-12
            torch.testing.assert_close(
                own[k], gradient, rtol=1e-5, atol=allowed, msg=lambda m, at=f"{name}: {k}": f"{at}: {m}"
            )


def test_two_workers_train_evaluate_and_resume_exactly(tiny_recipe, tiny_place, tmp_path):
    recipe = tiny_recipe(mode="repo", epochs=2)
    find.method("d3still").prepare(recipe, tiny_place)
    out = run(whole_run, 2, tmp_path, recipe_dict(recipe), tiny_place)
    first, second = (torch.load(f"{out}.{rank}", weights_only=True) for rank in range(2))
    assert first["same"] and first["metrics_same"]
    assert [h["val/map"] for h in first["history"]] == [h["val/map"] for h in second["history"]]
    assert [h["train/loss"] for h in first["history"]] == [h["train/loss"] for h in second["history"]]


def test_gathering_keeps_order_and_routes_the_gradient(tmp_path):
    out = run(share, 2, tmp_path)
    for rank in range(2):
        found = torch.load(f"{out}.{rank}", weights_only=True)
        assert found["embedded"].shape == (7, 5)
        assert found["gathered"][:, 0].tolist() == [0, 0, 1, 1]
        # Twice this rank's rows: averaging over two ranks halves it again.
        assert torch.equal(found["gradient"], 2 * torch.arange(12.0).reshape(4, 3)[2 * rank : 2 * rank + 2])
        assert found["largest"] == 1.0
    one, two = (torch.load(f"{out}.{rank}", weights_only=True)["embedded"] for rank in range(2))
    assert torch.equal(one, two)


def test_alone_everything_is_the_identity():
    x = torch.ones(2, requires_grad=True)
    assert distributed.gather(x) is x and distributed.largest(2.0) == 2.0
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
