"""Run a sweep: ``python -m orchestrator.sweep d3still_beta_gamma [--on demo] [--data-root DIR] …``."""

import dataclasses
from typing import Any

import typer

from orchestrator import command, find, on_ray, tracking
from orchestrator.command import console
from orchestrator.method import recipe_dict
from orchestrator.reporting import summary, trial_table
from search_spaces._space import SearchSpace


@command.app
def main(
    name: str = typer.Argument("", help="File name in search_spaces; --list shows all.", metavar="NAME"),
    on: str = command.ON,
    data_root: str = command.DATA_ROOT,
    trials: int = typer.Option(None, "--trials", help="In total, the paper's points included.", min=1),
    concurrent: int = typer.Option(None, "--concurrent", help="Default: as many as the cluster holds.", min=1),
    workers: int = command.WORKERS,
    gpus_per_worker: float = command.GPUS,
    epochs: int = command.EPOCHS,
    settings: list[str] = command.SET,
    resume: bool = typer.Option(False, "--resume", help="Continue the newest sweep of this name and benchmark."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check everything, print the plan, stop."),
    listing: bool = typer.Option(False, "--list", help="Show all sweeps."),
) -> None:
    """Sweep one search space with Ray Tune and Optuna, every trial a Ray Train job, logged to MLflow."""
    if listing or not name:
        for known in find.names("search_spaces"):
            console.print(f"{known:24} {find.space(known).question}")
        return
    space = find.space(name)
    given = command.parse_settings(settings)
    if resume:
        plan = command.latest_plan(name, on)
        command.check_unchanged(plan, given, epochs, data_root, workers, gpus_per_worker)
        if trials and (trials < plan.trials or space.cells):
            raise ValueError(f"the sweep {plan.sweep} has {plan.trials} trials; only a larger number can be asked for")
        if trials:
            plan = dataclasses.replace(plan, trials=trials)
        if dry_run:
            finished = sum(r.status in ("completed", "pruned", "failed") for r in on_ray.records(plan))
            console.print(f"{plan.sweep}: {finished} of {plan.trials} trials are finished; --resume runs the rest")
            return
        with on_ray.cluster():
            _run(command.continued(plan, concurrent))
        return
    recipes, place = command.resolve(space, on, given, epochs, data_root, workers)
    total = len(space.table()) if space.cells else (trials or space.trials)
    if space.cells and trials:
        raise ValueError(f"{name} is a table of {total} rows × seeds and always runs in full; leave --trials away")
    console.print(f"[bold]{name}[/bold] on {on}: {space.question}")
    _print_plan(space, total, recipes)
    if dry_run:
        recipe = next(iter(recipes.values()))
        find.dataset(recipe.dataset)(place.data_root, recipe.evaluate_on)
        return
    with on_ray.cluster():
        title = f"{name} on {on}"
        plan = command.make_plan(name, space, title, on, recipes, place, total, concurrent, workers, gpus_per_worker)
        _run(plan)


def _run(plan: on_ray.Plan) -> None:
    console.print(
        f"  sweep {plan.sweep}: {plan.trials} trials, {plan.concurrent} at once, {plan.workers} worker(s) each"
    )
    records = on_ray.run_sweep(plan, console)
    console.print(trial_table.trial_table(plan, records))
    done = sum(r.status == "completed" for r in records)
    console.print(f"{done} completed, {sum(r.status == 'pruned' for r in records)} stopped early, "
                  f"{sum(r.status == 'failed' for r in records)} failed")  # fmt: skip
    console.print(f"compare: {tracking.ui_command(plan.tracking_uri)}   (experiment “{plan.title}”)")
    console.print(f"report:  python -m orchestrator.report {plan.space} --on {plan.benchmark}")
    summary.summarise(plan, records)
    if not done:
        raise ValueError("no trial completed; the reasons are in the table above and in the MLflow runs")


def _print_plan(space: SearchSpace, total: int, recipes: dict[str, Any]) -> None:
    for name, bounds in space.tune.items():
        console.print(f"  {name}: {bounds}", markup=False)
    for point in space.table():
        console.print(f"  first: {point}", markup=False)
    shared: dict[str, Any] = {}
    for method, recipe in recipes.items():
        values = recipe_dict(recipe)
        own = ", ".join(f"{k}={v}" for k, v in values.items() if k not in shared or shared[k] != v)
        console.print(f"  {total} trials; recipe: {own}" if not shared else f"  {method}: {own}", markup=False)
        shared = shared or values


if __name__ == "__main__":
    main()
