"""A campaign at work: its sweeps are prepared in threads, join one pool as they are ready, and end for themselves.

What several sweeps need is made once: leases see to that. A teacher's training is a sweep of the pool, too. What ends
one sweep does not stop the others.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator import find, mirror
from orchestrator.launch import preparing, study
from orchestrator.launch.campaign import Entry, State, save
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.launch.pool import Budget, Limit, Member, Pool, Shown
from orchestrator.launch.runner import Capacity, Runner, driving
from orchestrator.leases import Taken
from orchestrator.needs import Place, Report
from orchestrator.progress import PreparationBar

_TEACHERS_FIRST = 1000.0  # priority of a teacher's training: others wait for it
_PREPARING = 4  # sweeps at once
_KEPT_SECONDS = 30.0  # between two notes of what was spent
_LIMIT_SECONDS = 5.0  # between two questions what the cluster has


class Watched(Protocol):
    """What a campaign tells: which sweep is prepared, runs, has ended. The command's display is one."""

    def board(self, title: str, plan: Plan, known: list[TrialRecord]) -> Shown:
        """Where the events of a sweep's trials go."""
        ...

    def bar(self, title: str) -> PreparationBar:
        """Where the progress of a sweep's preparation goes."""
        ...

    def said(self, title: str, state: str, why: str = "") -> None:
        """A sweep is now "preparing", "running", "done", "stopped" or "failed"."""
        ...


@dataclass
class _Through:
    """A runner for preparation in a campaign: calls go through, trainings of teachers into the pool."""

    runner: Runner
    pool: Pool

    @property
    def beside(self) -> bool:
        return self.runner.beside

    def capacity(self) -> Capacity:
        return self.runner.capacity()

    def admit(self, place: Place, tracking_uri: str) -> None:
        self.runner.admit(place, tracking_uri)

    def concurrent(self, workers: int, gpus_per_worker: float, asked: int | None) -> int:
        return self.runner.concurrent(workers, gpus_per_worker, asked)

    def threads(self, workers: int) -> int:
        return self.runner.threads(workers)

    def call(self, function: str, values: Mapping[str, Any], network: bool, progress: Report) -> Any:
        def told(what: str, done: int, total: int) -> None:
            self.pool.still()  # ends a preparation that nobody wants any more
            progress(what, done, total)

        self.pool.still()
        return self.runner.call(function, values, network, told)

    def sweep(self, plan: Plan, board: Shown) -> list[TrialRecord]:
        member = self.pool.add(plan, board, _TEACHERS_FIRST, counted=False)
        member.over.wait()
        if member.failed:
            raise ValueError(member.failed)
        return study.records(plan)

    def drive(self, pool: Pool) -> None:
        raise RuntimeError("a campaign has one pool")


def run(state: State, runner: Runner, watched: Watched, check: Callable[[], None], asked: int | None) -> State:
    """Prepares and runs what is left of a campaign; returns it with what it has spent.

    Args:
        state: as stored.
        runner: Ray, or this process.
        watched: told what happens.
        check: raises when another process has taken over.
        asked: the most trials at once; None = as many as the cluster holds.
    """
    plans = state.plans()
    _load(plans)
    budget = Budget(
        state.trials or math.inf,
        state.gpu_hours or math.inf,
        sum(study.finished(plan) for plan in plans.values()),
        state.spent,
    )
    threads = min(state.threads, runner.threads(1))  # no node may have as many any more
    pool = Pool(_limits(runner, plans, asked), budget, check, threads)
    through, refused = _Through(runner, pool), preparing.Refused()
    entries = [entry for entry in state.entries if entry.sweep]
    executor = ThreadPoolExecutor(len(entries), thread_name_prefix="sweep")
    turn = _Turn(len(entries), runner.beside)
    tasks = [
        executor.submit(_one, entry, plans[entry.title], through, watched, refused, turn)
        for entry in sorted(entries, key=lambda entry: -entry.priority)
    ]
    closing = threading.Thread(target=_closed_after, args=(tasks, pool), daemon=True)
    closing.start()
    try:
        with _kept(state, pool, check):
            runner.drive(pool)
    except BaseException as error:
        pool.give_up(f"the campaign was interrupted: {error!r}")
        raise
    finally:
        for task in tasks:
            task.cancel()
        executor.shutdown(wait=pool.is_over)
    return dataclasses.replace(state, spent=pool.gpu_hours)


def _load(plans: Mapping[str, Plan]) -> None:
    """Imports what the sweeps need before there are threads, whose imports would meet each other half-way.

    A check of a recipe builds its networks, so it loads all that they are made of.
    """
    for plan in plans.values():
        for name in plan.recipes:
            find.method(name).check(plan.base_recipe(name), plan.workers)


@contextmanager
def _kept(state: State, pool: Pool, check: Callable[[], None]) -> Iterator[None]:
    """Writes down what is spent while the block runs, so that a killed driver's hours count after a resume."""
    stop = threading.Event()

    def keep() -> None:
        while not stop.wait(_KEPT_SECONDS):
            write()

    def write() -> None:
        with suppress(OSError, Taken):  # away for a while, or another driver's by now
            check()
            mirror.check(state.where)  # else it would be written where the storage is not mounted
            save(dataclasses.replace(state, spent=pool.gpu_hours))

    write()
    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        write()


def _one(
    entry: Entry, plan: Plan, through: _Through, watched: Watched, refused: preparing.Refused, turn: "_Turn"
) -> None:
    """One sweep, from its preparation to its end; whatever ends it does not end the others."""
    title = entry.title
    try:
        with ExitStack() as held:
            with turn.preparing():
                lease = held.enter_context(driving(plan))
                watched.said(title, "preparing")
                with watched.bar(title) as bar:
                    plan = preparing.prepared(plan, through, bar, refused)
            lease.check()
            watched.said(title, "running")
            board = watched.board(title, plan, study.records(plan))
            member = through.pool.add(plan, board, entry.priority)
            member.over.wait()
            watched.said(title, *_ended(member, through.pool))
    except Exception as error:
        why = str(error).strip() if isinstance(error, ValueError | OSError) else repr(error)
        watched.said(title, *(("stopped", "") if through.pool.is_given_up else ("failed", why)))


def _ended(member: Member, pool: Pool) -> tuple[str, str]:
    """How a sweep ended, and why it is not done."""
    if member.failed:
        return "failed", member.failed
    if member.study.left() and pool.budget.is_spent:
        return "stopped", "the budget is spent; a larger one with --resume goes on"
    records = study.records(member.plan)
    if records and all(record.status == "failed" for record in records):
        return "failed", f"no trial completed: {records[0].message}"
    return "done", ""


class _Turn:
    """Whose preparation may run: a few at once or, in one process, one after the other and before all trials."""

    def __init__(self, sweeps: int, beside: bool):
        self._at_once, self._left, self._beside = threading.Semaphore(_PREPARING if beside else 1), sweeps, beside
        self._lock, self._all = threading.Lock(), threading.Event()

    @contextmanager
    def preparing(self) -> Iterator[None]:
        try:
            with self._at_once:
                yield
        finally:
            with self._lock:
                self._left -= 1
                if not self._left:
                    self._all.set()
        if not self._beside:
            self._all.wait()


def _closed_after(tasks: list[Any], pool: Pool) -> None:
    futures.wait(tasks)
    pool.close()


def _limits(runner: Runner, plans: Mapping[str, Plan], asked: int | None) -> Callable[[], Limit]:
    """What may run at once, looked at again every few seconds: nodes come and go."""
    smallest = min(plans.values(), key=lambda plan: (plan.workers * plan.gpus_per_worker, plan.workers))
    known: list[tuple[float, Limit]] = []

    def limit() -> Limit:
        if not known or time.monotonic() - known[-1][0] > _LIMIT_SECONDS:
            try:
                at_once = runner.concurrent(smallest.workers, smallest.gpus_per_worker, asked)
            except ValueError:  # too few nodes just now
                at_once = 0
            gpus = runner.capacity().gpus if smallest.gpus_per_worker else math.inf
            known[:] = [(time.monotonic(), Limit(at_once, gpus))]
        return known[-1][1]

    return limit
