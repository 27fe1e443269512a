"""Words of the command lines: their options, settings, one-line errors, and the console."""

import contextlib
import dataclasses
import functools
import inspect
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import losses
import models
import orchestrator
import search_spaces
from orchestrator import find, patience, tracking
from orchestrator.launch import preparing, study
from orchestrator.launch.plan import Plan
from orchestrator.launch.runner import InProcess, Runner
from orchestrator.progress import PreparationBar
from orchestrator.recipe import changed, path_of, value_of
from orchestrator.reporting import provenance, scores

# Options of several commands, spelled once.
ON = typer.Option("demo", "--on", help="Benchmark: demo, omniglot, emoji, folder, inshop, …", metavar="BENCHMARK")
DATA_ROOT = typer.Option("", "--data-root", help="Where the benchmark's files are.", metavar="DIR")
SET = typer.Option(
    [], "--set", help="A recipe field, such as --set alpha=50 or teacher.epochs=20; may be repeated.",
    metavar="FIELD=VALUE",
)  # fmt: skip
AFTER_TRAINING = typer.Option(
    [], "--set", help="Another value than in training, such as --set keep_ratio=0.5; may be repeated.",
    metavar="FIELD=VALUE",
)  # fmt: skip
WORKERS = typer.Option(1, "--workers", help="Ray Train workers of one trial.", min=1)
GPUS = typer.Option(None, "--gpus-per-worker", help="Default: 1 where the cluster has GPUs.", min=0.0)
EPOCHS = typer.Option(None, "--epochs", help="Instead of the recipe's.", min=1)
IN_PROCESS = typer.Option(False, "--in-process", help="Without Ray, one trial after the other in this process.")


def _readable(stream: Any) -> Any:
    """Letters that a terminal or a log lacks are replaced instead of ending the command."""
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors="replace")
    return stream


def _one_line(message: Warning | str, *where: Any) -> str:
    """A warning for people: where in the code it was raised tells them nothing."""
    return f"warning: {message}\n"


console = Console(highlight=False, width=None if sys.stdout.isatty() else 160, soft_wrap=not sys.stdout.isatty())


def app(command: Callable[..., None]) -> Callable[[], None]:
    """A command line from a function: errors of users become one line and exit code 2."""
    goes_on = "with --resume goes on" if "resume" in inspect.signature(command).parameters else "does what is left"

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        for stream in (sys.stdout, sys.stderr):
            _readable(stream)
        warnings.formatwarning = _one_line
        find.listed.cache_clear()
        try:
            _one_tree()
            patience.seconds()  # nonsense in it would be met hours later, when something is away
            command(*args, **kwargs)
        except (ValueError, OSError) as error:
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            Console(stderr=True, soft_wrap=True).print(f"interrupted; the same command {goes_on}")
            raise typer.Exit(130) from None

    cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    cli.command()(guarded)
    return cli


@contextlib.contextmanager
def runner(in_process: bool) -> Iterator[Runner]:
    """This process, or Ray: the only place that chooses."""
    if in_process:
        yield InProcess()
        return
    from orchestrator import on_ray

    with on_ray.connected() as connected:
        yield connected


def check_servers(tracking_uri: str, study_address: str) -> None:
    """Raises ValueError where MLflow or the study's database does not answer."""
    tracking.check(tracking_uri)
    study.check(study_address)


def check_addresses(tracking_uri: str, study_address: str) -> None:
    """The same for a dry run, which makes no database in a file."""
    if not tracking_uri.startswith("sqlite:"):
        tracking.check(tracking_uri)
    study.check("" if study_address.startswith("sqlite:") else study_address)


def gpus_of(chosen: Runner, asked: float | None) -> float:
    """One GPU a worker where there is any, unless something else is asked for."""
    if asked is not None:
        return asked
    return 1.0 if chosen.capacity().gpus >= 1 else 0.0


def continued(plan: Plan, runner: Runner, concurrent: int | None = None) -> Plan:
    """A stored plan as this cluster can run it."""
    at_once = runner.concurrent(plan.workers, plan.gpus_per_worker, concurrent or plan.concurrent)
    return dataclasses.replace(plan, concurrent=at_once)


def prepare(plan: Plan, runner: Runner) -> Plan:
    """The plan with everything ready; says what the data and the teachers are."""
    with PreparationBar(console) as bar:
        plan = preparing.prepared(plan, runner, bar)
    said = dict.fromkeys(line for told in plan.told() for line in _about(told))
    for line in said:
        console.print(f"  {line}", markup=False)
    shown = [metric for metric in scores.metrics(plan)[:2]]
    for reference in provenance.references(plan):
        if reference.kind == "teacher":
            values = [f"{m.title} {scores.written(m, reference.metrics.get(m.name))}" for m in shown]
            console.print(f"  {reference.title}: {', '.join(values)}", markup=False)
    return plan


def _about(told: dict[str, Any]) -> list[str]:
    notice = told.get("notice", "")
    how = "; ".join(told[name] for name in ("protocol", "rule") if told.get(name))
    return [how, *([f"notice: {notice}"] if notice else [])]


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """``FIELD=VALUE`` pairs.

    Raises:
        ValueError: a pair without "=", or a field that is named twice.
    """
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set needs FIELD=VALUE, got {pair!r}")
    names = [pair.split("=", 1)[0] for pair in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--set names {', '.join(twice)} more than once")
    return dict(pair.split("=", 1) for pair in pairs)


def settings_after_training(method: str, recipe: Any, pairs: list[str]) -> tuple[Any, dict[str, Any]]:
    """The recipe with ``FIELD=VALUE`` pairs that a stored student is scored or exported with.

    Returns:
        The changed recipe, and the settings by full path.

    Raises:
        ValueError: a field that the training has fixed or that does nothing, or a value out of range.
    """
    given = parse_settings(pairs)
    other = changed(recipe, given)
    settings = {path: value_of(other, path) for path in (path_of(recipe, name) for name in given)}
    free = find.method(method).after_training(other)
    fixed = sorted(set(settings) - free)
    if fixed:
        raise ValueError(f"{fixed[0]} has no effect here; what can be changed: {', '.join(sorted(free))}")
    return other, settings


def _one_tree() -> None:
    """Refuses to mix an installed copy with somebody's ``models`` or ``losses`` in the current directory."""
    roots = {str(Path(next(iter(m.__path__))).resolve().parent) for m in (orchestrator, models, losses, search_spaces)}
    if len(roots) > 1:
        raise ValueError(
            f"packages come from different places: {', '.join(sorted(roots))}; start elsewhere or use python -P"
        )
