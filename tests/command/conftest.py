"""One storage for all command lines, with one trained teacher and one finished sweep."""

import shutil
from pathlib import Path

import pytest
from command.typed import call, settings, storage_at

from search_spaces._space import Float, Int, SearchSpace

ALPHA = {"method": "d3still", "tune": {"alpha": Float(5.0, 1000.0, log=True)}, "picture": ("alpha",)}

# Spaces of the tests, beside those of search_spaces.
SPACES = {
    "interrupted": SearchSpace(
        **ALPHA, question="Does it go on?", start=({"alpha": 100.0}, {"alpha": 50.0}), early_stopping=False
    ),
    "fingerprints": SearchSpace(**ALPHA, question="Is it what it was?", start=({"alpha": 100.0},)),
    "given": SearchSpace(**ALPHA, question="Is it the same teacher?", start=({"alpha": 100.0},)),
    "rates": SearchSpace(
        method="d3still", question="Who is stopped?", tune={"train.rate": Float(1e-4, 0.05)},
        start=({"train.rate": 0.05},),
    ),
    "unknown metric": SearchSpace(**ALPHA, question="How fast?", metric="val/ma"),
    "refused": SearchSpace(
        method="d3still", question="Which can be run?", tune={"together": Int(1, 3)}, early_stopping=False
    ),
    "ends": SearchSpace(
        method="d3still", question="How can a trial end?", cells={"good": {}, "explodes": {"train.rate": 1e30}},
        seeds=(0, 1),
    ),
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def quick_databases():
    """Databases are not forced to the disk: nobody pulls the plug of a test."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def quick(connection, record):
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", quick)
    yield
    event.remove(Engine, "connect", quick)


@pytest.fixture(scope="session")
def storage(tmp_path_factory, quick_disk) -> Path:
    return tmp_path_factory.mktemp("commands") / "runs"


@pytest.fixture(autouse=True)
def here(storage, monkeypatch):
    """The storage of the session is the one that commands find, and the spaces of the tests are known."""
    from orchestrator import find

    known = find.space
    monkeypatch.setattr(find, "space", lambda name: SPACES.get(name) or known(name))
    with storage_at(storage):
        yield


@pytest.fixture
def empty(tmp_path):
    """An empty storage instead."""
    with storage_at(tmp_path / "runs"):
        yield tmp_path / "runs"


@pytest.fixture(scope="session")
def root(tiny_root, tmp_path_factory) -> Path:
    """A copy of the tiny data set of which a test may change a file for a while."""
    return Path(shutil.copytree(tiny_root, tmp_path_factory.mktemp("data") / "tiny"))


@pytest.fixture(scope="session")
def data(root) -> list[str]:
    """The arguments that name the data."""
    return ["--on", "folder", "--data-root", str(root), "--in-process"]


@pytest.fixture(scope="session")
def trained(storage, data) -> str:
    """What the command printed that trained the teacher of all tiny recipes."""
    from orchestrator import teacher

    with storage_at(storage):
        return call(teacher.main, "d3still", *data, *settings("d3still")).output


@pytest.fixture(scope="session")
def swept(storage, data, trained) -> str:
    """What a sweep of two trials over α printed."""
    from orchestrator import sweep

    with storage_at(storage):
        return call(sweep.main, "d3still_alpha", *data, "--trials", 2, *settings("d3still")).output


@pytest.fixture
def best(swept):
    """The record of the sweep's best trial."""
    from orchestrator.launch import shelf, study

    return study.ranked(study.records(shelf.latest("d3still_alpha")))[0]
