"""Benchmarks of face recognition that every method of the family has, and what is the same in them for all."""

from collections.abc import Mapping
from typing import Any

from orchestrator.families.face.recipe import FaceRecipe
from orchestrator.recipe import changed

# Drawn faces at 48 pixels, narrow networks, minutes on two cores: mechanics and rough directions, no ranking.
_SMALL = {
    "student.size": (48, 48),
    "student.width": 0.25,
    "student.affine": True,
    "embedding_dim": 64,
    "head.scale": 24.0,
    "head.margin": 0.3,
    "batch_size": 64,
    "train.optimizer": "adamw",
    "train.rate": 2e-3,
    "train.weight_decay": 0.05,
    "train.epochs": 16,
    "train.warmup_epochs": 1,
    "train.schedule": "polynomial",
    "train.evaluate_every": 4,
    "loader_workers": 0,
    "precision": "float32",
}
_SMALL_TEACHER = {
    "teacher.name": "iresnet18",
    "teacher.network.size": (48, 48),
    "teacher.network.width": 0.25,
    "teacher.optimizer": "adamw",
    "teacher.rate": 2e-3,
    "teacher.epochs": 24,
    "teacher.seed": 1,
    "teacher.batch_size": 64,
    "targets": "cached",
}
# Aligned 112 × 112 in records, as public code trains on them: batches of 4 × 128, the rate for 512.
_RECORDS = {"pixel_cache": "off", "teacher.rate": 0.1, "teacher.epochs": 26}
_COSFACE = {"head.kind": "cosface"}
_BENCHMARKS: dict[str, dict[str, Any]] = {
    "demo": {"data.name": "demo_faces", **_SMALL, **_SMALL_TEACHER, "show_faces": "own"},
    "orl": {
        "data.name": "orl",
        **_SMALL,
        **_SMALL_TEACHER,
        "batch_size": 40,
        "teacher.batch_size": 40,
        "train.epochs": 60,
        "train.evaluate_every": 20,
        "teacher.epochs": 80,
    },
    "records": {"data.name": "face_records", **_RECORDS},
    "folder": {"data.name": "folder_faces", "teacher.rate": 0.1, "teacher.epochs": 26},
    **{
        name: {"data.name": name, **_RECORDS, **own}
        for name, own in {
            "casia": {"train.epochs": 60, "train.falls": (40, 48, 52, 0), "teacher.epochs": 60},
            "ms1mv2": {},
            "ms1mv3": {},
            "glint360k": {**_COSFACE, "train.schedule": "polynomial", "train.epochs": 20, "teacher.epochs": 20},
            "webface4m": _COSFACE,
            "webface12m": _COSFACE,
            "webface42m": _COSFACE,
        }.items()
    },
}


def recipes(recipe: type[FaceRecipe], own: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A recipe for every benchmark of the family.

    Args:
        recipe: the method's recipe class; its defaults and the benchmark's settings are where everything starts.
        own: the method's numbers by benchmark; "*" is of all, and comes first.
    """
    own = own or {}
    teaches = hasattr(recipe(), "teacher")
    found = {}
    for benchmark, settings in _BENCHMARKS.items():
        kept = {
            name: value for name, value in settings.items() if teaches or not name.startswith(("teacher.", "targets"))
        }
        found[benchmark] = changed(recipe(), {**kept, **own.get("*", {}), **own.get(benchmark, {})})
    return found
