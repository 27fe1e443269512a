"""What tests know of tiny recipes: of every family its settings and cases, and how needs are met in this process."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def family_of(method: str) -> Any:
    """What tests know of a method's family: ``tests/families/<family>.py`` with its tiny settings and its cases."""
    from orchestrator import find

    return importlib.import_module(f"families.{find.method(method).family}")


def cases(quick: bool = False) -> list[Any]:
    """Every method with every case of its family, as parameters (method, changes of the tiny recipe).

    Where they are to be ``quick``, all but the first of each family are slow.
    """
    from orchestrator import find

    found = [(name, changes) for name in find.methods() for changes in family_of(name).CASES.get(name, ({},))]
    return parameters(found, quick)


def parameters(found: Iterable[tuple[str, Mapping[str, Any]]], quick: bool = False) -> list[Any]:
    """Methods and changes as parameters; ``quick`` as of :func:`cases`."""
    from orchestrator import find

    made, seen = [], set()
    for name, changes in found:
        family = find.method(name).family
        marks = [pytest.mark.slow] if quick and family in seen else []
        seen.add(family)
        made.append(
            pytest.param(name, changes, marks=marks, id=" ".join([name, *(f"{k}={v}" for k, v in changes.items())]))
        )
    return made


def with_paths(recipe: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the full paths of their fields; those of fields that the recipe does not have as they are."""
    from orchestrator.recipe import path_of

    found = {}
    for name, value in settings.items():
        try:
            found[path_of(recipe, name)] = value
        except ValueError:
            found[name] = value
    return found


def own(recipe: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of fields that the recipe has."""
    from orchestrator.recipe import fields_of

    return {path: value for path, value in settings.items() if path in fields_of(recipe)}


def preparation(place: Any) -> Any:
    """Meets needs in a place in this process, silently; what was met once is not looked up again."""
    from dataclasses import asdict

    from rich.console import Console

    from orchestrator.launch.plan import Plan
    from orchestrator.launch.preparing import Preparation
    from orchestrator.launch.runner import InProcess
    from orchestrator.progress import PreparationBar

    return Preparation(Plan("", "", "", "", {}, asdict(place), "", 1), InProcess(), PreparationBar(Console(quiet=True)))


def met(method: str, recipe: Any, place: Any) -> Any:
    """Meets every need of a recipe as a new command would: what is ready is looked up in the ledger."""
    from orchestrator import find
    from orchestrator.needs import Prepared

    found = preparation(place)
    needs = find.method(method).needs(recipe, place)
    return Prepared(place, {role: found.meet(method, need) for role, need in needs.items()})
