"""The family of token pruning for tests that run for every family: a tiny recipe, its cases, a teacher."""

from pathlib import Path
from typing import Any

import torch

from models.token_pruning import PrunedViT
from orchestrator import checkpoint
from orchestrator.families.token_pruning.networks import student_config, teacher_training

# Eight tokens, six blocks.
TINY: dict[str, Any] = {
    "student.name": "vit_tiny_patch16_224",
    "student.size": "32x16",
    "student.width": 32,
    "student.heads": 2,
    "student.pad": 1,
    "student.pretrained": "false",
    "student.drop_path": 0.0,
    "patches.patch_size": 8,
    "patches.depth": 6,
    "pruning.stages": "1x2x4",
    "teacher.network.name": "vit_tiny_patch16_224",
    "teacher.network.width": 32,
    "teacher.network.heads": 2,
    "teacher.network.pretrained": "false",
    "teacher.train.epochs": 1,
    "labelled.identities_per_batch": 4,
    "labelled.images_per_identity": 2,
    "train.epochs": 2,
    "train.warmup_epochs": 1,
    "train.evaluate_every": 1,
    "run.loader_workers": 0,
    "views.occluder_count": 10,
}


def save_teacher(folder: Path, recipe: Any, classes: int) -> Path:
    """Weights of an untrained teacher with its classifier, for tests that do not care how good it is."""
    torch.manual_seed(8)
    config = student_config(teacher_training(recipe)[1], num_classes=classes)
    checkpoint.save_model(folder, PrunedViT(config), {}, "teacher")
    return folder / "teacher.safetensors"
