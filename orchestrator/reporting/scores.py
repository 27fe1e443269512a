"""How the scores of a sweep are named and written: what its methods say of their metrics."""

import statistics
from collections.abc import Iterable

from orchestrator import find
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.method import Metric
from orchestrator.published import Published
from orchestrator.recipe import did_you_mean


def metrics(plan: Plan) -> list[Metric]:
    """Metrics of the sweep's methods, each once; the main one first."""
    found: dict[str, Metric] = {}
    for method in plan.recipes:
        for metric in find.method(method).metrics:
            found.setdefault(metric.name, metric)
    return list(found.values())


def maximised(plan: Plan) -> Metric:
    """What the sweep maximises.

    Raises:
        ValueError: no method of the sweep has the metric that its space names.
    """
    known = {metric.name: metric for metric in metrics(plan)}
    name = plan.search_space.metric or next(iter(known))
    if name not in known:
        raise ValueError(f"{plan.space} maximises {name!r}, which its methods do not have" + did_you_mean(name, known))
    return known[name]


def occurring(plan: Plan, records: Iterable[TrialRecord]) -> list[Metric]:
    """The metrics that any of the records has."""
    found = {name for r in records for name in r.metrics}
    return [metric for metric in metrics(plan) if metric.name in found]


def choice(plan: Plan) -> str:
    """What a reader must know of how the best was chosen; empty where a table has no choice in it."""
    if plan.confirms:
        return (
            f"chosen by {plan.confirms} on held-out identities, trained on the whole training set, scored once on test"
        )
    if held_out(plan):
        return "scored on held-out identities (validation)"
    if plan.search_space.tune and plan.trials > 1:
        return "selected on test, as papers of this field do: the best score flatters itself"
    return ""


def held_out(plan: Plan) -> bool:
    """Whether its scores are of held-out training identities, which nobody has published."""
    return any(plan.base_recipe(method).data.part == "validation" for method in plan.recipes)


def side(metric: Metric) -> str:
    """What was scored: the first part of a metric's name."""
    return metric.name.partition("/")[0]


def side_of(plan: Plan, published: Published) -> str:
    """What a printed row has scored, as our metrics name it."""
    return published.side or side(metrics(plan)[0])


def score(metric: Metric) -> str:
    """The last part of a metric's name, as published rows write it."""
    return metric.name.rpartition("/")[2]


def axis(metric: Metric) -> str:
    """The title with its unit."""
    return f"{metric.title} (%)" if metric.percent else metric.title


def shown(metric: Metric, value: float) -> float:
    """A value in the unit of tables and pictures."""
    return 100 * value if metric.percent else value


def written(metric: Metric, value: float | None) -> str:
    """A value as tables write it; nothing where there is none."""
    if value is None:
        return ""
    # z: what rounds to zero has no sign.
    return f"{shown(metric, value):z.2f}" if metric.percent else f"{value:.4g}"


def mean_and_spread(metric: Metric, values: Iterable[float | None]) -> str:
    """Mean ± standard deviation of what is there; one value has no spread."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = written(metric, statistics.mean(known))
    return f"{mean} ± {written(metric, statistics.stdev(known))}" if len(known) > 1 else mean
