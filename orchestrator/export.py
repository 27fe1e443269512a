"""Take a student away: ``python -m orchestrator.export RUN_ID --format onnx|safetensors [--to DIR]``."""

import enum
import shutil
import tempfile
from pathlib import Path

import typer

from orchestrator import checkpoint, command, tracking
from orchestrator.command import AFTER_TRAINING, console
from orchestrator.launch import shelf, trial
from orchestrator.onnx_file import export_onnx, onnx_files


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

    An ONNX file runs without this project; safetensors are rebuilt from the JSON, with all that was stored beside.
    """
    uri = tracking.tracking_uri(shelf.storage())
    record = tracking.read_record(uri, run_id)
    _, settled = command.settings_after_training(record.method, trial.recipe_of(record), settings)
    other = {path.rpartition(".")[2]: value for path, value in settled.items()}
    stored = tracking.student_file(uri, run_id)
    student, facts = checkpoint.load_model(stored)
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
        written = onnx_files(student, folder / f"{name}.onnx").values()
        console.print(f"ONNX Runtime and torch differ by at most {difference:.1e} on random images")
        with tempfile.TemporaryDirectory() as whole:
            checkpoint.save_model(whole, student, {**facts, "run_id": run_id}, name)
            shutil.copy(Path(whole) / f"{name}.json", folder)
    else:
        extras = checkpoint.load_extras(stored)
        checkpoint.save_model(folder, student, {**facts, "run_id": run_id}, name, extras)
        written = [folder / f"{name}.safetensors"]
    console.print(f"{', '.join(map(str, written))} and {name}.json")


if __name__ == "__main__":
    main()
