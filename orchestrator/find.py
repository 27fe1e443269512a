"""Names to objects, by file name: adding a method, a data set or a sweep is adding its file."""

import importlib
import inspect
import pkgutil
import threading
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from orchestrator.recipe import did_you_mean
from search_spaces._campaign import Campaign

if TYPE_CHECKING:
    from orchestrator.method import Method


_loading = threading.RLock()  # torchvision and timm import in circles: two threads would wait for each other


def names(package: str) -> list[str]:
    """File names of a package that can be named on a command line (those not starting with "_")."""
    return sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__) if m.name[0] != "_")


def methods() -> list[str]:
    return [name for name in names("orchestrator.methods") if hasattr(_module("orchestrator.methods", name), "METHOD")]


def datasets() -> list[str]:
    return [name for name in names("orchestrator.datasets") if _reader(name)]


def method(name: str) -> "Method":
    """``METHOD`` of ``orchestrator/methods/<name>.py``; raises ValueError with the near names."""
    return _found("orchestrator.methods", "METHOD", name, "method", methods)


def dataset(name: str) -> Any:
    """``load`` of ``orchestrator/datasets/<name>.py``; raises ValueError with the near names."""
    found = _reader(name) if name in names("orchestrator.datasets") else None
    if found is None:
        raise ValueError(f"there is no data set reader {name!r}" + did_you_mean(name, datasets()))
    return found


@lru_cache(maxsize=8)
def listed(name: str, data_root: str, part: str) -> Any:
    """What a reader lists, once for each command: a list of millions of files takes a while."""
    return dataset(name)(data_root, part)


def spaces() -> list[str]:
    """Search spaces; campaigns are beside them."""
    return [name for name in names("search_spaces") if not name.startswith("campaign_")]


def campaigns() -> list[str]:
    return [name for name in names("search_spaces") if name.startswith("campaign_")]


def space(name: str) -> Any:
    """``SPACE`` of ``search_spaces/<name>.py``; raises ValueError with the near names."""
    return _found("search_spaces", "SPACE", name, "sweep", spaces)


def campaign(name: str) -> Any:
    """``CAMPAIGN`` of ``search_spaces/<name>.py``; raises ValueError with the near names."""
    if f"campaign_{name}" in campaigns():
        raise ValueError(f"there is no campaign {name!r}; did you mean campaign_{name}?")
    found = _found("search_spaces", "CAMPAIGN", name, "campaign", campaigns)
    if not isinstance(found, Campaign):
        raise ValueError(f"search_spaces/{name}.py: CAMPAIGN is {found!r}, expected Campaign(question=…, sweeps=…)")
    return found


def answer(name: str) -> Path | None:
    """What was measured with a sweep, ``search_spaces/<name>.md``; None where nothing was."""
    folder = next(iter(importlib.import_module("search_spaces").__path__))
    path = Path(folder, f"{name}.md")
    return path if path.is_file() else None


def recipe(method_name: str, benchmark: str) -> Any:
    """A method's recipe for a benchmark; raises ValueError with the near names."""
    recipes = method(method_name).recipes
    if benchmark not in recipes:
        raise ValueError(f"{method_name} has no recipe for {benchmark!r}" + did_you_mean(benchmark, recipes))
    return recipes[benchmark]


def _module(package: str, name: str) -> ModuleType:
    with _loading:
        return importlib.import_module(f"{package}.{name}")


def _reader(name: str) -> Any:
    """``load(data_root, part)`` of a file; None where there is none, or it reads a single file of a data set."""
    found = getattr(_module("orchestrator.datasets", name), "load", None)
    return found if found is not None and "data_root" in inspect.signature(found).parameters else None


def _found(package: str, attribute: str, name: str, what: str, known: Any) -> Any:
    if name in names(package):
        file = f"{package.replace('.', '/')}/{name}.py"
        try:
            found = getattr(_module(package, name), attribute, None)
        except Exception as error:
            if package != "search_spaces":  # a fault in the code of a method is shown where it is
                raise
            raise ValueError(f"{file} cannot be loaded: {type(error).__name__}: {error}; mend the file") from error
        if found is not None:
            return found
        if name in known():
            raise ValueError(f"{file} has no {attribute}, which makes it a {what}")
    raise ValueError(f"there is no {what} {name!r}" + did_you_mean(name, known()))
