"""A sweep of tuned fields: a curve for every pictured one, and a heat map of two."""

import math

from orchestrator import figures, published
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.progress import label, symbol
from orchestrator.published import Published
from orchestrator.reporting import scores
from orchestrator.reporting.content import Section, TableOf, drawn


def sections(plan: Plan, records: list[TrialRecord]) -> list[Section]:
    """One section per pictured field, with the others at the paper's values, and the heat map."""
    picture = plan.search_space.picture
    found = [_curve(plan, name, records) for name in picture]
    return [*found, _heat_map(plan, *picture, records)] if len(picture) == 2 else found


def _curve(plan: Plan, name: str, records: list[TrialRecord]) -> Section:
    space, metric = plan.search_space, scores.maximised(plan)
    start = dict(space.start[0]) if space.start else {}
    others = {k: v for k, v in start.items() if k != name}
    points = sorted(
        (r.point[name], r.value)
        for r in records
        if r.status == "completed" and all(r.point[k] == v for k, v in others.items())
    )
    rows = [
        p
        for p in published.beside(plan.space, plan.benchmark)
        if scores.side_of(plan, p) == scores.side(metric) and scores.score(metric) in p.scores
    ]
    rows = [p for p in rows if name in p.at and all(p.at.get(k) == v for k, v in others.items())]
    rows = [] if scores.held_out(plan) else rows
    rows = [p for p in rows if len({q.at[name] for q in rows if q.source == p.source}) > 1]
    beside: dict[str, list[tuple[float, float]]] = {}
    for p in rows:
        beside.setdefault(p.benchmark, []).append((p.at[name], p.scores[scores.score(metric)]))
    figure = figures.curves(
        f"ours, {plan.benchmark}",
        [(x, scores.shown(metric, y)) for x, y in points],
        symbol(name),
        (metric.title, scores.axis(metric)),
        beside,
        start.get(name, 0.0),
    )
    ours = TableOf(
        [symbol(name), f"{scores.axis(metric)}, ours"],
        [[f"{x:.4g}", scores.written(metric, y)] for x, y in points],
        {0, 1},
    )
    return Section(
        symbol(name) + (f" at {label(others, 'g')}" if others else ""),
        "One run a point: how far another seed would move it is not known.",
        tables=[ours, *([_printed(name, rows, beside)] if rows else [])],
        pictures=[drawn(f"{name}.png", f"{metric.title} over {name}", figure)],
    )


def _printed(name: str, rows: list[Published], beside: dict[str, list[tuple[float, float]]]) -> TableOf:
    """The published curves of one field as a table with a column per benchmark."""
    notes = {p.benchmark: p.note for p in rows if p.note}
    return TableOf(
        [symbol(name), *beside],
        [
            [f"{x:g}", *(f"{dict(curve).get(x, math.nan):.2f}" for curve in beside.values())]
            for x in sorted({x for curve in beside.values() for x, _ in curve})
        ],
        set(range(len(beside) + 1)),
        caption=f"published: {'; '.join(sorted({p.source for p in rows}))}; {rows[0].teacher} → {rows[0].student}"
        + "".join(f"; {benchmark}: {note}" for benchmark, note in notes.items()),
        published=True,
    )


def _heat_map(plan: Plan, x: str, y: str, records: list[TrialRecord]) -> Section:
    metric = scores.maximised(plan)
    points = [(r.point[x], r.point[y], scores.shown(metric, r.value), r.status) for r in records if r.value is not None]
    figure = figures.heat_map("All trials", symbol(x), symbol(y), scores.axis(metric), points)
    picture = drawn("heat_map.png", f"{metric.title} over {x} and {y}", figure)
    return Section(f"{symbol(x)} × {symbol(y)}", pictures=[picture])
