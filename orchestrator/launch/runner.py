"""Who runs work: the protocol that Ray and this process implement, and this process.

A command line hands a runner to preparation and sweep; nothing in ``launch`` knows which one it is.
"""

import importlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from orchestrator import checkpoint, leases
from orchestrator.launch import study, trial
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.needs import Report
from orchestrator.progress import Board


@dataclass(frozen=True)
class Capacity:
    """What a runner has."""

    cpus: float
    gpus: float
    calls: int  # how many calls may be under way at once


class Runner(Protocol):
    """Runs calls of preparation, and sweeps."""

    def capacity(self) -> Capacity: ...

    def concurrent(self, workers: int, gpus_per_worker: float, asked: int | None) -> int:
        """How many trials may run at once; raises ValueError where one alone is too large."""
        ...

    def call(self, function: str, values: Mapping[str, Any], network: bool, progress: Report) -> Any:
        """``module:function`` with plain values and a device; a GPU where a network runs and there is one."""
        ...

    def sweep(self, plan: Plan, board: Board) -> list[TrialRecord]:
        """Runs what is left of a plan's trials and returns all of them, in order of their numbers.

        The caller is :func:`driving` the plan.
        """
        ...


class InProcess:
    """Everything in this process, one trial after the other: no Ray, so a debugger stops where it should.

    The study, early stopping, MLflow runs and numbers are those of a sweep on a cluster.
    """

    def capacity(self) -> Capacity:
        return Capacity(os.cpu_count() or 1, float(_device() != "cpu"), 1)

    def concurrent(self, workers: int, gpus_per_worker: float, asked: int | None) -> int:
        """Raises ValueError for several workers: there is one process."""
        if workers > 1:
            raise ValueError(f"--in-process runs one worker, this run has --workers {workers}; leave one of them away")
        if gpus_per_worker > self.capacity().gpus:
            raise ValueError(f"--gpus-per-worker {gpus_per_worker:g}: this process sees no GPU")
        return 1

    def call(self, function: str, values: Mapping[str, Any], network: bool, progress: Report) -> Any:
        return resolved(function)(values, device=_device() if network else "cpu", progress=progress)

    def sweep(self, plan: Plan, board: Board) -> list[TrialRecord]:
        search = study.Study(plan)
        search.close_abandoned()
        with board:
            while (given := search.next()) is not None:
                self._trial(plan, search, board, *given)
        return study.records(plan)

    def _trial(self, plan: Plan, search: study.Study, board: Board, number: int, point: dict[str, Any]) -> None:
        job = prepared_job(plan, search, number, point)
        if job is None:
            return
        job["threads"] = torch.get_num_threads()  # as the user has set it: OMP_NUM_THREADS
        board.started(number, point, job["epochs"])
        folder = Path(job["train_storage"]) / job["name"]
        stored, last = folder / "in-process.pt", {}

        def report(epoch: int, metrics: dict[str, float], state: Any) -> None:
            if state is not None:
                folder.mkdir(parents=True, exist_ok=True)
                checkpoint.save(stored, state())
            last.update({"epoch": epoch, **metrics})
            board.epoch(number, epoch, metrics.get(search.metric))
            if search.metric in metrics and search.report(number, epoch, metrics[search.metric]):
                raise trial.Stopped

        resume = checkpoint.load(stored) if stored.exists() else None
        device = "cpu" if not plan.gpus_per_worker else _device()
        try:
            final = trial.work(job, device, 0, 1, resume, report)
        except trial.Stopped:
            search.prune(number, last)
        except Exception as error:  # whatever ends a trial must not end the sweep; the reason goes to its record
            search.fail(number, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
        else:
            end(search, number, final)
        shutil.rmtree(folder, ignore_errors=True)
        board.ended(number, *search.close_run(number, job["run_id"]))


def prepared_job(plan: Plan, search: study.Study, number: int, point: dict[str, Any]) -> trial.Job | None:
    """The job of a trial that was given; None where it has already ended: refused, or stopped while nobody looked."""
    try:
        job = trial.job_of(plan, number, point)
    except ValueError as error:  # a combination that the method refuses
        search.fail(number, str(error))
        return None
    if search.catches_up(number, job["run_id"]):
        search.close_run(number, job["run_id"])
        return None
    return job


def end(search: study.Study, number: int, final: Mapping[str, Any]) -> None:
    """Writes how a trial ended that was not stopped: what :func:`orchestrator.launch.trial.work` returned."""
    if "failed" in final:
        search.fail(number, str(final["failed"]))
    else:
        search.finish(number, numbers(final))


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a result without a runner's own bookkeeping."""
    return {k: v for k, v in result.items() if isinstance(v, int | float) and ("/" in k or k == "epoch")}


def driving(plan: Plan) -> Any:
    """Holds the sweep while it is prepared and runs.

    Raises:
        ValueError: another process runs it.
    """
    return leases.held(plan.where.address("sweeps", plan.sweep, "driver.lease"), what=f"the sweep {plan.sweep}")


def resolved(function: str) -> Any:
    """The function of ``module:function``."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
