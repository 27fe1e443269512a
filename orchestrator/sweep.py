"""Run a sweep: ``python -m orchestrator.sweep d3still_beta_gamma [--on demo] [--data-root DIR] …``."""

import dataclasses
from pathlib import Path
from typing import Any

import typer

from orchestrator import command, find, tracking
from orchestrator.command import console
from orchestrator.launch import asked, confirming, shelf, study
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.launch.runner import Runner, driving
from orchestrator.progress import Board
from orchestrator.recipe import path_of
from orchestrator.reporting import dry_run as dry
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
    select_on: str = typer.Option(
        "",
        "--select-on",
        help="test, as papers do, or validation: choose on held-out identities, then confirm the best on test.",
    ),
    confirm: int = typer.Option(None, "--confirm", help="How many of the best are confirmed. Default: 3.", min=1),
    seeds: int = typer.Option(None, "--seeds", help="Seeds of each that is confirmed. Default: 3.", min=1),
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
    asked_to_confirm = _confirm_of(select_on, confirm, seeds)
    if resume:
        if asked_to_confirm:
            raise ValueError("a sweep goes on as it was started; --resume takes no --select-on, --confirm or --seeds")
        plan = _resumed(name, on, given, epochs, data_root, workers, gpus_per_worker, trials)
        if dry_run:
            finished = sum(r.status in ("completed", "pruned", "failed") for r in study.records(plan))
            console.print(f"{plan.sweep}: {finished} of {plan.trials} trials are finished; --resume runs the rest")
            if plan.confirm:
                table = confirming.stored(plan)
                done = sum(r.status == "completed" for r in study.records(table)) if table else 0
                console.print(f"  then {dry.confirmed(plan.confirm)}: {done} runs are finished", markup=False)
            return
        command.check_servers(plan.tracking_uri, plan.study)
        with command.runner(in_process) as runner:
            runner.admit(plan.where, plan.tracking_uri)
            _run(command.continued(plan, runner, concurrent), runner)
        return
    total = len(space.table()) if space.cells else (trials or space.trials)
    if space.cells and trials:
        raise ValueError(f"{name} is a table of {total} rows × seeds and always runs in full; leave --trials away")
    if asked_to_confirm:
        points = len(space.cells) or total
        if confirm and confirm > points:
            raise ValueError(f"--confirm {confirm}: the search has {points} points; ask for {points} or fewer")
        asked_to_confirm["points"] = min(asked_to_confirm["points"], points)
        given = _on_validation(space, on, given)
    recipes, place = asked.resolve(space, on, given, epochs, data_root, workers)
    uri = tracking.tracking_uri(place.storage)
    if asked_to_confirm:
        seed = recipes[space.method].train.seed if space.method in recipes else 0
        asked_to_confirm["seeds"] = confirming.fresh_seeds(space, seed, asked_to_confirm["seeds"])
    for line in dry.lines(name, space, on, total, recipes, place, uri if dry_run else ""):
        console.print(line, markup=False)
    if asked_to_confirm:
        console.print(f"  then             {dry.confirmed(asked_to_confirm)}", markup=False)
    if dry_run:
        command.check_addresses(uri, shelf.study_address(place))
        return
    command.check_servers(uri, shelf.study_address(place))
    with command.runner(in_process) as runner:
        runner.admit(place, uri)
        gpus = command.gpus_of(runner, gpus_per_worker)
        at_once = runner.concurrent(workers, gpus, concurrent)
        plan = shelf.new_plan(
            name, space, f"{name} on {on}", on, recipes, place, uri, total, at_once, workers, gpus,
            confirm=asked_to_confirm,
        )  # fmt: skip
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


def _confirm_of(select_on: str, confirm: int | None, seeds: int | None) -> dict[str, Any]:
    """What follows the search; nothing where it selects on test, as papers of this field do."""
    if select_on not in ("", "test", "validation"):
        raise ValueError(f"--select-on must be test or validation, got {select_on!r}")
    if select_on == "validation":
        return {"points": confirm or 3, "seeds": seeds or 3}
    if confirm or seeds:
        raise ValueError("--confirm and --seeds follow a search on held-out identities; add --select-on validation")
    return {}


def _on_validation(space: SearchSpace, on: str, given: dict[str, str]) -> dict[str, str]:
    recipe = find.recipe(space.method, on)
    named = [name for name in given if name.rpartition(".")[2] == "part" and path_of(recipe, name) == "data.part"]
    if named:
        raise ValueError(
            f"--select-on validation says which part is scored; leave --set {named[0]}={given[named[0]]} away"
        )
    return {**given, "data.part": "validation"}


def _run(plan: Plan, runner: Runner) -> None:
    """Runs what is left of a plan and, after a search on validation, of the table that confirms it."""
    records = _ran(plan, runner)
    if plan.confirm:
        found = confirming.confirmation(plan, records)
        console.print(f"confirmed as {found.sweep}: {dry.confirmed(plan.confirm)}", markup=False)
        _ran(command.continued(found, runner, plan.concurrent), runner)
    console.print(f"report:  python -m orchestrator.report {plan.space} --on {plan.benchmark}")


def _ran(plan: Plan, runner: Runner) -> list[TrialRecord]:
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
    summary.summarise(plan, records)
    if not done:
        raise ValueError("no trial completed; the reasons are in the table above and in the MLflow runs")
    return records


def _resumed(
    name: str, on: str, given: dict[str, str], epochs: int | None, data_root: str, workers: int, gpus: float | None,
    trials: int | None,
) -> Plan:  # fmt: skip
    plan = shelf.latest(name, on)
    asked.check_unchanged(plan, given, epochs, data_root, workers, gpus)
    if trials and (trials < plan.trials or plan.search_space.cells):
        raise ValueError(f"the sweep {plan.sweep} has {plan.trials} trials; only a larger number can be asked for")
    if trials and trials > plan.trials and plan.confirm and confirming.stored(plan):
        raise ValueError(
            f"the best of {plan.sweep} have been scored on test, so its search is over; start a new one to search on"
        )
    return dataclasses.replace(plan, trials=trials) if trials else plan


if __name__ == "__main__":
    main()
