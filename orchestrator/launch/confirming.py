"""Selecting without peeking: the best points of a search on held-out identities, trained again, scored once on test.

The second half is a sweep of its own, a table of points × seeds on the whole training set. It is made once: which
points it holds is decided when the search has ended, and a resumed sweep goes on with them.
"""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from orchestrator.launch import shelf
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.progress import label
from orchestrator.recipe import changed
from search_spaces._space import SearchSpace


def fresh_seeds(space: SearchSpace, seed: int, count: int) -> list[int]:
    """Seeds that no trial of a search had: its choice has seen those.

    >>> fresh_seeds(SearchSpace(method="fitnet", question="?", cells={"a": {}}, seeds=(0, 1)), 0, 2)
    [2, 3]
    """
    first = 1 + max(space.seeds if space.cells else [seed])
    return list(range(first, first + count))


def best(plan: Plan, records: Sequence[TrialRecord], count: int) -> dict[str, tuple[dict[str, Any], float]]:
    """The best settings of a search, the best first: name -> what the space sets, and its mean value over seeds."""
    space, values, settings = plan.search_space, {}, {}
    for record in records:
        if record.status != "completed":
            continue
        key = record.point["cell"] if space.cells else json.dumps(record.point, sort_keys=True)
        values.setdefault(key, []).append(record.value)
        settings.setdefault(key, space.cells[key] if space.cells else record.point)
    means = {key: statistics.mean(of_key) for key, of_key in values.items()}
    order = sorted(means, key=lambda key: -means[key])[:count]  # equal ones in the order in which they ran
    names = {key: key if space.cells else label(settings[key], ".6g") for key in order}
    return {names[key]: (dict(settings[key]), means[key]) for key in order}


def stored(plan: Plan) -> Plan | None:
    """The sweep that confirms a search, where it has been made."""
    return next((one for one in shelf.stored(_name(plan), plan.benchmark) if one.confirms == plan.tag), None)


def confirmation(plan: Plan, records: Sequence[TrialRecord]) -> Plan:
    """The sweep that confirms a search, found or made: its best points on the whole training set, scored on test.

    Raises:
        ValueError: the search has no completed trial.
    """
    found = stored(plan)
    if found is not None:
        return found
    space, chosen = plan.search_space, best(plan, records, plan.confirm["points"])
    if not chosen:
        raise ValueError(f"no trial of {plan.sweep} completed, so there is nothing to confirm")
    table = SearchSpace(
        method=space.method,
        question=space.question,
        cells={name: settings for name, (settings, _) in chosen.items()},
        seeds=tuple(plan.confirm["seeds"]),
        fix=space.fix,
        metric=space.metric,
        early_stopping=False,
        compare=space.compare,
    )
    recipes = {method: _on_test(plan.base_recipe(method)) for method in table.methods}
    return shelf.new_plan(
        _name(plan), table, f"{plan.title}, confirmed", plan.benchmark, recipes, plan.where, plan.tracking_uri,
        len(table.table()), plan.concurrent, plan.workers, plan.gpus_per_worker, confirms=plan.tag,
    )  # fmt: skip


def _on_test(recipe: Any) -> Any:
    """Scored on test once, at the end: curves over epochs would be many looks."""
    return changed(recipe, {"data.part": "test", "train.evaluate_every": recipe.train.epochs})


def _name(plan: Plan) -> str:
    return f"{plan.space}_confirmed"
