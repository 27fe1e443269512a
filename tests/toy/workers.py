"""One of several workers: what they all end with must be the same, and what one worker alone ends with."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import toy
from orchestrator import find
from orchestrator.fit import fit
from orchestrator.method import Experiment, Where
from orchestrator.needs import Place, Prepared

CPU = torch.device("cpu")


def experiment(prepared: Prepared, rank: int, world: int) -> Experiment:
    """Two epochs in float64, so that only the order of sums differs."""
    made = find.method("toy").experiment(
        find.recipe("toy", "two_sizes"), prepared, Where(prepared.place, rank, world, CPU)
    )
    made.task.double()
    made.epochs = 2
    return made


def trained(made: Experiment) -> dict[str, Any]:
    states: list[Any] = []
    history, evaluation = fit(made, CPU, on_epoch=lambda epoch, metrics, state: states.append(state and state()))
    numbers = [{k: v for k, v in metrics.items() if not k.startswith("perf/")} for metrics in history]
    everything = {k: v.clone() for k, v in made.task.state_dict().items()}
    return {"history": numbers, "task": everything, "stored": states[-1]["task"], "metrics": evaluation.metrics}


def work(rank: int, world: int, folder: str, place: Place, ready: Mapping[str, Any]) -> None:
    """Trains; then begins anew with another bank on the last rank."""
    torch.set_num_threads(1)
    patience = timedelta(minutes=3)  # with a worker that has ended
    dist.init_process_group("gloo", f"file://{folder}/meet", timeout=patience, rank=rank, world_size=world)
    with toy.added():
        prepared = Prepared.of(place, ready)
        found = trained(experiment(prepared, rank, world))
        other = experiment(prepared, rank, world)
        other.task.student.bank.rows_MD += rank
        try:
            fit(other, CPU)
        except RuntimeError as error:
            found["refused"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def second(number: int, *given: Any) -> None:
    """The worker that is started beside the test's own process, which is the first."""
    work(1 + number, *given)
