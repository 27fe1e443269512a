"""The only door to MLflow: experiments, runs found again by tag, metrics, models, pictures.

One experiment per sweep and benchmark; every trial is a flat run in it, so that the chart view draws all curves
at once; one summary run per sweep carries the table and the report. A run is found by its tags, never by a
remembered id: a resumed sweep writes into the same runs. Everything goes through ``MlflowClient``; the fluent
interface keeps per-process state that does not survive workers.
"""

import dataclasses
import functools
import json
import tempfile
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import artifacts, checkpoint, mirror, store
from orchestrator.method import PairScores, Queries
from orchestrator.mlflow_store import check as check
from orchestrator.mlflow_store import check_there as check_there
from orchestrator.mlflow_store import client as client
from orchestrator.mlflow_store import made, mlflow
from orchestrator.mlflow_store import tracking_uri as tracking_uri
from orchestrator.mlflow_store import ui_command as ui_command
from orchestrator.needs import Place
from orchestrator.patience import first_line

RECORD = "record.json"
QUERIES = "queries.npz"
PAIRS = "pairs.npz"


@dataclass(frozen=True)
class Record:
    """What a run says about itself; enough to evaluate or export its student again."""

    run_id: str
    method: str
    benchmark: str
    recipe: dict[str, Any]
    place: Place
    facts: dict[str, Any]
    prepared: dict[str, dict[str, Any]] = field(default_factory=dict)  # role -> what was ready for it; none before 0.4


def experiment(uri: str, name: str, storage: str, note: str) -> str:
    """Id of the experiment, created on first use with artifacts below the storage folder."""
    return made(uri, _experiment, uri, name, storage, note)


def _experiment(uri: str, name: str, storage: str, note: str) -> str:
    mlflow_client = client(uri)
    found = mlflow_client.get_experiment_by_name(name)
    if found is None:
        location = (
            None if uri.startswith("http") else str(Path(storage).absolute() / "artifacts" / name.replace(" ", "-"))
        )
        try:
            experiment_id = mlflow_client.create_experiment(name, artifact_location=location)
        except mlflow().MlflowException:  # another sweep created it a moment ago, or the store is away
            found = mlflow_client.get_experiment_by_name(name)
            if found is None:
                raise
            experiment_id = found.experiment_id
        mlflow_client.set_experiment_tag(experiment_id, "mlflow.note.content", note)
        mlflow_client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
        return experiment_id
    if found.lifecycle_stage == "deleted":
        raise ValueError(f"the MLflow experiment {name!r} is in the trash; restore it or empty the trash")
    return found.experiment_id


def run(uri: str, experiment_id: str, key: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any]) -> str:
    """Id of the run with tag ``orch.key`` = key; created with its parameters when there is none."""
    return made(uri, _run, uri, experiment_id, key, name, tags, params)


def _run(uri: str, experiment_id: str, key: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any]) -> str:
    mlflow_client = client(uri)
    found = mlflow_client.search_runs([experiment_id], f"tags.`orch.key` = '{key}'", max_results=1)
    if found:
        run_id, stored = found[0].info.run_id, found[0].data.params
        mlflow_client.update_run(run_id, status="RUNNING")
    else:
        all_tags = {**tags, "orch.key": key, "orch.status": "running"}
        run_id, stored = mlflow_client.create_run(experiment_id, run_name=name, tags=all_tags).info.run_id, {}
    written = {k: json.dumps(v) if isinstance(v, (list, dict)) else str(v) for k, v in params.items()}
    entries = [mlflow().Param(k, v) for k, v in written.items() if k not in stored]  # a kill may have come between
    for start in range(0, len(entries), 100):  # MLflow takes no more at once
        mlflow_client.log_batch(run_id, params=entries[start : start + 100])
    return run_id


def log_record(uri: str, record: Record) -> None:
    """The record as an artifact, and its data sets and caches as MLflow datasets."""
    stored = {
        "format": 2,
        "method": record.method,
        "benchmark": record.benchmark,
        "recipe": record.recipe,
        "storage": record.place.remote or record.place.storage,
        "data_root": record.place.data_root,
        "facts": record.facts,
        "prepared": record.prepared,
    }
    log_json(uri, record.run_id, stored, RECORD)
    inputs = []
    for role, ready in record.prepared.items():
        if ready["fingerprint"]:
            where = record.place.data_root if ready["kind"] == "index" else record.place.folder(ready["path"])
            inputs.append(_dataset(f"{record.benchmark} {role}", ready["fingerprint"], role, where))
    client(uri).log_inputs(record.run_id, inputs)


def read_record(uri: str, run_id: str) -> Record:
    """The record of a run.

    Raises:
        ValueError: there is no such run, or it has no record.
    """
    run = found(uri, run_id)
    with artifacts.reading(uri, run_id, RECORD) as path:
        if path is None:
            place = run.info.artifact_uri
            raise ValueError(f"run {run_id} has no {RECORD} in {place}: no trial, or its files are away")
        stored = json.loads(path.read_text())
    storage = stored["storage"]
    if not store.is_remote(storage):
        storage = artifacts.own_storage(uri) or storage  # one that was moved is where its database is
    place = dataclasses.replace(mirror.place(address=storage), data_root=stored["data_root"])
    prepared = stored.get("prepared", {})
    return Record(run_id, stored["method"], stored["benchmark"], stored["recipe"], place, stored["facts"], prepared)


def warm() -> None:
    """Imports MLflow, so that a later call does not wait for it."""
    mlflow()


class EpochLog:
    """Writes the epochs of one run; epochs that are there already are not written twice."""

    def __init__(self, uri: str, run_id: str):
        self.uri, self.run_id = uri, run_id

    @functools.cached_property
    def client(self) -> Any:
        return client(self.uri)

    @functools.cached_property
    def written(self) -> set[int]:
        return {metric.step for metric in self.client.get_metric_history(self.run_id, "train/loss")}

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> None:
        if epoch in self.written:
            return
        now = int(time.time() * 1000)
        entries = [mlflow().Metric(name, float(value), now, epoch) for name, value in metrics.items()]
        self.client.log_batch(self.run_id, metrics=entries)
        self.written.add(epoch)


def pages(uri: str, run_ids: Sequence[str]) -> dict[str, str]:
    """Where the MLflow page shows runs of one experiment; of a file, where ``mlflow ui`` shows it by default."""
    if not run_ids:
        return {}
    experiment_id = client(uri).get_run(run_ids[0]).info.experiment_id
    server = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return {run_id: f"{server}/#/experiments/{experiment_id}/runs/{run_id}" for run_id in run_ids}


def campaign_run(uri: str, tag: str, storage: str, question: str, params: Mapping[str, Any]) -> str:
    """Id of a campaign's run, under which the summaries of its sweeps are nested."""
    tags, name = {"orch.campaign": tag, "orch.kind": "campaign"}, tag.rpartition("-")[0]
    return run(uri, experiment(uri, campaign_title(tag), storage, question), f"campaign/{tag}", name, tags, params)


def campaign_title(tag: str) -> str:
    """The experiment of all campaigns of a name.

    >>> campaign_title("campaign_smoke-3-0123abcd")
    'campaign_smoke'
    """
    return tag.rsplit("-", 2)[0]


def found(uri: str, run_id: str) -> Any:
    """A trial's run of MLflow.

    Raises:
        ValueError: there is none of this id, it is that of a whole sweep or campaign, or the store is not there.
    """
    check_there(uri)
    try:
        run = client(uri).get_run(run_id)
    except mlflow().MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ValueError(f"{uri} does not say what run {run_id} is: {first_line(error)}") from error
        raise ValueError(f"{uri} has no run {run_id!r}; the run id is in the table of the sweep") from error
    kind = run.data.tags.get("orch.kind", "trial")
    if kind != "trial":
        raise ValueError(f"run {run_id} is of a whole sweep or campaign ({kind}); name one of its trials")
    return run


def log_status(uri: str, run_id: str, metrics: Mapping[str, float], note: str) -> None:
    """Where a long run stands: numbers over time, and a text that its page shows on top."""
    now = int(time.time() * 1000)
    step = int(now / 1000)
    entries = [mlflow().Metric(name, float(value), now, step) for name, value in metrics.items()]
    client(uri).log_batch(run_id, metrics=entries, tags=[mlflow().RunTag("mlflow.note.content", note[:8000])])


def log_values(
    uri: str, run_id: str, metrics: Mapping[str, float] | None = None, tags: Mapping[str, str] | None = None
) -> None:
    """Final numbers and tags of a run."""
    now = int(time.time() * 1000)
    client(uri).log_batch(
        run_id,
        metrics=[mlflow().Metric(k, float(v), now, 0) for k, v in (metrics or {}).items()],
        tags=[mlflow().RunTag(k, str(v)) for k, v in (tags or {}).items()],
    )


def log_student(uri: str, run_id: str, student: Any, facts: Mapping[str, Any]) -> None:
    """The student as ``student/student.safetensors`` + ``student/student.json``, and what is stored beside it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_model(folder, student, facts)
        artifacts.put_all(uri, run_id, folder, "student")


def log_queries(uri: str, run_id: str, queries: Queries) -> None:
    """Scores of single queries as ``queries.npz``: numbers and names, nothing that runs when it is read."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez_compressed(Path(folder) / QUERIES, identity=np.asarray(queries.identity_Q), **queries.scores)
        log_file(uri, run_id, Path(folder) / QUERIES)


def stored_queries(uri: str, run_id: str) -> Queries | None:
    """What :func:`log_queries` has stored; None where there is nothing."""
    stored = _numbers(uri, run_id, QUERIES)
    return None if stored is None else Queries(stored.pop("identity"), stored)


def _numbers(uri: str, run_id: str, name: str) -> dict[str, np.ndarray] | None:
    """What is in an ``.npz`` file of a run; None where there is none."""
    with artifacts.reading(uri, run_id, name) as path:
        if path is None:
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{name} of run {run_id} is damaged ({first_line(error)}); remove it from the run's files, and "
                "evaluate stores it again"
            ) from error


def log_pairs(uri: str, run_id: str, pairs: Mapping[str, PairScores]) -> None:
    """Scores of single pairs as ``pairs.npz``, by verification set."""
    stored: dict[str, Any] = {}
    for name, one in pairs.items():
        stored |= {f"{name}/{key}": value for key, value in vars(one).items()}
    with tempfile.TemporaryDirectory() as folder:
        np.savez_compressed(Path(folder) / PAIRS, **stored)
        log_file(uri, run_id, Path(folder) / PAIRS)


def stored_pairs(uri: str, run_id: str) -> dict[str, PairScores]:
    """What :func:`log_pairs` has stored; empty where there is nothing."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in (_numbers(uri, run_id, PAIRS) or {}).items():
        name, _, field = key.rpartition("/")
        found.setdefault(name, {})[field] = value if value.ndim else value.item()
    return {name: PairScores(**fields) for name, fields in found.items()}


def student_file(uri: str, run_id: str) -> Path:
    """A local path of the run's student weights, with its JSON beside it; there until this process ends.

    Raises:
        ValueError: the run has no student (it failed, was stopped early, or is not finished).
    """
    folder = artifacts.kept(uri, run_id, "student")
    if folder is None:
        raise ValueError(f"run {run_id} has no student; only finished trials have one")
    return folder / "student.safetensors"


def log_figure(uri: str, run_id: str, figure: Any, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        figure.savefig(Path(folder) / name)
        log_file(uri, run_id, Path(folder) / name)


def pictures(uri: str, run_id: str) -> list[str]:
    """Names of the pictures among a run's artifacts."""
    return [name for name in artifacts.names(uri, run_id) if name.endswith(".png")]


def file(uri: str, run_id: str, name: str) -> bytes | None:
    """What is in a file of a run; None where there is none."""
    with artifacts.reading(uri, run_id, name) as path:
        return path.read_bytes() if path is not None else None


def log_json(uri: str, run_id: str, value: Any, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(json.dumps(value, indent=1))
        log_file(uri, run_id, Path(folder) / name)


def log_file(uri: str, run_id: str, path: str | Path, folder: str | None = None) -> None:
    artifacts.put(uri, run_id, path, folder)


def finish(uri: str, run_id: str, status: str, message: str = "") -> None:
    """Ends a run: status completed, pruned (both FINISHED in MLflow) or failed."""
    mlflow_client = client(uri)
    mlflow_client.set_tag(run_id, "orch.status", status)
    if message:
        mlflow_client.set_tag(run_id, "orch.message", message[:4000])
    mlflow_client.set_terminated(run_id, "FAILED" if status == "failed" else "FINISHED")


def runs_of(uri: str, sweep: str, kind: str = "trial") -> list[Any]:
    """MLflow runs of a sweep in the order they were created."""
    mlflow_client = client(uri)
    experiments = [e.experiment_id for e in mlflow_client.search_experiments()]
    found: list[Any] = []
    page = None
    while page is None or page.token:
        page = mlflow_client.search_runs(
            experiments,
            f"tags.`orch.sweep` = '{sweep}' and tags.`orch.kind` = '{kind}'",
            max_results=5000,
            order_by=["attributes.start_time ASC"],
            page_token=page.token if page else None,
        )
        found += page
    return found


def curve(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a run, in order of steps.

    Each step once: a worker on a node that was cut off may have written one after its trial had gone on elsewhere.
    """
    return sorted({m.step: m.value for m in client(uri).get_metric_history(run_id, metric)}.items())


def metrics_at(uri: str, run_id: str, step: int) -> dict[str, float]:
    """All metrics of a run at one step."""
    keys = client(uri).get_run(run_id).data.metrics
    found = {key: dict(curve(uri, run_id, key)) for key in keys if "/" in key}
    return {key: values[step] for key, values in found.items() if step in values}


def _dataset(name: str, digest: str, context: str, where: str) -> Any:
    api = mlflow()
    source = api.CodeDatasetSource({"location": where or "embedded"})
    dataset = api.MetaDataset(source, name=name, digest=digest[:32])
    # MLflow makes the entity itself only for the run of its fluent interface.
    return api.DatasetInput(dataset._to_mlflow_entity(), tags=[api.InputTag("mlflow.data.context", context)])
