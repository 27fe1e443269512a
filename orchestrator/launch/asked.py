"""From what a person typed to recipes: every name and value of a sweep checked before anything starts."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import find, mirror
from orchestrator.launch.plan import Plan
from orchestrator.needs import Place
from orchestrator.recipe import changed, check_field, did_you_mean, flat, path_of, short
from search_spaces._space import Choice, Float, Int, SearchSpace


def resolve(
    space: SearchSpace, benchmark: str, settings: Mapping[str, Any], epochs: int | None, data_root: str,
    workers: int = 1,
) -> tuple[dict[str, Any], Place]:  # fmt: skip
    """The base recipe of every method of a sweep, and its place; everything checked that can be without data.

    Raises:
        ValueError: unknown or ambiguous names, values out of range, a field that the sweep varies or fixes and the
            command line also sets, points of the space that the method refuses, or a metric that no method has.
    """
    known = [metric.name for method in space.methods for metric in find.method(method).metrics]
    if space.metric and space.metric not in known:
        raise ValueError(
            f"the sweep maximises {space.metric!r}, which its methods do not have" + did_you_mean(space.metric, known)
        )
    settings = {**settings, **({"train.epochs": epochs} if epochs else {})}
    _check_not_varied(space, benchmark, settings)
    recipes = {}
    for method in space.methods:
        try:
            recipes[method] = changed(find.recipe(method, benchmark), {**space.fix, **settings})
        except ValueError as error:
            raise ValueError(f"{error} (method {method})" if len(space.methods) > 1 else str(error)) from error
    for name, bounds in space.tune.items():
        for edge in _edges(bounds):
            check_field(recipes[space.method], name, edge)
    for point in [*space.table(), *_corners(space)] or [{}]:
        method = space.method_of(point) if point else space.method
        try:
            recipe = changed(recipes[method], space.settings(point) if point else {})
            find.method(method).check(recipe, workers)
        except ValueError as error:
            row = f" (row {point['cell']})" if len(space.cells) > 1 else ""
            raise ValueError(f"{error}{row}") from error
    if data_root and not Path(data_root).is_dir():
        raise ValueError(f"--data-root {data_root} is not a directory; give the folder of its files")
    return recipes, mirror.place(data_root)


def check_unchanged(
    plan: Plan, settings: Mapping[str, Any], epochs: int | None, data_root: str, workers: int, gpus: float | None
) -> None:
    """A sweep is resumed with the numbers it was started with.

    Raises:
        ValueError: names every difference.
    """
    recipe = plan.base_recipe(plan.search_space.method)
    then = flat(recipe)
    asked = {**settings, **({"train.epochs": epochs} if epochs else {})}
    differing = []
    for name, value in asked.items():
        path = path_of(recipe, name)
        now = flat(changed(recipe, {name: value}))[path]
        if then[path] != now:
            differing.append(f"{short(path, then)}={then[path]} (asked {now})")
    if workers not in (1, plan.workers):
        differing.append(f"{plan.workers} workers (asked {workers})")
    if gpus is not None and gpus != plan.gpus_per_worker:
        differing.append(f"{plan.gpus_per_worker} GPUs a worker (asked {gpus})")
    if data_root and str(Path(data_root).absolute()) != plan.place["data_root"]:
        differing.append(f"--data-root {plan.place['data_root']} (asked {data_root})")
    if differing:
        raise ValueError(f"the sweep {plan.sweep} was started with {', '.join(differing)}; resume it without changes")


def _check_not_varied(space: SearchSpace, benchmark: str, settings: Mapping[str, Any]) -> None:
    recipe = find.recipe(space.method, benchmark)
    having: dict[str, list[str]] = {}
    for name in settings:
        having[name] = [m for m in space.methods if _has(find.recipe(m, benchmark), name)]
    for name, methods in having.items():
        if methods and len(methods) < len(space.methods):
            raise ValueError(f"{name} is a field of {', '.join(methods)} only, not of every method of this sweep")
    varied = {*space.tune, *space.fix, *(name for cell in space.cells.values() for name in cell if name != "method")}
    varied |= {"train.seed"} if space.cells else set()
    paths = {path_of(recipe, name) for name in varied if _has(recipe, name)} | varied
    for name, value in settings.items():
        if name in paths or (_has(recipe, name) and path_of(recipe, name) in paths):
            raise ValueError(f"{name} is what this sweep varies or fixes; it cannot also be set to {value}")


def _has(recipe: Any, name: str) -> bool:
    try:
        path_of(recipe, name)
    except ValueError as error:
        return "say which" in str(error)
    return True


def _edges(bounds: Float | Int | Choice) -> tuple[Any, ...]:
    return bounds.options if isinstance(bounds, Choice) else (bounds.low, bounds.high)


def _corners(space: SearchSpace) -> list[dict[str, Any]]:
    """Every combination of the outermost values of the tuned fields."""
    edges = {name: _edges(bounds) for name, bounds in space.tune.items()}
    return [dict(zip(edges, values, strict=True)) for values in itertools.product(*edges.values())] if edges else []
