"""What a sweep is: made from names and values, stored as ``plan.json``, read again, continued."""

import contextlib
import dataclasses
import glob
import itertools
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import orchestrator
from orchestrator import find
from orchestrator.launch import before
from orchestrator.needs import Place, Prepared
from orchestrator.recipe import changed, flat, recipe_from
from search_spaces._space import Choice, Float, Int, SearchSpace

FORMAT = 2  # of plan.json; 1 was 0.3's, which did not say


@dataclass(frozen=True)
class Plan:
    """Everything a sweep is, as plain values; stored as ``plan.json`` in its folder."""

    folder: str
    space: str  # file name in search_spaces, or a title for single runs
    title: str  # the MLflow experiment
    benchmark: str
    recipes: dict[str, dict[str, Any]]  # method -> the flat base recipe of its trials
    place: dict[str, str]
    tracking_uri: str
    trials: int
    workers: int = 1
    gpus_per_worker: float = 0.0
    concurrent: int = 1
    facts: dict[str, Any] = field(default_factory=dict)  # version and commit of the code
    space_data: dict[str, Any] = field(default_factory=dict)  # the search space itself, as plain values
    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # no other sweep has it, in any storage
    prepared: dict[str, dict[str, Any]] = field(default_factory=dict)  # variant -> role -> what is ready for it
    created: float = 0.0  # seconds since 1970; 0 = by a version that did not say
    format: int = FORMAT

    @property
    def sweep(self) -> str:
        """The name people see."""
        return Path(self.folder).name

    @property
    def tag(self) -> str:
        """The name by which its MLflow runs are found."""
        return f"{self.sweep}-{self.key[:8]}"

    @property
    def where(self) -> Place:
        return Place(**self.place)

    @property
    def search_space(self) -> SearchSpace:
        """The space, the inverse of :func:`space_data`, also after JSON."""
        data = dict(self.space_data)
        for name in ("start", "seeds", "picture"):
            data[name] = tuple(data[name])
        made = {}
        for name, (kind, values) in data["tune"].items():
            made[name] = _DIMENSIONS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        return SearchSpace(**{**data, "tune": made})

    @property
    def metric(self) -> str:
        """What is maximised."""
        space = self.search_space
        return space.metric or find.method(space.method).metrics[0].name

    def base_recipe(self, method: str) -> Any:
        """The recipe from which a method's trials start."""
        return recipe_from(find.recipe(method, self.benchmark), self.recipes[method])

    def recipe_of(self, point: Mapping[str, Any]) -> tuple[str, Any]:
        """Method and recipe of one point of the space."""
        space = self.search_space
        method = space.method_of(point) if point else space.method
        return method, changed(self.base_recipe(method), space.settings(point) if point else {})

    def prepared_for(self, point: Mapping[str, Any]) -> Prepared:
        """What is ready for the trial of a point."""
        return Prepared.of(self.where, self.prepared[variant_of(self.search_space, point)])

    def told(self) -> list[dict[str, Any]]:
        """What the preparation of each variant tells the record, in the order of the space."""
        if not self.prepared:  # made by 0.3 and not continued since
            return before.told(self.facts)
        return [Prepared.of(self.where, roles).told() for roles in self.prepared.values()]


@dataclass(frozen=True)
class TrialRecord:
    """One row of the final table."""

    number: int
    status: str  # completed, pruned, failed, running
    point: dict[str, Any]
    epochs: int
    value: float | None  # of the space's metric, last evaluated
    metrics: dict[str, float]
    run_id: str
    message: str = ""
    seconds: float = 0.0


_DIMENSIONS = {"Float": Float, "Int": Int, "Choice": Choice}


def storage() -> str:
    """``ORCHESTRATOR_STORAGE`` or ./runs, absolute: databases, caches, teachers, sweeps.

    Raises:
        ValueError: a path that addresses of databases read otherwise.
    """
    path = str(Path(os.environ.get("ORCHESTRATOR_STORAGE") or "runs").expanduser().absolute())
    if odd := re.search(r"\?|%[0-9A-Fa-f]{2}", path):
        raise ValueError(
            f"the storage {path} has {odd[0]!r} in its path, which addresses of databases take for something else; "
            f"set ORCHESTRATOR_STORAGE to another folder"
        )
    return path


def space_data(space: SearchSpace) -> dict[str, Any]:
    """A space as plain values: a resumed sweep does not depend on a file that somebody has edited since."""
    tune = {name: [type(bounds).__name__, vars(bounds)] for name, bounds in space.tune.items()}
    return json.loads(json.dumps({**{f.name: getattr(space, f.name) for f in fields(space)}, "tune": tune}))


def single(method: str, seed: int = 0, question: str = "") -> SearchSpace:
    """A space of one trial, so that single runs and sweeps are one path."""
    return SearchSpace(
        method=method,
        question=question or f"One run of {method}.",
        cells={"run": {}},
        seeds=(seed,),
        early_stopping=False,
    )


def new_plan(
    name: str, space: SearchSpace, title: str, benchmark: str, recipes: Mapping[str, Any], place: Place, uri: str,
    trials: int, concurrent: int, workers: int, gpus: float,
) -> Plan:  # fmt: skip
    """A new sweep with its own folder, stored before anything is prepared."""
    plan = Plan(
        folder=str(_new_folder(place, f"{name}-{benchmark}")),
        space=name,
        title=title,
        benchmark=benchmark,
        recipes={method: flat(recipe) for method, recipe in recipes.items()},
        place=dataclasses.asdict(place),
        tracking_uri=uri,
        trials=trials,
        workers=workers,
        gpus_per_worker=gpus,
        concurrent=min(concurrent, trials),
        facts=code_facts(),
        space_data=space_data(space),
        created=time.time(),
    )
    save(plan)
    return plan


@contextlib.contextmanager
def withdrawn_if_refused(plan: Plan) -> Iterator[None]:
    """A new sweep that is refused before its first trial leaves no plan: it could never go on, and would be the newest.

    What was prepared for it is kept, so that the mended command finds it.
    """
    try:
        yield
    except ValueError:
        if not (Path(plan.folder) / "study.db").exists():
            shutil.rmtree(plan.folder, ignore_errors=True)
        raise


def variants(plan: Plan) -> dict[str, tuple[str, Any]]:
    """What trials may need different things: every row of a table, or every combination of a space's choices.

    Returns:
        Name of the variant -> method and recipe.
    """
    space = plan.search_space
    if space.cells:
        points = space.table()
    else:
        choices = {name: bounds.options for name, bounds in space.tune.items() if isinstance(bounds, Choice)}
        points = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    found: dict[str, tuple[str, Any]] = {}
    for point in points:
        found.setdefault(variant_of(space, point), plan.recipe_of(point))
    return found


def ranges(plan: Plan) -> list[tuple[str, str, Any, Any]]:
    """Tuned numbers with the recipes of their ends: (name, method, recipe at the low end, at the high end)."""
    space, base = plan.search_space, plan.base_recipe(plan.search_space.method)
    return [
        (name, space.method, changed(base, {name: bounds.low}), changed(base, {name: bounds.high}))
        for name, bounds in space.tune.items()
        if not isinstance(bounds, Choice)
    ]


def variant_of(space: SearchSpace, point: Mapping[str, Any]) -> str:
    """The variant to which a point belongs: its row, or the values of its choices."""
    if space.cells:
        return str(point["cell"])
    chosen = {name: point[name] for name, bounds in space.tune.items() if isinstance(bounds, Choice)}
    return json.dumps(chosen, sort_keys=True) if chosen else "all"


# --- On disk ----------------------------------------------------------------------------------------------------------


def save(plan: Plan) -> None:
    path = Path(plan.folder) / "plan.json"
    partial = path.with_suffix(f".tmp-{os.getpid()}")
    partial.write_text(json.dumps(dataclasses.asdict(plan), indent=1))
    os.replace(partial, path)


def read(folder: Path) -> Plan:
    """The plan of a folder, wherever the storage lies now, also one of an earlier version.

    Raises:
        ValueError: it is of a newer version, damaged, or its folder has another name now.
    """
    path = folder / "plan.json"
    try:
        data = json.loads(path.read_text())
        written = int(data.get("format", 1))
        if written <= FORMAT:
            if "recipes" not in data:  # before 0.2 a sweep had one method
                data["recipes"] = {data.pop("method"): data.pop("recipe")}
            plan = Plan(**{**(_from_03(data) if written == 1 else data), "format": FORMAT})
            _check(plan)
            return _moved(plan, folder.absolute())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error if str(error) else repr(error)}") from error
    raise ValueError(f"{path} is of format {written}, this version reads up to {FORMAT}; update it to go on")


def _check(plan: Plan) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError where a stored plan does not hold what a plan does."""
    for name, kind in get_type_hints(Plan).items():
        kind = get_origin(kind) or kind
        value = getattr(plan, name)
        if not isinstance(value, int | float if kind is float else kind):
            raise ValueError(f"{name} is {value!r}, expected {kind.__name__}")
    for name, value in plan.place.items():
        if not isinstance(value, str):
            raise ValueError(f"place.{name} is {value!r}, expected a path")
    for method in plan.search_space.methods:
        if method not in plan.recipes:
            raise ValueError(f"recipes have none of {method}")
    for roles in plan.prepared.values():
        Prepared.of(plan.where, roles)


def _from_03(data: dict[str, Any]) -> dict[str, Any]:
    recipes = {
        method: before.today(values, find.recipe(method, data["benchmark"]))
        for method, values in data["recipes"].items()
    }
    first = find.recipe(next(iter(recipes)), data["benchmark"])
    return {**data, "recipes": recipes, "space_data": before.space_today(data["space_data"], first)}


def _moved(plan: Plan, folder: Path) -> Plan:
    """The plan in the storage where it was found: storages are copied, renamed and mounted elsewhere.

    Raises:
        ValueError: the sweep's own folder was renamed; its runs and its study are found by that name.
    """
    then, now = plan.place["storage"], str(folder.parent.parent)
    if plan.sweep != folder.name:
        raise ValueError(f"it is the plan of {plan.sweep}; give the folder that name again")
    if str(folder) == plan.folder or plan.folder != f"{then}/sweeps/{folder.name}":
        return plan
    uri = plan.tracking_uri.replace(f"sqlite:///{then}/", f"sqlite:///{now}/")
    return dataclasses.replace(plan, folder=str(folder), place={**plan.place, "storage": now}, tracking_uri=uri)


def stored(name: str, benchmark: str | None = None, root: str = "") -> list[Plan]:
    """All sweeps of a space (and benchmark) in the storage, newest last; one that cannot be read is left out.

    It is told in a warning.
    """
    found = []
    for plan in _all(name, benchmark, Path(root or storage(), "sweeps")):
        if isinstance(plan, Plan):
            found.append(plan)
        else:
            warnings.warn(f"{plan}; left out", stacklevel=2)
    return found


def _all(name: str, benchmark: str | None, folder: Path) -> list[Plan | ValueError]:
    """The sweeps of a space (and benchmark), newest last; for one that cannot be read, why."""
    found: list[tuple[float, int, Plan | ValueError]] = []
    for path in folder.glob(f"{glob.escape(name)}-*/plan.json"):
        if not (benchmark is None or path.parent.name.startswith(f"{name}-{benchmark}-")):
            continue
        plan: Plan | ValueError
        try:
            plan = read(path.parent)
            if plan.space != name or benchmark not in (None, plan.benchmark):
                continue
        except ValueError as error:
            plan = error
        # Times of files are those of a copy where the storage was copied; of a damaged plan nothing else is known.
        created = plan.created if isinstance(plan, Plan) else path.stat().st_mtime
        found.append((created, _number(path.parent.name), plan))
    return [plan for _, _, plan in sorted(found, key=lambda f: f[:2])]


def latest(name: str, benchmark: str | None = None, single: str = "") -> Plan:
    """The newest sweep of a space (and benchmark); ``single`` names the method where the plans are of single runs.

    Raises:
        ValueError: there is none, or the newest cannot be read.
    """
    found = _all(name, benchmark, Path(storage(), "sweeps"))
    if found and isinstance(found[-1], ValueError):
        raise found[-1]
    if not found:
        where = f" on {benchmark}" if benchmark else ""
        what, command = ("run", f"train {single}") if single else ("sweep", f"sweep {name}")
        raise ValueError(
            f"no {what} {single or name}{where} in {storage()}; run python -m orchestrator.{command} first"
        )
    return found[-1]


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
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        asked = subprocess.run(command, capture_output=True, text=True)
        commit = asked.stdout.strip() or commit
    return {"version": installed, "commit": commit, "code": str(folder)}


def _new_folder(place: Place, stem: str) -> Path:
    root = Path(place.folder("sweeps"))
    root.mkdir(parents=True, exist_ok=True)
    number = 1 + max((_number(p.name) for p in root.glob(f"{stem}-*")), default=0)
    while True:
        try:
            (root / f"{stem}-{number}").mkdir()
            return root / f"{stem}-{number}"
        except FileExistsError:  # another sweep took the number
            number += 1


def _number(name: str) -> int:
    found = re.search(r"-(\d+)$", name)
    return int(found[1]) if found else 0
