"""Train one student: ``python -m orchestrator.train d3still --on demo --set beta=0.3``."""

import typer

from orchestrator import command, find, tracking
from orchestrator.command import console
from orchestrator.launch import asked, shelf, study
from orchestrator.launch import plan as plans
from orchestrator.launch.plan import Plan
from orchestrator.launch.runner import Runner, driving
from orchestrator.progress import Board
from orchestrator.recipe import check_field
from orchestrator.reporting import scores


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
    in_process: bool = command.IN_PROCESS,
) -> None:
    """One run of a method as a Ray Train job, logged to MLflow; the same path as a trial of a sweep."""
    find.method(method)
    name, given = f"train-{method}", command.parse_settings(settings)
    recipe = find.recipe(method, on)
    seed_name = next((n for n in ("seed", "train.seed") if n in given), "train.seed")
    if resume:
        plan = shelf.latest(name, on, single=method)
        (started,) = plan.search_space.seeds
        if check_field(recipe, "train.seed", given.pop(seed_name, started)) != started:
            raise ValueError(f"the run {plan.sweep} was started with seed={started}; resume it without changes")
        asked.check_unchanged(plan, given, epochs, data_root, workers, gpus_per_worker)
        command.check_servers(plan.tracking_uri, plan.study)
        with command.runner(in_process) as runner:
            runner.admit(plan.where, plan.tracking_uri)
            _run(command.continued(plan, runner), runner)
        return
    seed = check_field(recipe, "train.seed", given.pop(seed_name, recipe.train.seed))
    space = plans.single(method, seed)
    recipes, place = asked.resolve(space, on, given, epochs, data_root, workers)
    uri = tracking.tracking_uri(place.storage)
    command.check_servers(uri, shelf.study_address(place))
    with command.runner(in_process) as runner:
        runner.admit(place, uri)
        gpus = command.gpus_of(runner, gpus_per_worker)
        runner.concurrent(workers, gpus, 1)
        plan = shelf.new_plan(name, space, f"{method} on {on}", on, recipes, place, uri, 1, 1, workers, gpus)
        with shelf.withdrawn_if_refused(plan):
            _run(plan, runner)


def _run(plan: Plan, runner: Runner) -> None:
    with driving(plan):
        plan = command.prepare(plan, runner)
        record = runner.sweep(plan, Board(console, plan.metric, study.records(plan), 1))[0]
    if record.status != "completed":
        raise ValueError(f"the run {record.status}: {record.message}")
    for metric in scores.occurring(plan, [record]):
        console.print(f"  {metric.name:16} {record.metrics[metric.name]:.4f}")
    console.print(f"MLflow run {record.run_id}; compare: {tracking.ui_command(plan.tracking_uri)}")


if __name__ == "__main__":
    main()
