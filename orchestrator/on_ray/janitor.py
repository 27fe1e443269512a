"""Gives back what stopped trials leave behind.

Ray Train's placement groups belong to the job, not to the trial, and outlive a trial that early stopping ends. Ray's
own cleaner needs the dashboard and misses trials that are still starting.
"""

import time
from typing import Any

import ray
import ray.tune

from orchestrator.on_ray import internals

_ORPHAN_SECONDS = 120.0  # a placement group that no live trial has claimed for so long is nobody's
_STARTING_SECONDS = 900.0  # the same while a trial is starting: an overloaded machine needs minutes to claim a group
_DYING_SECONDS = 3.0  # an unclaimed group this old was not made by a trial that started later


class Janitor(ray.tune.Callback):
    """Gives back what stopped trials leave behind (module docstring).

    The trial's first worker is killed first: its controller then ends the rest. Of one that waits for Tune, which has
    stopped it, the group is taken away, and with it what is in it.
    """

    def __init__(self):
        self._first_seen: dict[str, float] = {}  # worker group -> when
        self._live: dict[str, float] = {}  # trial -> start
        self._ended: dict[str, float] = {}  # trial that will not come back -> end; watched for a while
        self._dead: set[str] = set()  # groups whose first worker was killed
        self._next_look = 0.0

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._live[trial.trial_id] = time.monotonic()
        self._ended.pop(trial.trial_id, None)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._end(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._end(trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        # The trial comes back under its id with another group; only what it held until now is dead.
        self._dead.add(kill_worker(trial.trial_id))
        self._live[trial.trial_id] = time.monotonic()

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + 1
            self.look()

    def look(self) -> int:
        """Removes what is nobody's; returns how many worker groups of this job are left."""
        now = time.monotonic()
        groups = internals.worker_groups()
        self._first_seen = {group: self._first_seen.get(group, now) for group in groups}
        for trial in self._ended:
            self._dead.add(kill_worker(trial))
        held = {trial: internals.claim_of(trial)[0] for trial in self._live}
        living = {group for group in held.values() if group not in self._dead}
        # A live trial without its group is starting or being retried: one of the unclaimed groups is its own,
        # unless that was there before the trial.
        expecting = [
            start for trial, start in self._live.items() if held[trial] not in groups or held[trial] in self._dead
        ]
        orphaned = _STARTING_SECONDS if expecting else _ORPHAN_SECONDS
        retried = any(held[trial] and held[trial] not in groups for trial in self._live)
        for group, seen in self._first_seen.items():
            age = now - seen
            nobodys = age > _DYING_SECONDS and not retried and seen < min(expecting, default=now)
            if group in self._dead or (group not in living and (nobodys or age > orphaned)):
                internals.remove_placement_group(group)
        self._ended = {t: end for t, end in self._ended.items() if now - end < _ORPHAN_SECONDS}
        return len(groups)

    def finish(self, seconds: float = 20.0) -> None:
        """Waits until the groups of the last trials are gone."""
        end = time.monotonic() + seconds
        while self.look() and time.monotonic() < end:
            time.sleep(0.5)

    def _end(self, trial_id: str) -> None:
        self._live.pop(trial_id, None)
        self._ended[trial_id] = time.monotonic()
        self._dead.add(kill_worker(trial_id))


def kill_worker(trial_id: str) -> str:
    """Ends the trial's first worker; returns the id of its group."""
    group, worker = internals.claim_of(trial_id)
    if worker is not None:
        ray.kill(worker)
    return group
