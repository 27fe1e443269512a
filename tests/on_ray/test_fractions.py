"""Several students on one GPU, by fractions: real trials on a cluster that says it has a GPU. Nothing is computed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PACKED = """
import dataclasses, os, sys
from pathlib import Path
from orchestrator import find, progress, tracking
from orchestrator.command import console
from orchestrator.launch import pool as pools, shelf, study
from orchestrator.needs import Place
from orchestrator.on_ray import environment, sweep
from search_spaces._space import SearchSpace

storage = sys.argv[1]
os.environ.update(environment.RAY)
import ray
ray.init(address="local", num_cpus=8, num_gpus=1, include_dashboard=False, object_store_memory=100 * 2**20,
         log_to_driver=False, logging_level="ERROR")

def student(job):
    import json, time
    from orchestrator.on_ray.internals import claim_placement_group
    claim_placement_group(job["claim"], 0)
    began = time.time()
    Path(storage, f"{job['name']}.began").touch()
    while len(list(Path(storage).glob("*.began"))) < 4 and time.time() < began + 120:
        time.sleep(0.1)  # however slowly processes start, four meet
    time.sleep(3)  # and a fifth would come too early
    noted = {"gpus": ray.get_gpu_ids(), "began": began, "ended": time.time()}
    Path(storage, f"{job['name']}.note").write_text(json.dumps(noted))
    return {"epoch": 1, "val/map": 1.0}

def packed(config):
    from orchestrator.on_ray import trial
    trial.worker = student
    trial.run(config)

cells = {f"row {row}": {"beta": 0.01 * (row + 1)} for row in range(6)}
space = SearchSpace(method="d3still", question="Do four fit?", cells=cells)
uri = tracking.tracking_uri(storage)
plan = shelf.new_plan("packed", space, "packed", "demo", {"d3still": find.recipe("d3still", "demo")}, Place(storage),
                      uri, 6, 6, 1, 0.25)
plan = dataclasses.replace(plan, prepared={name: {} for name in cells})
shelf.save(plan)
pool = pools.Pool(lambda: pools.Limit(6, 1.0))
pool.add(plan, progress.Board(console, plan.metric, [], 6))
pool.close()
sweep.drive(pool, packed)
print("done:", sorted(record.status for record in study.records(plan)))
"""


def test_a_quarter_of_a_gpu_each(tmp_path):
    """Four at once on the one GPU, the other two when there is room."""
    own = {**os.environ, "PYTHONPATH": str(ROOT)}
    own.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", PACKED, str(tmp_path)],
        env=own, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "done: ['completed', " in done.stdout, done.stdout + done.stderr
    notes = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("t*.note"))]
    assert [note["gpus"] for note in notes] == [[0]] * 6
    at_once = [sum(other["began"] <= note["began"] < other["ended"] for other in notes) for note in notes]
    assert max(at_once) == 4, f"never more than four quarters, and they share: {at_once}"
