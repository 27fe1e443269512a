"""Take a student away: ``python -m orchestrator.export RUN_ID --format onnx|safetensors [--to DIR]``."""

import enum
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import typer

from orchestrator import checkpoint, command, tracking
from orchestrator.command import AFTER_TRAINING, console
from orchestrator.launch import plan as plans
from orchestrator.launch import trial

_TOLERANCE = 1e-4  # largest difference of normalised embeddings between torch and ONNX Runtime


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
    uri = tracking.tracking_uri(plans.storage())
    record = tracking.read_record(uri, run_id)
    _, settled = command.settings_after_training(record.method, trial.recipe_of(record), settings)
    other = {path.rpartition(".")[2]: value for path, value in settled.items()}
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


def export_onnx(student: checkpoint.Model, path: Path) -> float:
    """Writes an ONNX graph with a free batch size and compares it with torch.

    A network that is told the camera has a second input, ``camera``, its number for every image.

    Returns:
        Largest difference of L2-normalised embeddings on eight random images.

    Raises:
        ValueError: the difference is above 1e-4; the file is removed.
    """
    import onnxruntime

    size = student.config.image_size
    images = torch.randn(8, 3, *size, generator=torch.Generator().manual_seed(0))
    cameras = getattr(student.config, "cameras", 0)
    inputs = {"images": images} | ({"camera": torch.arange(8) % cameras} if cameras else {})
    batch = torch.export.Dim("batch", min=1)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            student.eval(), tuple(inputs.values()), str(partial), input_names=list(inputs),
            output_names=["embedding"], dynamic_shapes=tuple({0: batch} for _ in inputs), dynamo=True,
            external_data=False, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected = student(*inputs.values()).numpy()
    difference = float(np.abs(_unit(exported) - _unit(expected)).max())
    if not difference <= _TOLERANCE:
        partial.unlink()
        raise ValueError(f"the ONNX file differs from the student by {difference:.1e}, more than {_TOLERANCE:.0e}")
    os.replace(partial, path)
    return difference


def _unit(embedding: np.ndarray) -> np.ndarray:
    return embedding / np.linalg.norm(embedding, axis=1, keepdims=True).clip(1e-12)


if __name__ == "__main__":
    main()
