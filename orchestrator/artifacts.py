"""Files of runs: put there and read, wherever MLflow keeps them.

MLflow's client copies a file into a new temporary folder whenever it is read, one that lies on this host too, and
never removes the copy. Here files of this host are read where they are; what a server or a bucket holds is copied
for as long as it is used.
"""

import contextlib
import functools
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.mlflow_store import Patient, client, database, mlflow


def put(uri: str, run_id: str, path: str | Path, folder: str | None = None) -> None:
    """One file, into a folder of the run or beside its other files."""
    _files(uri, run_id).log_artifact(str(path), folder)


def put_all(uri: str, run_id: str, path: str | Path, folder: str) -> None:
    """All files of a folder."""
    _files(uri, run_id).log_artifacts(str(path), folder)


def names(uri: str, run_id: str) -> list[str]:
    """Files and folders of a run, those within folders left out."""
    return sorted(file.path for file in _files(uri, run_id).list_artifacts())


@contextlib.contextmanager
def reading(uri: str, run_id: str, name: str) -> Iterator[Path | None]:
    """A path of a run's file or folder, None where there is none; a copy of it is gone afterwards."""
    with contextlib.ExitStack() as copies:
        yield _path(uri, run_id, name, lambda: copies.enter_context(tempfile.TemporaryDirectory()))


def kept(uri: str, run_id: str, name: str) -> Path | None:
    """A path of a run's file or folder, None where there is none; a copy of it stays until this process ends."""
    return _path(uri, run_id, name, lambda: tempfile.mkdtemp(dir=_copies().name))


@functools.cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="orchestrator-runs-")


def _path(uri: str, run_id: str, name: str, copies: Callable[[], str]) -> Path | None:
    try:
        files = _files(uri, run_id)
        return Path(files.download_artifacts(name, None if _is_here(files.artifact_uri) else copies()))
    except (mlflow().MlflowException, OSError):
        return None


def own_storage(uri: str) -> str:
    """The storage folder whose own database this is; empty where MLflow is somewhere else."""
    file = database(uri)
    return str(file.parent) if file is not None and file.name == "mlflow.db" else ""


def _files(uri: str, run_id: str) -> Any:
    """MLflow's repository of a run's files: a folder of this host, or what a server or a bucket holds."""
    recorded = client(uri).get_run(run_id).info.artifact_uri
    if _is_here(recorded):
        recorded = _moved(own_storage(uri), recorded.removeprefix("file://")) or recorded
    return Patient(mlflow().get_artifact_repository(recorded, uri), f"the files of run {run_id}")


def _is_here(address: str) -> bool:
    return urllib.parse.urlsplit(address).scheme in ("", "file")


def _moved(storage: str, recorded: str) -> str:
    """Where a run's folder is in a storage folder that was moved: MLflow's database holds where it once was.

    Empty where it is where the database says, or not in a storage folder at all.
    """
    if not storage or recorded.startswith(f"{storage}/") or "/artifacts/" not in recorded:
        return ""
    then = Path(recorded).parents[3]
    here = Path(storage, Path(recorded).relative_to(then))
    if not here.is_dir() and then.is_dir() and not (then / "mlflow.db").exists():
        return ""  # nothing was moved: somebody keeps the database beside another storage
    # Also of runs that began after the move: MLflow's experiments never change their location.
    return str(here)
