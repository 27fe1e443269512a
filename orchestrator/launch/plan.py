"""What a sweep is, as plain values; how it is stored, read and continued is in :mod:`orchestrator.launch.shelf`."""

import itertools
import json
import subprocess
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orchestrator
from orchestrator import find
from orchestrator.launch import before
from orchestrator.needs import Place, Prepared
from orchestrator.recipe import changed, recipe_from
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
    study: str = ""  # address of the database that has its study, without password; empty = SQLite in its folder
    campaign: str = ""  # name of the campaign that it belongs to
    confirm: dict[str, Any] = field(default_factory=dict)  # what follows a search on validation: "points", "seeds"
    confirms: str = ""  # tag of the search whose best points this table trains again
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
