"""The family of person search from boxes for tests that run for every family: a tiny recipe and its cases."""

from typing import Any

# Frames of 48 × 64 and 64 × 48.
TINY: dict[str, Any] = {
    "student.name": "resnet10t",
    "student.width": 0.125,
    "student.size": "48x64",
    "student.levels": 64,
    "student.dim": 8,
    "student.crop": "32x32",
    "student.anchors": "8x16x24x32x48",
    "student.pretrained": "false",
    "student.frozen_stages": 0,
    "student.freeze_norms": "false",
    "detection.detections": 8,
    "detection.candidates": 20,
    "memory.queue": 12,
    "batch.scenes": 4,
    "search.least_score": 0.05,
    "train.epochs": 2,
    "train.warmup_steps": 3,
    "train.falls": "1x2",
    "train.evaluate_every": 1,
    "run.loader_workers": 0,
    "run.pixel_cache": "on",
}

# What a method does differently inside; each case is trained, and by two workers as by one.
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "rsiamnet": (
        {},
        {"student.detector": "retinanet", "student.crop_cells": "average", "inter_normalization": "matrix_softmax",
         "rule": "strict", "refill": "blend", "cluster_by": "scene"},
        {"student.detector": "faster_rcnn", "student.crop_cells": "align_tall", "inter_diagonal": False,
         "inter_temperature": 0.1, "ins_stop": "crop", "rule": "other_images", "units": False},
        {"path": "crop", "student.search_by": "crop", "student.crop_cells": "whole", "clusters": "singletons"},
        {"path": "scene", "clu": 0.0, "ins": 0.0, "inter": 0.0, "oim": 1.0},
    )
}  # fmt: skip

NORMS_PER_WORKER = True  # whether batch norms see a worker's own rows alone
