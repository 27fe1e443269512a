"""Check a cluster before a night is lost: ``python -m orchestrator.doctor [--concurrent N] [--method METHOD …]``.

One line a finding: "ok", "warn" or "bad", what was found, and what to do. Nothing is changed; a marker in the storage
folder is removed again. Exit code 1 when something is bad.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import typer

from orchestrator import command, find, mirror
from orchestrator.command import console
from orchestrator.on_ray import OnRay, connected
from orchestrator.on_ray.findings import Finding
from orchestrator.recipe import flat

_STYLES = {"ok": None, "warn": "yellow", "bad": "red"}


@command.app
def main(
    concurrent: int = typer.Option(None, "--concurrent", help="Trials at once; default: what fits.", min=1),
    workers: int = command.WORKERS,
    gpus_per_worker: float = command.GPUS,
    in_cluster: bool = typer.Option(
        None, "--in-cluster/--local",
        help="The cluster of RAY_ADDRESS, or the one that runs here; or one started for the check. Default: the first "
        "where RAY_ADDRESS is set.", show_default=False,
    ),
    method: str = typer.Option("", "--method", help="Check the pretrained weights that its recipe starts from."),
    on: str = typer.Option("", "--on", help="Benchmark of that recipe; default: demo.", metavar="BENCHMARK"),
    weights: list[str] = typer.Option([], "--weights", help="A network of timm to check, too; may be repeated."),
) -> None:  # fmt: skip
    """Looks at every node: versions, GPUs, memory, storage, clocks, servers, weights; says what to do."""
    from orchestrator.on_ray.examination import Asked, examine

    starts = pretrained(method, on)
    networks = list(dict.fromkeys([*weights, *starts]))
    place = mirror.place()
    storage = place.remote or place.storage
    states = []
    with contextlib.ExitStack() as stack:
        try:
            runner = stack.enter_context(_connection(in_cluster))
        except Exception as error:  # Ray raises several kinds; all mean that there is nothing to examine
            states = [_show(_unreachable(error))]
        else:
            gpus = command.gpus_of(runner, gpus_per_worker)
            study = os.environ.get("OPTUNA_STORAGE", "")
            asked = Asked(storage, concurrent, workers, gpus, networks, study)
            states = [_show(finding) for finding in examine(asked)]
    if method and not starts:
        _show(Finding("weights", "ok", f"{method} on {on or 'demo'} starts from none"))
    elif not networks:
        console.print("      weights        not looked at; ask with --method METHOD --on BENCHMARK, or --weights NAME")
    if "bad" in states:
        raise typer.Exit(1)


def pretrained(method: str, on: str) -> list[str]:
    """Networks that a method's recipe for a benchmark starts from with their public weights.

    Raises:
        ValueError: an unknown name, or a benchmark without a method.
    """
    if not method:
        if on:
            raise ValueError(f"--on {on} needs --method: the weights are those of its recipe")
        return []
    values: dict[str, Any] = flat(find.recipe(method, on or "demo"))
    groups = [
        path.removesuffix("pretrained") for path, value in values.items() if path.endswith("pretrained") and value
    ]
    return list(dict.fromkeys(values[f"{group}name"] for group in groups if not values[f"{group}weights"]))


@contextlib.contextmanager
def _connection(in_cluster: bool | None) -> Iterator[OnRay]:
    if in_cluster:
        os.environ.setdefault("RAY_ADDRESS", "auto")  # Ray's word for the cluster that runs on this machine
    elif in_cluster is False:
        os.environ.pop("RAY_ADDRESS", None)
    with connected() as runner:
        yield runner


def _unreachable(error: Exception) -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    where = f"the cluster at {address}" if address else "a local cluster"
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    remedy = "start the cluster, use its head's address and its versions of Python and Ray"
    return Finding("cluster", "bad", f"{where} cannot be used: {why}", remedy)


def _show(finding: Finding) -> str:
    console.print(str(finding), style=_STYLES[finding.state], markup=False)
    return finding.state


if __name__ == "__main__":
    main()
