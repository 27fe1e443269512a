"""The family of person search for tests that run for every family: a tiny recipe, its cases, a teacher."""

from pathlib import Path
from typing import Any

import torch

from models.person_search import PersonSearch
from orchestrator import checkpoint
from orchestrator.families.person_search.recipe import network_config
from orchestrator.families.person_search.training import memory

_NETWORK = {
    "name": "resnet10t",
    "width": 0.125,
    "size": "48x64",
    "levels": 8,
    "head": 16,
    "pretrained": "false",
    "freeze_stem": "false",
}
# Frames of 48 × 64 and 64 × 48.
TINY: dict[str, Any] = {
    **{f"student.{name}": value for name, value in _NETWORK.items()},
    **{f"teacher.network.{name}": value for name, value in _NETWORK.items()},
    "teacher.network.levels": 12,
    "teacher.train.epochs": 1,
    "teacher.scenes": 4,
    "detector.dim": 8,
    "detector.anchors": "8x16x24x32x48",
    "detector.proposals": 20,
    "detector.train_proposals": 40,
    "detector.sampled_anchors": 32,
    "detector.sampled_boxes": 16,
    "detector.detections": 8,
    "memory.queue": 12,
    "batch.scenes": 4,
    "search.least_score": 0.05,
    "train.epochs": 2,
    "train.evaluate_every": 1,
    "run.loader_workers": 0,
    "run.pixel_cache": "on",
}

# What a method does differently inside; each case is trained, and by two workers as by one.
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "ddps": (
        {},
        {"regions": "teacher", "cd_reduction": "mean", "boxes": "unpadded", "cd_score": "constant"},
        {"ld": 0.0, "cd": 0.0, "dfd": 0.0, "batch.by_aspect": False},
    )
}

NORMS_PER_WORKER = True  # whether batch norms see a worker's own rows alone


def save_teacher(folder: Path, recipe: Any, classes: int) -> Path:
    """Weights of an untrained teacher with a full memory, for tests that do not care how good it is."""
    torch.manual_seed(9)
    teacher = PersonSearch(network_config(recipe, recipe.teacher.network))
    teacher.memory = memory(recipe.memory, recipe.detector.dim, classes)
    for rows in (teacher.memory.table_KD, teacher.memory.queue_QD):
        rows.copy_(torch.nn.functional.normalize(torch.randn(rows.shape)))
    checkpoint.save_model(folder, teacher, {}, "teacher")
    return folder / "teacher.safetensors"
