"""Saving, resuming, and the student as files that run without this project."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from models.embedder import Embedder, EmbedderConfig, retrieval_config
from models.token_pruning import PrunedViT, PrunedViTConfig
from orchestrator.datasets.augmentation import PIXELS

FORMAT = 1
# What a stored model is -> its class and configuration.
MODELS: dict[str, tuple[type, type]] = {
    "embedder": (Embedder, EmbedderConfig),
    "pruned_vit": (PrunedViT, PrunedViTConfig),
}
Model = Embedder | PrunedViT
ModelConfig = EmbedderConfig | PrunedViTConfig


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


def load(path: str | Path) -> dict[str, Any]:
    """Reads a training state: tensors and plain values only, never pickled code.

    Raises:
        ValueError: the file cannot be read, in one line that names it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and OS errors alike mean the file is no checkpoint
        raise ValueError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from error


def save_model(folder: str | Path, model: Model, facts: Mapping[str, Any], name: str = "student") -> None:
    """``<name>.safetensors`` (weights, no classifier) and ``<name>.json`` (how to build and feed it).

    A classifier goes to ``<name>.classifier.safetensors``: losses on class predictions need it of a teacher.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.startswith("classifier.")
    }
    config = {
        "format": FORMAT,
        "kind": next(kind for kind, (cls, _) in MODELS.items() if isinstance(model, cls)),
        "model": asdict(retrieval_config(model.config)),
        "input": {
            "size": list(model.config.image_size),
            "resize": f"exactly, {model.resize} with anti-aliasing",
            "range": "RGB in [0, 1], then (x - mean) / std",
            "mean": list(PIXELS[model.pixels][0]),
            "std": list(PIXELS[model.pixels][1]),
        },
        "architecture": list(model.architecture),
        "output": "raw embedding; L2-normalise before comparing",
        "facts": dict(facts),
    }
    partial = folder / f"{name}.safetensors.tmp-{os.getpid()}"
    save_file(weights, partial)
    os.replace(partial, folder / f"{name}.safetensors")
    if model.classifier is not None:
        partial = folder / f"{name}.classifier.safetensors.tmp-{os.getpid()}"
        save_file({"weight": model.classifier.weight.detach().cpu().contiguous()}, partial)
        os.replace(partial, folder / f"{name}.classifier.safetensors")
    # The configuration comes last: its presence says that the weights are whole.
    partial = folder / f"{name}.json.tmp-{os.getpid()}"
    partial.write_text(json.dumps(config, indent=1))
    os.replace(partial, folder / f"{name}.json")


def load_model(path: str | Path, expected: ModelConfig | None = None) -> tuple[Model, dict[str, Any]]:
    """A model in eval mode from ``<name>.safetensors`` and, beside it, ``<name>.json``; and the stored facts.

    Args:
        path: the weights file.
        expected: the architecture the caller needs; without a JSON file it says what the weights are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no safetensors file, or holds another architecture than expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; expected a .safetensors file, with its .json beside it")
    sidecar = path.with_suffix(".json")
    stored = json.loads(sidecar.read_text()) if sidecar.is_file() else {}
    wanted_config = None if expected is None else retrieval_config(expected)
    if not stored and wanted_config is None:
        raise ValueError(f"{path} has no {sidecar.name} beside it, so its architecture is unknown")
    kind = stored.get("kind", "embedder")  # files of 0.2 and before do not say
    if kind not in MODELS:
        raise ValueError(f"{path} holds a {kind!r}; this version knows {', '.join(MODELS)}")
    config = MODELS[kind][1](**stored["model"]) if stored else wanted_config
    if wanted_config is not None and type(config) is not type(wanted_config):
        raise ValueError(f"{path} holds another kind of network: {kind}")
    if wanted_config not in (None, config):
        have, want = asdict(config), asdict(wanted_config)
        differing = [f"{k} {have[k]} instead of {want[k]}" for k in want if have[k] != want[k]]
        raise ValueError(f"{path} holds another architecture: {', '.join(differing)}")
    model = next(cls for cls, config_class in MODELS.values() if isinstance(config, config_class))(config)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    wanted = model.state_dict()
    wrong = sorted(k for k in set(weights) ^ set(wanted)) or sorted(
        k for k in wanted if weights[k].shape != wanted[k].shape
    )
    if wrong:
        raise ValueError(
            f"{path} holds another architecture than {config.backbone}: "
            f"{len(wrong)} tensors do not fit, first {wrong[0]}"
        )
    model.load_state_dict(weights)
    return model.eval(), stored.get("facts", {})


def reconfigured(model: Model, settings: Mapping[str, Any]) -> Model:
    """The same model with other values of those settings that are part of its configuration; its weights stay."""
    own = {name: value for name, value in settings.items() if hasattr(model.config, name)}
    model.config = replace(model.config, **own)
    return model


def load_classifier(path: str | Path) -> nn.Linear | None:
    """The classifier that :func:`save_model` stored beside a weights file, or None where there is none.

    Raises:
        ValueError: the file is no safetensors file with a matrix ``weight`` (classes, width).
    """
    file = Path(path).with_suffix(".classifier.safetensors")
    if not file.is_file():
        return None
    try:
        weight_CD = load_file(file)["weight"]
        classes, width = weight_CD.shape
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file} holds no matrix named weight (classes, width): {error}") from error
    classifier = nn.Linear(width, classes, bias=False)
    classifier.load_state_dict({"weight": weight_CD})
    return classifier
