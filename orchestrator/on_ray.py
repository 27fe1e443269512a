"""The only door to Ray and Optuna: trials as Ray Train jobs, sweeps as Ray Tune over an Optuna study.

One source of truth for a resume: the Optuna study on disk. Every suggestion is written there before it runs,
every value as it comes, every end as completed, pruned or failed; what a killed driver did not see any more is
taken from the trial's MLflow run, which is written first. A resumed sweep is a new Tuner over the old study:
finished trials stay, unfinished ones are suggested again under their old number, and with it come their Ray Train
folder (last checkpoint) and their MLflow run. Tune's own experiment state is not needed, so a kill at any moment
loses at most the epochs since the last checkpoints. Departs from Ray's ``OptunaSearch`` + ``Tuner.restore``, which
lose ASHA's rungs, store early-stopped trials as complete, and start a trial anew that was suggested after the last
snapshot.

Ray Train's placement groups belong to the job, not to the trial, and outlive a trial that ASHA stops. The
:class:`Janitor` removes them; Ray's own cleaner needs the dashboard and misses trials that are still starting.
"""

import contextlib
import json
import math
import os
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

for _name, _value in {
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # also the rate at which epochs are reported
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # epochs without an evaluation have no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}.items():
    os.environ.setdefault(_name, _value)

import optuna  # noqa: E402
import ray  # noqa: E402
import ray.train  # noqa: E402
import ray.tune  # noqa: E402
from optuna.trial import TrialState  # noqa: E402
from ray.train.torch import TorchTrainer, get_device  # noqa: E402
from ray.tune.schedulers import AsyncHyperBandScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402
from ray.util.placement_group import PlacementGroup  # noqa: E402
from rich.console import Console  # noqa: E402

from orchestrator import cache, checkpoint, figures, find, tracking  # noqa: E402
from orchestrator.evaluation import cost  # noqa: E402
from orchestrator.fit import NonFiniteLoss, fit  # noqa: E402
from orchestrator.method import Place, changed, recipe_dict, recipe_from  # noqa: E402
from orchestrator.progress import Board, label  # noqa: E402
from search_spaces._space import Choice, Float, Int, SearchSpace  # noqa: E402

_HEAD_ONLY = {"CPU": 0, "node:__internal_head__": 0.001}  # the thin driver of a trial must not take a worker's CPU
_ORPHAN_SECONDS = 120.0  # a placement group that no live trial has claimed for so long is nobody's
_STARTING_SECONDS = 900.0  # the same while a trial is starting: an overloaded machine needs minutes to claim a group
_DYING_SECONDS = 3.0  # an unclaimed group this old was not made by a trial that started later
_RETRIES = 1  # of a trial whose worker failed


@dataclass(frozen=True)
class Plan:
    """Everything a sweep is, as plain values; stored as ``plan.json`` in its folder."""

    folder: str
    space: str  # file name in search_spaces, or a title for single runs
    title: str  # the MLflow experiment
    benchmark: str
    recipes: dict[str, dict[str, Any]]  # method -> the base recipe of its trials
    place: dict[str, str]
    tracking_uri: str
    trials: int
    workers: int = 1
    gpus_per_worker: float = 0.0
    concurrent: int = 1
    facts: dict[str, Any] = field(default_factory=dict)  # code version, fingerprints, teacher
    space_data: dict[str, Any] = field(default_factory=dict)  # the search space itself, as plain values
    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # no other sweep has it, in any storage

    @property
    def sweep(self) -> str:
        """The name people see."""
        return Path(self.folder).name

    @property
    def method(self) -> str:
        """The first method; most sweeps have no other."""
        return next(iter(self.recipes))

    @property
    def recipe(self) -> dict[str, Any]:
        """The base recipe of the first method."""
        return self.recipes[self.method]

    def base_recipe(self, method: str) -> Any:
        """The recipe from which a method's trials start."""
        return recipe_from(find.recipe(method, self.benchmark), self.recipes[method])

    @property
    def tag(self) -> str:
        """The name by which its MLflow runs are found."""
        return f"{self.sweep}-{self.key[:8]}"


@dataclass(frozen=True)
class TrialRecord:
    """One row of the final table."""

    number: int
    status: str  # completed, pruned, failed, running
    point: dict[str, Any]
    epochs: int
    value: float | None  # of the space's metric, last evaluated
    metrics: dict[str, float]
    run_id: str
    message: str = ""
    seconds: float = 0.0


# --- The cluster ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(dashboard: bool = True) -> Iterator[None]:
    """A Ray connection: the cluster of ``RAY_ADDRESS`` if set, else a local one that ends with the block."""
    if ray.is_initialized():
        yield
        return
    passed_on = {k: v for k, v in os.environ.items() if k.startswith(("RAY_TRAIN_", "MLFLOW_", "ORCHESTRATOR_"))}
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": passed_on},
    }
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"object_store_memory": 256 * 2**20, "include_dashboard": dashboard}
    ray.init(**options)
    try:
        yield
    finally:
        ray.shutdown()


def check_resources(workers: int, gpus_per_worker: float, concurrent: int | None) -> int:
    """How many trials may run at once.

    Raises:
        ValueError: one trial alone needs more than the cluster has; Ray itself would wait for ever.
    """
    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0), total.get("GPU", 0)
    if workers > cpus or workers * gpus_per_worker > gpus:
        need = f"{workers} CPUs" + (f" and {workers * gpus_per_worker:g} GPUs" if gpus_per_worker else "")
        raise ValueError(f"a trial of {workers} workers needs {need}, the cluster has {cpus:g} CPUs and {gpus:g} GPUs")
    fitting = int(cpus // workers)
    if gpus_per_worker:
        fitting = min(fitting, int(gpus / (workers * gpus_per_worker) + 1e-6))
    if concurrent is None:  # the processes that watch over one trial hold 1.5 GB
        fitting = min(fitting, max(1, int(total.get("memory", math.inf) // (1.5 * 2**30))))
    return min(concurrent or fitting, fitting)


def default_gpus() -> float:
    """One GPU a worker where the cluster has any."""
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def prepare(method: str, recipe: dict, benchmark: str, place: Place, gpus: float, progress: cache.Progress) -> dict:
    """Runs a method's preparation on a node of the cluster, with its progress shown here."""
    note = Path(place.storage) / "cache" / f"progress-{os.getpid()}.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    task = ray.remote(_prepare).options(num_cpus=1, num_gpus=gpus, max_retries=0)
    waiting = task.remote(method, recipe, benchmark, place, str(note))
    try:
        while not ray.wait([waiting], timeout=0.3)[0]:
            with contextlib.suppress(OSError, ValueError):
                progress(*json.loads(note.read_text()))
        try:
            facts, messages = ray.get(waiting)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, (ValueError, OSError)) else error from None
        for message in messages:
            warnings.warn(message, stacklevel=2)
        return facts
    finally:
        note.unlink(missing_ok=True)


def _prepare(method: str, recipe: dict, benchmark: str, place: Place, note: str) -> tuple[dict, list[str]]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)  # nothing else of this job runs meanwhile
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.3 or done == total:
            last = time.monotonic()
            partial = f"{note}.tmp"
            Path(partial).write_text(json.dumps([what, done, total]))
            os.replace(partial, note)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = find.method(method)
        facts = found.prepare(recipe_from(find.recipe(method, benchmark), recipe), place, progress)
    return facts, [str(w.message) for w in caught if (w.category is UserWarning and "cache" in str(w.message))
                   or "cannot be read" in str(w.message)]  # fmt: skip


# --- One trial --------------------------------------------------------------------------------------------------


def _train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker of a trial runs. Returns the final metrics, or {"failed": why}."""
    import torch

    context = ray.train.get_context()
    rank, world, device = context.get_world_rank(), context.get_world_size(), get_device()
    if device.type == "cpu":
        torch.set_num_threads(job["threads"])
    method = find.method(job["method"])
    recipe = recipe_from(find.recipe(job["method"], job["benchmark"]), job["recipe"])
    place = Place(**job["place"])
    _claim_placement_group(job["claim"], rank)
    experiment = method.experiment(recipe, place, rank, world, device)
    log = tracking.EpochLog(job["tracking_uri"], job["run_id"]) if rank == 0 else None
    resume = None
    stored = ray.train.get_checkpoint()
    if stored is not None:
        with stored.as_directory() as folder:
            resume = checkpoint.load(Path(folder) / "state.pt")

    def on_epoch(epoch: int, metrics: dict[str, float], state: Callable[[], dict[str, Any]]) -> None:
        current = state()
        if log is None:
            ray.train.report({"epoch": epoch, **metrics})
            return
        log(epoch, metrics)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder) / "state.pt", current)
            ray.train.report({"epoch": epoch, **metrics}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    try:
        history = fit(experiment, device, resume, on_epoch)
    except NonFiniteLoss as error:
        return {"failed": str(error)}
    if rank == 0:
        _log_result(job, method, recipe, place, experiment.task.student, history[-1])
    return {"epoch": len(history), **history[-1]}


def _log_result(job: dict, method: Any, recipe: Any, place: Place, student: Any, metrics: dict[str, float]) -> None:
    """Student, cost and pictures of a finished trial."""
    uri, run_id = job["tracking_uri"], job["run_id"]
    student = student.eval().cpu()
    facts = {"method": job["method"], "benchmark": job["benchmark"], "metrics": metrics,
             "recipe": recipe_dict(recipe), "classes_fingerprint": job["classes"]}  # fmt: skip
    tracking.log_student(uri, run_id, student, facts)
    costs = {
        "cost/macs": cost.macs(student),
        "cost/parameters": cost.parameters(student),
        "cost/cpu_images_per_s": cost.images_per_second(student),
    }
    tracking.log_values(uri, run_id, costs)
    if method.pictures is not None:
        for name, picture in method.pictures(student, recipe, place).items():
            tracking.log_figure(uri, run_id, figures.draw(picture), f"{name}.png")


def _run_trial(config: dict[str, Any]) -> None:
    """The Tune function of a trial: launches Ray Train and says how it ended."""
    job = config["job"]
    job["claim"] = ray.tune.get_context().get_trial_id()
    try:
        final = train_job(job)
    except Exception as error:  # whatever ends a trial must not end the sweep; the reason goes to its record
        final = {"failed": _reason(error)}
    ray.tune.report({"epoch": 0, **final, "ended": True})


def train_job(job: dict[str, Any]) -> dict[str, Any]:
    """One Ray Train run, from its last checkpoint if its folder has any; returns what rank 0 returned."""
    from ray.tune.integration.ray_train import TuneReportCallback

    resources = {"CPU": 1, "GPU": job["gpus_per_worker"]} if job["gpus_per_worker"] else {"CPU": job["threads"]}
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=job["workers"], use_gpu=job["gpus_per_worker"] > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=job["name"],
            storage_path=job["train_storage"],
            callbacks=[TuneReportCallback()],
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=_RETRIES),
            logging_config=ray.train.LoggingConfig("ERROR"),
        ),
    )
    return trainer.fit().return_value


def _reason(error: BaseException) -> str:
    """The innermost message in one line: Ray wraps a worker's exception several times."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while getattr(error, "cause", None) is not None or error.__cause__ is not None:
        error = getattr(error, "cause", None) or error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}"[:2000]


# --- The search -------------------------------------------------------------------------------------------------


def open_study(plan: Plan) -> optuna.Study:
    """The sweep's study, created on first use with the points that are run in any case."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    storage = optuna.storages.RDBStorage(f"sqlite:///{plan.folder}/study.db")
    study = optuna.create_study(storage=storage, study_name=plan.sweep, direction="maximize", load_if_exists=True)
    table = search_space(plan).table()
    if sum("given" in t.user_attrs for t in study.get_trials(deepcopy=False)) < len(table):
        for point in table:  # a kill may have come between two of them
            study.enqueue_trial(point, user_attrs={"given": True}, skip_if_exists=True)
    return study


_DIMENSIONS = {"Float": Float, "Int": Int, "Choice": Choice}


def space_data(space: SearchSpace) -> dict[str, Any]:
    """A space as plain values: a resumed sweep does not depend on a file that somebody has edited since."""
    tune = {name: [type(bounds).__name__, vars(bounds)] for name, bounds in space.tune.items()}
    return {**{f.name: getattr(space, f.name) for f in fields(space)}, "tune": tune}


def search_space(plan: Plan) -> SearchSpace:
    """The plan's space; the inverse of :func:`space_data`, also after JSON."""
    data = dict(plan.space_data)
    for name in ("start", "seeds", "picture"):
        data[name] = tuple(data[name])
    made = {}
    for name, (kind, values) in data["tune"].items():
        made[name] = _DIMENSIONS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return SearchSpace(**{**data, "tune": made})


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


class StudySearch(Searcher):
    """Suggests what is unfinished in the study, then asks Optuna; writes every value and end back at once.

    The sampler of suggestion n is seeded by (seed, n), so a resumed sweep asks the same questions.
    """

    def __init__(self, plan: Plan):
        super().__init__(metric=None, mode=None)
        self.plan, self.space = plan, search_space(plan)
        self.seed = int(plan.recipe.get("seed", 0))
        self.numbers: dict[str, int] = {}  # Tune's trial id -> number in the study
        self._study: optuna.Study | None = None
        self._unfinished: list[int] | None = None
        self.scheduler: EarlyStopping | None = None

    @property
    def study(self) -> optuna.Study:
        if self._study is None:
            self._study = open_study(self.plan)
        return self._study

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        while True:
            number = self._next_number()
            if number is None:
                return Searcher.FINISHED
            frozen = self.study.trials[number]
            try:
                job = trial_job(self.plan, self.space, number, frozen.params)
            except ValueError as error:  # a combination that the method refuses
                self._tell(number, TrialState.FAIL, message=str(error))
                continue
            if self._would_have_been_stopped(trial_id, number, job["run_id"]):
                continue
            self.numbers[trial_id] = number
            return {"job": job}

    def _next_number(self) -> int | None:
        if self._unfinished is None:
            self._unfinished = [t.number for t in self.study.get_trials(states=(TrialState.RUNNING,))]
        if self._unfinished:
            return self._unfinished.pop(0)
        asked = [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
        if len(asked) >= self.plan.trials:
            return None
        self.study.sampler = optuna.samplers.TPESampler(seed=self.seed * 100_003 + len(asked), multivariate=True)
        return self.study.ask(distributions(self.space)).number

    def _would_have_been_stopped(self, trial_id: str, number: int, run_id: str) -> bool:
        """Catches up with what an interrupted trial did after its driver was killed.

        Its workers lived a little longer: epochs that are in its MLflow run are put into the study and on the
        rungs; where a rung would have stopped it, it ends as pruned now.
        """
        for epoch, value in tracking.curve(self.plan.tracking_uri, run_id, self.space.metric):
            self._report(number, epoch, value)
        frozen = self.study.trials[number]
        if self.scheduler is None or not frozen.intermediate_values:
            return False
        stopped_at = self.scheduler.remember(trial_id, frozen)
        if stopped_at is None:
            return False
        metrics = tracking.metrics_at(self.plan.tracking_uri, run_id, stopped_at)
        self._tell(number, TrialState.PRUNED, metrics={"epoch": stopped_at, **metrics})
        return True

    def _report(self, number: int, epoch: int, value: float) -> None:
        frozen = self.study.trials[number]
        if epoch not in frozen.intermediate_values:
            optuna.trial.Trial(self.study, frozen._trial_id).report(value, epoch)

    def _tell(self, number: int, state: TrialState, value: float | None = None, **notes: Any) -> None:
        trial = optuna.trial.Trial(self.study, self.study.trials[number]._trial_id)
        for key, note in notes.items():
            trial.set_user_attr(key, note)
        self.study.tell(number, value, state=state)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if result.get(self.space.metric) is not None and not result.get("ended"):
            self._report(self.numbers[trial_id], result["epoch"], result[self.space.metric])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self.numbers[trial_id]
        if self.study.trials[number].state.is_finished():
            return
        result = result or {}
        value = result.get(self.space.metric)
        if error or "failed" in result:
            self._tell(number, TrialState.FAIL, message=str(result.get("failed", "the trial's process died")))
        elif not result.get("ended"):  # the scheduler stopped it; its last report came with the decision
            if value is not None:
                self._report(number, result["epoch"], value)
            self._tell(number, TrialState.PRUNED, metrics=_numbers(result))
        elif value is None or not math.isfinite(value):
            self._tell(number, TrialState.FAIL, message=f"no finite {self.space.metric}")
        else:
            self._tell(number, TrialState.COMPLETE, value, metrics=_numbers(result))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the study is the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_study": None, "scheduler": None}


class EarlyStopping(AsyncHyperBandScheduler):
    """ASHA on the explicit epoch. Points that are run in any case fill the rungs but are never stopped.

    Rungs are rebuilt from the study when a sweep is resumed: they only depend on reported values.
    """

    def __init__(self, search: StudySearch, epochs: int):
        grace = max(1, epochs // 4)
        super().__init__(
            time_attr="epoch", metric=search.space.metric, mode="max", max_t=max(epochs, grace + 1),
            grace_period=grace, reduction_factor=2, stop_last_trials=False,
        )  # fmt: skip
        self.search, self.epochs = search, epochs
        search.scheduler = self
        for frozen in search.study.trials:
            if frozen.state.is_finished():
                self.remember(f"finished-{frozen.number}", frozen)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def remember(self, trial_id: str, frozen: optuna.trial.FrozenTrial) -> int | None:
        """Puts a trial's stored values on the rungs; the epoch at which they would have stopped it, or None."""
        trial = _Named(trial_id)
        for epoch, value in sorted(frozen.intermediate_values.items()):
            decision = self._brackets[0].on_result(trial, epoch, value)
            if self._obeyed(decision, frozen, epoch) == self.STOP:
                return epoch
        return None

    def _obeyed(self, decision: str, frozen: optuna.trial.FrozenTrial, epoch: int) -> str:
        exempt = frozen.user_attrs.get("given") or not self.search.space.early_stopping or epoch >= self.epochs
        return self.CONTINUE if exempt else decision

    def rungs(self) -> dict[int, int]:
        """Epoch of every rung -> how many values it holds."""
        return {int(epoch): len(recorded) for epoch, recorded in self._brackets[0]._rungs}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("ended") or self.search.space.metric not in result:
            return self.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        frozen = self.search.study.trials[self.search.numbers[trial.trial_id]]
        return self._obeyed(decision, frozen, result["epoch"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "search": None}


@dataclass(frozen=True)
class _Named:
    trial_id: str


def trial_job(plan: Plan, space: SearchSpace, number: int, point: Mapping[str, Any]) -> dict[str, Any]:
    """Names and plain numbers from which a trial can be replayed; its MLflow run exists from here on."""
    method = space.method_of(point)
    recipe = changed(plan.base_recipe(method), space.settings(point))
    find.method(method).check(recipe, plan.workers)
    values = recipe_dict(recipe)
    uri = plan.tracking_uri
    prepared = plan.facts["prepared"].get(prepared_key(method, recipe), {})
    facts = {k: v for k, v in {**plan.facts, **prepared}.items() if not isinstance(v, dict)}
    tags = {
        "orch.sweep": plan.tag,
        "orch.space": plan.space,
        "orch.kind": "trial",
        "orch.trial": str(number),
        "orch.method": method,
        "orch.benchmark": plan.benchmark,
        "orch.data_root": plan.place["data_root"],
        **{f"orch.{k}": str(v) for k, v in facts.items()},
        **{f"orch.point.{k}": str(v) for k, v in point.items()},
    }
    experiment_id = tracking.experiment(uri, plan.title, plan.place["storage"], space.question)
    run_id = tracking.run(uri, experiment_id, f"{plan.tag}/t{number:03d}", label(point), tags, values)
    tracking.log_record(uri, tracking.Record(run_id, method, plan.benchmark, values, Place(**plan.place), facts))
    return {
        "method": method,
        "benchmark": plan.benchmark,
        "recipe": values,
        "place": plan.place,
        "tracking_uri": uri,
        "run_id": run_id,
        "number": number,
        "name": f"t{number:03d}",
        "train_storage": f"{plan.folder}/train",
        "workers": plan.workers,
        "gpus_per_worker": plan.gpus_per_worker,
        "threads": _threads(plan.concurrent * plan.workers),
        "claim": "",
        "classes": facts.get("classes_fingerprint", ""),
    }


def prepared_key(method: str, recipe: Any) -> str:
    """Which preparation a recipe needs: recipes of one kind of method that differ only in other fields share it."""
    found = find.method(method)
    values = {k: v for k, v in recipe_dict(recipe).items() if k in found.prepared_by}
    return json.dumps([found.preparation or method, values], sort_keys=True)


def _threads(workers: int) -> int:
    """The most CPUs a worker can have when so many run at once; a worker does not span nodes."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fitting = (t for t in range(max(nodes, default=1), 1, -1) if sum(cpus // t for cpus in nodes) >= workers)
    return next(fitting, 1)


# --- The sweep --------------------------------------------------------------------------------------------------


def run_sweep(plan: Plan, console: Console) -> list[TrialRecord]:
    """Runs what is left of the plan's trials and returns all of them, in order of their numbers."""
    with _only_driver(plan):
        study = open_study(plan)
        space = search_space(plan)
        _close_abandoned(plan, study)
        left = plan.trials - sum(t.state.is_finished() for t in study.trials)
        if left > 0:
            search = StudySearch(plan)
            epochs = int(plan.recipe["epochs"])
            scheduler = EarlyStopping(search, epochs)
            janitor = Janitor()
            known = [(r.number, r.status, r.value) for r in records(plan)]
            board = Board(console, plan.trials, epochs, space.metric, known)
            attempt = 1 + len(list((Path(plan.folder) / "tune").glob("*")))
            with board:
                ray.tune.Tuner(
                    ray.tune.with_resources(_run_trial, _HEAD_ONLY),
                    tune_config=ray.tune.TuneConfig(
                        search_alg=search, scheduler=scheduler, num_samples=left, reuse_actors=False,
                        max_concurrent_trials=plan.concurrent, trial_dirname_creator=_trial_folder,
                    ),
                    run_config=ray.tune.RunConfig(
                        name=f"attempt-{attempt}", storage_path=f"{plan.folder}/tune", verbose=0,
                        failure_config=ray.tune.FailureConfig(max_failures=_RETRIES),
                        callbacks=[Reporter(plan, search, board), janitor],
                    ),
                ).fit()  # fmt: skip
            janitor.finish()
            if sum(t.state.is_finished() for t in open_study(plan).trials) < plan.trials:
                raise KeyboardInterrupt  # Tune returns as if nothing had happened
        _close_abandoned(plan, open_study(plan))
        return records(plan)


def _trial_folder(trial: Any) -> str:
    return f"{trial.config['job']['name']}-{trial.trial_id}"


def records(plan: Plan) -> list[TrialRecord]:
    """All trials of a sweep from its study; also while it runs."""
    states = {
        TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed",
        TrialState.RUNNING: "running",
    }  # fmt: skip
    runs = {int(run.data.tags["orch.trial"]): run.info.run_id for run in tracking.runs_of(plan.tracking_uri, plan.tag)}
    rows = []
    for frozen in open_study(plan).trials:
        if frozen.state == TrialState.WAITING:
            continue
        values = frozen.intermediate_values
        epochs = int(frozen.user_attrs.get("metrics", {}).get("epoch", max(values, default=0)))
        value = frozen.value if frozen.value is not None else (values[max(values)] if values else None)
        rows.append(
            TrialRecord(
                number=frozen.number,
                status=states[frozen.state],
                point=dict(frozen.params),
                epochs=epochs,
                value=value,
                metrics=frozen.user_attrs.get("metrics", {}),
                run_id=runs.get(frozen.number, ""),
                message=frozen.user_attrs.get("message", ""),
                seconds=frozen.duration.total_seconds() if frozen.duration else 0.0,
            )
        )
    return rows


class Janitor(ray.tune.Callback):
    """Gives back what stopped trials leave behind (module docstring).

    The trial's Train controller is killed first: alive, it would take a lost group for a lost node and make a
    new one, which then leaks.
    """

    def __init__(self):
        self._first_seen: dict[str, float] = {}  # worker group -> when
        self._live: dict[str, float] = {}  # trial -> start
        self._ended: dict[str, float] = {}  # trial that will not come back -> end; watched for a while
        self._dead: set[str] = set()  # groups whose controller is dead
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
        self._dead.add(_kill_controller(trial.trial_id))
        self._live[trial.trial_id] = time.monotonic()

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + 1
            self.look()

    def look(self) -> int:
        """Removes what is nobody's; returns how many worker groups of this job are left."""
        now = time.monotonic()
        groups = _worker_groups()
        self._first_seen = {group: self._first_seen.get(group, now) for group in groups}
        for trial in self._ended:
            self._dead.add(_kill_controller(trial))
        held = {trial: _claimed(trial) for trial in self._live}
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
                ray.util.remove_placement_group(PlacementGroup(ray._raylet.PlacementGroupID(bytes.fromhex(group))))
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
        self._dead.add(_kill_controller(trial_id))


def _worker_groups() -> list[str]:
    """Placement groups of Ray Train workers of this job that hold resources or wait for them."""
    job = ray.get_runtime_context().get_job_id()  # the last part of every id that the job made
    return [
        group
        for group, info in ray.util.placement_group_table().items()
        if info["state"] != "REMOVED"
        and group.endswith(job)
        and not any("node:__internal_head__" in bundle for bundle in info["bundles"].values())
    ]


class Reporter(ray.tune.Callback):
    """Writes each trial's end into its MLflow run and tells the progress board."""

    def __init__(self, plan: Plan, search: StudySearch, board: Any):
        self.plan, self.search, self.board = plan, search, board

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        job = trial.config["job"]
        self.board.started(job["number"], self.search.study.trials[job["number"]].params)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if not result.get("ended"):
            self.board.epoch(trial.config["job"]["number"], result["epoch"], result.get(self.search.space.metric))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended(trial)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._ended(trial)

    def _ended(self, trial: Any) -> None:
        job = trial.config["job"]
        self.search.on_trial_complete(trial.trial_id, trial.last_result, error=trial.status == "ERROR")
        number, status, message = _close_run(self.plan, self.search.study.trials[job["number"]], job["run_id"])
        frozen = self.search.study.trials[number]
        self.board.ended(number, status, frozen.value, message)

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": self.plan, "search": self.search, "board": None}


def _close_run(plan: Plan, frozen: optuna.trial.FrozenTrial, run_id: str) -> tuple[int, str, str]:
    states = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    status, message = states[frozen.state], frozen.user_attrs.get("message", "")
    tracking.finish(plan.tracking_uri, run_id, status, message)
    return frozen.number, status, message


def _close_abandoned(plan: Plan, study: optuna.Study) -> None:
    """MLflow runs that a killed driver left open although their trial had ended."""
    for run in tracking.runs_of(plan.tracking_uri, plan.tag):
        frozen = study.trials[int(run.data.tags["orch.trial"])]
        if run.info.status == "RUNNING" and frozen.state.is_finished():
            _close_run(plan, frozen, run.info.run_id)


@contextlib.contextmanager
def _only_driver(plan: Plan) -> Iterator[None]:
    import fcntl

    Path(plan.folder).mkdir(parents=True, exist_ok=True)
    with open(Path(plan.folder) / "driver.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"the sweep {plan.sweep} is being run by another process") from error
        yield


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a result without Tune's own bookkeeping."""
    return {k: v for k, v in result.items() if isinstance(v, (int, float)) and ("/" in k or k == "epoch")}


def _claim_placement_group(trial_id: str, rank: int) -> None:
    """Says on the cluster's blackboard which worker group and controller belong to a trial."""
    group = ray.util.get_current_placement_group()
    if rank == 0 and group is not None:
        from ray.experimental.internal_kv import _internal_kv_put
        from ray.train.v2._internal.execution.context import get_train_context

        claim = ray.cloudpickle.dumps((group.id.hex(), get_train_context().controller_actor))
        _internal_kv_put(f"orchestrator/{trial_id}", claim, overwrite=True)


def _claim(trial_id: str) -> tuple[str, Any]:
    from ray.experimental.internal_kv import _internal_kv_get

    # Unpickled from the cluster's own blackboard, which whoever can write to can run code on the cluster anyway.
    stored = _internal_kv_get(f"orchestrator/{trial_id}")
    return ray.cloudpickle.loads(stored) if stored else ("", None)


def _claimed(trial_id: str) -> str:
    """Id of the trial's worker group, empty before it has one."""
    return _claim(trial_id)[0]


def _kill_controller(trial_id: str) -> str:
    """Ends the trial's Train controller, and with it its workers; returns the id of their group."""
    group, controller = _claim(trial_id)
    if controller is not None:
        ray.kill(controller)
    return group
