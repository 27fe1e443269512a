"""Command lines as people type them, in this process, and the settings that make them run in a second."""

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

# What the tiny recipes of tests/families have, smaller still.
SMALLER = {"student.width": 0.0625, "teacher.network.width": 0.0625, "teacher.network.size": "16x16",
           "embedding_dim": 8, "train.warmup_epochs": 0, "train.constant_epochs": 3}  # fmt: skip


def call(cli: Any, *arguments: Any, code: int = 0, charset: str = "utf-8") -> Result:
    """What a command printed and how it ended; fails where that is another exit code."""
    result = CliRunner(charset=charset).invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def error(cli: Any, *arguments: Any, code: int = 2) -> str:
    """The one line that a user sees."""
    result = call(cli, *arguments, code=code)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert code != 2 or lines[0].startswith("error: "), lines[0]
    return lines[0]


def settings(*methods: str, **changes: Any) -> list[str]:
    """The ``--set`` arguments of a tiny recipe: of fields that all the methods have; None leaves one out."""
    from orchestrator import find
    from orchestrator.recipe import fields_of

    recipes = [find.recipe(method, "folder") for method in methods]
    tiny = importlib.import_module(f"families.{find.method(methods[0]).family}").TINY
    smaller = SMALLER if "embedding_dim" in tiny else {"train.epochs": 1, "train.warmup_epochs": 0}
    values = {**tiny, **smaller, **changes}
    known = [fields_of(recipe) for recipe in recipes]
    own = [name for name, value in values.items() if value is not None and all(name in paths for paths in known)]
    return [part for name in own for part in ("--set", f"{name}={values[name]}")]


@contextlib.contextmanager
def storage_at(folder: Path, **variables: str) -> Iterator[pytest.MonkeyPatch]:
    """Commands find this storage, and spend no time on pictures and on measuring speed."""
    from matplotlib.figure import Figure

    from orchestrator import figures
    from orchestrator.evaluation import cost

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORCHESTRATOR_STORAGE", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(figures, "draw", lambda picture: Figure(figsize=(1, 1)))
        patch.setattr(cost, "images_per_second", lambda network, *arguments, **options: 1000.0)
        yield patch


@contextlib.contextmanager
def replaced(file: Path, content: bytes) -> Iterator[None]:
    """A file with another content for a while; afterwards it is as old as it was, so no index is made again."""
    before, then = file.read_bytes(), file.stat()
    assert before != content
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)
        os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))


def nothing_written(storage: Path) -> bool:
    """No sweep, no teacher, no half-built cache."""
    return (
        not any((storage / "sweeps").glob("*"))
        and not any(storage.rglob("*tmp*"))
        and not any((storage / "teachers").glob("[!.]*"))
    )
