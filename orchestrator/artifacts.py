"""Files of runs: put there and read, wherever MLflow keeps them.

MLflow's client copies a file into a new temporary folder whenever it is read, one that lies on this host too, and
never removes the copy. Here files of this host are read where they are; what a server or a bucket holds is copied
for as long as it is used.
"""

import contextlib
import functools
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.mlflow_store import Patient, client, database, mlflow


def put(uri: str, run_id: str, path: str | Path, folder: str | None = None) -> None:
    """One file, into a folder of the run or beside its other files."""
    here = _here(uri, run_id)
    if here is not None:
        here.log_artifact(str(path), folder)
    else:
        client(uri).log_artifact(run_id, str(path), folder)


def put_all(uri: str, run_id: str, path: str | Path, folder: str) -> None:
    """All files of a folder."""
    here = _here(uri, run_id)
    if here is not None:
        here.log_artifacts(str(path), folder)
    else:
        client(uri).log_artifacts(run_id, str(path), folder)


def names(uri: str, run_id: str) -> list[str]:
    """Files and folders of a run, those within folders left out."""
    here = _here(uri, run_id)
    listed = here.list_artifacts() if here is not None else client(uri).list_artifacts(run_id)
    return sorted(file.path for file in listed)


@contextlib.contextmanager
def reading(uri: str, run_id: str, name: str) -> Iterator[Path | None]:
    """A path of a run's file or folder, None where there is none; a copy of it is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield _path(uri, run_id, name, folder)


def kept(uri: str, run_id: str, name: str) -> Path | None:
    """A path of a run's file or folder, None where there is none; a copy of it stays until this process ends."""
    return _path(uri, run_id, name, tempfile.mkdtemp(dir=_copies().name))


@functools.cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="orchestrator-runs-")


def _path(uri: str, run_id: str, name: str, copies: str) -> Path | None:
    try:
        here = _here(uri, run_id)
        if here is not None:
            return Path(here.download_artifacts(name))
        return Path(client(uri).download_artifacts(run_id, name, copies))
    except (mlflow().MlflowException, OSError):
        return None


def own_storage(uri: str) -> str:
    """The storage folder whose own database this is; empty where MLflow is somewhere else."""
    file = database(uri)
    return str(file.parent) if file is not None and file.name == "mlflow.db" else ""


def _here(uri: str, run_id: str) -> Any:
    """The run's folder where it is one of this host; None where a server or a bucket keeps its files."""
    recorded = client(uri).get_run(run_id).info.artifact_uri
    address = urllib.parse.urlsplit(recorded)
    if address.scheme not in ("", "file"):
        return None
    folder = _moved(own_storage(uri), recorded.removeprefix("file://"))
    return Patient(mlflow().LocalArtifactRepository(folder or recorded), f"the files of run {run_id}")


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
