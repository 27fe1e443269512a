"""Whose worker group is whose, on a clock of our own: the cases that real sweeps meet too rarely to test there."""

from dataclasses import dataclass

import pytest

from orchestrator.on_ray import internals, janitor
from orchestrator.on_ray.janitor import Janitor


@dataclass
class Trial:
    trial_id: str


class Cluster:
    """Groups "g1", "g2", …; claims of trials; what was removed and killed."""

    def __init__(self, monkeypatch):
        self.now, self.groups, self.claims, self.killed = 0.0, [], {}, []
        monkeypatch.setattr(janitor.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(internals, "worker_groups", lambda: [g.encode().hex() for g in self.groups])
        monkeypatch.setattr(internals, "claim_of", lambda trial: self.claims.get(trial, ("", None)))
        monkeypatch.setattr(janitor.ray, "kill", self.killed.append)
        removed = lambda group: self.groups.remove(bytes.fromhex(group).decode())  # noqa: E731
        monkeypatch.setattr(internals, "remove_placement_group", removed)
        self.janitor = Janitor()

    def claim(self, trial: str, group: str) -> None:
        self.claims[trial] = (group.encode().hex(), f"worker of {trial}")

    def after(self, seconds: float) -> list[str]:
        for _ in range(int(seconds)):
            self.now += 1
            self.janitor.look()
        return self.groups

    def starts(self, trial: str) -> None:
        self.janitor.on_trial_start(0, [], Trial(trial))

    def ends(self, trial: str) -> None:
        self.janitor.on_trial_complete(0, [], Trial(trial))


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


def test_a_stopped_trial_gives_its_group_back_at_once(cluster):
    cluster.starts("a")
    cluster.groups.append("g1")
    cluster.claim("a", "g1")
    assert cluster.after(60) == ["g1"]
    cluster.ends("a")
    assert cluster.after(1) == [] and cluster.killed[0] == "worker of a"


def test_a_starting_trial_keeps_the_group_it_has_not_claimed_yet(cluster):
    cluster.starts("a")
    cluster.groups.append("g1")
    assert cluster.after(800) == ["g1"]  # on an overloaded machine it takes minutes
    assert cluster.after(140) == []  # nothing starts for a quarter of an hour


def test_a_worker_that_is_retried_keeps_its_new_group(cluster):
    cluster.starts("a")
    cluster.groups.append("g1")
    cluster.claim("a", "g1")
    cluster.after(10)
    cluster.groups[:] = ["g2"]  # Ray Train replaced the group; its workers have not claimed it yet
    assert cluster.after(30) == ["g2"]
    cluster.claim("a", "g2")
    assert cluster.after(300) == ["g2"]


def test_a_trial_that_comes_back_keeps_its_new_group_and_loses_the_old(cluster):
    cluster.starts("a")
    cluster.groups.append("g1")
    cluster.claim("a", "g1")
    cluster.after(10)
    cluster.janitor.on_trial_recover(0, [], Trial("a"))
    cluster.starts("a")
    assert cluster.after(1) == []
    cluster.groups.append("g2")
    assert cluster.after(10) == ["g2"]
    cluster.claim("a", "g2")
    assert cluster.after(300) == ["g2"]


def test_what_a_dead_trial_left_unclaimed_is_found_while_others_run(cluster):
    cluster.starts("a")
    cluster.groups.append("g1")
    cluster.after(5)
    cluster.janitor.on_trial_error(0, [], Trial("a"))  # killed before its workers had started
    cluster.now += 1
    cluster.starts("b")
    cluster.groups.append("g2")
    assert cluster.after(10) == ["g2"]


def test_groups_of_running_trials_are_left_alone(cluster):
    for trial, group in (("a", "g1"), ("b", "g2")):
        cluster.starts(trial)
        cluster.groups.append(group)
        cluster.claim(trial, group)
    cluster.ends("a")
    assert cluster.after(500) == ["g2"]
