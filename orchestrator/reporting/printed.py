"""Published tables with ours beside them, where benchmark and networks are the same."""

from collections.abc import Collection

from orchestrator import published
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.method import Metric
from orchestrator.published import Published
from orchestrator.reporting import scores
from orchestrator.reporting.content import Section, TableOf
from orchestrator.reporting.provenance import changed_settings, networks, references


def sections(plan: Plan, done: list[TrialRecord]) -> list[Section]:
    """One table per pair of networks and set of losses; no section where nothing is published of what was scored."""
    if scores.held_out(plan):
        return []
    groups: dict[tuple[str, str], list[Published]] = {}
    for p in published.beside(plan.space, plan.benchmark):
        groups.setdefault((_networks(p), p.losses), []).append(p)
    tables = [_table(plan, done, *group, rows) for group, rows in groups.items()]
    settings = changed_settings(plan)
    text = "“ours” is of the same benchmark and networks."
    text += f" They differ from the benchmark's recipes in {', '.join(settings)}." if settings else ""
    return [Section("Published", text, tables)] if tables else []


def ours(plan: Plan, done: list[TrialRecord], p: Published) -> str:
    """Our scores of a printed row's cell and networks, or "not run"."""
    if p.row == published.TEACHER:
        for reference in references(plan):
            if (reference.kind, reference.network) == ("teacher", p.student):
                short = {name.rpartition("/")[2]: value for name, value in reference.metrics.items()}
                measured = short | dict(reference.metrics)
                return " / ".join(scores.written(m, measured.get(name)) or "–" for name, m in named(plan, p.scores))
    found = of_row(plan, done, p)
    values = [scores.mean_and_spread(metric, values_of(plan, found, p, name)) for name, metric in named(plan, p.scores)]
    return " / ".join(value or "–" for value in values) if any(values) else "not run"


def of_row(plan: Plan, done: list[TrialRecord], p: Published) -> list[TrialRecord]:
    """Our trials of a printed row's cell and networks."""
    return [r for r in done if r.point["cell"] == p.row and _same_networks(networks(plan, r), p)]


def values_of(plan: Plan, records: list[TrialRecord], p: Published, name: str) -> list[float]:
    """What our trials have for a printed score."""
    measured = [r.metrics.get(_measured_as(plan, p, name)) for r in records]
    return [value for value in measured if value is not None]


def _measured_as(plan: Plan, p: Published, name: str) -> str:
    """The metric of ours that a printed score compares with."""
    return name if "/" in name else f"{scores.side_of(plan, p)}/{name}"


def _table(plan: Plan, done: list[TrialRecord], names: str, losses: str, rows: list[Published]) -> TableOf:
    benchmarks = list(dict.fromkeys(p.benchmark for p in rows))
    timed = any(p.images_per_s for p in rows)
    body = []
    for row, student in dict.fromkeys((p.row, p.student) for p in rows):
        found = {p.benchmark: p for p in rows if (p.row, p.student) == (row, student)}
        speeds = [f"{p.images_per_s:.0f}" for p in found.values() if p.images_per_s]
        body.append(
            [
                f"{row}, {student}" if names == published.BOTH_SIDES else row,
                *(_printed(plan, found[b]) if b in found else "" for b in benchmarks),
                *([speeds[0] if speeds else ""] if timed else []),
                ours(plan, done, found[plan.benchmark]) if plan.benchmark in found else "not run",
                _notes(found),
            ]
        )
    head = [
        "row",
        *(f"{b}, {' / '.join(_titles(plan, [p for p in rows if p.benchmark == b]))}" for b in benchmarks),
        *(["images/s, their GPU"] if timed else []),
        "ours",
        "note",
    ]
    caption = f"published: {'; '.join(dict.fromkeys(p.source for p in rows))}; {names}; {losses}; single runs"
    return TableOf(head, body, set(range(1, len(head) - 1)), caption, published=True)


def _networks(p: Published) -> str:
    """Rows of one network on both sides are one table whatever the network."""
    if p.teacher == published.BOTH_SIDES:
        return p.teacher
    return f"{p.student}, no teacher" if p.teacher == published.NO_TEACHER else f"{p.teacher} → {p.student}"


def _same_networks(trial: tuple[str, str], p: Published) -> bool:
    student, teacher = trial
    return student == p.student and p.teacher in (teacher, published.BOTH_SIDES)


def named(plan: Plan, printed: Collection[str]) -> list[tuple[str, Metric]]:
    """Names of printed scores with our metrics of that name, in the methods' order.

    A score that no method has comes last, under its own name.
    """
    known: dict[str, Metric] = {}
    for metric in scores.metrics(plan):
        known.setdefault(scores.score(metric), metric)
        known[metric.name] = metric
    order = [*(name for name in known if name in printed), *(name for name in printed if name not in known)]
    return [(name, known.get(name, Metric(name, name))) for name in order]


def _printed(plan: Plan, p: Published) -> str:
    """A row's scores as printed."""
    return " / ".join(f"{p.scores[name]:.2f}" for name, _ in named(plan, p.scores))


def _titles(plan: Plan, rows: list[Published]) -> list[str]:
    """Titles of the scores that a source prints for a benchmark."""
    printed = list(dict.fromkeys(name for p in rows for name in p.scores))
    return [metric.title for _, metric in named(plan, printed)]


def _notes(found: dict[str, Published]) -> str:
    """What the sources say of one row, with the benchmarks it is said of."""
    noted: dict[str, list[str]] = {}
    for benchmark, p in found.items():
        if p.note:
            noted.setdefault(p.note, []).append(benchmark)
    return "; ".join(f"{', '.join(benchmarks)}: {note}" for note, benchmarks in noted.items())
