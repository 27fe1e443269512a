"""Numbers of a fixed small sweep of every system: what moves one of them is seen, and then meant. ``make numbers``.

``tests/regression.py`` says what is measured, and stores it anew.
"""

import json

import pytest
import regression
import torch

pytestmark = pytest.mark.slow
QUICKEST, *OTHERS = regression.sweeps()


def test_every_trial_keeps_a_score_and_a_loss_that_have_hardly_drifted():
    stored = json.loads(regression.GOLDEN.read_text())
    assert sorted(stored) == sorted(regression.sweeps())
    for title, trials in stored.items():
        for trial, numbers in trials.items():
            scores = [n for n in numbers if n.endswith(", untrained") and not n.startswith(regression.TRAINED)]
            losses = [n for n in numbers if n.startswith("loss/") and n.endswith(", step 1")]
            assert scores and losses, f"{title}, {trial}: {list(numbers)}"


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
