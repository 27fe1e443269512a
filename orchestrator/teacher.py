"""Train the teacher of a method's recipe: ``python -m orchestrator.teacher d3still --on demo``."""

import dataclasses

import typer

from orchestrator import command, find, tracking
from orchestrator.command import console
from orchestrator.launch import asked, shelf
from orchestrator.launch import plan as plans
from orchestrator.launch.plan import Plan
from orchestrator.launch.preparing import Preparation
from orchestrator.progress import PreparationBar
from orchestrator.recipe import flat


@command.app
def main(
    method: str = typer.Argument(..., help="The method that will use the teacher.", metavar="METHOD"),
    on: str = command.ON,
    data_root: str = command.DATA_ROOT,
    workers: int = command.WORKERS,
    gpus_per_worker: float = command.GPUS,
    settings: list[str] = command.SET,
    in_process: bool = command.IN_PROCESS,
) -> None:
    """Trains the teacher (once: a teacher is found again by its recipe and its training images)."""
    space, given = plans.single(method), command.parse_settings(settings)
    recipes, place = asked.resolve(space, on, given, None, data_root, workers)
    uri = tracking.tracking_uri(place.storage)
    needs = find.method(method).needs(recipes[method], place)
    trained = [need for need in needs.values() if need.trial is not None]
    if not trained:
        raise ValueError(f"this recipe of {method} trains no teacher: it uses none, or its weights are given")
    command.check_servers(uri, shelf.study_address(place))
    with command.runner(in_process) as runner, PreparationBar(console) as bar:
        runner.admit(place, uri)
        gpus = command.gpus_of(runner, gpus_per_worker)
        runner.concurrent(workers, gpus, 1)
        plan = Plan(
            folder="", space=f"teacher of {method}", title="", benchmark=on, recipes={method: flat(recipes[method])},
            place=dataclasses.asdict(place), tracking_uri=uri, trials=1, workers=workers, gpus_per_worker=gpus,
        )  # fmt: skip
        preparation = Preparation(plan, runner, bar)
        paths = [place.folder(preparation.meet(method, need).path) for need in trained]
    for path in paths:
        console.print(f"teacher: {path}")


if __name__ == "__main__":
    main()
