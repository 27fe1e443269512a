"""What a sweep will do, before it does anything: by groups of the recipe, with what is ready and what will be made."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from orchestrator.launch import plan as plans
from orchestrator.launch import preparing
from orchestrator.launch.plan import Plan
from orchestrator.needs import Place
from orchestrator.progress import label
from orchestrator.recipe import flat
from search_spaces._space import Choice, Int, SearchSpace


def lines(
    name: str, space: SearchSpace, on: str, total: int, recipes: Mapping[str, Any], place: Place, uri: str = ""
) -> list[str]:
    """The plan as text.

    Args:
        name: of the sweep.
        space: what it varies.
        on: the benchmark.
        total: number of trials.
        recipes: method -> recipe.
        place: storage and data.
        uri: of MLflow; given, the data are listed and the last lines say what is ready and what will be made.

    Raises:
        ValueError, OSError: as the readers, when the data are listed.
    """
    first = next(iter(recipes.values()))
    found = [f"{name} on {on}: {space.question}", *_varied(space, total, first.train.epochs)]
    shared: dict[str, Any] = {}
    for method, recipe in recipes.items():
        usual = flat(type(recipe)())  # the class defaults are the paper's
        groups: dict[str, list[str]] = {}
        for path, value in flat(recipe).items():
            if path in shared and shared[path] == value:
                continue
            group, _, field = path.rpartition(".")
            star = "" if usual[path] == value or path == "data.name" else "*"
            groups.setdefault(group or method, []).append(f"{field}={_text(value)}{star}")
        first_of_all = not shared
        shared = shared or flat(recipe)
        note = "  (* = not the paper's)" if first_of_all else ""
        for number, group in enumerate(sorted(groups, key=lambda g: g != method)):
            found.append(f"  {group:16} {' '.join(groups[group])}" + (note if number == 0 else ""))
    return [*found, *_needs(name, space, on, total, recipes, place, uri)] if uri else found


def _varied(space: SearchSpace, total: int, epochs: int) -> list[str]:
    if space.cells:
        rows = ", ".join(space.cells)
        return [f"  varies           rows: {rows}; seeds {', '.join(map(str, space.seeds))}; {total} trials"]
    text = ", ".join(f"{name} {_range(bounds)}" for name, bounds in space.tune.items())
    given = " ".join(f"({label(point)})" for point in space.table())
    first = f"; first {given}" if given else ""
    return [f"  varies           {text}{first}; {total} trials × {epochs} epochs"]


def _range(bounds: Any) -> str:
    if isinstance(bounds, Choice):
        return "of " + ", ".join(map(str, bounds.options))
    whole = " whole" if isinstance(bounds, Int) else ""
    return f"{bounds.low:g} … {bounds.high:g}{whole}{' log' if bounds.log else ''}"


Wanted = tuple[str, SearchSpace, str, int, Mapping[str, Any], Place]


def confirmed(asked: Mapping[str, Any]) -> str:
    """What follows a search on validation."""
    points, seeds = asked["points"], ", ".join(map(str, asked["seeds"]))
    best = f"the best {points} are" if points > 1 else "the best one is"
    return f"{best} trained again on the whole training set, seeds {seeds}, and scored once on test"


def united(wanted: list[Wanted], uri: str) -> list[str]:
    """What is ready for several sweeps together, and what will be made, each thing once."""
    both: list[dict[str, None]] = [{}, {}]
    for each in wanted:
        for known, found in zip(both, preparing.status(_plan(*each, uri)), strict=True):
            known.update(dict.fromkeys(found))
    return _lines(*map(list, both))


def _needs(
    name: str, space: SearchSpace, on: str, total: int, recipes: Mapping[str, Any], place: Place, uri: str
) -> list[str]:
    return _lines(*preparing.status(_plan(name, space, on, total, recipes, place, uri)))


def _plan(
    name: str, space: SearchSpace, on: str, total: int, recipes: Mapping[str, Any], place: Place, uri: str
) -> Plan:
    return Plan(
        folder="", space=name, title="", benchmark=on, recipes={m: flat(r) for m, r in recipes.items()},
        place=dataclasses.asdict(place), tracking_uri=uri, trials=total, space_data=plans.space_data(space),
    )  # fmt: skip


def _lines(ready: list[str], missing: list[str]) -> list[str]:
    return [
        *([f"  ready            {' · '.join(ready)}"] if ready else []),
        *([f"  to be made       {' · '.join(missing)}"] if missing else []),
    ]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "×".join(map(str, value)) if isinstance(value, list) else str(value) or "-"
