"""Training throughput of D3still's student step, by where the teacher's embeddings and the pixels come from.

    python tests/benchmarks/bench_training.py                # the paper's nets on a GPU, small nets on a CPU
    python tests/benchmarks/bench_training.py --images 2000  # more files on disk

JPEG files are written to a temporary folder; every variant trains the same nets on the same files with the
same batch. The limit is the student's own step on data that are already on the device.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.embedder import Embedder, EmbedderConfig
from orchestrator import checkpoint, find
from orchestrator.fit import sent_ahead, to_device
from orchestrator.method import Where
from orchestrator.needs import Need, Place, Prepared, Ready, silent
from orchestrator.recipe import changed

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NETS = {
    True: {
        "student.name": "resnet18",
        "student.size": "64x64",
        "teacher.name": "resnet101",
        "teacher.size": "256x256",
        "batch_size": 512,
        "embedding_dim": 512,
        "loader_workers": min(16, os.cpu_count() or 1),
    },
    False: {
        "student.name": "resnet18",
        "student.width": 0.25,
        "student.size": "32x32",
        "teacher.name": "resnet18",
        "teacher.width": 0.5,
        "teacher.size": "64x64",
        "batch_size": 128,
        "embedding_dim": 128,
        "loader_workers": 1,
    },
}
VARIANTS = {
    "online teacher, images decoded": {"views": "online", "pixel_cache": "off"},
    "cached embeddings, images decoded": {"views": "clean", "pixel_cache": "off"},
    "cached embeddings + pixel cache": {"views": "clean", "pixel_cache": "on"},
    "the same, tables on the device": {"views": "clean", "pixel_cache": "device"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=4096 if GPU else 1024)
    parser.add_argument("--side", type=int, default=256, help="pixels of the stored JPEG files")
    parser.add_argument("--epochs", type=int, default=4, help="the first is warm-up")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}; {args.images} JPEG files of {args.side} pixels; {NETS[GPU]}")
    with tempfile.TemporaryDirectory() as folder:
        base, place = recipe_of(Path(folder), args.images, args.side, args.epochs)
        results = {name: measure(changed(base, change), place, args.epochs) for name, change in VARIANTS.items()}
        limit = student_alone(changed(base, VARIANTS["cached embeddings + pixel cache"]), place)
    slowest = results["online teacher, images decoded"]
    for name, rate in {**results, "limit: student step, data on the device": limit}.items():
        print(f"{name:42} {rate:10.0f} images/s   {rate / slowest:6.2f} ×   {100 * rate / limit:5.1f} % of the limit")


def recipe_of(root: Path, images: int, side: int, epochs: int):
    """A recipe with a teacher of random weights, its JPEG files, and the place for both, in a folder."""
    write_images(root / "data", images, side)
    schedule = {"train.epochs": epochs, "warmup_epochs": 0, "constant_epochs": 0}
    scratch = {"student.pretrained": "false", "teacher.pretrained": "false", "student.pixels": "imagenet",
               "teacher.pixels": "imagenet"}  # fmt: skip
    base = changed(find.recipe("d3still", "folder"), {**NETS[GPU], **scratch, **schedule})
    own = base.teacher.network
    config = EmbedderConfig(backbone=own.name, width=own.width, image_size=own.size, embedding_dim=base.embedding_dim)
    checkpoint.save_model(root, Embedder(config), {}, "teacher")
    base = changed(base, {"teacher.weights": str(root / "teacher.safetensors")})
    return base, Place(str(root / "runs"), str(root / "data"))


def measure(recipe, place: Place, epochs: int) -> float:
    """Median images/s over whole epochs, loading included."""
    experiment = experiment_of(recipe, place)
    rates = []
    for epoch in range(1, epochs + 1):
        images, start = 0, time.perf_counter()
        for batch in sent_ahead(experiment.batches(epoch), DEVICE):
            step(experiment, batch)
            images += recipe.batch_size
        synchronise()
        rates.append(images / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def experiment_of(recipe, place: Place):
    """The job with everything ready, met one after the other without a ledger: nothing here needs Optuna or MLflow."""
    method, where = find.method("d3still"), Where(place, 0, 1, DEVICE)
    met: dict[str, Ready] = {}

    def meet(need: Need) -> Ready:
        if need.key not in met:
            met[need.key] = method.make(need, {role: meet(n) for role, n in need.after.items()}, where, silent)
        return met[need.key]

    needs = method.needs(recipe, place)
    made = method.experiment(recipe, Prepared(place, {role: meet(need) for role, need in needs.items()}), where)
    made.task.to(memory_format=torch.channels_last)  # as fit does
    return made


def student_alone(recipe, place: Place) -> float:
    experiment = experiment_of(recipe, place)
    batch = to_device(next(iter(experiment.batches(1))), DEVICE)
    for _ in range(3):
        step(experiment, batch)
    synchronise()
    start, steps = time.perf_counter(), 20
    for _ in range(steps):
        step(experiment, batch)
    synchronise()
    return steps * recipe.batch_size / (time.perf_counter() - start)


def step(experiment, batch) -> None:
    experiment.task.train()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=experiment.precision == "bfloat16"):
        losses = experiment.task(batch)
    experiment.optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    experiment.optimizer.step()


def synchronise() -> None:
    if GPU:
        torch.cuda.synchronize()


def write_images(root: Path, count: int, side: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count + 64):
        folder = root / ("train" if i < count else "gallery") / f"{i % 16:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)


if __name__ == "__main__":
    main()
