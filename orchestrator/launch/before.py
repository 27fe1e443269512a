"""What version 0.3 stored, read as what it is called now: one table of names, plans and records."""

from collections.abc import Mapping
from typing import Any

from orchestrator.needs import digest
from orchestrator.recipe import fields_of

# Name of a recipe field in 0.3 -> its path; of several the one that the recipe has.
NAMES: dict[str, tuple[str, ...]] = {
    "dataset": ("data.name",),
    "evaluate_on": ("data.part",),
    "skip_unreadable": ("data.skip_unreadable",),
    "student": ("student.name",),
    "student_size": ("student.size",),
    "student_width": ("student.width",),
    "student_heads": ("student.heads",),
    "student_pad": ("student.pad",),
    "pretrained": ("student.pretrained",),
    "weights": ("student.weights",),
    "drop_path": ("student.drop_path",),
    "teacher": ("teacher.network.name",),
    "teacher_size": ("teacher.network.size",),
    "teacher_width": ("teacher.network.width",),
    "teacher_heads": ("teacher.network.heads",),
    "teacher_pad": ("teacher.network.pad",),
    "teacher_pretrained": ("teacher.network.pretrained",),
    "teacher_start": ("teacher.network.weights",),
    "teacher_weights": ("teacher.weights",),
    "teacher_epochs": ("teacher.train.epochs",),
    "teacher_learning_rate": ("teacher.train.rate",),
    "teacher_optimizer": ("teacher.train.optimizer",),
    "teacher_seed": ("teacher.train.seed",),
    "teacher_logit_neck": ("teacher.logit_neck",),
    "teacher_triplet": ("teacher.triplet",),
    "teacher_noda": ("teacher.noda",),
    "optimizer": ("train.optimizer",),
    "learning_rate": ("train.rate",),
    "momentum": ("train.momentum",),
    "weight_decay": ("train.weight_decay",),
    "epochs": ("train.epochs",),
    "warmup_epochs": ("train.warmup_epochs",),
    "constant_epochs": ("train.constant_epochs",),
    "least_rate": ("train.least_rate",),
    "clip_norm": ("train.clip_norm",),
    "precision": ("train.precision",),
    "evaluate_every": ("train.evaluate_every",),
    "seed": ("train.seed",),
    "bias_rate_scale": ("train.bias_rate_scale",),
    "backbone_rate_scale": ("train.backbone_rate_scale",),
    "backbone_frozen_epochs": ("train.backbone_frozen_epochs",),
    "compile": ("run.compile",),
    "loader_workers": ("run.loader_workers",),
    "pixel_cache": ("run.pixel_cache",),
    **{
        name: (f"labelled.{name}",)
        for name in (
            "identities_per_batch", "images_per_identity", "cross_entropy", "triplet", "label_smoothing",
            "triplet_margin", "triplet_mining", "triplet_form", "neck", "evaluate_neck",
        )
    },
    **{name: (f"augment.{name}", f"views.{name}") for name in ("flip", "erase", "erase_fill")},
    **{
        name: (f"views.{name}",)
        for name in (
            "views_without_noda", "noda_triplet", "patch", "jitter", "occluders", "occluder_folder", "occluder_alpha",
            "occluder_count", "occluder_seed",
        )
    },
    **{
        name: (f"patches.{name}",)
        for name in ("patch_size", "depth", "patch_stride", "camera_weight", "pos_resize", "pixels")
    },
    **{
        name: (f"pruning.{name}",)
        for name in (
            "keep_ratio", "stages", "predictor", "keep_column", "gumbel_temperature", "softmax_guard",
            "attention_scale", "rounding", "token_order", "selection", "selection_seed", "inference", "reweight",
            "reweight_at_inference",
        )
    },
}  # fmt: skip


def renamed(values: Mapping[str, Any], recipe: Any) -> dict[str, Any]:
    """Values of recipe fields under today's paths; names that the recipe itself has are left as they are."""
    paths = fields_of(recipe)
    found = {}
    for name, value in values.items():
        if name in ("cell", "seed", "method"):  # words of a space's table
            found[name] = value
            continue
        candidates = [path for path in NAMES.get(name, ()) if path in paths]
        found[candidates[0] if name not in paths and candidates else name] = value
    return found


def today(values: Mapping[str, Any], recipe: Any) -> dict[str, Any]:
    """A stored flat recipe as this version would store it."""
    if not is_old(values):
        return dict(values)
    paths = fields_of(recipe)
    was = {path: value for path, value in _NEW.items() if path in paths}  # a benchmark's own may differ by now
    seed = {"train.seed": values["seed"]} if "seed" in values else {}
    return was | renamed({name: value for name, value in values.items() if name != "seed"}, recipe) | seed


def is_old(values: Mapping[str, Any]) -> bool:
    """Whether a flat recipe is of 0.3 or before, when every recipe had a field ``dataset``."""
    return "dataset" in values


def space_today(data: Mapping[str, Any], recipe: Any) -> dict[str, Any]:
    """The plain values of a search space with today's names of recipe fields."""
    cells = {name: renamed(cell, recipe) for name, cell in data["cells"].items()}
    return {
        **data,
        "tune": renamed(data["tune"], recipe),
        "fix": renamed(data["fix"], recipe),
        "cells": cells,
        "start": [renamed(point, recipe) for point in data["start"]],
        "picture": list(renamed(dict.fromkeys(data["picture"]), recipe)),
    }


def fingerprints(facts: Mapping[str, Any]) -> dict[str, set[str]]:
    """What the ``facts`` of a plan or record of 0.3 say of data and teacher: role -> fingerprints."""
    found: dict[str, set[str]] = {}
    for group in facts.get("prepared", {"": facts}).values():
        for name, value in group.items():
            if name.endswith("_fingerprint") and isinstance(value, str):
                found.setdefault(name.removesuffix("_fingerprint"), set()).add(value)
    return found


def told(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the preparations of a plan of 0.3 told, with today's names of metrics."""
    found = []
    for group in facts.get("prepared", {}).values():
        own = dict(group)
        for kind in ("teacher", "chance"):
            measured = group.get(f"{kind}_metrics", {})
            own[f"{kind}_metrics"] = {f"val/{name.partition('/')[2]}": value for name, value in measured.items()}
        found.append(own)
    return found


# Fields that 0.3 left out of a teacher's name.
_NOT_IN_A_NAME = (
    "pixel_cache", "loader_workers", "compile", "evaluate_every", "evaluate_on", "ap", "skip_unreadable",
)  # fmt: skip
# Fields that 0.3 did not have, and what it did.
_NEW = {
    "data.fraction": 1.0,
    "augment.draw_steps": 0,
    "student.pixels": "imagenet",
    "teacher.network.pixels": "imagenet",
    "student.weights": "",
    "run.checkpoint_every": 0,
}


def teacher_folder(values: Mapping[str, Any], content: Mapping[str, str]) -> str | None:
    """The folder in which 0.3 would have stored the teacher of a flat recipe; None where it had no such teacher.

    Args:
        values: the training's recipe.
        content: fingerprints of what it is trained on, "train" and perhaps "occluders".
    """
    if "train" not in content:
        return None
    transformer = "patches.pixels" in values
    was = {path: name for name, paths in NAMES.items() for path in paths if path in values}
    named: dict[str, Any] = {}
    for path, value in values.items():
        if path in _NEW and not (transformer and path == "student.weights"):
            if value != _NEW[path]:
                return None
            continue
        named[was.get(path, path)] = value
    left_out = (*_NOT_IN_A_NAME, *(("dataset", "occluder_folder") if transformer else ()))
    named = {name: value for name, value in named.items() if name not in left_out}
    if "occluders" in content:
        named["occluders_fingerprint"] = content["occluders"]
    return digest([named, content["train"]])[:32]
