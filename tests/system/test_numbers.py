"""Numbers of a fixed small sweep of every system: what moves one of them is seen, and then meant. ``make numbers``.

``tests/regression.py`` says what is measured, and stores it anew.
"""

import json

import pytest
import regression
import torch

pytestmark = pytest.mark.slow
QUICKEST, *OTHERS = regression.sweeps()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("title", [QUICKEST, *(pytest.param(title, marks=pytest.mark.numbers) for title in OTHERS)])
def test_numbers_are_what_they_were(title, tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    expected = json.loads(regression.GOLDEN.read_text())[title]
    found = regression.measured(title, tmp_path / "runs")
    assert found.keys() == expected.keys()
    moved = [
        f"{trial}: {name} {found[trial].get(name)} was {value} ± {tolerance:.4g}"
        for trial, metrics in expected.items()
        for name, (value, tolerance) in metrics.items()
        if not abs(found[trial].get(name, float("inf")) - value) <= tolerance
    ]
    assert not moved, "\n".join(moved)
