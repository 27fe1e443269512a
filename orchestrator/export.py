"""Take a student away: ``python -m orchestrator.export RUN_ID --format onnx|safetensors [--to DIR]``."""

import enum
import shutil
import tempfile
from pathlib import Path

import typer

from orchestrator import checkpoint, command, find, tracking
from orchestrator.command import AFTER_TRAINING, console
from orchestrator.method import recipe_from
from orchestrator.onnx_file import export_onnx


class Format(enum.StrEnum):
    onnx = "onnx"
    safetensors = "safetensors"


@command.app
def main(
    run_id: str = typer.Argument(..., help="From the table of a sweep, or the MLflow page.", metavar="RUN_ID"),
    form: Format = typer.Option(Format.safetensors, "--format"),
    to: str = typer.Option(".", "--to", help="Folder for the files.", metavar="DIR"),
    settings: list[str] = AFTER_TRAINING,
) -> None:
    """Writes the student and a JSON file that says how to feed it and how it is built.

    An ONNX file runs without this project; safetensors are loaded by models.embedder or rebuilt from the JSON.
    """
    uri = tracking.tracking_uri(command.storage())
    record = tracking.read_record(uri, run_id)
    recipe = recipe_from(find.recipe(record.method, record.benchmark), record.recipe)
    other = command.settings_after_training(record.method, recipe, settings)
    student, facts = checkpoint.load_model(tracking.student_file(uri, run_id))
    name = "-".join([record.method, record.benchmark, run_id[:8], *(f"{k}-{v}" for k, v in other.items())])
    if other:
        without = [setting for setting in other if not hasattr(student.config, setting)]
        if without:
            raise ValueError(f"{without[0]} changes how a network is scored, not the network; leave it out")
        student = checkpoint.reconfigured(student, other)
        # The metrics are those of the network as it was trained.
        facts = {k: v for k, v in facts.items() if k != "metrics"} | {"not_as_trained": other}
    folder = Path(to)
    folder.mkdir(parents=True, exist_ok=True)
    if form is Format.onnx:
        difference = export_onnx(student, folder / f"{name}.onnx")
        console.print(f"ONNX Runtime and torch differ by at most {difference:.1e} on random images")
        with tempfile.TemporaryDirectory() as whole:
            checkpoint.save_model(whole, student, {**facts, "run_id": run_id}, name)
            shutil.copy(Path(whole) / f"{name}.json", folder)
    else:
        checkpoint.save_model(folder, student, {**facts, "run_id": run_id}, name)
    console.print(f"{folder / name}.{form.value} and {name}.json")


if __name__ == "__main__":
    main()
