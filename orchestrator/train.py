"""Train one student: ``python -m orchestrator.train d3still --on demo --set beta=0.3``."""

import typer

from orchestrator import command, find, on_ray, tracking
from orchestrator.command import console
from orchestrator.method import check_field


@command.app
def main(
    method: str = typer.Argument(..., help="File name in orchestrator/methods.", metavar="METHOD"),
    on: str = command.ON,
    data_root: str = command.DATA_ROOT,
    workers: int = command.WORKERS,
    gpus_per_worker: float = command.GPUS,
    epochs: int = command.EPOCHS,
    settings: list[str] = command.SET,
    resume: bool = typer.Option(False, "--resume", help="Continue the newest run of this method and benchmark."),
) -> None:
    """One run of a method as a Ray Train job, logged to MLflow; the same path as a trial of a sweep."""
    find.method(method)
    name, given = f"train-{method}", command.parse_settings(settings)
    if resume:
        plan = command.latest_plan(name, on, single=method)
        (started,) = on_ray.search_space(plan).seeds
        if check_field(find.recipe(method, on), "seed", given.pop("seed", started)) != started:
            raise ValueError(f"the run {plan.sweep} was started with seed={started}; resume it without changes")
        command.check_unchanged(plan, given, epochs, data_root, workers, gpus_per_worker)
        with on_ray.cluster():
            plan = command.continued(plan)
            _finish(on_ray.run_sweep(plan, console)[0], plan)
        return
    seed = check_field(find.recipe(method, on), "seed", given.pop("seed", 0))
    space = command.single(method, seed)
    recipes, place = command.resolve(space, on, given, epochs, data_root, workers)
    with on_ray.cluster():
        title = f"{method} on {on}"
        plan = command.make_plan(name, space, title, on, recipes, place, 1, 1, workers, gpus_per_worker)
        _finish(on_ray.run_sweep(plan, console)[0], plan)


def _finish(record: on_ray.TrialRecord, plan: on_ray.Plan) -> None:
    if record.status != "completed":
        raise ValueError(f"the run {record.status}: {record.message}")
    for key, value in record.metrics.items():
        if key.startswith(("val/", "symmetric/")):
            console.print(f"  {key:16} {value:.4f}")
    console.print(f"MLflow run {record.run_id}; compare: {tracking.ui_command(plan.tracking_uri)}")


if __name__ == "__main__":
    main()
