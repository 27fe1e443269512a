"""What docker/ says, read for its tests: services, manifests, commands, names of variables."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|KEY")  # a variable of such a name holds a credential

# ${NAME}, ${NAME-default}, ${NAME:-default}, ${NAME:?message}
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:?[-?])([^}]*))?\}")


def compose() -> dict[str, Any]:
    """``compose.yaml`` with its variables as they are written."""
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def variables(text: str) -> dict[str, str]:
    """Name of a variable -> how a missing value is met: ``""``, ``-``, ``:-``, ``?`` or ``:?``."""
    return {name: rule or "" for name, rule, _ in _VARIABLE.findall(text)}


def filled(value: Any, given: Mapping[str, str]) -> Any:
    """A part of ``compose.yaml`` with its variables replaced.

    Raises:
        ValueError: a variable that must be given is not.
    """
    if isinstance(value, dict):
        return {key: filled(part, given) for key, part in value.items()}
    if isinstance(value, list):
        return [filled(part, given) for part in value]
    if not isinstance(value, str):
        return value

    def replaced(match: re.Match[str]) -> str:
        name, rule, rest = match.groups()
        found = given.get(name, "")
        if not found and rule and "?" in rule:
            raise ValueError(f"{name} is empty: {rest}")
        return found or (rest if rule and "-" in rule else "")

    return _VARIABLE.sub(replaced, value)


def example() -> dict[str, str]:
    """``env.example``: name -> value, empty for what must be filled in."""
    lines = [line for line in (DOCKER / "env.example").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def manifests(file: str) -> list[dict[str, Any]]:
    """The documents of a manifest."""
    return list(yaml.safe_load_all((DOCKER / file).read_text()))


def pods(cluster: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Group, pod template and parameters of ``ray start`` of every group of a RayCluster's spec."""
    head = cluster["headGroupSpec"]
    yield "head", head["template"], head["rayStartParams"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"], group["rayStartParams"]
