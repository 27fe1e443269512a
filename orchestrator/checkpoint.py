"""Saving, resuming, and the student as files that run without this project."""

import glob
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.network import Network, configured, deployed_config, kind_of, network_class
from models.weights import misfit
from orchestrator.cache import file_hash

FORMAT = 1


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes a training state so that a crash leaves either the old file or the new one."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(partial, "wb") as handle:
            torch.save(dict(state), handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Behind:
    """Work behind the training, one piece at a time and in order: what writes a state must not hold up the next epoch.

    A second piece waits for the first, so that one state waits in memory at most. What went wrong in one is raised by
    the next, or at the end of the block.

    >>> done = []
    >>> with Behind() as behind:
    ...     behind(lambda: done.append(1))
    ...     behind(lambda: done.append(2))
    >>> done
    [1, 2]
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        self._finish()
        self._last = self._pool.submit(work)

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        try:
            if kind is None:  # else that error is what matters
                self._finish()
        finally:
            self._pool.shutdown()

    def _finish(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()


def load(path: str | Path) -> dict[str, Any]:
    """Reads a training state: tensors and plain values only, never pickled code.

    Raises:
        ValueError: the file cannot be read, in one line that names it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and OS errors alike mean the file is no checkpoint
        raise ValueError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from error


def save_model(
    folder: str | Path, model: Network, facts: Mapping[str, Any], name: str = "student",
    extras: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """``<name>.safetensors`` (weights as deployed) and ``<name>.json`` (how to build and feed the network).

    What the network keeps beside its weights goes to ``<name>.<group>.safetensors``, such as the classifier, which
    losses on class predictions need of a teacher. A network that was loaded has no more of it than its weights:
    ``extras`` is then what :func:`load_extras` found.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "kind": model.kind,
        "model": asdict(deployed_config(model.config)),
        "input": dict(model.feeding),
        "architecture": list(model.architecture),
        "output": model.output,
        "facts": dict(facts),
    }
    groups: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in (model.extras() if extras is None else extras).items():
        group, _, tensor_name = full_name.partition(".")
        groups.setdefault(group, {})[tensor_name] = tensor
    _save_tensors(folder / f"{name}.safetensors", model.deployed().state_dict())
    for group, tensors in groups.items():
        _save_tensors(folder / f"{name}.{group}.safetensors", tensors)
    # The configuration comes last: its presence says that the weights are whole.
    partial = folder / f"{name}.json.tmp-{os.getpid()}"
    partial.write_text(json.dumps(config, indent=1))
    os.replace(partial, folder / f"{name}.json")


def load_model(path: str | Path, expected: Any = None, kind: str = "") -> tuple[Network, dict[str, Any]]:
    """A network in eval mode from ``<name>.safetensors`` and, beside it, ``<name>.json``; and the stored facts.

    Args:
        path: the weights file.
        expected: the configuration that the caller needs; without a JSON file it says what the weights are.
        kind: of network that ``expected`` is of; empty = that whose file defines the configuration's class.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no safetensors file, or holds another network than expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; expected a .safetensors file, with its .json beside it")
    stored = _stored_description(path)
    if expected is not None:
        expected, kind = deployed_config(expected), kind or kind_of(expected)
    if not stored and expected is None:
        raise ValueError(f"{path} has no {path.stem}.json beside it, so its architecture is unknown")
    stored_kind = stored.get("kind", "embedder") if stored else kind  # files of 0.2 and before do not say
    try:
        cls = network_class(stored_kind)
        config = configured(cls, stored["model"]) if stored else expected
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a network that this version cannot build: {error}") from error
    if expected is not None and type(config) is not type(expected):
        raise ValueError(f"{path} holds another kind of network: {stored_kind} instead of {kind}")
    if expected not in (None, config):
        have, want = asdict(config), asdict(expected)
        differing = [f"{k} {have[k]} instead of {want[k]}" for k in want if have[k] != want[k]]
        raise ValueError(f"{path} holds another architecture: {', '.join(differing)}")
    model = cls(config)
    weights = _load_tensors(path)
    if different := misfit(weights, model.state_dict()):
        of = "its description" if stored else "expected"
        raise ValueError(f"{path} holds another architecture than {of}: {different}")
    model.load_state_dict(weights)
    return model.eval(), _facts(stored)


def copy_model(file: str | Path, folder: str | Path, name: str, facts: Mapping[str, Any]) -> None:
    """A stored network, with all that is stored beside it, under another name and with more facts."""
    file, folder = Path(file), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = _stored_description(file)
    for suffix in hashes(file):
        partial = folder / f"{name}{suffix}.safetensors.tmp-{os.getpid()}"
        shutil.copyfile(file.with_name(f"{file.stem}{suffix}.safetensors"), partial)
        os.replace(partial, folder / f"{name}{suffix}.safetensors")
    partial = folder / f"{name}.json.tmp-{os.getpid()}"
    partial.write_text(json.dumps({**described, "facts": {**described.get("facts", {}), **facts}}, indent=1))
    os.replace(partial, folder / f"{name}.json")


def hashes(path: str | Path) -> dict[str, str]:
    """SHA-256 of a weights file ("") and of what :func:`save_model` stored beside it (".classifier").

    Raises:
        ValueError, OSError: a file is missing or cannot be read.
    """
    path = Path(path)
    groups = {name.partition(".")[0] for name in load_extras(path)}
    suffixes = ["", *(f".{group}" for group in sorted(groups))]
    return {suffix: file_hash(path.with_name(f"{path.stem}{suffix}.safetensors")) for suffix in suffixes}


def facts_of(path: str | Path) -> dict[str, Any]:
    """The facts that were stored with a network; empty without a description.

    Raises:
        ValueError: the description cannot be read.
    """
    return _facts(_stored_description(Path(path)))


def reconfigured(model: Network, settings: Mapping[str, Any]) -> Network:
    """The same network with other values of those settings that are part of its configuration; its weights stay."""
    own = {name: value for name, value in settings.items() if hasattr(model.config, name)}
    model.config = replace(model.config, **own)
    return model


def load_extras(path: str | Path) -> dict[str, Tensor]:
    """What :func:`save_model` stored beside a weights file, as "group.tensor"; empty where there is nothing.

    Raises:
        ValueError: a file beside it is no safetensors file.
    """
    path = Path(path)
    found = {}
    for name in sorted(glob.glob(f"{glob.escape(path.stem)}.*.safetensors", root_dir=path.parent)):
        file, group = path.parent / name, name.removeprefix(f"{path.stem}.").removesuffix(".safetensors")
        if "." in group or file.with_suffix(".json").is_file():
            continue  # of another network, whose name begins with this one's
        found |= {f"{group}.{tensor_name}": tensor for tensor_name, tensor in _load_tensors(file).items()}
    return found


def load_classifier(path: str | Path) -> nn.Linear | None:
    """The classifier that :func:`save_model` stored beside a weights file, or None where there is none.

    Raises:
        ValueError: the file is no safetensors file with a matrix ``weight`` (classes, width).
    """
    file = Path(path).with_suffix(".classifier.safetensors")
    if not file.is_file():
        return None
    try:
        weight_CD = _load_tensors(file)["weight"]
        classes, width = weight_CD.shape
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file} holds no matrix named weight (classes, width): {error}") from error
    classifier = nn.Linear(width, classes, bias=False)
    classifier.load_state_dict({"weight": weight_CD})
    return classifier


def _stored_description(path: Path) -> dict[str, Any]:
    """What the JSON file beside a weights file says, empty without one."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return {}
    try:
        return dict(json.loads(sidecar.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{sidecar} is not the description of a network: {error}") from error


def _facts(described: Mapping[str, Any]) -> dict[str, Any]:
    found = described.get("facts")
    return dict(found) if isinstance(found, Mapping) else {}


def _save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    partial = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        # Copies: a module that a network has twice is stored twice, which its names ask for when it is loaded.
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
