"""A teacher from a public checkpoint: a state dict with the names of other code, kept as one of ours."""

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from models.network import EmbeddingNetwork, configured, identity, kind_of, network_class
from models.weights import stamp_of
from orchestrator import cache, checkpoint
from orchestrator.needs import Need, Place, Ready
from orchestrator.recipe import Teacher


def is_public(teacher: Teacher) -> bool:
    """Whether a teacher's file is of another code: files of ours are .safetensors with a .json beside them."""
    file = Path(teacher.weights)
    return bool(teacher.weights) and not (file.suffix == ".safetensors" and file.with_suffix(".json").is_file())


def public_teacher_need(teacher: Teacher, config: Any, train: Need, wants_centres: bool) -> Need:
    """The need for a frozen network from such a file; its class centres lie beside it, where they are wanted.

    Raises:
        ValueError: there is no such file, it holds another network than the recipe's, or the class centres lack.
    """
    centres = Path(teacher.weights).with_suffix(".classifier.safetensors")
    if wants_centres and not centres.is_file():
        raise ValueError(
            f"teacher.weights: this method looks at the teacher's class centres, and there is no {centres}; store a "
            f"matrix 'weight' (classes, {config.embedding_dim}) there, classes in order of identity"
        )
    try:
        size, mtime_ns = stamp_of(teacher.weights)
        _check(teacher.weights, config, (size, mtime_ns))
    except ValueError as error:
        asked = (
            f"{kind_of(config)} at {'×'.join(map(str, config.image_size))} with embeddings of {config.embedding_dim}"
        )
        raise ValueError(f"teacher.weights: {str(error).removeprefix('weights: ')} (asked for: {asked})") from error
    made_from = {
        "file": teacher.weights, "size": size, "mtime_ns": mtime_ns, "kind": kind_of(config),
        "config": identity(config), "centres": stamp_of(centres) if centres.is_file() else None,
    }  # fmt: skip
    return Need("public teacher", made_from, {"train": train}, title=f"teacher {Path(teacher.weights).name}")


@lru_cache(maxsize=16)  # every row of a table asks, and the file is read whole
def _check(file: str, config: Any, stamp: tuple[int, int]) -> None:
    _loaded(kind_of(config), config, file)


def make_public_teacher(need: Need, place: Place) -> Ready:
    """Stores the network in our own form, so that trials open it as they open every teacher."""
    cls = network_class(need.made_from["kind"])
    network = _loaded(cls.kind, configured(cls, need.made_from["config"]), need.made_from["file"])
    network.classifier = checkpoint.load_classifier(need.made_from["file"])
    path = f"teachers/public-{need.key}"
    checkpoint.save_model(place.folder(path), network.eval(), {"from": Path(need.made_from["file"]).name}, "teacher")
    return Ready(need.key, need.kind, f"{path}/teacher.safetensors", cache.weights_hash(network.deployed()))


def _loaded(kind: str, config: Any, file: str) -> EmbeddingNetwork:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a file has beside the network, such as its head, is not used
        return network_class(kind)(config, weights=file)
