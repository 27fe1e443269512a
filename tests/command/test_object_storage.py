"""A storage that is a URI: hosts with copies of their own share nothing else but databases."""

import contextlib

import pytest
from command.typed import call, error, settings, storage_at

from orchestrator import evaluate, sweep, tracking
from orchestrator.launch import shelf, study


@pytest.fixture
def host(tmp_path):
    """Makes a host: commands in the block find the storage, and keep their copies in a folder of the host's name."""

    @contextlib.contextmanager
    def made(name: str, storage: str = f"file://{tmp_path}/objects"):
        own = {
            "ORCHESTRATOR_STORAGE": storage, "ORCHESTRATOR_CACHE": str(tmp_path / name),
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "OPTUNA_STORAGE": f"sqlite:///{tmp_path}/optuna.db",
        }  # fmt: skip
        with storage_at(tmp_path, **own) as patch:
            yield patch

    return made


def test_what_one_host_has_made_another_uses(host, data, tmp_path):
    asked = ["d3still_alpha", *data, "--trials", 1, *settings("d3still")]
    with host("one"):
        shown = call(sweep.main, *asked).output
        assert "trained now, kept for all sweeps" in shown
    with host("two"):
        shown = call(sweep.main, *asked).output
        assert "trained now" not in shown and "1 completed" in shown
        assert shelf.latest("d3still_alpha").sweep == "d3still_alpha-folder-2"
        assert "1 completed" in call(sweep.main, "d3still_alpha", *data[:2], "--resume", "--in-process").output
    with host("three", storage=""):  # knows the MLflow store and nothing else
        plans = tracking.client(f"sqlite:///{tmp_path}/mlflow.db").search_experiments()
        runs = tracking.client(f"sqlite:///{tmp_path}/mlflow.db").search_runs([e.experiment_id for e in plans])
        trial = next(
            r for r in runs if r.data.tags.get("orch.kind") == "trial" and r.data.tags["orch.space"] == asked[0]
        )
        assert "(logged " in call(evaluate.main, trial.info.run_id).output
    with host("four"):
        assert [r.status for r in study.records(shelf.latest("d3still_alpha"))] == ["completed"]
    assert not list((tmp_path / "objects").rglob("*.db"))


def test_databases_are_asked_for(host, data):
    asked = ["d3still_alpha", *data, *settings("d3still")]
    with host("one") as patch:
        patch.delenv("OPTUNA_STORAGE")
        assert "can hold no database: set OPTUNA_STORAGE to one that every driver reaches" in error(sweep.main, *asked)
        patch.delenv("MLFLOW_TRACKING_URI")
        assert "can hold no database: set MLFLOW_TRACKING_URI to a server" in error(sweep.main, *asked)
