"""Which rows are told apart: runs of one row with all their seeds, their differences, and how sure those are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from orchestrator import find, tracking
from orchestrator.evaluation import uncertainty
from orchestrator.evaluation.uncertainty import Difference
from orchestrator.launch import trial
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.method import Metric, Queries
from orchestrator.progress import label
from orchestrator.reporting import scores
from orchestrator.reporting.content import Section, TableOf


@dataclass(frozen=True)
class Row:
    """One setting and its seeds."""

    title: str
    benchmark: str
    method: str
    run_ids: tuple[str, ...]
    queries: tuple[Queries, ...]  # of every seed

    def seeds(self, metric: str) -> list[float]:
        """The mean over queries of every seed."""
        return [float(np.nanmean(one.scores[metric])) for one in self.queries]

    def mean(self, metric: str) -> float:
        return float(np.mean(self.seeds(metric)))

    def scores(self, metric: str) -> np.ndarray:
        """(Q,), the mean over seeds."""
        return np.mean([one.scores[metric] for one in self.queries], axis=0)

    @cached_property
    def metrics(self) -> list[Metric]:
        """Metrics that are means over queries, as the method names them."""
        return [metric for metric in find.method(self.method).metrics if metric.name in self.queries[0].scores]


def row_of(uri: str, run_id: str, alone: bool = False) -> Row:
    """A run with the runs of its sweep that differ from it in their seed alone.

    Args:
        uri: of MLflow.
        run_id: of a finished trial.
        alone: this run and no other seed.

    Raises:
        ValueError: there is no such run, or it has no scores of single queries.
    """
    run = tracking.found(uri, run_id)
    point = trial.row_of(run.data.tags)
    runs = [run]
    if not alone and "orch.sweep" in run.data.tags:
        same = tracking.runs_of(uri, run.data.tags["orch.sweep"])
        runs = [
            one
            for one in same
            if trial.row_of(one.data.tags) == point and one.data.tags.get("orch.status") == "completed"
        ] or runs
    ids = tuple(one.info.run_id for one in runs)
    tags = run.data.tags
    title = label(point) if point else tags.get("orch.method", run_id[:8])
    queries = tuple(tracking.read_queries(uri, one) for one in ids)
    return Row(title, tags.get("orch.benchmark", ""), tags.get("orch.method", ""), ids, queries)


def check_same_queries(rows: Sequence[Row]) -> None:
    """Raises ValueError unless all rows have scored the same queries."""
    first = rows[0]
    for row in rows:
        for one in row.queries:
            if not np.array_equal(one.identity_Q, first.queries[0].identity_Q):
                raise ValueError(
                    f"{row.title} on {row.benchmark} has scored other queries than {first.title} on {first.benchmark}; "
                    f"differences are of one benchmark and one part of it"
                )


def difference(row: Row, other: Row, metric: str, seeds: uncertainty.Seeds | None = None) -> Difference:
    """How far the row is above the other one; over seeds where both have several, or as ``seeds`` says."""
    own = uncertainty.seeds_of(row.seeds(metric), other.seeds(metric)) if seeds is None else seeds
    return uncertainty.difference(row.scores(metric), other.scores(metric), other.queries[0].identity_Q, own)


def holm(found: Sequence[Difference]) -> list[float]:
    """p-values of several differences, corrected for their number."""
    return uncertainty.holm([one.p for one in found])


def notes(rows: Sequence[Row]) -> list[str]:
    """What the numbers mean, and what they do not."""
    identities = len(np.unique(rows[0].queries[0].identity_Q))
    said = [
        f"Intervals: {uncertainty.RESAMPLES:,} resamples of {identities:,} identities with all of their queries. "
        f"“Could be seen”: the smallest true difference that {uncertainty.POWER:.0%} of such comparisons would find."
    ]
    if min(len(row.run_ids) for row in rows) < 2:
        said.append("A row with one seed: its intervals say nothing about other seeds.")
    return said


def from_best(rows: Sequence[Row], metric: str) -> tuple[int, list[Difference | None]]:
    """The number of the best row, and what every other one is below it; seeds have one variance in all rows.

    p-values are Holm's, over the table.
    """
    best = int(np.argmax([row.mean(metric) for row in rows]))
    variance, freedom = uncertainty.pooled([row.seeds(metric) for row in rows])
    found: list[Difference | None] = [None] * len(rows)
    others = [number for number in range(len(rows)) if number != best]
    for number in others:
        counts = [len(rows[n].queries) for n in (number, best)]
        seeds = uncertainty.Seeds(variance * sum(1 / count for count in counts), freedom) if freedom else None
        found[number] = difference(rows[number], rows[best], metric, seeds)
    for number, p in zip(others, holm([found[number] for number in others]), strict=True):
        found[number] = replace(found[number], p=p)
    return best, found


def sections(plan: Plan, done: Sequence[TrialRecord]) -> list[Section]:
    """Which rows of a table are told apart from its best one; nothing where a run has no scores of single queries."""
    metric, rows = scores.maximised(plan), []
    for cell in plan.search_space.cells:
        ids = tuple(r.run_id for r in done if r.point["cell"] == cell)
        queries = tuple(tracking.stored_queries(plan.tracking_uri, run_id) for run_id in ids)
        if None in queries:
            return []
        rows += [Row(cell, plan.benchmark, "", ids, queries)] if ids else []
    if len(rows) < 2 or any(metric.name not in one.scores for row in rows for one in row.queries):
        return []
    best, found = from_best(rows, metric.name)
    shown = lambda value: scores.written(metric, value)  # noqa: E731
    body = [
        [row.title, shown(row.mean(metric.name)), *(
            ["the best", "", "", "", ""] if one is None else
            [shown(one.value), f"{shown(one.low)} … {shown(one.high)}", f"{one.p:.2g}",
             "told apart" if one.told_apart else "not told apart", shown(one.detectable)]
        )]
        for row, one in zip(rows, found, strict=True)
    ]  # fmt: skip
    head = ["row", metric.title, f"minus {rows[best].title}", "95 %", "p, Holm", "", "could be seen"]
    caption = "Seeds have one variance in all rows. The best row is the best of these numbers, so a little is luck."
    table = TableOf(head, body, {1, 2, 3, 4, 6}, caption, best)
    return [Section("Which rows are told apart from the best", " ".join(notes(rows)), [table])]
