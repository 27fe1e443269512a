"""Run a campaign of sweeps: ``python -m orchestrator.campaign campaign_smoke [--data-root inshop=DIR …]``."""

import contextlib
import dataclasses
import warnings

import typer

from orchestrator import command, find, tracking
from orchestrator.command import console
from orchestrator.launch import campaign as campaigns
from orchestrator.launch import leading, shelf
from orchestrator.launch.campaign import Asked, State
from orchestrator.launch.runner import Runner
from orchestrator.leases import Lease
from orchestrator.needs import Place
from orchestrator.reporting import campaign_report, dry_run
from orchestrator.reporting.campaign_board import CampaignBoard

ROOTS = typer.Option([], "--data-root", help="DIR for all benchmarks, BENCHMARK=DIR for one; may be repeated.")


@command.app
def main(
    name: str = typer.Argument("", help="File name in search_spaces; --list shows all.", metavar="NAME"),
    data_root: list[str] = ROOTS,
    concurrent: int = typer.Option(None, "--concurrent", help="Trials at once, of all sweeps together.", min=1),
    gpus_per_worker: float = command.GPUS,
    trials: int = typer.Option(None, "--trials", help="Budget: the most trials in all."),
    gpu_hours: float = typer.Option(None, "--gpu-hours", help="Budget: the most GPU hours of trials in all."),
    resume: bool = typer.Option(False, "--resume", help="Continue the newest campaign of this name."),
    in_process: bool = command.IN_PROCESS,
    dry_run: bool = typer.Option(False, "--dry-run", help="Check everything, print the plan, stop."),
    listing: bool = typer.Option(False, "--list", help="Show all campaigns."),
) -> None:
    """Many sweeps on one cluster: shared preparation, fair shares, one status, one report."""
    if listing or not name:
        for line in campaign_report.listing():
            console.print(line, markup=False)
        return
    asked, roots = find.campaign(name), campaigns.data_roots(data_root)
    campaigns.check_budget(trials, gpu_hours)
    if resume:
        state = campaigns.latest(name)
        if roots or gpus_per_worker is not None:
            raise ValueError(f"{state.name} was started with its data and workers; resume it without naming them")
        if gpu_hours and not any(plan.gpus_per_worker for plan in state.plans().values()):
            raise ValueError(f"--gpu-hours {gpu_hours:g}: trials use no GPU here; limit them with --trials")
        changes = {"trials": trials or state.trials, "gpu_hours": gpu_hours or state.gpu_hours}
        state = dataclasses.replace(state, **changes)
        if dry_run:
            _print_state(state)
            return
        command.check_servers(state.tracking_uri, shelf.study_address(state.where))
        with command.runner(in_process) as runner, _leading(state.where, name) as lease:
            for place in {plan.where for plan in state.plans().values()}:
                runner.admit(place, state.tracking_uri)
            _run(state, runner, lease, concurrent)
        return
    found = campaigns.resolved(asked, roots)
    uri = tracking.tracking_uri(found[0].place.storage)
    if dry_run:
        command.check_addresses(uri, shelf.study_address(found[0].place))
        _print_plan(name, asked.question, found, uri)
        return
    command.check_servers(uri, shelf.study_address(found[0].place))
    budget = (trials or asked.trials, gpu_hours or asked.gpu_hours)
    with command.runner(in_process) as runner, _leading(found[0].place, name) as lease:
        if gpu_hours and not command.gpus_of(runner, gpus_per_worker):
            raise ValueError(f"--gpu-hours {gpu_hours:g}: trials use no GPU here; limit them with --trials")
        if asked.gpu_hours and not command.gpus_of(runner, gpus_per_worker):
            warnings.warn("trials use no GPU here, so the campaign's GPU hours are no limit", stacklevel=2)
        state = _new(name, asked, found, uri, runner, concurrent, gpus_per_worker, budget)
        _run(state, runner, lease, concurrent)


def _leading(place: Place, name: str) -> contextlib.AbstractContextManager[Lease]:
    return campaigns.leading(place, name, lambda line: warnings.warn(line, stacklevel=2))


def _new(
    name: str, asked: campaigns.Campaign, found: list[Asked], uri: str, runner: Runner, concurrent: int | None,
    gpus_per_worker: float | None, budget: tuple[int, float],
) -> State:  # fmt: skip
    places = {each.place: each for each in found if not each.left_out}
    for place in places:
        runner.admit(place, uri)
    gpus = command.gpus_of(runner, gpus_per_worker)
    at_once = [runner.concurrent(each.sweep.workers, gpus, concurrent) for each in found if not each.left_out]
    threads = runner.threads(max(at_once))
    return campaigns.new(name, asked, found, uri, max(at_once), threads, gpus, *budget)


def _run(state: State, runner: Runner, lease: Lease, concurrent: int | None) -> None:
    """Runs what is left of a campaign, and says what came out."""
    board = CampaignBoard(console, state, campaign_report.standing(state))
    console.print(f"{state.name}: {state.question}", markup=False)
    for text in board.text()[:-1]:
        console.print(text, markup=False)
    with campaign_report.told(state, board), board:
        state = leading.run(state, runner, board, lease.check, concurrent)
    for text in board.text():
        console.print(text, markup=False)
    html, run_id = campaign_report.write(state)
    failed = [line for line in board.lines.values() if line.state == "failed"]
    tracking.finish(state.tracking_uri, run_id, "failed" if failed else "completed")
    console.print(f"report:  {html}")
    console.print(f"compare: {tracking.ui_command(state.tracking_uri)}   (experiment “{state.campaign}”)")
    if failed:
        run = sum(bool(entry.sweep) for entry in state.entries)
        rest = "the others are done, and " if run > len(failed) else ""
        first = f"{failed[0].title}: {failed[0].why}"
        raise ValueError(f"{len(failed)} of {run} sweeps failed: {first}; {rest}--resume tries the failed ones again")


def _print_plan(name: str, question: str, found: list[Asked], uri: str) -> None:
    console.print(f"{name}: {question}", markup=False)
    for each in found:
        planned = f"{each.total} trial{'s' * (each.total != 1)}, priority {each.sweep.priority:g}"
        shown = f"left out: {each.left_out}" if each.left_out else planned
        console.print(f"  {each.sweep.title}: {shown}", markup=False)
    wanted = [each for each in found if not each.left_out]
    for line in dry_run.united(
        [(each.sweep.space, each.space, each.sweep.on, each.total, each.recipes, each.place) for each in wanted], uri
    ):
        console.print(line, markup=False)


def _print_state(state: State) -> None:
    console.print(f"{state.name}: {state.question}", markup=False)
    standing = campaign_report.standing(state)
    for title, done, total in standing:
        console.print(f"  {title}: {done} of {total} trials are finished", markup=False)
    spent = bool(state.trials) and sum(done for _, done, _ in standing) >= state.trials
    left = f"the budget of {state.trials} trials is spent; --resume --trials with more goes on"
    whole = all(done == total for _, done, total in standing)
    console.print("nothing is left to run" if whole else left if spent else "--resume runs the rest", markup=False)


if __name__ == "__main__":
    main()
