"""The only door to Ray: trials as Ray Train jobs, sweeps as Ray Tune over the study of ``orchestrator.launch``.

One Tuner runs a pool of sweeps, be it one sweep or a campaign: a trial that ends makes room for the next one of
whichever sweep has the smallest share. A resumed sweep is a new Tuner over the old study: finished trials stay,
unfinished ones are suggested again under their old number, and with it come their Ray Train folder (last checkpoint)
and their MLflow run. Tune's own experiment state is not needed, so a kill at any moment loses at most the epochs
since the last checkpoints. Departs from Ray's ``OptunaSearch`` + ``Tuner.restore``, which lose the rungs of early
stopping, store early-stopped trials as complete, and start a trial anew that was suggested after the last snapshot.

A trial is its workers and one process on the head, in which Tune's function and Train's controller are, and which goes
to the next trial. Only the workers import torch; the other one loads ``on_ray.trial`` and nothing below ``launch``.

Importing this package loads neither Ray nor torch.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.launch.plan import Plan, TrialRecord
    from orchestrator.launch.pool import Pool, Shown
    from orchestrator.launch.runner import Capacity
    from orchestrator.needs import Place, Report


class OnRay:
    """Runs preparation as Ray tasks and sweeps with Ray Tune; needs :func:`connected`."""

    beside = True

    def capacity(self) -> "Capacity":
        from orchestrator.on_ray import cluster

        return cluster.capacity()

    def concurrent(self, workers: int, gpus_per_worker: float, asked: int | None) -> int:
        from orchestrator.on_ray import cluster

        return cluster.check_resources(workers, gpus_per_worker, asked)

    def threads(self, workers: int) -> int:
        from orchestrator.on_ray import cluster

        return cluster.threads(workers)

    def call(self, function: str, values: Mapping[str, Any], network: bool, progress: "Report") -> Any:
        from orchestrator.on_ray import cluster

        return cluster.call(function, values, network, progress)

    def admit(self, place: "Place", tracking_uri: str) -> None:
        from orchestrator.on_ray import cluster

        cluster.admit(place, tracking_uri)

    def sweep(self, plan: "Plan", board: "Shown") -> "list[TrialRecord]":
        from orchestrator.launch import pool

        return pool.alone(self, plan, board)

    def drive(self, pool: "Pool") -> None:
        from orchestrator.on_ray import sweep

        sweep.drive(pool)


@contextlib.contextmanager
def connected(dashboard: bool = True) -> Iterator[OnRay]:
    """A runner on the cluster of ``RAY_ADDRESS`` if set, else on a local one that ends with the block."""
    from orchestrator.on_ray import cluster

    with cluster.cluster(dashboard):
        yield OnRay()
