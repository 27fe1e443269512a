"""Which rows are told apart: runs of one row with all their seeds, their differences, and how sure those are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from orchestrator import find, tracking
from orchestrator.evaluation import influence, uncertainty, verification
from orchestrator.evaluation.influence import Rate
from orchestrator.evaluation.uncertainty import Difference
from orchestrator.launch import trial
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.method import Metric, PairScores, Queries
from orchestrator.progress import label
from orchestrator.reporting import scores
from orchestrator.reporting.content import Section, TableOf

_MANY_SEEDS = 6  # a side; of three the smallest difference to be seen is within a factor of 1.7 in 80 of 100 tables


@dataclass(frozen=True)
class Row:
    """One setting and its seeds."""

    title: str
    benchmark: str
    method: str
    run_ids: tuple[str, ...]
    queries: tuple[Queries, ...] = ()  # of every seed, where there are metrics that are means over queries
    pairs: tuple[Mapping[str, PairScores], ...] = ()  # of every seed, where there are rates of pairs
    data: Mapping[str, str] = field(default_factory=dict)  # fingerprints of what was scored, where they are known
    _kept: dict[str, list[Rate]] = field(default_factory=dict, repr=False, compare=False)

    def seeds(self, metric: str) -> list[float]:
        """The metric of every seed."""
        if self.is_mean(metric):
            return [float(np.nanmean(one.scores[metric])) for one in self.queries]
        return [one.value for one in self._rates(metric)]

    def is_mean(self, metric: str) -> bool:
        """Whether a metric is a mean over queries, not a rate of pairs."""
        return bool(self.queries) and all(metric in one.scores for one in self.queries)

    def mean(self, metric: str) -> float:
        return float(np.mean(self.seeds(metric)))

    def scores(self, metric: str) -> np.ndarray:
        """(Q,), of every query, the mean over seeds."""
        return np.mean([one.scores[metric] for one in self.queries], axis=0)

    def rate(self, metric: str) -> Rate:
        """The mean over seeds."""
        return influence.mean_over_seeds(self._rates(metric))

    def identities(self, metric: str) -> np.ndarray:
        """Whose queries, (Q,), or pairs, (P, 2), a metric is made of."""
        if self.is_mean(metric):
            return self.queries[0].identity_Q
        people, found = 0, []
        for name in self._sets(metric):  # of two sets nobody is known to be one person
            _, person_P2 = np.unique(self.pairs[0][name].people_P2, return_inverse=True)
            found.append(person_P2.reshape(-1, 2) + people)
            people += int(person_P2.max()) + 1
        return np.concatenate(found)

    def _rates(self, metric: str) -> list[Rate]:
        """Of every seed; of the metric that was asked last, kept."""
        if metric not in self._kept:
            rate, sets = metric.partition("/")[2], self._sets(metric)
            self._kept.clear()
            self._kept[metric] = [
                influence.mean_over_sets([influence.rate(one[name], rate) for name in sets]) for one in self.pairs
            ]
        return self._kept[metric]

    def _sets(self, metric: str) -> list[str]:
        """The sets of pairs whose rate a metric is, or whose mean accuracy."""
        of_set = metric.partition("/")[0]
        if not self.pairs:
            return []
        if of_set in self.pairs[0]:
            return [of_set]
        folds = {name: one.folds for name, one in self.pairs[0].items() if not one.templates}
        return verification.averaged(folds) if metric == verification.MEAN_ACCURACY else []

    @cached_property
    def metrics(self) -> list[Metric]:
        """Metrics of which single scores are known: those that the method names first, then all others."""
        known = list(self.queries[0].scores) if self.queries else []
        if self.pairs:
            known += [f"{name}/{rate}" for name, one in self.pairs[0].items() for rate in influence.rates(one)]
            if verification.MEAN_ACCURACY not in known and self._sets(verification.MEAN_ACCURACY):
                known.append(verification.MEAN_ACCURACY)
        named = [metric for metric in find.method(self.method).metrics if metric.name in known]
        if not self.pairs:
            return named
        rest = [name for name in known if name not in {metric.name for metric in named}]
        return named + [Metric(name, f"{name}, less is better" if name.endswith("/eer") else name) for name in rest]

    def has(self, metric: str) -> bool:
        if self.is_mean(metric):
            return True
        rate, sets = metric.partition("/")[2], self._sets(metric)
        return bool(sets) and all(
            name in one and rate in influence.rates(one[name]) for one in self.pairs for name in sets
        )


def row_of(uri: str, run_id: str, alone: bool = False) -> Row:
    """A run with the runs of its sweep that differ from it in their seed alone.

    Args:
        uri: of MLflow.
        run_id: of a finished trial.
        alone: this run and no other seed.

    Raises:
        ValueError: there is no such run, or it has no scores of single queries or pairs.
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
    # A sampler may try a point twice: of one seed that is one run, not two.
    of_seed = {trial.seeds_of(one.data.params) or one.info.run_id: one for one in runs}
    ids, tags = tuple(one.info.run_id for one in of_seed.values()), run.data.tags
    title = label(point) if point else tags.get("orch.method", run_id[:8])
    if tags.get("orch.status", "completed") != "completed":
        raise ValueError(f"run {run_id} is {tags['orch.status']}, so it has no final scores; compare completed runs")
    found = _stored(uri, ids)
    benchmark, part = tags.get("orch.benchmark", ""), run.data.params.get("data.part", "test")
    benchmark += f" ({part})" if part != "test" else ""
    return Row(title, benchmark, tags.get("orch.method", ""), ids, *found, scored_data(tags))


def scored_data(tags: Mapping[str, str]) -> dict[str, str]:
    """Fingerprints of the images that a run has scored, from its tags; those it has trained on may differ."""
    known = {side: f"orch.{side}_fingerprint" for side in ("query", "gallery")}
    return {side: tags[name] for side, name in known.items() if name in tags}


def _stored(uri: str, run_ids: Sequence[str]) -> tuple[tuple[Queries, ...], tuple[Mapping[str, PairScores], ...]]:
    """What runs have stored of single queries or pairs.

    Raises:
        ValueError: one of them has neither.
    """
    queries = tuple(tracking.stored_queries(uri, one) for one in run_ids)
    pairs = tuple(tracking.stored_pairs(uri, one) for one in run_ids)
    found = () if None in queries else queries, pairs if all(pairs) else ()
    if not any(found):
        lacking = [one for one, q, p in zip(run_ids, queries, pairs, strict=True) if q is None and not p] or run_ids
        raise ValueError(
            f"run {lacking[0]} has no scores of single queries or pairs: it has not finished, its metrics are of "
            f"neither, its files are away, or it is of a version that stored none: "
            f"python -m orchestrator.evaluate {lacking[0]} then does"
        )
    return found


def check_same_queries(rows: Sequence[Row]) -> None:
    """Raises ValueError unless all rows have scored the same queries, or the same pairs."""
    first = rows[0]
    for row in rows:
        if bool(row.pairs) != bool(first.pairs):
            kinds = ["single pairs" if one.pairs else "single queries" for one in (row, first)]
            raise ValueError(
                f"{row.title} ({row.method}) has scores of {kinds[0]}, {first.title} ({first.method}) of {kinds[1]}; "
                f"differences are of one benchmark"
            )
        if not _scored(row, first):
            raise ValueError(
                f"{row.title} on {row.benchmark} has scored other queries than {first.title} on {first.benchmark}; "
                f"differences are of one benchmark and one part of it"
            )


def _scored(row: Row, first: Row) -> bool:
    """Whether a row has scored what the first one has."""
    if any(row.data[side] != first.data[side] for side in row.data.keys() & first.data.keys()):
        return False
    if row.queries and first.queries:
        asked_Q = first.queries[0].identity_Q
        if not all(np.array_equal(one.identity_Q, asked_Q) for one in row.queries):
            return False
    theirs = first.pairs[0] if first.pairs else {}
    return all(
        one.keys() == theirs.keys()
        and all(
            np.array_equal(one[name].same_P, theirs[name].same_P)
            and np.array_equal(one[name].people_P2, theirs[name].people_P2)
            for name in one
        )
        for one in row.pairs
    )


def differences(rows: Sequence[Row], of: int, metric: str, comparisons: int | None = None) -> list[Difference | None]:
    """How far every row is above one of them, in whose place is None; p-values are Holm's.

    Args:
        rows: at least two, which have scored the same.
        of: the number of the row that the others are compared with.
        metric: that all of them have.
        comparisons: for which p-values and what could be seen allow; None = these differences.
    """
    seeds_KS = [row.seeds(metric) for row in rows]
    found: list[Difference | None] = [None] * len(rows)
    others = [number for number in range(len(rows)) if number != of]
    for number in others:
        seeds = uncertainty.of_seeds(seeds_KS[number], seeds_KS[of], seeds_KS)
        found[number] = _difference(rows[number], rows[of], metric, seeds, comparisons or len(others))
    adjusted = uncertainty.holm([found[number].p for number in others], comparisons)
    for number, p in zip(others, adjusted, strict=True):
        found[number] = replace(found[number], p=p)
    return found


def _difference(row: Row, other: Row, metric: str, seeds: uncertainty.Seeds | None, comparisons: int) -> Difference:
    identities = other.identities(metric)
    if row.is_mean(metric):
        of, sides = uncertainty.difference, (row.scores(metric), other.scores(metric))
    else:
        of, sides = uncertainty.difference_of_rates, (row.rate(metric), other.rate(metric))
    return of(*sides, identities, seeds, comparisons=comparisons)


def said(metric: Metric, found: Difference) -> tuple[str, str]:
    """A difference and its interval."""
    value, low, high = (scores.written(metric, x) for x in (found.value, found.low, found.high))
    return value, f"{low} … {high}"


def notes(
    rows: Sequence[Row], metric: str, found: Sequence[Difference | None], from_the_best: bool = False
) -> list[str]:
    """What the numbers of :func:`differences` or :func:`from_best` mean, and what they do not."""
    identities = next(one.identities for one in found if one is not None)
    comparisons = math.comb(len(rows), 2) if from_the_best else len(rows) - 1
    how = f"{uncertainty.resamples_of(comparisons):,} resamples of {identities:,} identities with all of their queries"
    if not rows[0].is_mean(metric):
        how = f"from what every pair adds to a rate; pairs that share one of {identities:,} people are not independent"
    said = [
        f"Intervals: {how}. "
        f"“Could be seen”: the smallest true difference that {uncertainty.POWER:.0%} of such comparisons would find."
    ]
    if len(rows) > 2:
        others = "all pairs of rows, as the best was chosen by these numbers" if from_the_best else "the other rows"
        said.append(f"p and “could be seen” allow for {others}; an interval is of its row alone.")
    seeds = [row.run_ids for row in rows]
    if max(map(len, seeds)) < 2:
        said.append("One seed each: the intervals say nothing about other seeds.")
    elif uncertainty.own_variances(seeds):
        said.append("Every row has the variance of its own seeds.")
    else:
        said.append(
            "Rows of one or two seeds are taken to vary as all of these do, and so are rows beside them, or as their "
            "own seeds if those clearly vary more; of a row of one seed nothing shows whether it does."
        )
    if 2 <= max(map(len, seeds)) < _MANY_SEEDS:
        how_well = (
            "to about a factor of two" if uncertainty.own_variances(seeds) else "badly, to a factor of two to ten"
        )
        said.append(f"Of few seeds “could be seen” is itself known {how_well}.")
    return said


def unbounded(found: Sequence[Difference | None]) -> list[str]:
    """A line about what is infinite, where there is anything."""
    if all(one is None or np.isfinite([one.low, one.high, one.detectable]).all() for one in found):
        return []
    return ["inf: too few identities differ to say how far that side may be."]


def from_best(rows: Sequence[Row], metric: str) -> tuple[int, list[Difference | None]]:
    """The number of the best row, and what every other one is above it, so below 0.

    The best one is chosen by the same numbers: of twelve equal rows of one seed one would differ from it in 16 of 100
    tables, not in 5. So p-values and what could be seen allow for all pairs of rows, of which these are some.
    """
    best = int(np.argmax([row.mean(metric) for row in rows]))
    return best, differences(rows, best, metric, math.comb(len(rows), 2))


def sections(plan: Plan, done: Sequence[TrialRecord]) -> list[Section]:
    """Which rows of a table are told apart from its best one, or why that cannot be said; nothing of a single row.

    Where a search on held-out identities has chosen, that is the first row, whatever the others reach on test.
    """
    if len({r.point["cell"] for r in done}) < 2:
        return []
    title = f"Which rows are told apart from the {'chosen one' if plan.confirms else 'best'}"
    try:
        return [Section(title, *_table(plan, done))]
    except ValueError as error:
        return [Section(title, f"Not known: {error}.")]


def _table(plan: Plan, done: Sequence[TrialRecord]) -> tuple[str, list[TableOf]]:
    metric, rows = scores.maximised(plan), []
    for cell in plan.search_space.cells:
        ids = tuple(r.run_id for r in done if r.point["cell"] == cell)
        if not ids:
            continue
        rows.append(Row(cell, plan.benchmark, plan.search_space.method, ids, *_stored(plan.tracking_uri, ids)))
        if not rows[-1].has(metric.name):
            raise ValueError(f"{metric.title} is no mean over the queries or pairs that {cell} has stored")
    check_same_queries(rows)
    if plan.confirms:
        if rows[0].title != (chosen := next(iter(plan.search_space.cells))):
            raise ValueError(f"the chosen row, {chosen}, has no completed run yet")
        best, found, called = 0, differences(rows, 0, metric.name), "the chosen one"
        caption = ""
    else:
        best, found = from_best(rows, metric.name)
        called, caption = "the best", "The best row is the best of these numbers, so some of its lead is luck."
    body = [
        [row.title, scores.written(metric, row.mean(metric.name)), *(
            [called, "", "", "", ""] if one is None else
            [*said(metric, one), f"{one.p:.2g}", "told apart" if one.told_apart else "not told apart",
             scores.written(metric, one.detectable)]
        )]
        for row, one in zip(rows, found, strict=True)
    ]  # fmt: skip
    head = ["row", metric.title, f"minus {rows[best].title}", "95 %", "p, Holm", "", "could be seen"]
    table = TableOf(head, body, {1, 2, 3, 4, 6}, caption, best)
    text = " ".join([*notes(rows, metric.name, found, not plan.confirms), *unbounded(found)])
    return text, [table]
