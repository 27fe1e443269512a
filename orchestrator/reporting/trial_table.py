"""Every trial of a sweep as a row, in the terminal and in the report; and its best trial."""

from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator import figures, tracking
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.launch.study import ranked
from orchestrator.progress import label, symbol
from orchestrator.reporting import scores
from orchestrator.reporting.content import Picture, Section, TableOf, drawn


def trial_table(plan: Plan, records: list[TrialRecord]) -> Table:
    """The table in the terminal: best first, failed last; metrics under their names in MLflow."""
    main = scores.maximised(plan)
    second = [metric.name for metric in scores.occurring(plan, records) if metric != main][:1]
    fields = sorted({name for r in records for name in r.point}, key=str)
    table = Table(title=None, header_style="bold", caption=scores.choice(plan) or None)
    for heading in ("trial", *fields, "status", "epochs", main.name, *second, "minutes", "MLflow run"):
        table.add_column(heading, justify="left" if heading in (*fields, "status", "MLflow run") else "right")
    for r in ranked(records):
        values = [r.value, *(r.metrics.get(name) for name in second)]
        table.add_row(
            str(r.number),
            *(_plain(r.point.get(name, "")) for name in fields),
            r.status if not r.message else f"{r.status}: {r.message[:60]}",
            str(r.epochs),
            *("" if value is None else f"{value:.4f}" for value in values),
            f"{r.seconds / 60:.1f}",
            r.run_id,
        )
    return table


def section(plan: Plan, records: list[TrialRecord]) -> Section:
    """All trials with all their metrics."""
    space = plan.search_space
    fields = list(space.table()[0]) if space.table() else sorted(space.tune)
    numbers = [at for at, name in enumerate(fields, 1) if not any(isinstance(r.point[name], str) for r in records)]
    shown = scores.occurring(plan, records)
    table = TableOf(
        ["trial", *map(symbol, fields), "status", "epochs", *(m.title for m in shown), "minutes", "MLflow run"],
        rows=[],
        numeric={0, *numbers, *range(len(fields) + 2, len(fields) + 4 + len(shown))},
        caption=scores.choice(plan),
        best=0,
    )
    for r in ranked(records):
        table.rows.append(
            [
                str(r.number),
                *(_plain(r.point[name]) for name in fields),
                r.status + (f": {r.message}" if r.message else ""),
                str(r.epochs),
                *(scores.written(metric, r.metrics.get(metric.name)) for metric in shown),
                f"{r.seconds / 60:.1f}",
                r.run_id,
            ]
        )
    return Section("Trials", tables=[table])


def best_trial(plan: Plan, done: list[TrialRecord]) -> Section:
    """Training curves of the best trial and the pictures of its run."""
    best, uri = ranked(done)[0], plan.tracking_uri
    logged = sorted(tracking.client(uri).get_run(best.run_id).data.metrics)
    terms = {k.split("/")[1]: tracking.curve(uri, best.run_id, k) for k in logged if k.startswith("loss_weighted/")}
    evaluated = {
        m.title: tracking.curve(uri, best.run_id, m.name)
        for m in scores.metrics(plan)
        if m.percent and m.name in logged
    }
    figure = figures.training(f"trial {best.number}", terms, evaluated)
    pictures = [drawn("training.png", "training curves of the best trial", figure)]
    for name in tracking.pictures(uri, best.run_id):
        drawing = tracking.file(uri, best.run_id, name)
        if drawing is not None:
            pictures.append(Picture(name, f"{Path(name).stem} of the best trial", drawing))
    return Section(f"Best trial: {label(best.point, '.4g')}", pictures=pictures)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
