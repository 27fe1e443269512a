"""The only door to MLflow: experiments, runs found again by tag, metrics, models, pictures.

One experiment per sweep and benchmark; every trial is a flat run in it, so that the chart view draws all curves
at once; one summary run per sweep carries the table and the report. A run is found by its tags, never by a
remembered id: a resumed sweep writes into the same runs. Everything goes through ``MlflowClient``; the fluent
interface keeps per-process state that does not survive workers.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator import cache, checkpoint
from orchestrator.method import Place

RECORD = "record.json"


@dataclass(frozen=True)
class Record:
    """What a run says about itself; enough to evaluate or export its student again."""

    run_id: str
    method: str
    benchmark: str
    recipe: dict[str, Any]
    place: Place
    facts: dict[str, Any]


def tracking_uri(storage: str) -> str:
    """``MLFLOW_TRACKING_URI`` if set, else SQLite in the storage folder; always absolute."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if given.startswith("sqlite:///") and not given.startswith("sqlite:////"):
        return f"sqlite:///{Path(given.removeprefix('sqlite:///')).absolute()}"
    return given or f"sqlite:///{Path(storage).absolute()}/mlflow.db"


def ui_command(uri: str) -> str:
    """What a person types to look at the runs."""
    if uri.startswith("http"):
        return f"open {uri}"
    python = Path(sys.executable)
    with contextlib.suppress(ValueError):
        python = python.relative_to(Path.cwd())
    return f"{python} -m mlflow ui --backend-store-uri {uri} --workers 1"


def client(uri: str) -> MlflowClient:
    """A client whose SQLite database exists: first use by several processes at once would destroy it."""
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        with cache.locked(database.parent, database.name):
            found = MlflowClient(uri)
            found.search_experiments(max_results=1)
            return found
    return MlflowClient(uri)


def experiment(uri: str, name: str, storage: str, note: str) -> str:
    """Id of the experiment, created on first use with artifacts below the storage folder."""
    mlflow_client = client(uri)
    found = mlflow_client.get_experiment_by_name(name)
    if found is None:
        location = (
            None if uri.startswith("http") else str(Path(storage).absolute() / "artifacts" / name.replace(" ", "-"))
        )
        try:
            experiment_id = mlflow_client.create_experiment(name, artifact_location=location)
        except MlflowException:  # another sweep created it a moment ago
            experiment_id = mlflow_client.get_experiment_by_name(name).experiment_id
        mlflow_client.set_experiment_tag(experiment_id, "mlflow.note.content", note)
        mlflow_client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
        return experiment_id
    if found.lifecycle_stage == "deleted":
        raise ValueError(f"the MLflow experiment {name!r} is in the trash; restore it or empty the trash")
    return found.experiment_id


def run(uri: str, experiment_id: str, key: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any]) -> str:
    """Id of the run with tag ``orch.key`` = key; created with its parameters when there is none."""
    mlflow_client = client(uri)
    found = mlflow_client.search_runs([experiment_id], f"tags.`orch.key` = '{key}'", max_results=1)
    if found:
        mlflow_client.update_run(found[0].info.run_id, status="RUNNING")
        return found[0].info.run_id
    all_tags = {**tags, "orch.key": key, "orch.status": "running"}
    created = mlflow_client.create_run(experiment_id, run_name=name, tags=all_tags)
    entries = [Param(k, json.dumps(v) if isinstance(v, (list, dict)) else str(v)) for k, v in params.items()]
    for start in range(0, len(entries), 100):  # MLflow takes no more at once
        mlflow_client.log_batch(created.info.run_id, params=entries[start : start + 100])
    return created.info.run_id


def log_record(uri: str, record: Record) -> None:
    """The record as an artifact, and its data sets and caches as MLflow datasets."""
    mlflow_client = client(uri)
    stored = {
        "method": record.method,
        "benchmark": record.benchmark,
        "recipe": record.recipe,
        "storage": record.place.storage,
        "data_root": record.place.data_root,
        "facts": record.facts,
    }
    mlflow_client.log_dict(record.run_id, stored, RECORD)
    inputs = []
    for part in ("train", "query", "gallery", "occluders"):
        fingerprint = record.facts.get(f"{part}_fingerprint")
        if fingerprint:
            inputs.append(_dataset(f"{record.recipe['dataset']}-{part}", fingerprint, part, record.place.data_root))
    for context in ("target_cache", "gallery_cache"):
        if context in record.facts:
            name = record.facts[context]
            folder = record.place.folder("cache", name)
            inputs.append(_dataset(name.rsplit("-", 1)[0], name.rsplit("-", 1)[1], context, folder))
    mlflow_client.log_inputs(record.run_id, inputs)


def read_record(uri: str, run_id: str) -> Record:
    """The record of a run.

    Raises:
        ValueError: there is no such run, or it has no record.
    """
    try:
        path = client(uri).download_artifacts(run_id, RECORD)
    except (MlflowException, OSError) as error:
        raise ValueError(
            f"{uri} has no run {run_id!r} with a {RECORD}; the run id is in the table of the sweep"
        ) from error
    stored = json.loads(Path(path).read_text())
    place = Place(storage=stored["storage"], data_root=stored["data_root"])
    return Record(run_id, stored["method"], stored["benchmark"], stored["recipe"], place, stored["facts"])


class EpochLog:
    """Writes the epochs of one run; epochs that are there already are not written twice."""

    def __init__(self, uri: str, run_id: str):
        self.client, self.run_id = client(uri), run_id
        history = self.client.get_metric_history(run_id, "train/loss")
        self.written = {metric.step for metric in history}

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> None:
        if epoch in self.written:
            return
        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, epoch) for name, value in metrics.items()]
        self.client.log_batch(self.run_id, metrics=entries)
        self.written.add(epoch)


def log_values(
    uri: str, run_id: str, metrics: Mapping[str, float] | None = None, tags: Mapping[str, str] | None = None
) -> None:
    """Final numbers and tags of a run."""
    now = int(time.time() * 1000)
    client(uri).log_batch(
        run_id,
        metrics=[Metric(k, float(v), now, 0) for k, v in (metrics or {}).items()],
        tags=[RunTag(k, str(v)) for k, v in (tags or {}).items()],
    )


def log_student(uri: str, run_id: str, student: checkpoint.Network, facts: Mapping[str, Any]) -> None:
    """The student as ``student/student.safetensors`` + ``student/student.json``, and its classifier if it has one."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_model(folder, student, facts)
        client(uri).log_artifacts(run_id, folder, "student")


def student_file(uri: str, run_id: str) -> Path:
    """A local path of the run's student weights, with its JSON beside it.

    Raises:
        ValueError: the run has no student (it failed, was stopped early, or is not finished).
    """
    try:
        return Path(client(uri).download_artifacts(run_id, "student")) / "student.safetensors"
    except (MlflowException, OSError) as error:
        raise ValueError(f"run {run_id} has no student; only finished trials have one") from error


def log_figure(uri: str, run_id: str, figure: Any, name: str) -> None:
    client(uri).log_figure(run_id, figure, name)


def pictures(uri: str, run_id: str) -> list[str]:
    """Names of the pictures among a run's artifacts."""
    return sorted(file.path for file in client(uri).list_artifacts(run_id) if file.path.endswith(".png"))


def log_json(uri: str, run_id: str, value: Any, name: str) -> None:
    client(uri).log_text(run_id, json.dumps(value, indent=1), name)


def log_file(uri: str, run_id: str, path: str | Path, folder: str | None = None) -> None:
    client(uri).log_artifact(run_id, str(path), folder)


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
    return mlflow_client.search_runs(
        experiments,
        f"tags.`orch.sweep` = '{sweep}' and tags.`orch.kind` = '{kind}'",
        max_results=5000,
        order_by=["attributes.start_time ASC"],
    )


def curve(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a run, in order of steps."""
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, metric))


def metrics_at(uri: str, run_id: str, step: int) -> dict[str, float]:
    """All metrics of a run at one step."""
    keys = client(uri).get_run(run_id).data.metrics
    found = {key: dict(curve(uri, run_id, key)) for key in keys if "/" in key}
    return {key: values[step] for key, values in found.items() if step in values}


def artifact(uri: str, run_id: str, name: str) -> Path | None:
    """A local path of an artifact, or None."""
    try:
        return Path(client(uri).download_artifacts(run_id, name))
    except (MlflowException, OSError):
        return None


def _dataset(name: str, digest: str, context: str, where: str) -> DatasetInput:
    dataset = MetaDataset(CodeDatasetSource({"location": where or "embedded"}), name=name, digest=digest[:32])
    return DatasetInput(dataset._to_mlflow_entity(), tags=[InputTag("mlflow.data.context", context)])
