"""A sweep with Ray Tune: one Tuner over the plan's study, with a janitor and a board."""

from pathlib import Path
from typing import Any

import ray.tune

from orchestrator.launch import study
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.launch.study import Study
from orchestrator.on_ray import trial as trials
from orchestrator.on_ray.janitor import Janitor
from orchestrator.on_ray.search import EarlyStopping, StudySearch
from orchestrator.progress import Board

_HEAD_ONLY = {"CPU": 0, "node:__internal_head__": 0.001}  # the thin driver of a trial must not take a worker's CPU
_RETRIES = 1  # of a trial whose process died


def run(plan: Plan, board: Board) -> list[TrialRecord]:
    """Runs what is left of the plan's trials and returns all of them, in order of their numbers."""
    opened = Study(plan)
    opened.close_abandoned()
    left = opened.left()
    if left > 0:
        search, janitor = StudySearch(plan, opened), Janitor()
        attempt = 1 + len(list((Path(plan.folder) / "tune").glob("*")))
        with board:
            ray.tune.Tuner(
                ray.tune.with_resources(trials.run, _HEAD_ONLY),
                tune_config=ray.tune.TuneConfig(
                    search_alg=search,
                    scheduler=EarlyStopping(search),
                    num_samples=left,
                    reuse_actors=False,
                    max_concurrent_trials=plan.concurrent,
                    trial_dirname_creator=_folder_of,
                ),
                run_config=ray.tune.RunConfig(
                    name=f"attempt-{attempt}",
                    storage_path=f"{plan.folder}/tune",
                    verbose=0,
                    failure_config=ray.tune.FailureConfig(max_failures=_RETRIES),
                    callbacks=[Reporter(search, board), janitor],
                ),
            ).fit()
        janitor.finish()
        if opened.left() > 0:
            raise KeyboardInterrupt  # Tune returns as if nothing had happened
    opened.close_abandoned()
    return study.records(plan)


class Reporter(ray.tune.Callback):
    """Writes each trial's end into its MLflow run and tells the progress board."""

    def __init__(self, search: StudySearch, board: Any):
        self.search, self.board = search, board

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        job = trial.config["job"]
        self.board.started(job["number"], self.search.study.point(job["number"]), job["epochs"])

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if not result.get("ended"):
            self.board.epoch(trial.config["job"]["number"], result["epoch"], result.get(self.search.study.metric))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended(trial)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended(trial)

    def _ended(self, trial: Any) -> None:
        job = trial.config["job"]
        self.search.on_trial_complete(trial.trial_id, trial.last_result, error=trial.status == "ERROR")
        self.board.ended(job["number"], *self.search.study.close_run(job["number"], job["run_id"]))

    def __getstate__(self) -> dict[str, Any]:
        return {"search": None, "board": None}


def _folder_of(trial: Any) -> str:
    return f"{trial.config['job']['name']}-{trial.trial_id}"
