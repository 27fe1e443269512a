"""Every method's training step as a GPU would run it: one device, float32 losses, and nothing that waits.

Each family makes a tiny task of a recipe, and a batch of random tensors with the keys that its loader gives.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_cuda import run
from torch import Tensor, nn

from models.embedder import Embedder, EmbedderConfig
from models.token_pruning import PrunedViT
from orchestrator import find
from orchestrator.datasets import augmentation, person_views
from orchestrator.method import Batch, Task
from orchestrator.methods import asymmetric, embedding, supervised, sureid, sureid_training

CLASSES, CAMERAS, IMAGES, TRAINING_IMAGES = 5, 3, 12, 40
TINY = {"student": "resnet10t", "student_width": 0.125, "student_size": (32, 32), "embedding_dim": 16}
TINY_VIT = {
    "student_size": (32, 16), "student_width": 32, "student_heads": 2, "depth": 5, "stages": (1, 2, 3),
    "student_pad": 1, "teacher_width": 64, "teacher_heads": 2, "jitter": 0.2,
}  # fmt: skip


class Stages(nn.Module):
    """Four maps and a stem, as the embedder asks timm's networks for them: a fake operation takes a millisecond."""

    def __init__(self, channels: int):
        super().__init__()
        self.feature_info = [{"num_chs": channels}] * 5
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.stage = nn.Conv2d(channels, channels, 3, padding=1)

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_intermediates(images_BCHW, [4])[0]

    def forward_intermediates(self, images_BCHW: Tensor, indices: list[int], output_fmt: str = "NCHW"):
        maps = [self.stem(images_BCHW)]
        maps += [self.stage(maps[0])] * 4
        return maps[-1], [maps[i] for i in indices]


NETWORKS: dict[tuple[EmbedderConfig, bool], Embedder] = {}  # the harness copies what it is given: cases share them


def network(config: EmbedderConfig, plain: bool = False) -> Embedder:
    """An embedder, ``plain`` = its backbone replaced by next to nothing."""
    if (config, plain) not in NETWORKS:
        NETWORKS[config, plain] = built = Embedder(config)
        if plain:
            built.backbone = Stages(built.neck[0].num_features)
    return NETWORKS[config, plain]


def frames(size: tuple[int, int], channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (IMAGES, channels, *size), dtype=torch.uint8)


def labels() -> dict[str, Any]:
    return {"label": torch.arange(IMAGES) % CLASSES, "names": [f"{i}.png" for i in range(IMAGES)]}


def labelled_batch(recipe: embedding.EmbeddingRecipe) -> Batch:
    return {"frames": frames(recipe.student_size), "draws": torch.rand(IMAGES, augmentation.DRAWS)} | labels()


# --- Families: task and batch of a recipe


def supervised_step(name: str, **changes: Any) -> tuple[Task, Batch]:
    recipe = replace(find.recipe(name, "demo"), **{**TINY, **changes})
    return supervised.Supervised(recipe, network(embedding.student_config(recipe, CLASSES))), labelled_batch(recipe)


def asymmetric_step(name: str, **changes: Any) -> tuple[Task, Batch]:
    tiny = {**TINY, "teacher": "resnet10t", "teacher_width": 0.125, "teacher_size": (48, 48), "batch_size": IMAGES}
    recipe = find.recipe(name, "demo")
    if hasattr(recipe, "top_k"):
        tiny["top_k"] = 4
    recipe = replace(recipe, **{**tiny, **changes})
    method = find.method(name).experiment.args[0]
    asymmetric.check(method, recipe)
    recipe = asymmetric._with_used_views(method, recipe)
    repo = recipe.mode == "repo"
    plain = name != "d3still"  # real backbones for one method: the others differ in what they make of the outputs
    student = network(embedding.student_config(recipe, CLASSES if repo or method.student_classifier else 0), plain)
    teacher, neighbours = network(asymmetric._teacher_config(recipe), plain).eval(), None
    teacher.classifier = nn.Linear(recipe.embedding_dim, CLASSES, bias=False) if method.teacher_classifier else None
    if count := method.neighbours(recipe):
        index_NK = torch.randint(0, TRAINING_IMAGES, (TRAINING_IMAGES, count))
        gallery_ND = torch.randn(TRAINING_IMAGES, recipe.embedding_dim)
        neighbours = asymmetric.Neighbours(gallery_ND, index_NK, torch.rand(TRAINING_IMAGES, count))
    online = recipe.views == "online"
    task = asymmetric.AsymmetricDistillation(
        recipe, method, student, teacher if online else None, teacher.classifier, neighbours
    )
    distill = labelled_batch(recipe) | {"image": torch.randint(0, TRAINING_IMAGES, (IMAGES,))}
    if online:
        distill["teacher_frames"] = frames(recipe.teacher_size)
        distill["teacher_draws"] = torch.rand(IMAGES, augmentation.DRAWS)
    else:
        with torch.no_grad():
            distill["teacher"] = method.teacher_outputs(recipe, teacher, torch.rand(IMAGES, 3, *recipe.teacher_size))
    return task, {"distill": distill} | ({"labelled": labelled_batch(recipe)} if repo else {})


def sureid_step(name: str, **changes: Any) -> tuple[Task, Batch]:
    recipe = replace(find.recipe(name, "demo"), **{**TINY_VIT, **changes})
    sureid_training.check(recipe)
    student = PrunedViT(sureid_training.student_config(recipe, CLASSES, CAMERAS), drop_path=0.1)
    teacher = None
    if recipe.npkd:
        teacher = PrunedViT(sureid_training.teacher_config(recipe, CAMERAS))
        teacher.classifier = nn.Linear(teacher.backbone.embed_dim, CLASSES, bias=False)
    batch = {
        "frames": frames(recipe.student_size),
        "draws": [torch.rand(IMAGES, person_views.DRAWS) for _ in range(recipe.views)],
        "overlays": [frames(recipe.student_size, channels=4) for _ in range(recipe.views)],
        "camera": torch.arange(IMAGES) % CAMERAS,
    } | labels()
    if recipe.hts:
        shape = IMAGES * recipe.views, sureid_training.STAGES, student.num_tokens, sureid_training.COLUMNS
        batch["uniform"] = torch.rand(shape)
    if teacher is not None and recipe.teacher_view == "clean":
        batch["teacher"] = torch.randn(IMAGES, teacher.backbone.embed_dim)
    return sureid.SUReID(recipe, student, teacher), batch


# --- Cases: methods × modes × places of the teacher's embeddings, and what a method does differently inside

MODES_AND_VIEWS = ({"mode": "paper", "views": "online"}, {"mode": "repo", "views": "clean"})
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "aml": tuple({"views": "clean", "variant": v, "symmetric": s, "together": 2, "negatives": 3}
                 for v, s in (("contrastive", False), ("contrastive+", True), ("triplet", False))),
    "cckd": ({"views": "clean", "form": "kernel"},),
    "csd": ({"neighbours": "train"},),
    "d3still": ({"mode": "paper", "views": "recorded", "double_losses": True}, {"mode": "repo", "views": "online"},
                {"views": "clean", "reading": "A", "ties": "reference", "pairwise": 1.0, "differential": 1.0},),
    "rop": ({"neighbours": "train"},),
    "supervised": ({}, {"erase_fill": "zero"}),
    "sureid": (
        {}, {"noda": False}, {"hts": False}, {"npkd": False}, {"hts": False, "npkd": False, "noda": False},
        {"noda": False, "views_without_noda": 2, "teacher_view": "clean", "beta": 0.0},
        {"triplet_mining": "camera", "camera_weight": 3.0, "align": "ts_linear"},
        {"noda_triplet": "per_view", "kl_direction": "st", "align": "st_interpolation"},
        {"triplet_mining": "camera", "noda_triplet": "per_view", "triplet_form": "margin", "predictor": "mlp"},
        {"reweight": "pool", "softmax_guard": 0.0, "ratio_weight": 0.0, "pixels": "imagenet", "neck": "none"},
    ),
}  # fmt: skip
STEPS = {supervised.Recipe: supervised_step, asymmetric.AsymmetricRecipe: asymmetric_step, sureid.Recipe: sureid_step}


def cases():
    for name in find.methods():
        variants = VARIANTS.get(name, ())
        if isinstance(find.recipe(name, "demo"), asymmetric.AsymmetricRecipe):
            variants = MODES_AND_VIEWS + variants
        for changes in variants or ({},):
            yield pytest.param(name, changes, id=" ".join([name, *(f"{k}={v}" for k, v in changes.items())]))


@pytest.mark.parametrize(("name", "changes"), cases())
def test_a_step_stays_on_the_device_and_never_waits(name, changes):
    recipe = find.recipe(name, "demo")
    step = next(step for kind, step in STEPS.items() if isinstance(recipe, kind))
    task, batch = step(name, **changes)
    losses = run(task.train(), batch)
    assert losses.terms and losses.terms.keys() == losses.weights.keys()
    assert all(value.device.type == "cuda" for value in losses.observed.values())
