"""Write the report of a sweep: ``python -m orchestrator.report d3still_beta_gamma [--on demo]``.

One HTML file without any reference outside itself, the same as Markdown, and the pictures as files; all are
also artifacts of the sweep's summary run in MLflow.
"""

import typer

from orchestrator import command, find
from orchestrator.command import console
from orchestrator.launch import shelf
from orchestrator.reporting import summary


@command.app
def main(
    name: str = typer.Argument(..., help="The sweep.", metavar="NAME"),
    on: str = typer.Option("", "--on", help="Default: the benchmark of the newest sweep.", metavar="BENCHMARK"),
    to: str = typer.Option("", "--to", help="Default: the sweep's own folder.", metavar="DIR"),
) -> None:
    """Curves beside the published ones, the trial table, a heat map, training curves, a retrieval panel."""
    find.space(name)
    html, run_id = summary.write_report(shelf.latest(name, on or None), to)
    console.print(f"report: {html}")
    console.print(f"summary run in MLflow: {run_id}")


if __name__ == "__main__":
    main()
