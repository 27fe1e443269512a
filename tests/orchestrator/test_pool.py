"""Who runs next: shares, limits, budgets and failures of sweeps in one pool, with studies that only count."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from orchestrator.launch import pool as pools
from orchestrator.launch.pool import Budget, Limit, Pool


class Board:
    def __init__(self):
        self.events = []

    def started(self, number, point, epochs):
        self.events.append(("started", number))

    def epoch(self, number, epoch, value):
        self.events.append(("epoch", number, epoch))

    def happened(self, number, what):
        self.events.append(("happened", number, what))

    def ended(self, number, status, value, message=""):
        self.events.append(("ended", number, status))


@dataclass
class Counting:
    """A study of so many trials."""

    plan: SimpleNamespace
    metric: str = "val/map"
    given: int = 0
    finished: dict = field(default_factory=dict)
    interrupted: frozenset = frozenset()

    def close_abandoned(self): ...

    def left(self):
        return self.plan.trials - len(self.finished)

    def next(self):
        if self.plan.breaks_at == self.given:
            raise ValueError("the study is broken")
        if self.given >= self.plan.trials:
            return None
        self.given += 1
        return self.given - 1, {}

    def is_finished(self, number):
        return number in self.finished

    def finish(self, number, metrics):
        self.finished[number] = "completed"

    def fail(self, number, message):
        self.finished[number] = f"failed: {message}"

    def prune(self, number, metrics):
        self.finished[number] = "pruned"

    def report(self, number, epoch, value):
        return value < 0

    def close_run(self, number, run_id):
        return self.finished[number], 0.5, ""


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(pools, "Study", Counting)
    job = lambda plan, search, number, point: {"epochs": 3, "number": number, "run_id": "r"}  # noqa: E731
    monkeypatch.setattr(pools, "prepared_job", job)


def plan(trials: int, workers: int = 1, gpus: float = 0.0, breaks_at: int = -1) -> SimpleNamespace:
    return SimpleNamespace(trials=trials, workers=workers, gpus_per_worker=gpus, breaks_at=breaks_at)


def end(pool: Pool, given, final=None) -> None:
    pool.ended(given.member, given.number, final or {"epoch": 3, "val/map": 0.5})
    pool.closed(given.member, given.number, "r")


def drained(pool: Pool) -> list:
    found = []
    while (given := pool.next()) is not None:
        found.append(given)
    return found


def test_a_pool_of_one_runs_its_trials_and_is_over():
    pool, board = Pool(lambda: Limit(2)), Board()
    member = pool.add(plan(3), board)
    assert not pool.is_over
    pool.close()
    first = drained(pool)
    assert [given.number for given in first] == [0, 1] and pool.next() is None, "two at once"
    end(pool, first[0])
    (third,) = drained(pool)
    assert third.number == 2 and not pool.is_over
    end(pool, first[1])
    end(pool, third, {"failed": "no"})
    assert pool.is_over and member.over.is_set() and not member.failed
    assert member.study.finished == {0: "completed", 1: "completed", 2: "failed: no"}
    assert [event[0] for event in board.events].count("ended") == 3


@pytest.mark.parametrize(("priorities", "expected"), [((1, 1), (6, 6)), ((3, 1), (9, 3)), ((1, 2), (4, 8))])
def test_shares_follow_priorities(priorities, expected):
    pool = Pool(lambda: Limit(12))
    members = [pool.add(plan(50), Board(), priority) for priority in priorities]
    drained(pool)
    assert tuple(len(member.running) for member in members) == expected


def test_what_one_gives_back_goes_to_who_has_least():
    pool = Pool(lambda: Limit(4))
    one, other = pool.add(plan(50), Board()), pool.add(plan(2), Board())
    running = drained(pool)
    assert (len(one.running), len(other.running)) == (2, 2)
    for given in running:
        if given.member is other:
            end(pool, given)
    assert other.over.is_set()
    assert {given.member for given in drained(pool)} == {one} and len(one.running) == 4


def test_a_sweep_that_comes_later_gets_its_share_as_trials_end():
    pool = Pool(lambda: Limit(4))
    early = pool.add(plan(50), Board())
    running = drained(pool)
    late = pool.add(plan(50), Board())
    assert pool.next() is None, "nobody is stopped"
    for given in running[:2]:
        end(pool, given)
    drained(pool)
    assert (len(early.running), len(late.running)) == (2, 2)


def test_gpus_are_a_limit_and_a_large_trial_is_not_overtaken_for_ever():
    pool = Pool(lambda: Limit(100, gpus=4.0))
    small, large = pool.add(plan(50, gpus=1.0), Board()), pool.add(plan(50, workers=4, gpus=1.0), Board())
    running = drained(pool)
    assert {given.member for given in running} == {small} and len(small.running) == 1, "the large one waits for all"
    end(pool, running[0])
    assert {given.member for given in drained(pool)} == {large} and not small.running
    shares = Pool(lambda: Limit(100, gpus=2.0))
    packed = shares.add(plan(50, gpus=0.25), Board())
    drained(shares)
    assert len(packed.running) == 8, "quarters of two GPUs"


def test_the_limit_is_asked_again():
    limit = Limit(1)
    pool = Pool(lambda: limit)
    member = pool.add(plan(9), Board())
    assert len(drained(pool)) == 1
    limit = Limit(3)
    assert len(drained(pool)) == 2 and len(member.running) == 3


def test_a_budget_of_trials_ends_the_campaign_and_spares_trainings_of_teachers():
    pool = Pool(lambda: Limit(100), Budget(trials=5, trials_spent=2))
    first, second = pool.add(plan(50), Board()), pool.add(plan(50), Board())
    teacher = pool.add(plan(1), Board(), priority=1000, counted=False)
    pool.close()
    running = drained(pool)
    assert len(teacher.running) == 1
    assert len(first.running) + len(second.running) == 3
    for given in running:
        end(pool, given)
    assert pool.next() is None and pool.is_over


def test_a_budget_of_gpu_hours_counts_every_gpu(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pools.time, "monotonic", lambda: now[0])
    pool = Pool(lambda: Limit(1), Budget(gpu_hours=1.0))
    pool.add(plan(50, workers=2, gpus=0.5), Board())
    pool.close()
    for _ in range(2):
        given = pool.next()
        now[0] += 1800
        assert pool.gpu_hours == pytest.approx(pool.budget.gpu_hours_spent + 0.5), "the running ones until now"
        end(pool, given)
    assert pool.budget.gpu_hours_spent == pytest.approx(1.0)
    assert pool.next() is None and pool.is_over


def test_a_study_that_breaks_ends_its_own_sweep():
    pool = Pool(lambda: Limit(4))
    broken, whole = pool.add(plan(9, breaks_at=1), Board()), pool.add(plan(2), Board())
    pool.close()
    for given in drained(pool):
        end(pool, given)
    assert broken.over.is_set() and broken.failed == "the study is broken"
    assert whole.over.is_set() and not whole.failed and pool.is_over


def test_who_waits_for_a_sweep_learns_that_nobody_runs_it_any_more():
    pool = Pool(lambda: Limit(4))
    member = pool.add(plan(9), Board())
    pool.give_up("interrupted")
    assert member.over.is_set() and member.failed == "interrupted"


def test_a_process_that_was_taken_over_starts_nothing():
    def check():
        raise ValueError("taken over")

    pool = Pool(lambda: Limit(4), check=check)
    pool.add(plan(9), Board())
    with pytest.raises(ValueError, match="taken over"):
        pool.next()


def test_early_stopping_and_ends_are_told_once():
    pool = Pool(lambda: Limit(1))
    member = pool.add(plan(2), Board())
    given = pool.next()
    assert not pool.epoch(member, 0, {"epoch": 1}), "no value, no decision"
    assert not pool.epoch(member, 0, {"epoch": 2, "val/map": 0.5})
    assert pool.epoch(member, 0, {"epoch": 3, "val/map": -1.0})
    pool.stopped(member, 0, {"epoch": 3})
    pool.ended(member, 0, {"failed": "later"})
    pool.closed(given.member, 0, "r")
    pool.closed(given.member, 0, "r")
    assert member.study.finished == {0: "pruned"} and len(member.running) == 0
    assert not math.isfinite(pool.budget.trials)
