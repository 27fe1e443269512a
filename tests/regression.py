"""The fixed small sweep of every system whose numbers are stored, and what they were.

    python tests/regression.py        # measures them anew, with one thread and with two, and stores them: ten minutes

The sweeps are those of ``campaign_smoke``. A number may differ by three times what the second thread makes of it, since
sums in another order do no more, and by a fifth of a point at least.
"""

import json
import os
import tempfile
from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "golden" / "numbers.json"
LEAST = 0.002  # of a rate from 0 to 1
TIMES = 3.0

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
    return {
        label(r.point): {k: v for k, v in r.metrics.items() if not k.startswith(("perf/", "cost/", "epoch"))}
        for r in records
        if r.status == "completed"
    }


def main() -> None:
    stored = {}
    for title in sweeps():
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with tempfile.TemporaryDirectory() as storage:
                found.append(measured(title, Path(storage)))
        one, two = found
        stored[title] = {
            trial: {
                name: [
                    value,
                    max(LEAST * max(1.0, abs(value)), TIMES * abs(value - two.get(trial, metrics).get(name, value))),
                ]
                for name, value in metrics.items()
            }
            for trial, metrics in one.items()
        }
        print(title, "stored", flush=True)
    GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
