"""Tune's searcher and scheduler as two windows on one pool, which decides everything."""

import json
from typing import Any, NamedTuple

from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from orchestrator.launch.pool import Member, Pool, numbers
from orchestrator.on_ray.cluster import threads


class Running(NamedTuple):
    """What the driver remembers of a trial that it was given."""

    member: Member
    number: int
    run_id: str


class PoolSearch(Searcher):
    """Suggests what the pool gives; writes every end back at once."""

    def __init__(self, pool: Pool):
        super().__init__(metric=None, mode=None)
        self.pool = pool
        self.given: dict[str, Running] = {}  # Tune's trial id -> what runs under it

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        given = self.pool.next()
        if given is None:
            return Searcher.FINISHED if self.pool.is_over else None
        self.given[trial_id] = Running(given.member, given.number, given.job["run_id"])
        at_once = self.pool.limit().trials * given.member.plan.workers
        job = {**given.job, "threads": self.pool.threads or threads(at_once)}
        # As text: Tune keeps several copies of what it is given, and of thousands of trials.
        return {"name": job["name"], "job": json.dumps(job)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing to do: the scheduler has reported the value."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        given = self.given[trial_id]
        # Tune adds what the trial was given, flattened.
        result = {name: value for name, value in (result or {}).items() if not name.startswith("config/")}
        if error:
            failed = {"failed": str(result.get("failed", "the trial's process died too often"))}
            self.pool.ended(given.member, given.number, failed)
        elif result.get("ended"):
            self.pool.ended(given.member, given.number, result)
        else:  # the scheduler stopped it
            self.pool.stopped(given.member, given.number, numbers(result))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the studies are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the studies are the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {"given": {}, "pool": None}


class EarlyStopping(FIFOScheduler):
    """Stores every value in the study and stops a trial where the study says so."""

    def __init__(self, search: PoolSearch):
        super().__init__()
        self.search = search

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("ended"):
            return self.CONTINUE
        given = self.search.given[trial.trial_id]
        return self.STOP if self.search.pool.epoch(given.member, given.number, result) else self.CONTINUE

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "search": None}
