"""A whole system of its own, found as if its files had been added: it proves what the contract carries.

Scenes of two sizes with boxes; a live teacher that looks where the student looks; labels made anew before every
epoch; a bank that is filled after every step. No file of the product knows of it.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import orchestrator.methods
import search_spaces


@contextlib.contextmanager
def added() -> Iterator[None]:
    """The method and the sweep of this folder can be named while the block runs."""
    folders = {orchestrator.methods: "methods", search_spaces: "search_spaces"}
    before = {package: list(package.__path__) for package in folders}
    for package, folder in folders.items():
        package.__path__ = [*before[package], str(Path(__file__).parent / folder)]
    try:
        yield
    finally:
        for package, paths in before.items():
            package.__path__ = paths
        for name in ("orchestrator.methods.toy", "search_spaces.toy_sweep"):
            sys.modules.pop(name, None)
