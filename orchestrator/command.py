"""What the command lines share: names and values to a checked plan, preparation, one-line errors."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import losses
import models
import orchestrator
import search_spaces
from orchestrator import find, on_ray, tracking
from orchestrator.method import Place, changed, check_field, recipe_dict
from orchestrator.on_ray import Plan
from search_spaces._space import Choice, SearchSpace

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160, soft_wrap=not sys.stdout.isatty())

# Options of several commands, spelled once.
ON = typer.Option("demo", "--on", help="Benchmark: demo, omniglot, emoji, folder, inshop, …", metavar="BENCHMARK")
DATA_ROOT = typer.Option("", "--data-root", help="Where the benchmark's files are.", metavar="DIR")
SET = typer.Option([], "--set", help="A recipe field, such as --set alpha=50; may be repeated.", metavar="FIELD=VALUE")
AFTER_TRAINING = typer.Option(
    [], "--set", help="Another value than in training, such as --set keep_ratio=0.5; may be repeated.",
    metavar="FIELD=VALUE",
)  # fmt: skip
WORKERS = typer.Option(1, "--workers", help="Ray Train workers of one trial.", min=1)
GPUS = typer.Option(None, "--gpus-per-worker", help="Default: 1 where the cluster has GPUs.", min=0.0)
EPOCHS = typer.Option(None, "--epochs", help="Instead of the recipe's.", min=1)


def app(command: Callable[..., None]) -> Callable[[], None]:
    """A command line from a function: errors of users become one line and exit code 2."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            _one_tree()
            command(*args, **kwargs)
        except (ValueError, OSError) as error:
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            Console(stderr=True, soft_wrap=True).print(
                "interrupted; the same command with --resume goes on, without it where only the teacher had begun"
            )
            raise typer.Exit(130) from None

    cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    cli.command()(guarded)
    return cli


def storage() -> str:
    """``ORCHESTRATOR_STORAGE`` or ./runs, absolute: databases, caches, teachers, sweeps."""
    return str(Path(os.environ.get("ORCHESTRATOR_STORAGE", "runs")).absolute())


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """``FIELD=VALUE`` pairs.

    Raises:
        ValueError: a pair without "=".
    """
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set needs FIELD=VALUE, got {pair!r}")
    names = [pair.split("=", 1)[0] for pair in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--set names {', '.join(twice)} more than once")
    return dict(pair.split("=", 1) for pair in pairs)


def settings_after_training(method: str, recipe: Any, pairs: list[str]) -> dict[str, Any]:
    """``FIELD=VALUE`` pairs that a stored student is scored or exported with.

    Raises:
        ValueError: a field that the training has fixed or that does nothing, or a value out of range.
    """
    settings = {name: check_field(recipe, name, value) for name, value in parse_settings(pairs).items()}
    free = find.method(method).after_training(changed(recipe, settings))
    fixed = sorted(set(settings) - free)
    if fixed:
        raise ValueError(f"{fixed[0]} has no effect here; what can be changed: {', '.join(sorted(free))}")
    return settings


def resolve(
    space: SearchSpace,
    benchmark: str,
    settings: Mapping[str, Any],
    epochs: int | None,
    data_root: str,
    workers: int = 1,
) -> tuple[dict[str, Any], Place]:
    """The base recipe of every method of a sweep, and its place; everything checked that can be without data.

    Raises:
        ValueError: unknown names, values out of range, a tuned field that the command line also sets, or
            points of the space that the method refuses.
    """
    settings = {**settings, **({"epochs": epochs} if epochs else {})}
    varied = {*space.tune, *space.fix, *(name for cell in space.cells.values() for name in cell)}
    varied |= {"seed"} if space.cells else set()
    both = sorted(varied & set(settings))
    if both:
        raise ValueError(f"{both[0]} is what this sweep varies or fixes; it cannot also be set to {settings[both[0]]}")
    recipes = {}
    having = {name: [m for m in space.methods if hasattr(find.recipe(m, benchmark), name)] for name in settings}
    for name, methods in having.items():
        if methods and len(methods) < len(space.methods):
            raise ValueError(f"{name} is a field of {', '.join(methods)} only, not of every method of this sweep")
    for method in space.methods:
        try:
            recipes[method] = changed(find.recipe(method, benchmark), {**space.fix, **settings})
        except ValueError as error:
            raise ValueError(f"{error} (method {method})" if len(space.methods) > 1 else str(error)) from error
    for name, bounds in space.tune.items():
        for edge in bounds.options if isinstance(bounds, Choice) else (bounds.low, bounds.high):
            check_field(recipes[space.method], name, edge)
    for point in [*space.table(), *_corners(space)] or [{}]:
        method = space.method_of(point) if point else space.method
        try:
            find.method(method).check(changed(recipes[method], space.settings(point) if point else {}), workers)
        except ValueError as error:
            row = f" (row {point['cell']})" if len(space.cells) > 1 else ""
            raise ValueError(f"{error}{row}") from error
    if data_root and not Path(data_root).is_dir():
        raise ValueError(f"--data-root {data_root} is not a directory")
    return recipes, Place(storage=storage(), data_root=str(Path(data_root).absolute()) if data_root else "")


def make_plan(
    name: str, space: SearchSpace, title: str, benchmark: str, recipes: Mapping[str, Any], place: Place, trials: int,
    concurrent: int | None, workers: int, gpus: float | None,
) -> Plan:  # fmt: skip
    """A new sweep with its own folder. Needs a running cluster; prepares data, teacher and caches first."""
    gpus = on_ray.default_gpus() if gpus is None else gpus
    concurrent = on_ray.check_resources(workers, gpus, concurrent)
    prepared = _prepare_all(space, benchmark, recipes, place, workers, gpus)
    folder = _new_folder(place, f"{name}-{benchmark}")
    plan = Plan(
        folder=str(folder), space=name, title=title, benchmark=benchmark,
        recipes={method: recipe_dict(recipe) for method, recipe in recipes.items()}, place=dataclasses.asdict(place),
        tracking_uri=tracking.tracking_uri(place.storage), trials=trials, workers=workers, gpus_per_worker=gpus,
        concurrent=min(concurrent, trials), facts={**code_facts(), "prepared": prepared},
        space_data=on_ray.space_data(space),
    )  # fmt: skip
    save_plan(plan)
    return plan


def save_plan(plan: Plan) -> None:
    path = Path(plan.folder) / "plan.json"
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(dataclasses.asdict(plan), indent=1))
    os.replace(partial, path)


def read_plan(folder: Path) -> Plan:
    data = json.loads((folder / "plan.json").read_text())
    if "recipes" not in data:  # before 0.2 a sweep had one method
        data["recipes"] = {data.pop("method"): data.pop("recipe")}
    return Plan(**data)


def latest_plan(name: str, benchmark: str | None = None, single: str = "") -> Plan:
    """The newest sweep of a space (and benchmark); ``single`` names the method where the plans are of single runs.

    Raises:
        ValueError: there is none.
    """
    found = []
    for path in Path(storage(), "sweeps").glob("*/plan.json"):
        plan = read_plan(path.parent)
        if plan.space == name and benchmark in (None, plan.benchmark):
            found.append((path.stat().st_ctime_ns, int(plan.sweep.rsplit("-", 1)[1]), plan))
    if not found:
        where = f" on {benchmark}" if benchmark else ""
        what, command = ("run", f"train {single}") if single else ("sweep", f"sweep {name}")
        raise ValueError(
            f"no {what} {single or name}{where} in {storage()}; run python -m orchestrator.{command} first"
        )
    return max(found, key=lambda f: f[:2])[2]


def check_unchanged(
    plan: Plan, settings: Mapping[str, Any], epochs: int | None, data_root: str, workers: int, gpus: float | None
) -> None:
    """A sweep is resumed with the numbers it was started with.

    Raises:
        ValueError: names every difference.
    """
    recipe = find.recipe(plan.method, plan.benchmark)
    asked = {k: check_field(recipe, k, v) for k, v in {**settings, **({"epochs": epochs} if epochs else {})}.items()}
    stored = {k: check_field(recipe, k, v) for k, v in plan.recipe.items()}
    differing = [f"{k}={stored[k]} (asked {v})" for k, v in asked.items() if stored[k] != v]
    if workers not in (1, plan.workers):
        differing.append(f"{plan.workers} workers (asked {workers})")
    if gpus is not None and gpus != plan.gpus_per_worker:
        differing.append(f"{plan.gpus_per_worker} GPUs a worker (asked {gpus})")
    if data_root and str(Path(data_root).absolute()) != plan.place["data_root"]:
        differing.append(f"--data-root {plan.place['data_root']} (asked {data_root})")
    if differing:
        raise ValueError(f"the sweep {plan.sweep} was started with {', '.join(differing)}; resume it without changes")


def continued(plan: Plan, concurrent: int | None = None) -> Plan:
    """A stored plan made ready to go on: caches present, teacher and data unchanged, code version noted.

    Raises:
        ValueError: data or teacher are not those the sweep was started with.
    """
    space, place = on_ray.search_space(plan), Place(**plan.place)
    recipes = {method: plan.base_recipe(method) for method in plan.recipes}
    concurrent = on_ray.check_resources(plan.workers, plan.gpus_per_worker, concurrent or plan.concurrent)
    prepared = _prepare_all(space, plan.benchmark, recipes, place, plan.workers, plan.gpus_per_worker)
    for key, facts in prepared.items():
        check_fingerprints(plan.facts["prepared"].get(key, {}), facts)
    plan = dataclasses.replace(plan, concurrent=concurrent, facts={**code_facts(), "prepared": prepared})
    save_plan(plan)
    return plan


def check_fingerprints(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError when data or teacher are not those of the record."""
    for name, fingerprint in before.items():
        if name.endswith("_fingerprint") and now.get(name) != fingerprint:
            what = name.removesuffix("_fingerprint")
            raise ValueError(f"the {what} is not the one of the record: {fingerprint[:12]} then, {now[name][:12]} now")


def single(method: str, seed: int = 0, question: str = "") -> SearchSpace:
    """A space of one trial, so that single runs and sweeps are one path."""
    return SearchSpace(
        method=method, question=question or f"One run of {method}.", cells={"run": {}}, seeds=(seed,),
        early_stopping=False,
    )  # fmt: skip


def train_teacher(method: str, recipe: Any, benchmark: str, place: Place, workers: int, gpus: float) -> str:
    """Trains the teacher of a recipe as its own MLflow run, unless it is there; returns its folder."""
    found = find.method(method)
    with PreparationBar() as bar:
        name = found.teacher_folder(recipe, place, bar)
    if not name:
        return ""
    folder = Path(name)
    with on_ray.cache.locked(place.folder("teachers"), folder.name):
        wanted = found.teacher(recipe, place)
        if wanted is None:
            return str(folder)
        teacher_method, teacher_recipe = wanted
        plan = _unfinished_teacher(folder.name)
        if plan is None:
            console.print(f"[bold]teacher[/bold] {teacher_recipe.student} at {teacher_recipe.student_size}, "
                          f"{teacher_recipe.epochs} epochs: training it now, kept for all later sweeps")  # fmt: skip
            question = f"The teacher of {method} on {benchmark}."
            # A benchmark of this method alone, such as "inshop_repo", has the teacher of its data set.
            known = find.method(teacher_method).recipes
            home = benchmark if benchmark in known else teacher_recipe.dataset
            plan = make_plan(
                f"teacher-{folder.name[:8]}", single(teacher_method, teacher_recipe.seed, question),
                f"teacher on {benchmark}", home, {teacher_method: teacher_recipe}, place, 1, 1,
                workers, gpus,
            )  # fmt: skip
        else:
            console.print("[bold]teacher[/bold]: its training was interrupted and goes on")
        record = on_ray.run_sweep(plan, console)[0]
        if record.status != "completed":
            raise ValueError(f"the teacher could not be trained: {record.message or record.status}")
        student = tracking.student_file(plan.tracking_uri, record.run_id)
        _install_teacher(student, folder, {"run_id": record.run_id, "metrics": record.metrics})
        console.print(f"  teacher ready: val/map {record.value:.4f}, MLflow run {record.run_id}")
    return str(folder)


def _unfinished_teacher(key: str) -> Plan | None:
    """The plan of a teacher's training that somebody killed."""
    with contextlib.suppress(ValueError):
        plan = latest_plan(f"teacher-{key[:8]}")
        states = [r.status for r in on_ray.records(plan)]
        return plan if "failed" not in states else None
    return None


def code_facts() -> dict[str, str]:
    """Version, git commit and folder of the running code."""
    folder = Path(orchestrator.__file__).parent.parent
    try:
        installed = version("retrieval-distillation-orchestrator")
    except PackageNotFoundError:
        installed = "checkout"
    if (folder / "pyproject.toml").is_file():  # the code that runs, not what was once installed
        installed = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["version"]
    commit = "unknown"
    if (folder / ".git").exists():
        asked = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
                               capture_output=True, text=True)  # fmt: skip
        commit = asked.stdout.strip() or commit
    return {"version": installed, "commit": commit, "code": str(folder)}


class PreparationBar:
    """A progress bar with an ETA for every step of the preparation; plain lines where nothing can be redrawn."""

    def __init__(self):
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total)
            if not console.is_terminal:
                console.print(f"  {what} ({total})")
        self.bar.update(self.tasks[what], completed=done)

    def __enter__(self) -> "PreparationBar":
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()


def _corners(space: SearchSpace) -> list[dict[str, Any]]:
    """Every combination of the outermost values of the tuned fields."""
    edges = {n: b.options if isinstance(b, Choice) else (b.low, b.high) for n, b in space.tune.items()}
    return [dict(zip(edges, values, strict=True)) for values in itertools.product(*edges.values())] if edges else []


def _prepare_all(
    space: SearchSpace, benchmark: str, recipes: Mapping[str, Any], place: Place, workers: int, gpus: float
) -> dict[str, Any]:
    """Teacher and caches of every distinct preparation the space needs: preparation -> facts for the record."""
    prepared: dict[str, Any] = {}
    for key, (name, variant) in _preparations(space, recipes).items():
        facts: dict[str, Any] = {}
        if find.method(name).has_teacher and (folder := train_teacher(name, variant, benchmark, place, workers, gpus)):
            facts["teacher_run"] = json.loads((Path(folder) / "teacher.json").read_text())["facts"].get("run_id", "")
        started = time.monotonic()
        with PreparationBar() as bar:
            facts |= on_ray.prepare(name, recipe_dict(variant), benchmark, place, gpus, bar)
        prepared[key] = facts
        console.print(f"  {facts['protocol']}", markup=False)
        if "notice" in facts:
            console.print(f"  notice: {facts['notice']}", markup=False)
        teacher = facts.get("teacher_metrics", {})
        if teacher:
            scores = f"mAP {teacher['teacher/map']:.4f}, rank-1 {teacher['teacher/rank1']:.4f}"
            seconds = time.monotonic() - started
            console.print(f"  teacher on both sides: {scores}; data and caches ready in {seconds:.0f} s")
    return prepared


def _preparations(space: SearchSpace, recipes: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Key of every distinct preparation -> a method and recipe that needs it."""
    tuned = sorted(set(space.tune) & find.method(space.method).prepared_by)
    if tuned:
        options = space.tune[tuned[0]].options if isinstance(space.tune[tuned[0]], Choice) else ()
        if len(tuned) > 1 or not options:
            raise ValueError(f"{', '.join(tuned)} decides what is cached; only one such field may vary, as a Choice")
        variants = [(space.method, changed(recipes[space.method], {tuned[0]: option})) for option in options]
    elif space.cells:
        named = [(space.method_of(point), space.settings(point)) for point in space.table()]
        variants = [(method, changed(recipes[method], settings)) for method, settings in named]
    else:
        variants = [(space.method, recipes[space.method])]
    found: dict[str, tuple[str, Any]] = {}
    for method, recipe in variants:
        found.setdefault(on_ray.prepared_key(method, recipe), (method, recipe))
    return found


def _install_teacher(student: Path, folder: Path, facts: dict[str, Any]) -> None:
    from orchestrator import checkpoint

    model, stored = checkpoint.load_model(student)
    model.classifier = checkpoint.load_classifier(student)
    checkpoint.save_model(folder, model, {**stored, **facts}, name="teacher")


def _new_folder(place: Place, stem: str) -> Path:
    root = Path(place.folder("sweeps"))
    root.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(m[1]) for p in root.glob(f"{stem}-*") if (m := re.search(r"-(\d+)$", p.name))), default=0)
    while True:
        try:
            (root / f"{stem}-{number}").mkdir()
            return root / f"{stem}-{number}"
        except FileExistsError:  # another sweep took the number
            number += 1


def _one_tree() -> None:
    """Refuses to mix an installed copy with somebody's ``models`` or ``losses`` in the current directory."""
    roots = {str(Path(next(iter(m.__path__))).resolve().parent) for m in (orchestrator, models, losses, search_spaces)}
    if len(roots) > 1:
        raise ValueError(
            f"packages come from different places: {', '.join(sorted(roots))}; start elsewhere or use python -P"
        )
