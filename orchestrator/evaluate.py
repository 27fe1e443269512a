"""Evaluate a finished run again, from its record alone: ``python -m orchestrator.evaluate RUN_ID``."""

import typer

from orchestrator import checkpoint, command, find, tracking
from orchestrator.command import AFTER_TRAINING, console
from orchestrator.evaluation import cost
from orchestrator.method import Place, changed, recipe_from


@command.app
def main(
    run_id: str = typer.Argument(..., help="From the table of a sweep, or the MLflow page.", metavar="RUN_ID"),
    data_root: str = typer.Option("", "--data-root", help="If the data lie elsewhere now.", metavar="DIR"),
    settings: list[str] = AFTER_TRAINING,
) -> None:
    """Embeds and searches again with the stored student; prints every metric beside the logged one."""
    uri = tracking.tracking_uri(command.storage())
    record = tracking.read_record(uri, run_id)
    method = find.method(record.method)
    if method.evaluate is None:
        raise ValueError(f"{record.method} cannot be evaluated from a record")
    place = Place(record.place.storage, data_root or record.place.data_root)
    recipe = recipe_from(find.recipe(record.method, record.benchmark), record.recipe)
    other = command.settings_after_training(record.method, recipe, settings)
    scored = method.for_evaluation(changed(recipe, other))
    now = method.prepare(scored, place)
    command.check_fingerprints({name: fact for name, fact in record.facts.items() if name in now}, now)
    student, facts = checkpoint.load_model(tracking.student_file(uri, run_id))
    metrics = method.evaluate(checkpoint.reconfigured(student, other), scored, place)
    console.print(f"{record.method} on {record.benchmark}: {now['protocol']}")
    for name, value in other.items():
        console.print(f"  {name} {value} (trained with {getattr(recipe, name)})")
    for name, value in metrics.items():
        logged = facts["metrics"].get(name)
        console.print(f"  {name:18} {value:.6f}" + (f"   (logged {logged:.6f})" if logged is not None else ""))
    console.print(f"  {'GMACs':18} {cost.macs(student) / 1e9:.6f}")


if __name__ == "__main__":
    main()
