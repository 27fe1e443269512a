"""Files of runs on this host; tests/on_ray/test_servers.py has those of a server."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from orchestrator import artifacts, tracking
from orchestrator.method import Queries


@pytest.fixture
def run(tmp_path):
    """Address and id of a run in a storage folder of its own."""
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    experiment = tracking.experiment(uri, "one", f"{tmp_path}/runs", "")
    return uri, tracking.run(uri, experiment, "key", "name", {}, {})


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where this process puts temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    artifacts._copies.cache_clear()
    yield folder
    artifacts._copies.cache_clear()


def test_files_of_this_host_are_read_where_they_are(run, temporary, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "one.txt").write_text("first")
    artifacts.put(*run, tmp_path / "made" / "one.txt")
    artifacts.put(*run, tmp_path / "made" / "one.txt", "deep")
    artifacts.put_all(*run, tmp_path / "made", "student")
    assert artifacts.names(*run) == ["deep", "one.txt", "student"]
    for name in ("one.txt", "deep/one.txt", "student/one.txt"):
        with artifacts.reading(*run, name) as path:
            assert path.read_text() == "first" and path.is_relative_to(tmp_path / "runs" / "artifacts")
        assert tracking.file(*run, name) == b"first"
    kept = artifacts.kept(*run, "student")
    assert (kept / "one.txt").read_text() == "first" and kept.is_relative_to(tmp_path / "runs")
    assert not [path for path in temporary.rglob("*") if path.is_file()], "no copy"


def test_a_file_that_is_not_there_is_none_and_leaves_nothing(run, temporary):
    with artifacts.reading(*run, "one.txt") as path:
        assert path is None
    assert tracking.file(*run, "one.txt") is None and tracking.stored_queries(*run) is None
    assert tracking.stored_pairs(*run) == {} and not list(temporary.iterdir())
    assert artifacts.kept(*run, "student") is None
    with pytest.raises(ValueError, match="has no student"):
        tracking.student_file(*run)


def test_a_name_that_leaves_the_run_is_none(run, tmp_path):
    (tmp_path / "secret.txt").write_text("not of this run")
    with artifacts.reading(*run, "../../../../secret.txt") as path:
        assert path is None


@pytest.mark.parametrize("damage", ["empty", "cut off", "another byte"])
def test_scores_that_are_damaged_are_one_line(run, tmp_path, damage):
    tracking.log_queries(*run, Queries([3, 4], {"val/map": np.array([0.5, 1.0])}))
    (file,) = (tmp_path / "runs").rglob("queries.npz")
    assert list(tracking.stored_queries(*run).scores["val/map"]) == [0.5, 1.0]
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes({
        "empty": b"", "cut off": content[:middle],
        "another byte": content[:90] + bytes([content[90] ^ 255]) + content[91:],
    }[damage])  # fmt: skip
    with pytest.raises(ValueError, match=rf"queries\.npz of run {run[1]} is damaged .*; remove it"):
        tracking.stored_queries(*run)


def test_the_storage_of_a_database_with_settings(tmp_path):
    assert artifacts.own_storage(f"sqlite:///{tmp_path}/mlflow.db?timeout=5") == str(tmp_path)
    assert artifacts.own_storage(f"sqlite:///{tmp_path}/other.db") == artifacts.own_storage("http://127.0.0.1:1") == ""


def test_a_store_that_is_no_database_is_one_line(tmp_path):
    (tmp_path / "mlflow.db").write_text("a note to somebody, longer than sixteen bytes")
    with pytest.raises(ValueError, match=r"mlflow\.db is no SQLite database"):
        tracking.found(f"sqlite:///{tmp_path}/mlflow.db", "0" * 32)
