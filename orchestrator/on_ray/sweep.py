"""A pool of sweeps with Ray Tune: one Tuner, with a janitor, that asks the pool what runs next."""

import tempfile
from collections.abc import Callable
from typing import Any

import ray.tune

from orchestrator.launch.pool import Pool
from orchestrator.on_ray import internals
from orchestrator.on_ray import trial as trials
from orchestrator.on_ray.janitor import Janitor
from orchestrator.on_ray.search import EarlyStopping, PoolSearch

_HEAD_ONLY = {"CPU": 0, "node:__internal_head__": 0.001}  # the thin driver of a trial must not take a worker's CPU
_RETRIES = 10  # of a trial whose own process died, each from its last checkpoint


def drive(pool: Pool, function: Callable[[dict[str, Any]], None] = trials.run, resources: Any = _HEAD_ONLY) -> None:
    """Runs the trials that a pool gives, until it is over.

    Args:
        pool: says what runs next.
        function: of one trial.
        resources: of its thin driver.

    Raises:
        KeyboardInterrupt: the user stopped it; Tune alone returns as if nothing had happened.
    """
    internals.keep_secrets()
    search, janitor = PoolSearch(pool), Janitor()
    with tempfile.TemporaryDirectory(prefix="orchestrator-tune-") as own:
        ray.tune.Tuner(
            ray.tune.with_resources(function, resources),
            tune_config=ray.tune.TuneConfig(
                search_alg=search,
                scheduler=EarlyStopping(search),
                num_samples=-1,  # the pool says when it is over
                reuse_actors=True,  # a process that is there has imported Ray already: 2 s of the head's CPU
                trial_dirname_creator=lambda trial: f"{trial.config['name']}-{trial.trial_id}",
            ),
            run_config=ray.tune.RunConfig(
                name="tune",
                # The studies are the state: what Tune writes is read by nobody, so it burdens no shared storage.
                storage_path=own,
                verbose=0,
                failure_config=ray.tune.FailureConfig(max_failures=_RETRIES),
                callbacks=[Reporter(search), janitor],
            ),
        ).fit()
    janitor.finish()
    if not pool.is_over:
        raise KeyboardInterrupt


class Reporter(ray.tune.Callback):
    """Tells the pool what its trials go through, and closes their MLflow runs."""

    def __init__(self, search: PoolSearch):
        self.search = search

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if result.get("happened"):
            given = self.search.given[trial.trial_id]
            self.search.pool.happened(given.member, given.number, result["happened"])

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        given = self.search.given[trial.trial_id]
        self.search.pool.happened(given.member, given.number, "its process died; goes on from its last checkpoint")

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended(trial)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended(trial)

    def _ended(self, trial: Any) -> None:
        given = self.search.given.get(trial.trial_id)
        if given is None:  # told before
            return
        self.search.on_trial_complete(trial.trial_id, trial.last_result, error=trial.status == "ERROR")
        self.search.pool.closed(given.member, given.number, given.run_id)
        internals.forget_metrics(trial)

    def __getstate__(self) -> dict[str, Any]:
        return {"search": None}
