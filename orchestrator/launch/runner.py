"""Who runs work: the protocol that Ray and this process implement, and this process.

A command line hands a runner to preparation and sweep; nothing in ``launch`` knows which one it is.
"""

import importlib
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from orchestrator import checkpoint, leases
from orchestrator.launch import pool, trial
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.launch.pool import Given, Pool, Shown
from orchestrator.needs import Place, Report


@dataclass(frozen=True)
class Capacity:
    """What a runner has."""

    cpus: float
    gpus: float
    calls: int  # how many calls may be under way at once


class Runner(Protocol):
    """Runs calls of preparation, and sweeps."""

    beside: bool  # whether trials may run beside preparations: in one process they share its random numbers

    def capacity(self) -> Capacity: ...

    def admit(self, place: Place, tracking_uri: str) -> None:
        """Raises ValueError where storage, data or MLflow store are not there for everyone who needs them."""
        ...

    def concurrent(self, workers: int, gpus_per_worker: float, asked: int | None) -> int:
        """How many trials may run at once; raises ValueError where one alone is too large."""
        ...

    def threads(self, workers: int) -> int:
        """The most CPUs a worker can have when so many run at once."""
        ...

    def call(self, function: str, values: Mapping[str, Any], network: bool, progress: Report) -> Any:
        """``module:function`` with plain values and a device; a GPU where a network runs and there is one."""
        ...

    def sweep(self, plan: Plan, board: Shown) -> list[TrialRecord]:
        """Runs what is left of a plan's trials and returns all of them, in order of their numbers.

        The caller is :func:`driving` the plan.
        """
        ...

    def drive(self, pool: Pool) -> None:
        """Runs the trials that a pool gives, until it is over."""
        ...


class InProcess:
    """Everything in this process, one trial after the other: no Ray, so a debugger stops where it should.

    The study, early stopping, MLflow runs and numbers are those of a sweep on a cluster.
    """

    beside = False

    def __init__(self) -> None:
        self._one = threading.Lock()  # random numbers belong to the process: one thing at a time

    def capacity(self) -> Capacity:
        return Capacity(os.cpu_count() or 1, float(_device() != "cpu"), 1)

    def admit(self, place: Place, tracking_uri: str) -> None:
        """Whoever asks is who needs them."""

    def concurrent(self, workers: int, gpus_per_worker: float, asked: int | None) -> int:
        """Raises ValueError for several workers: there is one process."""
        if workers > 1:
            raise ValueError(f"--in-process runs one worker, this run has --workers {workers}; leave one of them away")
        if gpus_per_worker > self.capacity().gpus:
            raise ValueError(f"--gpus-per-worker {gpus_per_worker:g}: this process sees no GPU")
        return 1

    def threads(self, workers: int) -> int:
        return torch.get_num_threads()

    def call(self, function: str, values: Mapping[str, Any], network: bool, progress: Report) -> Any:
        with self._one:
            return resolved(function)(values, device=_device() if network else "cpu", progress=progress)

    def sweep(self, plan: Plan, board: Shown) -> list[TrialRecord]:
        return pool.alone(self, plan, board)

    def drive(self, pool: Pool) -> None:
        while not pool.is_over:
            given = pool.next()
            if given is None:
                threading.Event().wait(0.05)
                continue
            with self._one:
                self._trial(pool, given)

    def _trial(self, pool: Pool, given: Given) -> None:
        member, number, job = given.member, given.number, given.job
        job["threads"] = torch.get_num_threads()  # as the user has set it: OMP_NUM_THREADS
        folder = Path(member.plan.folder) / "train" / job["name"]
        stored, last = folder / "in-process.pt", {}

        def report(epoch: int, metrics: dict[str, float], state: Any) -> None:
            if state is not None:
                folder.mkdir(parents=True, exist_ok=True)
                behind(partial(checkpoint.save, stored, state()))
            last.update({"epoch": epoch, **metrics})
            if pool.epoch(member, number, {"epoch": epoch, **metrics}):
                raise trial.Stopped

        resume = checkpoint.load(stored) if stored.exists() else None
        device = "cpu" if not member.plan.gpus_per_worker else _device()
        try:
            with checkpoint.Behind() as behind:
                final = trial.work(job, device, 0, 1, resume, report)
        except trial.Stopped:
            pool.stopped(member, number, last)
        except Exception as error:  # whatever ends a trial must not end the sweep; the reason goes to its record
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            pool.ended(member, number, {"failed": reason})
        else:
            pool.ended(member, number, final)
        shutil.rmtree(folder, ignore_errors=True)
        pool.closed(member, number, job["run_id"])


def driving(plan: Plan) -> Any:
    """Holds the sweep while it is prepared and runs.

    Raises:
        ValueError: another process runs it.
    """
    lease, what = plan.where.address("sweeps", plan.sweep, "driver.lease"), f"the sweep {plan.sweep}"
    return leases.held(lease, what=what, took_over=lambda line: warnings.warn(line, stacklevel=2))


def resolved(function: str) -> Any:
    """The function of ``module:function``."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
