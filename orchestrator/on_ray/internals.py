"""Every private name of Ray that this project uses, with what to look at when Ray is upgraded (pinned: 2.60).

Tests of all of them: ``tests/on_ray``.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray.train import UserCallback
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.on_ray.environment import is_secret
from orchestrator.on_ray.trial import free_address, meet_at

__all__ = [
    "Rendezvous",
    "Told",
    "Trainer",
    "claim_of",
    "claim_placement_group",
    "forget_metrics",
    "keep_secrets",
    "remove_placement_group",
    "worker_groups",
]


class Trainer(DataParallelTrainer):
    """The trainer of the second version of Ray Train without any framework, and without four helpers of every trial.

    Each is a process of 170 MB or more that takes a second of a core to start: nobody reads Ray data sets here, worker
    groups are given back by :class:`orchestrator.on_ray.janitor.Janitor`, the controller runs in the process that
    is there to wait for it, and a worker that is alone meets nobody.
    Upgrade: a public name for the trainer; ``_create_default_callbacks``; ``_initialize_and_run_controller``, which
    makes an actor of ``TrainController`` and calls ``run`` and ``get_result``.
    """

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        with _no_barrier() if self.scaling_config.num_workers == 1 else contextlib.nullcontext():
            controller = TrainController(**given)
            try:
                asyncio.run(controller.run())
            finally:
                if controller.get_worker_group() is not None:  # left alone by a trial that Tune has stopped
                    controller.get_worker_group().shutdown()
            return controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


class _Answer:
    def remote(self, *, data: Any, **who: Any) -> Any:
        return ray.put(data)


class _Alone:
    """Stands in for the actor in which the workers of a group wait for each other, where there is one worker.

    The worker calls it as it would call the actor, and is told what it said.
    """

    broadcast_from_rank_zero = _Answer()

    @classmethod
    def options(cls, **where: Any) -> type["_Alone"]:
        return cls

    @classmethod
    def remote(cls, **patience: Any) -> "_Alone":
        return cls()


@contextlib.contextmanager
def _no_barrier() -> Iterator[None]:
    """Worker groups that are made here have no actor to wait in.

    Upgrade: ``worker_group.SynchronizationActor``, of which a worker calls ``broadcast_from_rank_zero`` alone, and
    ``state._shutdown_sync_actor``, which ends it.
    """
    actor, end = worker_group.SynchronizationActor, state._shutdown_sync_actor
    worker_group.SynchronizationActor, state._shutdown_sync_actor = _Alone, lambda nobody: None
    try:
        yield
    finally:
        worker_group.SynchronizationActor, state._shutdown_sync_actor = actor, end


class Told(UserCallback):
    """Reports what rank 0 has reported to Tune, from the controller that runs in the trial's process."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        import ray.tune  # workers load this file, too

        ray.tune.report(dict(metrics[0]))


class _MeetingPoint(Backend):
    """Tells the workers of a group where to meet; nothing of torch.

    Upgrade: ``ray.train.backend.Backend.on_start`` and ``worker_group.execute_single`` / ``execute``.
    """

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        if len(worker_group) > 1:
            host, port = worker_group.execute_single(0, free_address)
            worker_group.execute(meet_at, host=host, port=port)


class Rendezvous(BackendConfig):
    """Configuration of :class:`_MeetingPoint`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _MeetingPoint


def claim_placement_group(trial_id: str, rank: int) -> None:
    """Says on the cluster's blackboard which worker group belongs to a trial, and its first worker.

    Upgrade: ``ray.experimental.internal_kv``.
    """
    group = ray.util.get_current_placement_group()
    if rank == 0 and group is not None and trial_id:
        from ray.experimental.internal_kv import _internal_kv_put

        claim = ray.cloudpickle.dumps((group.id.hex(), ray.get_runtime_context().current_actor))
        _internal_kv_put(f"orchestrator/{trial_id}", claim, overwrite=True)


def claim_of(trial_id: str) -> tuple[str, Any]:
    """Id of a trial's worker group and its first worker; empty and None before it has them."""
    from ray.experimental.internal_kv import _internal_kv_get

    # Unpickled from the cluster's own blackboard, which whoever can write to can run code on the cluster anyway.
    stored = _internal_kv_get(f"orchestrator/{trial_id}")
    return ray.cloudpickle.loads(stored) if stored else ("", None)


def give_back(trial_id: str) -> None:
    """Ends what is left of an attempt of a trial: its first worker, and its group with all others."""
    from ray.experimental.internal_kv import _internal_kv_del

    group, worker = claim_of(trial_id)
    if worker is not None:
        ray.kill(worker)
    if group:
        remove_placement_group(group)
    _internal_kv_del(f"orchestrator/{trial_id}")


def keep_secrets() -> None:
    """Tune would pass AWS keys on to its trials by a runtime environment, which Ray writes into its logs.

    Upgrade: ``ENV_VARS_TO_PROPAGATE`` of ``ray.tune.execution.class_cache``.
    """
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.difference_update({name for name in ENV_VARS_TO_PROPAGATE if is_secret(name)})


def forget_metrics(trial: Any) -> None:
    """Lets go of the statistics that Tune keeps of every metric of a trial that has ended: 50 KB, and nobody asks.

    Upgrade: ``Trial.run_metadata``, whose two dicts are behind ``Trial.metric_analysis`` and ``metric_n_steps``.
    """
    trial.run_metadata.metric_analysis, trial.run_metadata.metric_n_steps = {}, {}


def remove_placement_group(group: str) -> None:
    """Gives back what a group holds. Upgrade: ``ray._raylet.PlacementGroupID``."""
    from ray.util.placement_group import PlacementGroup

    ray.util.remove_placement_group(PlacementGroup(ray._raylet.PlacementGroupID(bytes.fromhex(group))))


def worker_groups() -> list[str]:
    """Placement groups of Ray Train workers of this job that hold resources or wait for them.

    Upgrade: the last part of every id that a job made is the job's.
    """
    job = ray.get_runtime_context().get_job_id()
    return [
        group
        for group, info in ray.util.placement_group_table().items()
        if info["state"] != "REMOVED"
        and group.endswith(job)
        and not any("node:__internal_head__" in bundle for bundle in info["bundles"].values())
    ]
