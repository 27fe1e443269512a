"""The family of face recognition for tests that run for every family: a tiny recipe, its cases, a teacher."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.mobilefacenet import MobileFaceNet
from orchestrator import checkpoint
from orchestrator.families.face.recipe import network_config, teacher_dim

TINY: dict[str, Any] = {
    "student.name": "mobilefacenet",
    "student.width": 0.0625,
    "student.size": "16x16",
    "embedding_dim": 16,
    "teacher.network.name": "mobilefacenet",
    "teacher.network.width": 0.125,
    "teacher.network.size": "16x16",
    "teacher.train.epochs": 1,
    "teacher.batch_size": 16,
    "head.scale": 16.0,
    "batch_size": 16,
    "balanced.identities": 0,
    "balanced.images": 2,
    "train.rate": 0.05,
    "train.epochs": 3,
    "train.falls": "2x3x0x0",
    "run.loader_workers": 0,
    "bank": 20,
    "bank_from": 0,
    "rpsd_ramp": 4,
    "top_k": 4,
    "pairs": 40,
}

# What a method does differently inside; each case is trained, and by two workers as by one.
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "adadistill": ({}, {"weighted": False, "head.kind": "cosface", "targets": "cached"}),
    "ekd": ({"balanced.identities": 4},),
    "feature_consistency": ({"form": "l2_mean"},),
    "gkd": ({"stride": 2},),
    "margin_softmax": ({"head.kind": "adaface"}, {"head.grad": "exact", "student.name": "iresnet18"}),
    "triplet_distillation": ({"balanced.identities": 4, "distance": "angle"},),
    "unified_face": (
        {"balanced.identities": 4},
        {"iled_miner": "topk", "rpsd_miner": "discrepancy", "phi": "huber", "reference": "cross", "targets": "cached"},
        {"iled_miner": "soft", "rpsd_miner": "teacher_similar", "cls": 0.0, "bank_half": True},
        {"centres": "teacher", "bank": 0, "rpsd_miner": "all", "train.decay_everything": False},
    ),
}

NORMS_PER_WORKER = True  # whether batch norms see a worker's own rows alone


def save_teacher(folder: Path, recipe: Any, classes: int) -> Path:
    """Weights of an untrained teacher with class centres, for tests that do not care how good it is."""
    torch.manual_seed(9)
    teacher = MobileFaceNet(network_config(recipe.teacher.network, teacher_dim(recipe)))
    teacher.classifier = nn.Linear(teacher_dim(recipe), classes, bias=False)
    checkpoint.save_model(folder, teacher.eval(), {}, "teacher")
    return folder / "teacher.safetensors"
