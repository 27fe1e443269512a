"""One trial in plain Python: names and numbers in, reports out. Ray and this process run the same."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator import find, mirror
from orchestrator.launch import before
from orchestrator.launch.plan import Plan
from orchestrator.needs import Place, Prepared
from orchestrator.progress import label
from orchestrator.recipe import flat, recipe_from

Job = dict[str, Any]  # what a trial is sent: JSON values only, so that it can be replayed from its record
State = dict[str, Any]
# Epoch, metrics, and where a checkpoint is due a function that makes the state.
Report = Callable[[int, dict[str, float], Callable[[], State] | None], None]


class Stopped(Exception):
    """Raised by a report: the trial is not worth going on."""


def check(plan: Plan, point: Mapping[str, Any]) -> None:
    """Raises ValueError for a point that the method refuses."""
    method, recipe = plan.recipe_of(point)
    find.method(method).check(recipe, plan.workers)


def job_of(plan: Plan, number: int, point: Mapping[str, Any]) -> Job:
    """Names and plain numbers from which a trial can be replayed; its MLflow run exists from here on.

    Raises:
        ValueError: MLflow has the experiment in its trash.
    """
    from orchestrator import tracking

    method, recipe = plan.recipe_of(point)
    values, uri = flat(recipe), plan.tracking_uri
    prepared = plan.prepared_for(point)
    facts = {k: v for k, v in {**plan.facts, **prepared.told()}.items() if not isinstance(v, dict) and v != ""}
    tags = {
        "orch.sweep": plan.tag,
        "orch.space": plan.space,
        "orch.kind": "trial",
        "orch.trial": str(number),
        "orch.method": method,
        "orch.benchmark": plan.benchmark,
        "orch.data_root": plan.place["data_root"],
        **{f"orch.{k}": str(v) for k, v in facts.items()},
        **{f"orch.point.{k}": str(v) for k, v in point.items()},
    }
    experiment_id = tracking.experiment(uri, plan.title, plan.place["storage"], plan.search_space.question)
    run_id = tracking.run(uri, experiment_id, f"{plan.tag}/t{number:03d}", label(point), tags, values)
    tracking.log_record(
        uri, tracking.Record(run_id, method, plan.benchmark, values, plan.where, facts, prepared.plain())
    )
    return {
        "method": method,
        "benchmark": plan.benchmark,
        "recipe": values,
        "prepared": prepared.plain(),
        "place": plan.place,
        "tracking_uri": uri,
        "run_id": run_id,
        "number": number,
        "name": f"t{number:03d}",
        "epochs": recipe.train.epochs,
        "train_storage": plan.where.address("sweeps", plan.sweep, "train"),
        "workers": plan.workers,
        "gpus_per_worker": plan.gpus_per_worker,
        "threads": 1,
        "claim": "",
    }


def row_of(tags: Mapping[str, str]) -> dict[str, str]:
    """What a trial was given, from the tags of its run, but for its seed.

    >>> row_of({"orch.trial": "3", "orch.point.cell": "D3still", "orch.point.seed": "1"})
    {'cell': 'D3still'}
    """
    point = {name.removeprefix("orch.point."): value for name, value in tags.items() if name.startswith("orch.point.")}
    return {name: value for name, value in point.items() if name.rpartition(".")[2] != "seed"}


def seeds_of(params: Mapping[str, str]) -> tuple[str, ...]:
    """All seeds of a run, from its parameters.

    >>> seeds_of({"train.seed": "1", "teacher.train.seed": "0", "train.rate": "0.1"})
    ('0', '1')
    """
    return tuple(params[name] for name in sorted(params) if name.rpartition(".")[2] == "seed")


def recipe_of(record: Any) -> Any:
    """The recipe of a stored record, whatever version has written it."""
    template = find.recipe(record.method, record.benchmark)
    return recipe_from(template, before.today(record.recipe, template))


def work(
    job: Job, device: str, rank: int, world: int, resume: Mapping[str, Any] | None, report: Report
) -> dict[str, Any]:
    """What every worker of a trial runs. Returns the final metrics, or {"failed": why}.

    Args:
        job: made by :func:`job_of`.
        device: such as "cpu" or "cuda:0": the one that this worker was given.
        rank: of this worker.
        world: number of workers.
        resume: the last state that was reported, if any.
        report: called on every rank after every epoch; on rank 0 the epoch is in MLflow before.
    """
    import torch

    from orchestrator import tracking
    from orchestrator.fit import NonFiniteLoss, fit
    from orchestrator.method import Where

    if device == "cpu":
        torch.set_num_threads(job["threads"])
    place = Place(**job["place"])
    for ready in job["prepared"].values():
        mirror.fetch(place, ready["path"])
    share = min(1.0, job.get("gpus_per_worker") or 1.0)
    where = Where(place, rank, world, torch.device(device), share)
    method = find.method(job["method"])
    recipe = recipe_from(find.recipe(job["method"], job["benchmark"]), job["recipe"])
    prepared = Prepared.of(place, job["prepared"])
    experiment = method.experiment(recipe, prepared, where)
    log = tracking.EpochLog(job["tracking_uri"], job["run_id"]) if rank == 0 else None
    if log is not None:
        threading.Thread(target=_warm, daemon=True).start()

    def on_epoch(epoch: int, metrics: dict[str, float], state: Callable[[], State] | None) -> None:
        if log is not None:
            log(epoch, metrics)
        report(epoch, metrics, state)

    try:
        history, evaluation = fit(experiment, where.device, resume, on_epoch)
    except NonFiniteLoss as error:
        return {"failed": str(error)}
    if rank == 0:
        _log_result(job, method, recipe, prepared, experiment.task.student, evaluation, history[-1], where)
    return {"epoch": len(history), **history[-1]}


def _warm() -> None:
    """Imports while the first epoch trains what only its end and the trial's need: MLflow and matplotlib, seconds."""
    from orchestrator import figures, tracking  # noqa: F401

    tracking.warm()


def _log_result(
    job: Job, method: Any, recipe: Any, prepared: Prepared, student: Any, evaluation: Any, metrics: Mapping[str, float],
    where: Any,
) -> None:  # fmt: skip
    """Student, pictures and cost of a finished trial; the student first, so that no picture can cost it."""
    from orchestrator import figures, tracking
    from orchestrator.evaluation import cost

    uri, run_id = job["tracking_uri"], job["run_id"]
    student = student.eval()
    facts = {
        **{name: value for name, value in prepared.told().items() if not isinstance(value, dict)},
        "method": job["method"],
        "benchmark": job["benchmark"],
        "metrics": dict(metrics),
        "recipe": flat(recipe),
    }
    tracking.log_student(uri, run_id, student, facts)
    if evaluation.queries is not None:
        tracking.log_queries(uri, run_id, evaluation.queries)
    if evaluation.pairs:
        tracking.log_pairs(uri, run_id, evaluation.pairs)
    for name, picture in method.pictures(student, recipe, prepared, evaluation, where).items():
        tracking.log_figure(uri, run_id, figures.draw(picture), f"{name}.png")
    tracking.log_values(uri, run_id, cost.logged(student.cpu()))
