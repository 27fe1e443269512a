"""Sweeps on disk: a plan is stored before anything runs, found by name, read again, continued."""

import contextlib
import dataclasses
import glob
import json
import os
import re
import shutil
import time
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from orchestrator import find, mirror, store
from orchestrator.launch import before
from orchestrator.launch.plan import FORMAT, Plan, code_facts, space_data
from orchestrator.needs import Place, Prepared
from orchestrator.recipe import flat
from search_spaces._space import SearchSpace

STUDY = "study.db"  # in the folder of a sweep, unless its study is in a database of several
BEGUN = "begun"  # says so there


def storage() -> str:
    """``ORCHESTRATOR_STORAGE`` or ./runs, absolute: databases, caches, teachers, sweeps; a copy of object storage.

    Raises:
        ValueError: as :func:`orchestrator.mirror.place`.
    """
    return mirror.place().storage


def new_plan(
    name: str, space: SearchSpace, title: str, benchmark: str, recipes: Mapping[str, Any], place: Place, uri: str,
    trials: int, concurrent: int, workers: int, gpus: float, campaign: str = "",
    confirm: Mapping[str, Any] | None = None, confirms: str = "",
) -> Plan:  # fmt: skip
    """A new sweep with its own folder, stored before anything is prepared."""
    mirror.mark(place)
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
        study=study_address(place),
        campaign=campaign,
        confirm=dict(confirm or {}),
        confirms=confirms,
    )
    save(plan)
    return plan


def study_address(place: Place) -> str:
    """``OPTUNA_STORAGE`` without its password; empty = SQLite in the sweep's own folder.

    Raises:
        ValueError: it is no address, holds a password, or is missing where the storage is no folder.
    """
    given = os.environ.get("OPTUNA_STORAGE", "")
    if not given:
        if place.remote and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError(
                f"{place.remote} can hold no database: set MLFLOW_TRACKING_URI to a server, such as http://HOST:5000, "
                f"and OPTUNA_STORAGE to a database"
            )
        if place.remote:
            raise ValueError(
                f"{place.remote} can hold no database: set OPTUNA_STORAGE to one that every driver reaches, such as "
                f"postgresql+psycopg2://USER@HOST/optuna, and PGPASSWORD"
            )
        return ""
    parts = urllib.parse.urlsplit(given)
    if not parts.scheme or not (parts.path.strip("/") or parts.netloc):
        expected = "such as postgresql+psycopg2://USER@HOST/optuna"
        raise ValueError(f"OPTUNA_STORAGE={_hidden(given)} is no address {expected}")
    if parts.password is not None or "password" in parts.query:
        remedy = "which plans must not; put it into PGPASSWORD"
        raise ValueError(f"OPTUNA_STORAGE={_hidden(given)} holds a password, {remedy}")
    return given


def _hidden(address: str) -> str:
    """An address that may be shown."""
    return re.sub(r"//.*@", "//***@", address).partition("?")[0]


def has_begun(plan: Plan) -> bool:
    """Whether the search of a sweep has begun: it has a study."""
    if plan.study:
        return store.read(plan.where.address("sweeps", plan.sweep, BEGUN)) is not None
    return (Path(plan.folder) / STUDY).exists()


@contextlib.contextmanager
def withdrawn_if_refused(plan: Plan) -> Iterator[None]:
    """A new sweep that is refused before its first trial leaves no plan: it could never go on, and would be the newest.

    What was prepared for it is kept, so that the mended command finds it.
    """
    try:
        yield
    except ValueError:
        if not has_begun(plan):
            shutil.rmtree(plan.folder, ignore_errors=True)
            if plan.where.remote:
                store.remove(plan.where.address("sweeps", plan.sweep, "plan.json"))
        raise


def save(plan: Plan) -> None:
    data = json.dumps(dataclasses.asdict(plan), indent=1).encode()
    store.write(str(Path(plan.folder) / "plan.json"), data)
    if plan.where.remote:
        store.write(plan.where.address("sweeps", plan.sweep, "plan.json"), data)


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
    place = mirror.place()
    if folder == Path(place.folder("sweeps")):
        fetch(place, name)
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
        found.append((created, number_of(path.parent.name), plan))
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


def fetch(place: Place, name: str = "") -> None:
    """Copies plans that are in object storage to this host: those of a space, or all."""
    if not place.remote:
        return
    folder = Path(place.folder("sweeps"))
    for sweep in store.names(place.address("sweeps"), f"{name}-" if name else ""):
        content = store.read(place.address("sweeps", sweep, "plan.json"))
        if content is not None:
            (folder / sweep).mkdir(parents=True, exist_ok=True)
            store.write(str(folder / sweep / "plan.json"), content)


def _new_folder(place: Place, stem: str) -> Path:
    root = Path(place.folder("sweeps"))
    root.mkdir(parents=True, exist_ok=True)
    taken = [*(path.name for path in root.glob(f"{stem}-*")), *(store.names(place.address("sweeps"), f"{stem}-"))]
    number = 1 + max(map(number_of, taken), default=0)
    while not _reserved(place, f"{stem}-{number}"):  # another sweep took the number
        number += 1
    return root / f"{stem}-{number}"


def _reserved(place: Place, name: str) -> bool:
    """Makes the folder of a new sweep; of several who want one name, one gets it."""
    if place.remote and not store.create(place.address("sweeps", name, "reserved"), b""):
        return False
    try:
        Path(place.folder("sweeps", name)).mkdir()
    except FileExistsError:
        return bool(place.remote)  # left by a sweep that was withdrawn
    return True


def number_of(name: str) -> int:
    found = re.search(r"-(\d+)$", name)
    return int(found[1]) if found else 0
