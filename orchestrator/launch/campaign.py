"""Many sweeps under one limit: what a campaign is, what was asked of it, and how it is stored.

Its sweeps are ordinary sweeps with plans of their own; beside them lies which ones they are. How they run is in
:mod:`orchestrator.launch.leading`.
"""

import dataclasses
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import find, leases, mirror, store
from orchestrator.launch import asked, shelf
from orchestrator.launch.plan import Plan
from orchestrator.needs import Place
from orchestrator.patience import first_line
from search_spaces._campaign import Campaign, Sweep

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One sweep of a campaign, as it is stored."""

    title: str
    space: str
    benchmark: str
    priority: float
    sweep: str = ""  # name of its folder; empty = left out
    left_out: str = ""  # why


@dataclass(frozen=True)
class State:
    """A campaign on disk, as plain values."""

    name: str  # of its folder: campaign_smoke-1
    campaign: str  # file name in search_spaces
    question: str
    place: dict[str, str]
    tracking_uri: str
    entries: tuple[Entry, ...]
    concurrent: int
    threads: int  # of a worker on a CPU, kept from the start: sums depend on it
    trials: int = 0  # budget; 0 = none
    gpu_hours: float = 0.0
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)
    spent: float = 0.0  # GPU hours before the last resume
    format: int = FORMAT

    @property
    def where(self) -> Place:
        return Place(**self.place)

    @property
    def tag(self) -> str:
        """The name by which its MLflow run is found."""
        return f"{self.name}-{self.key[:8]}"

    def plans(self) -> dict[str, Plan]:
        """Title -> plan of every sweep that is not left out."""
        shelf.fetch(self.where)
        folder = Path(self.where.folder("sweeps"))
        if odd := next((e.sweep for e in self.entries if not re.fullmatch(r"[\w.-]*", e.sweep) or ".." in e.sweep), ""):
            raise ValueError(f"{self.name} names the sweep {odd!r}, which is no name of a folder in the storage")
        return {entry.title: shelf.read(folder / entry.sweep) for entry in self.entries if entry.sweep}


# --- What was asked ---------------------------------------------------------------------------------------------------


def data_roots(given: list[str]) -> dict[str, str]:
    """``DIR`` for every benchmark ("") and ``BENCHMARK=DIR`` for one.

    Raises:
        ValueError: a folder that is none, or two for the same benchmark.
    """
    found: dict[str, str] = {}
    for text in given:
        benchmark, equals, folder = text.partition("=")
        if not equals or "/" in benchmark:
            benchmark, folder = "", text
        if benchmark in found:
            raise ValueError(f"--data-root names {benchmark or 'the folder of all benchmarks'} twice")
        if not folder or not Path(folder).is_dir():
            named = folder or "an empty name"
            raise ValueError(
                f"--data-root {text}: {named} is not a directory; give the folder of the benchmark's files"
            )
        found[benchmark] = str(Path(folder).absolute())
    return found


def check_budget(trials: int | None, gpu_hours: float | None) -> None:
    """Raises ValueError for a budget of less than one trial."""
    if trials is not None and trials < 1:
        raise ValueError(f"--trials {trials}: the budget must be at least 1 trial; without it all are run")
    if gpu_hours is not None and not 0 < gpu_hours < math.inf:
        raise ValueError(f"--gpu-hours {gpu_hours:g}: the budget must be a number above 0, or no trial could start")


@dataclass(frozen=True)
class Asked:
    """One sweep of a campaign with everything that can be known without starting it."""

    sweep: Sweep
    space: Any
    recipes: Mapping[str, Any] = field(default_factory=dict)
    place: Place = field(default_factory=lambda: Place(""))
    total: int = 0
    left_out: str = ""


def resolved(campaign: Campaign, roots: Mapping[str, str]) -> list[Asked]:
    """Every sweep's recipes and place; one whose data nobody gave is left out.

    Raises:
        ValueError: a name or value that does not exist, or nothing is left.
    """
    unknown = sorted(set(roots) - {""} - {sweep.on for sweep in campaign.sweeps})
    if unknown:
        known = ", ".join(dict.fromkeys(sweep.on for sweep in campaign.sweeps))
        raise ValueError(f"--data-root {unknown[0]}=…: the campaign has no sweep on {unknown[0]!r}; it has {known}")
    found = []
    for sweep in campaign.sweeps:
        try:
            space = find.space(sweep.space)
            if sweep.seeds:
                if not space.cells:
                    raise ValueError("seeds are of tables; this space is sampled")
                space = dataclasses.replace(space, seeds=sweep.seeds)
            if sweep.trials and space.cells:
                raise ValueError(f"a table always runs in full; leave trials={sweep.trials} away")
            root = roots.get(sweep.on, roots.get("", ""))
            recipes, place = asked.resolve(space, sweep.on, sweep.settings, None, root, sweep.workers)
        except ValueError as error:
            raise ValueError(f"{sweep.title}: {error}") from error
        total = len(space.table()) if space.cells else (sweep.trials or space.trials)
        found.append(Asked(sweep, space, recipes, place, total, _left_out(recipes, place, sweep, sweep.on in roots)))
    if all(each.left_out for each in found):
        raise ValueError(f"nothing is left of the campaign: {found[0].sweep.title}: {found[0].left_out}")
    return found


def _left_out(recipes: Mapping[str, Any], place: Place, sweep: Sweep, own: bool) -> str:
    """Why a sweep cannot be run: its data are not here. Empty if it can.

    Raises:
        ValueError: they are not in the folder that was given for them.
    """
    try:
        for recipe in recipes.values():
            for name in recipe.data.name.split("+"):  # scenes of several data sets
                find.listed(name, place.data_root, recipe.data.part)
    except (ValueError, OSError) as error:
        if own:
            raise ValueError(f"--data-root {sweep.on}={place.data_root}: {first_line(error)}") from error
        there = f"not in {place.data_root}: " if place.data_root else "needs data: "
        return f"{there}--data-root {sweep.on}=DIR"
    return ""


# --- On disk ----------------------------------------------------------------------------------------------------------


def new(
    name: str, campaign: Campaign, found: list[Asked], uri: str, concurrent: int, threads: int, gpus: float,
    trials: int, gpu_hours: float,
) -> State:  # fmt: skip
    """A new campaign with a plan for each of its sweeps, stored before anything is prepared."""
    place = next(each.place for each in found if not each.left_out)
    mirror.mark(place)
    own, key = _new_name(place, name), uuid.uuid4().hex
    entries = []
    for each in found:
        entry = Entry(each.sweep.title, each.sweep.space, each.sweep.on, each.sweep.priority, "", each.left_out)
        if not each.left_out:
            plan = shelf.new_plan(
                each.sweep.space, each.space, each.sweep.title, each.sweep.on, each.recipes, each.place, uri,
                each.total, concurrent, each.sweep.workers, gpus, f"{own}-{key[:8]}",
            )  # fmt: skip
            entry = dataclasses.replace(entry, sweep=plan.sweep)
        entries.append(entry)
    state = State(
        own, name, campaign.question, dataclasses.asdict(dataclasses.replace(place, data_root="")), uri,
        tuple(entries), concurrent, threads, trials, gpu_hours, key,
    )  # fmt: skip
    save(state)
    return state


def save(state: State) -> None:
    store.write(
        state.where.address("campaigns", state.name, "campaign.json"),
        json.dumps(dataclasses.asdict(state), indent=1).encode(),
    )


def read(place: Place, name: str) -> State:
    """A stored campaign, in the storage where it lies now.

    Raises:
        ValueError: it cannot be read, or is of a newer version.
    """
    address = place.address("campaigns", name, "campaign.json")
    try:
        data = json.loads(store.read(address) or b"")
        if data["format"] > FORMAT:
            raise ValueError(f"format {data['format']}, this version reads up to {FORMAT}; update it to go on")
        then = data["place"]["storage"]
        uri = data["tracking_uri"].replace(f"sqlite:///{then}/", f"sqlite:///{place.storage}/")
        entries = tuple(Entry(**entry) for entry in data["entries"])
        now = {**data["place"], "storage": place.storage}
        return State(**{**data, "entries": entries, "place": now, "tracking_uri": uri})
    except (ValueError, KeyError, TypeError) as error:
        remedy = "restore the file, or start a new campaign without --resume"
        raise ValueError(f"{address} cannot be read: {error}; {remedy}") from error


def latest(name: str) -> State:
    """The newest campaign of a name; raises ValueError where there is none."""
    place = mirror.place()
    found = [
        own
        for own in store.names(place.address("campaigns"), f"{name}-")
        if re.fullmatch(rf"{name}-\d+", own)
        # Else it was killed before it was stored.
        and store.read(place.address("campaigns", own, "campaign.json")) is not None
    ]
    if not found:
        raise ValueError(f"no campaign {name} in {place.remote or place.storage}; run it without --resume first")
    return read(place, max(found, key=shelf.number_of))


def _new_name(place: Place, name: str) -> str:
    taken = store.names(place.address("campaigns"), f"{name}-")
    number = 1 + max(map(shelf.number_of, taken), default=0)
    while not store.create(place.address("campaigns", f"{name}-{number}", "reserved"), b""):
        number += 1
    return f"{name}-{number}"


def leading(place: Place, name: str, took_over: Callable[[str], None]) -> Any:
    """Holds the campaigns of a name while one runs; raises ValueError where another process runs one."""
    return leases.held(place.address("leases", name), what=f"the campaign {name}", took_over=took_over)
