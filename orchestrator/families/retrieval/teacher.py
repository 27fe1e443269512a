"""A teacher as a need: given as a file, or trained once and found again by what it is made from."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from models.network import configured, identity, kind_of, network_class
from orchestrator import cache, checkpoint, find
from orchestrator.families.retrieval.recipe import NOT_IN_THE_WEIGHTS
from orchestrator.needs import Need, Place, Ready
from orchestrator.recipe import Teacher, did_you_mean, flat


def teacher_need(
    teacher: Teacher, method: str, benchmark: str, training: Any, config: Any, train: Need,
    more: Mapping[str, Need] | None = None,
) -> Need:  # fmt: skip
    """The need for a frozen network.

    Args:
        teacher: the recipe's group; with weights it is a file, else a training.
        method: by which it is trained.
        benchmark: of that method, under which the training is recorded.
        training: recipe of the training.
        config: of the network; weights of another network are refused.
        train: index of its training images.
        more: what else decides it, such as a set of occluders.

    Raises:
        ValueError: there is no such file, or it holds another network.
    """
    network = {"kind": kind_of(config), "config": identity(config)}
    if teacher.weights:
        try:
            stat = os.stat(teacher.weights)
        except OSError as error:
            raise ValueError(f"teacher.weights: there is no file {teacher.weights}") from error
        _check_file(teacher.weights, config, (stat.st_size, stat.st_mtime_ns))
        made_from = {"file": teacher.weights, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, **network}
        return Need("teacher file", made_from, {"train": train}, title=f"teacher {Path(teacher.weights).name}")
    values = flat(training)
    decides = {path: value for path, value in values.items() if not path.startswith(NOT_IN_THE_WEIGHTS)}
    title = f"teacher {training.student.name} at {'×'.join(map(str, training.student.size))}"
    return Need(
        "teacher", {"method": method, "recipe": decides}, {"train": train, **(more or {})},
        title=title, trial=(method, benchmark, values),
    )  # fmt: skip


def trainer_s_recipe(trainer: str, data_name: str) -> tuple[str, Any]:
    """The first benchmark of the method that trains teachers which has a data set, and its recipe.

    Raises:
        ValueError: none has it, with the near names.
    """
    recipes = find.method(trainer).recipes
    by_data = {recipe.data.name: (benchmark, recipe) for benchmark, recipe in reversed(recipes.items())}
    if data_name not in by_data:
        raise ValueError(
            f"no benchmark of {trainer} has the data set {data_name!r}, so its teacher's recipe is not known"
            + did_you_mean(data_name, by_data)
        )
    return by_data[data_name]


@lru_cache(maxsize=16)  # every row of a table asks
def _check_file(path: str, config: Any, stamp: tuple[int, int]) -> None:
    """Before anything is prepared: the file is read whole."""
    try:
        with torch.random.fork_rng(devices=[]):
            checkpoint.load_model(path, config)
    except (ValueError, OSError) as error:
        raise ValueError(f"teacher.weights: {error}") from error


def ready_file(need: Need, place: Place) -> Ready:
    """Meets a need for a teacher that is given as a file.

    Raises:
        FileNotFoundError, ValueError: no such file, or it holds another network.
    """
    path = need.made_from["file"]
    cls = network_class(need.made_from["kind"])
    found, facts = checkpoint.load_model(path, configured(cls, need.made_from["config"]))
    told = {"classes_of_teacher": facts.get("classes_fingerprint", "")}
    return Ready(need.key, need.kind, path, cache.weights_hash(found), told)
