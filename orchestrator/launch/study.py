"""The search: one Optuna study on disk that says what runs next, what a value means, and how every trial ended.

It is the one source of truth for a resume. Every suggestion is written before it runs, every value as it comes,
every end as completed, pruned or failed; what a killed driver did not see any more is taken from the trial's MLflow
run, which is written first. Suggestion n is sampled with a seed made of (seed, n), so a resumed sweep asks the same
questions. The rungs of early stopping depend on reported values alone and are rebuilt from them.
"""

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError

from orchestrator import store, tracking
from orchestrator.launch import before, shelf
from orchestrator.launch.plan import Plan, TrialRecord
from orchestrator.patience import disk_is_away, first_line, patiently
from search_spaces._space import Choice, Float, Int, SearchSpace

STATUS = {
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


class Rungs:
    """Asynchronous successive halving (Li et al., MLSys 2020) on the explicit epoch, factor 2.

    At its first value at or after a rung's epoch a trial is compared with the values that are there: below their
    median it should stop. Its value joins them either way.
    """

    def __init__(self, epochs: int):
        first = max(1, epochs // 4)
        last = max(epochs, first + 1)
        count = int(math.log(last / first) / math.log(2) + 1)
        self.recorded: dict[int, dict[int, float]] = {first * 2**k: {} for k in reversed(range(count))}

    def falls(self, trial: int, epoch: int, value: float) -> bool:
        """Whether a trial is in the lower half of the highest rung that it has just reached; records it there."""
        for milestone, values in self.recorded.items():
            if epoch < milestone:
                continue
            if trial in values:
                return False
            cutoff = np.nanpercentile(list(values.values()), 50) if values else -math.inf
            values[trial] = value
            return bool(value < cutoff)
        return False


def _waits(method: Any) -> Any:
    """A method of a study that waits for a database that is away; made again, it changes nothing twice."""

    @functools.wraps(method)
    def waiting(self: "Study", *arguments: Any, **named: Any) -> Any:
        return patiently(f"the study of {self.plan.sweep}", method, self, *arguments, away=_away, **named)

    return waiting


def _away(error: BaseException) -> bool:
    return disk_is_away(error) or isinstance(error, optuna.exceptions.StorageInternalError | OperationalError)


class Study:
    """A sweep's study, opened by one driver at a time."""

    def __init__(self, plan: Plan):
        self.plan, self.space, self.metric = plan, plan.search_space, plan.metric
        recipe = plan.base_recipe(self.space.method)
        self.epochs, self.seed = recipe.train.epochs, recipe.train.seed
        self.optuna = patiently(f"the study of {plan.sweep}", _opened, plan, self.space, away=_away)
        self._given: set[int] = set()  # by this driver
        self.rungs = Rungs(self.epochs)
        for frozen in self.optuna.trials:
            if frozen.state.is_finished():
                self._remember(frozen)
        self._unfinished = [t.number for t in self.optuna.get_trials(states=(TrialState.RUNNING,))]
        for number in self._unfinished:
            self._complete(number)
        self.interrupted = frozenset(self._unfinished)  # with their driver

    @_waits
    def next(self) -> tuple[int, dict[str, Any]] | None:
        """Number and point of a trial that is unfinished or new; None when all that were planned have been given."""
        number = self._next_number()
        if number is None:
            return None
        self._given.add(number)
        return number, self.point(number)

    @_waits
    def point(self, number: int) -> dict[str, Any]:
        return _point(self.plan, self._frozen(number))

    @_waits
    def left(self) -> int:
        """How many trials are not finished."""
        return self.plan.trials - sum(t.state.is_finished() for t in self.optuna.get_trials(deepcopy=False))

    @_waits
    def report(self, number: int, epoch: int, value: float) -> bool:
        """Stores a value; says whether the trial should stop now."""
        self._store(number, epoch, value)
        frozen = self._frozen(number)
        return self._obeyed(frozen, epoch, self.rungs.falls(number, epoch, value))

    @_waits
    def catches_up(self, number: int, run_id: str) -> bool:
        """Takes over what an interrupted trial did after its driver was killed; says whether it would have stopped.

        Its workers lived a little longer: epochs that are in its MLflow run are put into the study and on the rungs;
        where a rung would have stopped it, it ends as pruned now.
        """
        if number not in self.interrupted:
            return False
        for epoch, value in tracking.curve(self.plan.tracking_uri, run_id, self.metric):
            self._store(number, epoch, value)
        stopped_at = self._remember(self._frozen(number))
        if stopped_at is None:
            return False
        metrics = tracking.metrics_at(self.plan.tracking_uri, run_id, stopped_at)
        self.prune(number, {"epoch": stopped_at, **metrics})
        return True

    @_waits
    def prune(self, number: int, metrics: Mapping[str, float]) -> None:
        """Ends a trial that was stopped early."""
        if self.metric in metrics:
            self._store(number, int(metrics["epoch"]), metrics[self.metric])
        self._tell(number, TrialState.PRUNED, metrics=dict(metrics))

    @_waits
    def fail(self, number: int, message: str) -> None:
        self._tell(number, TrialState.FAIL, message=message)

    @_waits
    def finish(self, number: int, metrics: Mapping[str, float]) -> None:
        """Ends a trial that ran to its last epoch; without a finite value it has failed."""
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value):
            self.fail(number, f"no finite {self.metric}")
        else:
            self._tell(number, TrialState.COMPLETE, value, metrics=dict(metrics))

    @_waits
    def close_run(self, number: int, run_id: str) -> tuple[str, float | None, str]:
        """Writes a finished trial's end into its MLflow run; returns status, value and message."""
        frozen = self._frozen(number)
        status, message = STATUS[frozen.state], frozen.user_attrs.get("message", "")
        tracking.finish(self.plan.tracking_uri, run_id, status, message)
        return status, frozen.value, message

    @_waits
    def close_abandoned(self) -> None:
        """Closes MLflow runs that a killed driver left open although their trial had ended."""
        for run in tracking.runs_of(self.plan.tracking_uri, self.plan.tag):
            number = int(run.data.tags["orch.trial"])
            if run.info.status == "RUNNING" and self.is_finished(number):
                self.close_run(number, run.info.run_id)

    @_waits
    def is_finished(self, number: int) -> bool:
        return self._frozen(number).state.is_finished()

    def _frozen(self, number: int) -> FrozenTrial:
        """One trial; all of them would be copied anew at every epoch of a sweep of thousands."""
        return self.optuna._storage.get_trial(_trial_id(self.optuna, number))

    def _next_number(self) -> int | None:
        if self._unfinished:
            return self._unfinished.pop(0)
        lost = [t.number for t in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
        for number in lost:  # asked for, and the answer was lost
            if number not in self._given:
                self._complete(number)
                return number
        asked = [t for t in self.optuna.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
        if len(asked) >= self.plan.trials:
            return None
        if not self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            # A point is stored whole before it is asked for: a trial gets its parameters one by one.
            self.optuna.enqueue_trial(self._suggested(len(asked)))
        return self.optuna.ask(distributions(self.space)).number

    def _suggested(self, number: int) -> dict[str, Any]:
        """The sampler's next point, from what has finished and a seed of its own."""
        sampler = optuna.samplers.TPESampler(seed=self.seed * 100_003 + number, multivariate=True)
        known = optuna.create_study(direction="maximize", sampler=sampler)
        known.add_trials(t for t in self.optuna.get_trials(deepcopy=False) if t.state.is_finished())
        return known.ask(distributions(self.space)).params

    def _complete(self, number: int) -> None:
        """Gives a trial the rest of its point, which a kill may have cut short."""
        trial, missing = _trial(self.optuna, number), distributions(self.space)
        for name in [name for name in missing if name not in trial.params]:
            trial._suggest(name, missing[name])

    def _remember(self, frozen: FrozenTrial) -> int | None:
        """Puts a trial's stored values on the rungs; the epoch at which they would have stopped it, or None."""
        for epoch, value in sorted(frozen.intermediate_values.items()):
            if self._obeyed(frozen, epoch, self.rungs.falls(frozen.number, epoch, value)):
                return epoch
        return None

    def _obeyed(self, frozen: FrozenTrial, epoch: int, falls: bool) -> bool:
        """Points that are run in any case fill the rungs but are never stopped."""
        exempt = frozen.user_attrs.get("given") or not self.space.early_stopping or epoch >= self.epochs
        return falls and not exempt

    def _store(self, number: int, epoch: int, value: float) -> None:
        frozen = self._frozen(number)
        if epoch not in frozen.intermediate_values:
            _trial(self.optuna, number).report(value, epoch)

    def _tell(self, number: int, state: TrialState, value: float | None = None, **notes: Any) -> None:
        if self._frozen(number).state.is_finished():
            return  # told before, and the answer was lost
        trial = _trial(self.optuna, number)
        for key, note in notes.items():
            trial.set_user_attr(key, note)
        self.optuna.tell(number, value, state=state)


def records(plan: Plan) -> list[TrialRecord]:
    """All trials of a sweep from its study; also while it runs."""
    runs = {int(run.data.tags["orch.trial"]): run.info.run_id for run in tracking.runs_of(plan.tracking_uri, plan.tag)}
    rows = []
    for frozen in _opened(plan, plan.search_space).trials:
        if frozen.state == TrialState.WAITING:
            continue
        values = frozen.intermediate_values
        last = values[max(values)] if values else None
        rows.append(
            TrialRecord(
                number=frozen.number,
                status=STATUS[frozen.state],
                point=_point(plan, frozen),
                epochs=int(frozen.user_attrs.get("metrics", {}).get("epoch", max(values, default=0))),
                value=frozen.value if frozen.value is not None else last,
                metrics=frozen.user_attrs.get("metrics", {}),
                run_id=runs.get(frozen.number, ""),
                message=frozen.user_attrs.get("message", ""),
                seconds=frozen.duration.total_seconds() if frozen.duration else 0.0,
            )
        )
    return rows


def finished(plan: Plan) -> int:
    """How many trials of a sweep have ended; none where its search has not begun."""
    if not shelf.has_begun(plan):
        return 0
    return sum(t.state.is_finished() for t in _opened(plan, plan.search_space).get_trials(deepcopy=False))


def ranked(rows: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Completed trials by value, then pruned, then the rest; ties by number."""
    order = {"completed": 0, "pruned": 1}
    return sorted(rows, key=lambda r: (order.get(r.status, 2), -(r.value or 0.0), r.number))


def distributions(space: SearchSpace) -> dict[str, optuna.distributions.BaseDistribution]:
    """The space in Optuna's words."""
    if space.cells:
        return {
            "cell": optuna.distributions.CategoricalDistribution(list(space.cells)),
            "seed": optuna.distributions.CategoricalDistribution(list(space.seeds)),
        }
    made: dict[str, optuna.distributions.BaseDistribution] = {}
    for name, bounds in space.tune.items():
        if isinstance(bounds, Float):
            made[name] = optuna.distributions.FloatDistribution(bounds.low, bounds.high, log=bounds.log)
        elif isinstance(bounds, Int):
            made[name] = optuna.distributions.IntDistribution(bounds.low, bounds.high, log=bounds.log)
        elif isinstance(bounds, Choice):
            made[name] = optuna.distributions.CategoricalDistribution(list(bounds.options))
    return made


def _opened(plan: Plan, space: SearchSpace) -> optuna.Study:
    """The study on disk, created on first use with the points that are run in any case."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(
        storage=_database(plan), study_name=plan.tag if plan.study else plan.sweep,
        direction="maximize", load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(seed=0),  # samples nothing: every point is enqueued
    )  # fmt: skip
    table = space.table()
    if sum("given" in t.user_attrs for t in study.get_trials(deepcopy=False)) < len(table):
        for point in table:  # a kill may have come between two of them
            study.enqueue_trial(point, user_attrs={"given": True}, skip_if_exists=True)
    return study


def _database(plan: Plan) -> optuna.storages.RDBStorage:
    """Where the study is: SQLite in the sweep's folder, or the database of ``OPTUNA_STORAGE``."""
    if not plan.study:
        return optuna.storages.RDBStorage(f"sqlite:///{plan.folder}/{shelf.STUDY}")
    # A connection is tried before it is used: the server may have been restarted.
    found = optuna.storages.RDBStorage(plan.study, engine_kwargs={"pool_pre_ping": True})
    store.create(plan.where.address("sweeps", plan.sweep, shelf.BEGUN), b"")
    return found


def check(address: str) -> None:
    """Asks a study's database once, so that a wrong address ends a command before anything is prepared.

    Raises:
        ValueError: nobody answers, or not to this user.
    """
    if not address:
        return
    try:
        timeout = {"connect_timeout": 10} if address.startswith("postgresql") else {}
        with create_engine(address, connect_args=timeout).connect():
            pass
    except Exception as error:  # whatever a driver raises, the address matters
        first = first_line(error)
        raise ValueError(f"OPTUNA_STORAGE={address} cannot be used: {first}; start the server, or unset it") from error


def _point(plan: Plan, frozen: FrozenTrial) -> dict[str, Any]:
    """The trial's parameters under today's names, also those that a kill left to be set."""
    whole = {**frozen.system_attrs.get("fixed_params", {}), **frozen.params}
    return before.renamed(whole, plan.base_recipe(plan.search_space.method))


def _trial(study: optuna.Study, number: int) -> optuna.trial.Trial:
    # Optuna hands out a Trial only when it asks; one that was asked before a restart is rebuilt from its id.
    return optuna.trial.Trial(study, _trial_id(study, number))


def _trial_id(study: optuna.Study, number: int) -> int:
    return study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
