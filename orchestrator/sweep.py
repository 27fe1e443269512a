"""Run a sweep: ``python -m orchestrator.sweep d3still_beta_gamma [--on demo] [--data-root DIR] …``."""

import dataclasses
from pathlib import Path

import typer

from orchestrator import command, find, tracking
from orchestrator.command import console
from orchestrator.launch import asked, shelf, study
from orchestrator.launch.plan import Plan
from orchestrator.launch.runner import Runner, driving
from orchestrator.progress import Board
from orchestrator.reporting import dry_run as dry
from orchestrator.reporting import summary, trial_table


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
    in_process: bool = command.IN_PROCESS,
    dry_run: bool = typer.Option(False, "--dry-run", help="Check everything, print the plan, stop."),
    listing: bool = typer.Option(False, "--list", help="Show all sweeps."),
) -> None:
    """Sweep one search space with Ray Tune and Optuna, every trial a Ray Train job, logged to MLflow."""
    if listing or not name:
        _list()
        return
    space, given = find.space(name), command.parse_settings(settings)
    if resume:
        plan = _resumed(name, on, given, epochs, data_root, workers, gpus_per_worker, trials)
        if dry_run:
            finished = sum(r.status in ("completed", "pruned", "failed") for r in study.records(plan))
            console.print(f"{plan.sweep}: {finished} of {plan.trials} trials are finished; --resume runs the rest")
            return
        command.check_servers(plan.tracking_uri, plan.study)
        with command.runner(in_process) as runner:
            runner.admit(plan.where, plan.tracking_uri)
            _run(command.continued(plan, runner, concurrent), runner)
        return
    total = len(space.table()) if space.cells else (trials or space.trials)
    if space.cells and trials:
        raise ValueError(f"{name} is a table of {total} rows × seeds and always runs in full; leave --trials away")
    recipes, place = asked.resolve(space, on, given, epochs, data_root, workers)
    uri = tracking.tracking_uri(place.storage)
    for line in dry.lines(name, space, on, total, recipes, place, uri if dry_run else ""):
        console.print(line, markup=False)
    if dry_run:
        return
    command.check_servers(uri, shelf.study_address(place))
    with command.runner(in_process) as runner:
        runner.admit(place, uri)
        gpus = command.gpus_of(runner, gpus_per_worker)
        at_once = runner.concurrent(workers, gpus, concurrent)
        plan = shelf.new_plan(name, space, f"{name} on {on}", on, recipes, place, uri, total, at_once, workers, gpus)
        with shelf.withdrawn_if_refused(plan):
            _run(plan, runner)


def _list() -> None:
    """Every sweep with its question, and where the answers are that were measured."""
    answers = {known: find.answer(known) for known in find.spaces()}
    for known, answer in answers.items():
        console.print(f"{known:25} {'*' if answer else ' '} {find.space(known).question}", markup=False)
    folders = {answer.parent for answer in answers.values() if answer}
    for folder in folders:
        near = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        console.print(f"* measured: {near}/NAME.md", markup=False)


def _run(plan: Plan, runner: Runner) -> None:
    """Prepares and runs what is left of a plan, and says what came out."""
    with driving(plan):
        plan = command.prepare(plan, runner)
        console.print(
            f"  sweep {plan.sweep}: {plan.trials} trials, {plan.concurrent} at once, {plan.workers} worker(s) each"
        )
        records = runner.sweep(plan, Board(console, plan.metric, study.records(plan), plan.trials))
    console.print(trial_table.trial_table(plan, records))
    done = sum(r.status == "completed" for r in records)
    pruned, failed = (sum(r.status == status for r in records) for status in ("pruned", "failed"))
    console.print(f"{done} completed, {pruned} stopped early, {failed} failed")
    console.print(f"compare: {tracking.ui_command(plan.tracking_uri)}   (experiment “{plan.title}”)")
    console.print(f"report:  python -m orchestrator.report {plan.space} --on {plan.benchmark}")
    summary.summarise(plan, records)
    if not done:
        raise ValueError("no trial completed; the reasons are in the table above and in the MLflow runs")


def _resumed(
    name: str, on: str, given: dict[str, str], epochs: int | None, data_root: str, workers: int, gpus: float | None,
    trials: int | None,
) -> Plan:  # fmt: skip
    plan = shelf.latest(name, on)
    asked.check_unchanged(plan, given, epochs, data_root, workers, gpus)
    if trials and (trials < plan.trials or plan.search_space.cells):
        raise ValueError(f"the sweep {plan.sweep} has {plan.trials} trials; only a larger number can be asked for")
    return dataclasses.replace(plan, trials=trials) if trials else plan


if __name__ == "__main__":
    main()
