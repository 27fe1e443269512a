"""The connection to MLflow: which store, whether it answers, and a client that waits for one that is away."""

import contextlib
import fcntl
import functools
import os
import shlex
import socket
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestrator.patience import disk_is_away, first_line, patiently


@functools.cache
def mlflow() -> SimpleNamespace:
    """What is used of MLflow, imported when it is first used: 2 s, and it reads its environment then."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Calls are made again here, with a line that says so; blindly repeated, one call could make two runs.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import entities
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.tracking import MlflowClient

    return SimpleNamespace(
        CodeDatasetSource=CodeDatasetSource,
        MetaDataset=MetaDataset,
        MlflowException=MlflowException,
        get_artifact_repository=get_artifact_repository,
        MlflowClient=MlflowClient,
        DatasetInput=entities.DatasetInput,
        InputTag=entities.InputTag,
        Metric=entities.Metric,
        Param=entities.Param,
        RunTag=entities.RunTag,
    )


def tracking_uri(storage: str) -> str:
    """``MLFLOW_TRACKING_URI`` if set, else SQLite in the storage folder; always absolute."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if given.startswith("sqlite:///") and not given.startswith("sqlite:////"):
        return f"sqlite:///{Path(given.removeprefix('sqlite:///')).absolute()}"
    return given or f"sqlite:///{Path(storage).absolute()}/mlflow.db"


def ui_command(uri: str) -> str:
    """What a person types to look at the runs."""
    if uri.startswith("http"):
        return shlex.join(["open", uri])
    python = Path(sys.executable)
    with contextlib.suppress(ValueError):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", "mlflow", "ui", "--backend-store-uri", uri, "--workers", "1"])


def check(uri: str) -> None:
    """Asks the store once, so that a wrong address ends a command before anything is trained.

    Raises:
        ValueError: MLflow refuses the address, or nobody answers.
    """
    if uri.startswith("http") and any(sign in uri for sign in "@?"):
        raise ValueError(
            "MLFLOW_TRACKING_URI holds a user, a password or a token, which plans must not; put them into "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if uri.startswith("http"):
        _check_server(uri)
    if (file := database(uri)) is not None:
        _check_folder(file.parent)
    try:
        mlflow().MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # whatever a store raises, the address matters
        first = first_line(error)
        raise ValueError(
            f"MLFLOW_TRACKING_URI={uri} cannot be used: {first}; set it to sqlite:///FILE or to a running server"
        ) from error


def check_there(uri: str) -> None:
    """For what only reads: asks a server once, and looks for a SQLite database, which a client would make.

    Raises:
        ValueError: nobody answers, or there is no such file, or it is another one.
    """
    if uri.startswith("http"):
        _check_server(uri)
    if (file := database(uri)) is None:
        return
    if not file.is_file():
        raise ValueError(f"there is no {file}, where runs would be; set {_setting()} to where they are")
    with open(file, "rb") as opened:
        if opened.read(16) not in (b"", b"SQLite format 3\0"):
            raise ValueError(f"{file} is no SQLite database; set {_setting()} to where the runs are")


def database(uri: str) -> Path | None:
    """The file of a SQLite database; None of any other store."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _setting() -> str:
    """What says where the store is."""
    return "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "ORCHESTRATOR_STORAGE"


def _check_server(uri: str) -> None:
    # MLflow itself would try again for minutes.
    address = urllib.parse.urlsplit(uri)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"MLFLOW_TRACKING_URI={uri} does not answer: {error}; start the server, or unset it"
        ) from error


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"nothing can be written into {folder}: {error.strerror}; set {_setting()} to another folder"
        ) from error


def client(uri: str) -> Any:
    """A client whose SQLite database exists: first use by several processes at once would destroy it."""
    if (file := database(uri)) is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(file):
            found = mlflow().MlflowClient(uri)
            patiently(f"the MLflow store {uri}", found.search_experiments, max_results=1, away=_away)
            return Patient(found, f"the MLflow store {uri}")
    return Patient(mlflow().MlflowClient(uri), f"the MLflow server {uri}")


@dataclass(frozen=True)
class Patient:
    """A client, or a folder of files, whose calls wait for a store that is away.

    What makes something is called once: whether it went through is asked before it is tried again.
    """

    inner: Any
    what: str

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.inner, name)
        if not callable(call) or name.startswith("create_"):
            return call
        return functools.partial(patiently, self.what, call, away=_away)


def _away(error: BaseException) -> bool:
    """Whether a store may answer later: no connection, an error of the server, a database or a disk that is away."""
    code = str(getattr(error, "error_code", ""))
    text = str(error)
    return (
        disk_is_away(error)
        or code == "TEMPORARILY_UNAVAILABLE"
        or (
            text.startswith("API request to")
            and ("failed with exception" in text or "failed with error code 5" in text)
        )
        or (code == "INTERNAL_ERROR" and ("psycopg2" in text or "sqlite3.OperationalError" in text))
    )


def made(uri: str, make: Any, *arguments: Any) -> Any:
    """Something that looks for what it makes before it makes it, tried until it is there."""
    return patiently(
        f"the MLflow {'server' if uri.startswith('http') else 'store'} {uri}", make, *arguments, away=_away
    )


@contextlib.contextmanager
def _only_one(database: Path) -> Iterator[None]:
    """One process of this host at a time; the system frees it when its holder dies. SQLite is never on a network."""
    locks = database.parent / "cache" / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / f"{database.name}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
