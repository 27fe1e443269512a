"""Train the teacher of a method's recipe: ``python -m orchestrator.teacher d3still --on demo``."""

import typer

from orchestrator import command, find, on_ray
from orchestrator.command import console


@command.app
def main(
    method: str = typer.Argument(..., help="The method that will use the teacher.", metavar="METHOD"),
    on: str = command.ON,
    data_root: str = command.DATA_ROOT,
    workers: int = command.WORKERS,
    gpus_per_worker: float = command.GPUS,
    settings: list[str] = command.SET,
) -> None:
    """Trains the teacher (once: a teacher is found again by its recipe and its training images)."""
    found = find.method(method)
    recipes, place = command.resolve(
        command.single(method), on, command.parse_settings(settings), None, data_root, workers
    )
    if not found.has_teacher:
        raise ValueError(f"{method} has no teacher")
    with on_ray.cluster():
        gpus = on_ray.default_gpus() if gpus_per_worker is None else gpus_per_worker
        folder = command.train_teacher(method, recipes[method], on, place, workers, gpus)
    if not folder:
        raise ValueError(f"this recipe of {method} trains no teacher: it uses none, or its weights are given")
    console.print(f"teacher: {folder}/teacher.safetensors")


if __name__ == "__main__":
    main()
