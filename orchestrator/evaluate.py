"""Evaluate a finished run again, from its record alone: ``python -m orchestrator.evaluate RUN_ID``."""

import dataclasses

import torch
import typer

from orchestrator import checkpoint, command, find, tracking
from orchestrator.command import AFTER_TRAINING, console
from orchestrator.evaluation import cost
from orchestrator.launch import before, preparing, shelf, trial
from orchestrator.launch.runner import InProcess
from orchestrator.method import Where
from orchestrator.progress import PreparationBar
from orchestrator.recipe import value_of


@command.app
def main(
    run_id: str = typer.Argument(..., help="From the table of a sweep, or the MLflow page.", metavar="RUN_ID"),
    data_root: str = typer.Option("", "--data-root", help="If the data lie elsewhere now.", metavar="DIR"),
    settings: list[str] = AFTER_TRAINING,
) -> None:
    """Embeds and searches again with the stored student; prints every metric beside the logged one."""
    uri = tracking.tracking_uri(shelf.storage())
    record = tracking.read_record(uri, run_id)
    method = find.method(record.method)
    place = dataclasses.replace(record.place, data_root=data_root or record.place.data_root)
    recipe = trial.recipe_of(record)
    scored, other = command.settings_after_training(record.method, recipe, settings)
    then = preparing.fingerprints([record.prepared]) or before.fingerprints(record.facts)
    with PreparationBar(console) as bar:
        prepared = preparing.for_scoring(record.method, scored, place, InProcess(), bar, then)
    student, facts = checkpoint.load_model(tracking.student_file(uri, run_id))
    student = checkpoint.reconfigured(student, {path.rpartition(".")[2]: value for path, value in other.items()})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = Where(place, 0, 1, device)
    evaluation = method.score(student.to(device), scored, prepared, where)
    metrics = evaluation.metrics
    if evaluation.queries is not None and not other and tracking.stored_queries(uri, run_id) is None:
        tracking.log_queries(uri, run_id, evaluation.queries)  # a run of a version that did not store them
    if evaluation.pairs and not other and not tracking.stored_pairs(uri, run_id):
        tracking.log_pairs(uri, run_id, evaluation.pairs)
    console.print(f"{record.method} on {record.benchmark}: {prepared.told().get('protocol', '')}", markup=False)
    for path, value in other.items():
        console.print(f"  {path} {value} (trained with {value_of(recipe, path)})", markup=False)
    for name, value in metrics.items():
        logged = facts["metrics"].get(name)
        console.print(f"  {name:18} {value:.6f}" + (f"   (logged {logged:.6f})" if logged is not None else ""))
    console.print(f"  {'GMACs':18} {cost.macs(student.cpu()) / 1e9:.6f}")


if __name__ == "__main__":
    main()
