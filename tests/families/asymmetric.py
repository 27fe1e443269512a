"""The family of asymmetric retrieval for tests that run for every family: a tiny recipe, its cases, a teacher."""

from pathlib import Path
from typing import Any

import torch

from models.embedder import Embedder
from orchestrator import checkpoint
from orchestrator.families.retrieval.recipe import embedder_config

# Settings that make the recipe "folder" of any method run in seconds on the tiny data set.
TINY: dict[str, Any] = {
    "student.name": "resnet18",
    "student.width": 0.125,
    "student.size": "16x16",
    "student.pad": 1,
    "student.pretrained": "false",
    "embedding_dim": 16,
    "teacher.network.name": "resnet18",
    "teacher.network.width": 0.125,
    "teacher.network.size": "24x24",
    "teacher.network.pad": 1,
    "teacher.network.pretrained": "false",
    "teacher.train.epochs": 1,
    "batch_size": 16,
    "top_k": 4,
    "views": "clean",
    "num_views": 2,
    "train.epochs": 3,
    "train.evaluate_every": 1,
    "train.warmup_epochs": 1,
    "train.constant_epochs": 2,
    "train.rate": 0.05,
    "run.loader_workers": 0,
    "augment.erase": 0.2,
    "labelled.identities_per_batch": 4,
    "labelled.images_per_identity": 2,
    "teacher.identities_per_batch": 4,
    "teacher.images_per_identity": 2,
}


def save_teacher(folder: Path, recipe: Any, classes: int) -> Path:
    """Weights of an untrained teacher with its classifier, for tests that do not care how good it is."""
    torch.manual_seed(7)
    teacher = Embedder(embedder_config(recipe.teacher.network, recipe.embedding_dim))
    teacher.classifier = torch.nn.Linear(recipe.embedding_dim, classes, bias=False)
    checkpoint.save_model(folder, teacher, {}, "teacher")
    return folder / "teacher.safetensors"
