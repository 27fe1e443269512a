"""What runs next, of one sweep or of many: fair shares by priority under one limit.

A sweep alone is a pool of one. Whoever runs trials (Ray, this process) asks the pool for the next one and tells it
what happened; the pool asks the studies, which decide everything else.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.launch import study, trial
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.launch.study import Study


class Shown(Protocol):
    """Where the events of a sweep go."""

    def started(self, number: int, point: Mapping[str, Any], epochs: int) -> None: ...

    def epoch(self, number: int, epoch: int, value: float | None) -> None: ...

    def ended(self, number: int, status: str, value: float | None, message: str = "") -> None: ...

    def happened(self, number: int, what: str) -> None:
        """Something that a trial survived, in one line."""
        ...


@dataclass(frozen=True)
class Limit:
    """How much may run at once."""

    trials: int
    gpus: float = math.inf


@dataclass
class Budget:
    """How much may run in all; what was spent before a resume counts."""

    trials: float = math.inf
    gpu_hours: float = math.inf
    trials_spent: int = 0
    gpu_hours_spent: float = 0.0

    @property
    def is_spent(self) -> bool:
        return self.trials_spent >= self.trials or self.gpu_hours_spent >= self.gpu_hours


@dataclass(eq=False)
class Member:
    """One sweep in a pool."""

    plan: Plan
    study: Study
    board: Shown
    priority: float = 1.0
    counted: bool = True  # against the budget of trials; trainings of teachers are not
    running: dict[int, float] = field(default_factory=dict)  # number -> start, on the clock that only runs forward
    given_all: bool = False
    had: float = 0.0  # what it was given in all for its priority; of equal shares, who had least is next
    over: threading.Event = field(default_factory=threading.Event)
    failed: str = ""

    @property
    def gpus(self) -> float:
        """Of one trial."""
        return self.plan.workers * self.plan.gpus_per_worker

    @property
    def share(self) -> float:
        """What it has of the cluster for its priority; the sweep with the least is next."""
        return len(self.running) * self.weight / self.priority

    @property
    def weight(self) -> float:
        return self.gpus or self.plan.workers


@dataclass(frozen=True)
class Given:
    """A trial that should start now."""

    member: Member
    number: int
    job: trial.Job


class Pool:
    """Sweeps that share what a runner has. Its methods may be called by several threads."""

    def __init__(
        self, limit: Callable[[], Limit], budget: Budget | None = None, check: Callable[[], None] = lambda: None,
        threads: int = 0,
    ):  # fmt: skip
        """
        Args:
            limit: asked again as time goes by: nodes come and go.
            budget: of the sweeps together; none = everything that is planned.
            check: raises when this process must not go on, such as when another one has taken over.
            threads: of a worker on a CPU, where a resume must keep them: sums depend on it; 0 = as many as there are.
        """
        self.threads = threads
        self.limit, self.budget, self.check = limit, budget or Budget(), check
        self.members: list[Member] = []
        self._closed, self._given_up = False, ""
        self._lock = threading.RLock()

    # --- Whoever has sweeps ---------------------------------------------------------------------------------------

    def add(self, plan: Plan, board: Shown, priority: float = 1.0, counted: bool = True) -> Member:
        """A sweep that is prepared; what has ended of it stays."""
        self.still()
        opened = Study(plan)
        opened.close_abandoned()
        member = Member(plan, opened, board, priority, counted)
        for number in sorted(opened.interrupted):
            board.happened(number, "its driver ended; goes on from its last checkpoint")
        with self._lock:
            self.still()
            # Who comes late has missed nothing.
            member.had = min((other.had for other in self.members if not other.over.is_set()), default=0.0)
            self.members.append(member)
            self._look(member)
        return member

    def close(self) -> None:
        """Nobody adds any more: the pool is over when its sweeps are."""
        with self._lock:
            self._closed = True

    @property
    def is_over(self) -> bool:
        with self._lock:
            return self._closed and all(member.over.is_set() for member in self.members)

    @property
    def gpu_hours(self) -> float:
        """What trials have used, the running ones until now."""
        with self._lock:
            now = time.monotonic()
            running = sum((now - start) * member.gpus for member in self.members for start in member.running.values())
            return self.budget.gpu_hours_spent + running / 3600

    def give_up(self, why: str) -> None:
        """Nobody runs trials any more; who waits for a sweep learns it."""
        with self._lock:
            self._given_up = why
            for member in self.members:
                if not member.over.is_set():
                    member.failed = why
                    member.over.set()

    @property
    def is_given_up(self) -> bool:
        return bool(self._given_up)

    def still(self) -> None:
        """Raises ValueError once nobody runs trials any more."""
        if self._given_up:
            raise ValueError(self._given_up)

    # --- Whoever runs trials --------------------------------------------------------------------------------------

    def next(self) -> Given | None:
        """The trial that should start now; None while the limit is reached, or nothing is ready yet.

        Of the sweeps that have trials left, the one with the smallest share for its priority; where its trial does
        not fit yet, nothing starts: a large one would wait for ever behind small ones.
        """
        self.check()
        with self._lock:
            limit = self.limit()
            running = sum(len(member.running) for member in self.members)
            gpus = sum(len(member.running) * member.gpus for member in self.members)
            for member in sorted(self.members, key=lambda m: (m.share, m.had)):
                if member.over.is_set() or member.given_all:
                    continue
                if member.counted and self.budget.is_spent:
                    member.given_all = True
                    self._look(member)
                    continue
                if running >= limit.trials or gpus + member.gpus > limit.gpus + 1e-6:
                    return None
                given = self._of(member)
                if given is not None:
                    return given
        return None

    def epoch(self, member: Member, number: int, metrics: Mapping[str, Any]) -> bool:
        """Stores an epoch; says whether the trial should stop now."""
        value = metrics.get(member.study.metric)
        member.board.epoch(number, metrics["epoch"], value)
        return value is not None and member.study.report(number, metrics["epoch"], value)

    def happened(self, member: Member, number: int, what: str) -> None:
        member.board.happened(number, what)

    def stopped(self, member: Member, number: int, metrics: Mapping[str, float]) -> None:
        """Ends a trial that was stopped early."""
        if not member.study.is_finished(number):
            member.study.prune(number, metrics)

    def ended(self, member: Member, number: int, final: Mapping[str, Any]) -> None:
        """Writes how a trial ended that was not stopped: what :func:`orchestrator.launch.trial.work` returned."""
        if member.study.is_finished(number):
            return
        if "failed" in final:
            member.study.fail(number, str(final["failed"]))
        else:
            member.study.finish(number, numbers(final))

    def closed(self, member: Member, number: int, run_id: str) -> None:
        """After the end of a trial: its MLflow run is closed, its share is free."""
        member.board.ended(number, *member.study.close_run(number, run_id))
        with self._lock:
            began = member.running.pop(number, None)
            if began is not None:
                self.budget.gpu_hours_spent += (time.monotonic() - began) / 3600 * member.gpus
            self._look(member)

    # --------------------------------------------------------------------------------------------------------------

    def _of(self, member: Member) -> Given | None:
        """The next trial of a sweep; None where it has no more, or its study cannot be asked."""
        try:
            while (given := member.study.next()) is not None:
                job = prepared_job(member.plan, member.study, *given)
                if job is None:
                    continue
                number, point = given
                member.running[number] = time.monotonic()
                member.had += member.weight / member.priority
                self.budget.trials_spent += member.counted
                member.board.started(number, point, job["epochs"])
                return Given(member, number, job)
        except ValueError as error:  # whatever ends a sweep must not end the others
            member.failed = str(error)
        member.given_all = True
        self._look(member)
        return None

    def _look(self, member: Member) -> None:
        """A sweep is over when everything was given and nothing runs."""
        if not member.given_all and not member.study.left():
            member.given_all = True
        if member.given_all and not member.running:
            member.over.set()


def alone(runner: Any, plan: Plan, board: Any) -> list[TrialRecord]:
    """Runs what is left of one sweep and returns all of its trials, in order of their numbers.

    Raises:
        ValueError: the study cannot be asked.
    """
    pool = Pool(lambda: Limit(plan.concurrent))
    member = pool.add(plan, board)
    pool.close()
    if not member.over.is_set():
        with board if hasattr(board, "__enter__") else contextlib.nullcontext():
            runner.drive(pool)
    if member.failed:
        raise ValueError(member.failed)
    member.study.close_abandoned()
    return study.records(plan)


def prepared_job(plan: Plan, search: Study, number: int, point: dict[str, Any]) -> trial.Job | None:
    """The job of a trial that was given; None where it has already ended: refused, or stopped while nobody looked."""
    try:
        trial.check(plan, point)
    except ValueError as error:  # a combination that the method refuses
        search.fail(number, str(error))
        return None
    job = trial.job_of(plan, number, point)
    if search.catches_up(number, job["run_id"]):
        search.close_run(number, job["run_id"])
        return None
    return job


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a result without a runner's own bookkeeping."""
    return {k: v for k, v in result.items() if isinstance(v, int | float) and ("/" in k or k == "epoch")}
