"""The fixed small sweep of every system whose numbers are stored, and what they were.

    python tests/regression.py [SWEEP …]   # measures them anew in three ways and stores them: half an hour

The sweeps are those of ``campaign_smoke``; of every trial its last metrics, its losses after the first epoch, which
have drifted less, and what has hardly drifted: the losses of its first step, and its scores before that. Sums in
another order make other numbers, and every processor has an order of its own: two threads, and convolutions by torch
itself instead of oneDNN, show what that does. Each number may differ by a fiftieth of its value, by ten times what
either makes of it, by three times what either makes of it in another trial of the sweep, and a score that counts
queries by three points: one of 40 moves it by 2.5. What may differ by a quarter of its value says little and is not
kept.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).parent / "golden" / "numbers.json"
LEAST = 0.02  # of the value
LEAST_SCORE = 0.03  # of a score from 0 to 1
TIMES = 10.0
TIMES_OTHERS = 3.0  # a trial may have been lucky in both ways
MOST = 0.25  # of the value
TRAINED = ("loss/", "train/")  # everything else is a score or a count
MEANS = ("map", "minp", "ap", "auc")  # scores that one query hardly moves

Numbers = dict[str, dict[str, float]]  # trial -> metric -> value


def sweeps() -> list[str]:
    """Titles of all sweeps, the quickest first."""
    from orchestrator import find

    order = ["rsiamnet_consistency", "ddps_temperature", "d3still_alpha", "sureid_alignment", "face_weights"]
    titles = [sweep.title for sweep in find.campaign("campaign_smoke").sweeps]
    return sorted(titles, key=lambda title: order.index(title.split()[0]))


def measured(title: str, storage: Path) -> Numbers:
    """Every evaluated metric of every trial, run in this process with its threads."""
    from rich.console import Console

    from orchestrator import find, tracking
    from orchestrator.launch import campaign, preparing, shelf
    from orchestrator.launch.runner import InProcess, driving
    from orchestrator.progress import Board, PreparationBar, label

    os.environ["ORCHESTRATOR_STORAGE"] = str(storage)
    (asked,) = [one for one in campaign.resolved(find.campaign("campaign_smoke"), {}) if one.sweep.title == title]
    plan = shelf.new_plan(
        asked.sweep.space, asked.space, title, asked.sweep.on, asked.recipes, asked.place,
        tracking.tracking_uri(str(storage)), asked.total, 1, 1, 0.0,
    )  # fmt: skip
    quiet = Console(quiet=True)
    with driving(plan), PreparationBar(quiet) as bar:
        plan = preparing.prepared(plan, InProcess(), bar)
        records = InProcess().sweep(plan, Board(quiet, plan.metric, [], plan.trials))
    assert {r.status for r in records} <= {"completed", "pruned"}, [r.message for r in records]
    uri = plan.tracking_uri
    return {
        label(r.point): _last(r.metrics) | _first(uri, r.run_id) | _untrained(plan, r.point)
        for r in records
        if r.status == "completed"
    }


def _last(metrics: dict[str, float]) -> dict[str, float]:
    """Without what is time, or another metric times its weight."""
    left_out = ("perf/", "cost/", "epoch", "loss_weighted/")
    return {name: value for name, value in metrics.items() if not name.startswith(left_out)}


def _first(uri: str, run_id: str) -> dict[str, float]:
    """Losses after the first epoch."""
    from orchestrator import tracking

    client = tracking.client(uri)
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith("loss/")]
    return {
        f"{name}, epoch 1": min(client.get_metric_history(run_id, name), key=lambda one: one.step).value
        for name in names
    }


def _untrained(plan: Any, point: Mapping[str, Any]) -> dict[str, float]:
    """Scores of the student that has learned nothing, and the losses of its first step."""
    from orchestrator import find
    from orchestrator.method import Where

    method, recipe = plan.recipe_of(point)
    where = Where(plan.where, 0, 1, torch.device("cpu"))
    made = find.method(method).experiment(recipe, plan.prepared_for(point), where)
    with torch.no_grad():
        scored = made.evaluate(made.task.eval()).metrics
        if made.start_epoch is not None:
            made.start_epoch(made.task, 1)
    losses = made.task.train()(next(iter(made.batches(1))))
    return {f"{name}, untrained": value for name, value in scored.items()} | {
        f"loss/{name}, step 1": term.item() for name, term in losses.terms.items()
    }


def _kept(numbers: Numbers, others: list[Numbers]) -> dict[str, dict[str, list[float]]]:
    """Value and tolerance of every metric of every trial that says something."""
    drift = {
        (trial, name): max(abs(value - other.get(trial, {}).get(name, value)) for other in others)
        for trial, metrics in numbers.items()
        for name, value in metrics.items()
    }
    kept: dict[str, dict[str, list[float]]] = {}
    for trial, metrics in numbers.items():
        kept[trial] = {}
        for name, value in metrics.items():
            of_all = max(found for (_, other), found in drift.items() if other == name)
            counts = not name.startswith(TRAINED) and name.partition(",")[0].rpartition("/")[2] not in MEANS
            least = LEAST_SCORE if counts else 0.0
            tolerance = max(TIMES * drift[trial, name], TIMES_OTHERS * of_all, LEAST * abs(value), least)
            if value != 0.0 and tolerance <= MOST * abs(value):  # of 0 no share can be taken
                kept[trial][name] = [value, tolerance]
    return kept


def main() -> None:
    stored, asked = json.loads(GOLDEN.read_text()), sys.argv[1:]
    if unknown := set(asked) - {title.split()[0] for title in sweeps()}:
        raise SystemExit(f"unknown sweeps {', '.join(unknown)}; there are {', '.join(sweeps())}")
    for title in (title for title in sweeps() if not asked or title.split()[0] in asked):
        found = []
        for threads, library in ((1, True), (2, True), (1, False)):
            torch.set_num_threads(threads)
            with tempfile.TemporaryDirectory() as storage, torch.backends.mkldnn.flags(enabled=library):
                found.append(measured(title, Path(storage)))
        stored[title] = _kept(found[0], found[1:])
        GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")
        print(f"{title}: {sum(map(len, stored[title].values()))} numbers stored", flush=True)


if __name__ == "__main__":
    main()
