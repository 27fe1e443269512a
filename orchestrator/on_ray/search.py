"""Tune's searcher and scheduler as two windows on one study, which decides everything."""

from typing import Any

from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from orchestrator.launch import runner
from orchestrator.launch.plan import Plan
from orchestrator.launch.study import Study
from orchestrator.on_ray.cluster import threads


class StudySearch(Searcher):
    """Suggests what is unfinished in the study, then asks it for more; writes every end back at once."""

    def __init__(self, plan: Plan, study: Study):
        super().__init__(metric=None, mode=None)
        self.plan, self.study = plan, study
        self.threads = threads(plan.concurrent * plan.workers)
        self.numbers: dict[str, int] = {}  # Tune's trial id -> number in the study

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        while (given := self.study.next()) is not None:
            job = runner.prepared_job(self.plan, self.study, *given)
            if job is not None:
                self.numbers[trial_id] = given[0]
                return {"job": {**job, "threads": self.threads}}
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing to do: the scheduler has reported the value."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self.numbers[trial_id]
        # Tune adds the whole job, flattened.
        result = {name: value for name, value in (result or {}).items() if not name.startswith("config/")}
        if self.study.is_finished(number):
            return
        if error:
            self.study.fail(number, str(result.get("failed", "the trial's process died")))
        elif result.get("ended"):
            runner.end(self.study, number, result)
        else:  # the scheduler stopped it
            self.study.prune(number, runner.numbers(result))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the study is the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "study": None}


class EarlyStopping(FIFOScheduler):
    """Stores every value in the study and stops a trial where the study says so."""

    def __init__(self, search: StudySearch):
        super().__init__()
        self.search = search

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        study = self.search.study
        if result.get("ended") or study.metric not in result:
            return self.CONTINUE
        number = self.search.numbers[trial.trial_id]
        return self.STOP if study.report(number, result["epoch"], result[study.metric]) else self.CONTINUE

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "search": None}
