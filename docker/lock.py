"""Writes the pinned versions of the images: ``python docker/lock.py > docker/lock.txt``.

Run it in an environment in which the tests pass. The requirements of ``.[cluster]`` are walked through the metadata of
what is installed there, so an image gets what was tested and nothing else. The result is a constraints file:
``pip install -c docker/lock.txt`` pins what is needed and installs nothing for being listed.
"""

import platform
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def wanted() -> list[Requirement]:
    """What ``pip install ".[cluster]"`` asks for."""
    table = tomllib.loads(PROJECT.read_text())["project"]
    return [Requirement(line) for line in table["dependencies"] + table["optional-dependencies"]["cluster"]]


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """Canonical name -> installed version of everything that the requirements bring on this platform.

    Raises:
        ValueError: something of it is not installed here.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise ValueError(f"{requirement} is not installed here; run: pip install -e '.[cluster]'") from None
        found[name] = distribution.version
        for line in distribution.requires or []:
            needed = Requirement(line)
            asked = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *extras})
            if asked:
                waiting.append(needed)
    return found


def main() -> None:
    """Prints the constraints file."""
    print(
        f"# Written by: python docker/lock.py, with Python {platform.python_version()} on Linux {platform.machine()}."
    )
    print("# Not edited by hand. torch is PyPI's CUDA build; a CPU build of the same version satisfies it too.")
    for name, version in sorted(closure(wanted()).items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
