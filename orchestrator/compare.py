"""How far runs are apart, and how sure that is: ``python -m orchestrator.compare RUN_A RUN_B […]``."""

from dataclasses import replace

import typer
from rich.table import Table

from orchestrator import command, tracking
from orchestrator.command import console
from orchestrator.launch import shelf
from orchestrator.recipe import did_you_mean
from orchestrator.reporting import compared, scores

METRIC = typer.Option(
    [],
    "--metric",
    help="One of single queries or pairs; may be repeated. Default: all. p allows for the rows, not for the metrics.",
    metavar="NAME",
)


@command.app
def main(
    runs: list[str] = typer.Argument(
        ..., help="Run ids, from the table of a sweep or the MLflow page.", metavar="RUN…"
    ),
    metric: list[str] = METRIC,
    alone: bool = typer.Option(False, "--alone", help="These runs, without the other seeds of their rows."),
) -> None:
    """Every run minus the first one, with 95 % intervals from resampled identities, and seeds where there are several.

    A run stands for its row: the runs of its sweep that differ in their seed alone are counted in.
    """
    if len(runs) < 2:
        raise ValueError(f"there is one run, {runs[0]}; a comparison needs two or more")
    uri = tracking.tracking_uri(shelf.storage())
    rows = [compared.row_of(uri, run_id, alone) for run_id in runs]
    if twice := [row.title for at, row in enumerate(rows) if row.run_ids in [other.run_ids for other in rows[:at]]]:
        raise ValueError(f"{twice[0]} is named twice; --alone compares single runs of one row")
    titles = [row.title for row in rows]
    rows = [
        replace(row, title=f"{row.title} ({row.run_ids[0][:8]})") if titles.count(row.title) > 1 else row
        for row in rows
    ]
    compared.check_same_queries(rows)
    first, *others = rows
    known = {one.name: one for one in first.metrics if all(row.has(one.name) for row in others)}
    if not known:
        raise ValueError("these runs share no metric with scores of single queries or pairs; nothing can be compared")
    for name in metric:
        if name not in known:
            raise ValueError(
                f"--metric {name} has no scores of single queries or pairs in these runs" + did_you_mean(name, known)
            )
    console.print(f"{first.benchmark}: every row minus {first.title}, in points", markup=False)
    for row in rows:
        console.print(f"  {row.title}: {len(row.run_ids)} seed(s), {', '.join(row.run_ids)}", markup=False)
    every: list[compared.Difference] = []
    notes: dict[str, None] = {}  # each once, in their order
    table = Table("row", "metric", "first", "this", "difference", "95 %", "p (Holm)", "could be seen")
    for name in dict.fromkeys(metric or known):
        found = compared.differences(rows, 0, name)[1:]
        every += found
        notes |= dict.fromkeys(compared.notes(rows, name, found))
        for row, one in zip(others, found, strict=True):
            metric_of = known[name]
            table.add_row(
                row.title, metric_of.title, scores.written(metric_of, first.mean(name)),
                scores.written(metric_of, row.mean(name)), *compared.said(metric_of, one), f"{one.p:.2g}",
                scores.written(metric_of, one.detectable),
            )  # fmt: skip
    console.print(table)
    for line in [*notes, *compared.unbounded(every)]:
        console.print(line, markup=False)


if __name__ == "__main__":
    main()
