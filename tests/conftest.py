"""Fixtures of all tests: a tiny data set on disk, recipes that fit it, one local cluster for the session."""

import os
from pathlib import Path

import pytest

for name, value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Settings that make the recipe "folder" of D3still run in seconds on the tiny data set.
TINY = {
    "student": "resnet18", "student_width": 0.125, "student_size": "16x16", "student_pad": 1, "embedding_dim": 16,
    "teacher": "resnet18", "teacher_width": 0.125, "teacher_size": "24x24", "teacher_pad": 1,
    "pretrained": "false", "teacher_pretrained": "false",
    "teacher_epochs": 1, "batch_size": 16, "top_k": 4, "views": "clean", "epochs": 3, "evaluate_every": 1,
    "warmup_epochs": 1, "constant_epochs": 2, "learning_rate": 0.05, "loader_workers": 0, "erase": 0.2,
    "identities_per_batch": 4, "images_per_identity": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_settings() -> dict:
    """Recipe settings of the tiny data set."""
    return dict(TINY)


@pytest.fixture(scope="session")
def tiny_arguments():
    """Makes the ``--set`` arguments of the tiny recipe."""
    return lambda **changes: [part for k, v in {**TINY, **changes}.items() for part in ("--set", f"{k}={v}")]


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """A folder data set: 16 training and 6 test identities, two cameras."""
    from orchestrator.datasets.demo import render

    root = tmp_path_factory.mktemp("tiny")
    for part, identities, shots in (
        ("train", range(16), 3),
        ("query", range(20, 26), 1),
        ("gallery", range(20, 26), 2),
    ):
        for identity in identities:
            folder = root / part / f"{identity:04d}"
            folder.mkdir(parents=True)
            for camera in range(2):
                for shot in range(shots):
                    image = render(identity, camera, shot + (5 if part == "gallery" else 0))
                    image.save(folder / f"{identity:04d}_c{camera + 1}_{shot}.png")
    return root


@pytest.fixture
def tiny_place(tiny_root, tmp_path):
    from orchestrator.method import Place

    return Place(storage=str(tmp_path / "runs"), data_root=str(tiny_root))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """Weights of an untrained teacher of the tiny recipe, for tests that do not care how good it is."""
    import torch

    from models.embedder import Embedder, EmbedderConfig
    from orchestrator import checkpoint

    torch.manual_seed(7)
    config = EmbedderConfig(backbone="resnet18", width=0.125, embedding_dim=16, image_size=(24, 24))
    teacher = Embedder(config)
    teacher.classifier = torch.nn.Linear(16, 16, bias=False)  # of the 16 training identities
    folder = tmp_path_factory.mktemp("teacher")
    checkpoint.save_model(folder, teacher, {}, "teacher")
    return folder / "teacher.safetensors"


@pytest.fixture
def tiny_recipe(tiny_teacher):
    from orchestrator import find
    from orchestrator.method import changed

    settings = {**TINY, "teacher_weights": str(tiny_teacher)}

    def recipe(method: str = "d3still", **changes):
        base = find.recipe(method, "folder")
        own = {k: v for k, v in {**settings, **changes}.items() if k in changes or hasattr(base, k)}
        return changed(base, own)

    return recipe


# The same of SUReID: eight tokens, six blocks.
TINY_SUREID = {
    "student": "vit_tiny_patch16_224", "student_size": "32x16", "student_width": 32, "student_heads": 2,
    "patch_size": 8, "depth": 6, "stages": "1x2x4", "student_pad": 1, "pretrained": "false", "drop_path": 0.0,
    "teacher": "vit_tiny_patch16_224", "teacher_width": 32, "teacher_heads": 2, "teacher_pretrained": "false",
    "teacher_epochs": 1, "identities_per_batch": 4, "images_per_identity": 2, "epochs": 2, "warmup_epochs": 1,
    "evaluate_every": 1, "loader_workers": 0, "occluder_count": 10,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_sureid_settings() -> dict:
    """Recipe settings of SUReID on the tiny data set."""
    return dict(TINY_SUREID)


@pytest.fixture(scope="session")
def tiny_sureid(tmp_path_factory):
    """Makes recipes of SUReID on the tiny data set, with an untrained teacher."""
    import torch

    from models.token_pruning import PrunedViT
    from orchestrator import checkpoint, find
    from orchestrator.method import changed
    from orchestrator.methods import sureid_training

    def recipe(**changes):
        return changed(find.recipe("sureid", "folder"), {**TINY_SUREID, "teacher_weights": str(weights), **changes})

    folder = tmp_path_factory.mktemp("sureid-teacher")
    weights = folder / "teacher.safetensors"
    torch.manual_seed(8)
    config = sureid_training.student_config(sureid_training.teacher_training(recipe()), num_classes=16)
    checkpoint.save_model(folder, PrunedViT(config), {}, "teacher")
    return recipe


@pytest.fixture(scope="session")
def local_ray():
    """One local cluster for the session."""
    from orchestrator import on_ray

    with on_ray.cluster(dashboard=False):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("the folder with reference numbers and images is not beside this checkout")
    return SHARED
