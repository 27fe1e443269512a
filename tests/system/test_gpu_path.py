"""Every method's training step as a GPU would run it: one device, float32 losses, and nothing that waits.

Each family makes a tiny task of a recipe, and a batch of random tensors with the keys that its loader gives.
"""

from typing import Any

import pytest
import torch
from fake_cuda import run
from families import face, person_search, weak_search
from tiny import own, parameters
from torch import Tensor, nn

from models.embedder import Embedder, EmbedderConfig
from models.mobilefacenet import MobileFaceNet
from models.person_search import PersonSearch
from models.token_pruning import PrunedViT
from orchestrator import find
from orchestrator.datasets import augmentation, person_views
from orchestrator.families.asymmetric import job, pairs
from orchestrator.families.asymmetric.recipe import is_supervised, used_views
from orchestrator.families.face import training as face_training
from orchestrator.families.face.recipe import network_config as face_config
from orchestrator.families.person_search import training
from orchestrator.families.person_search.recipe import network_config
from orchestrator.families.retrieval.recipe import EmbedderRecipe, embedder_config
from orchestrator.families.token_pruning import networks, views
from orchestrator.families.weak_search import training as weak_training
from orchestrator.method import Batch, Task
from orchestrator.methods import supervised
from orchestrator.recipe import changed

CLASSES, CAMERAS, IMAGES, TRAINING_IMAGES = 5, 3, 12, 40
TINY = {"student.name": "resnet10t", "student.width": 0.125, "student.size": (32, 32), "embedding_dim": 16}
TINY_TEACHER = {"teacher.name": "resnet10t", "teacher.network.width": 0.125, "teacher.network.size": (48, 48)}
TINY_VIT = {
    "student.size": (32, 16), "student.width": 32, "student.heads": 2, "depth": 5, "stages": (1, 2, 3),
    "student.pad": 1, "teacher.network.width": 64, "teacher.network.heads": 2, "jitter": 0.2,
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


def labelled_batch(recipe: EmbedderRecipe) -> Batch:
    return {"frames": frames(recipe.student.size), "draws": torch.rand(IMAGES, augmentation.DRAWS)} | labels()


# --- Families: task and batch of a recipe


def retrieval_step(name: str, real: bool, **changes: Any) -> tuple[Task, Batch]:
    recipe = changed(find.recipe(name, "demo"), {**TINY, **changes})
    student = network(embedder_config(recipe.student, recipe.embedding_dim, CLASSES), not real)
    return supervised.Supervised(recipe, student), labelled_batch(recipe)


def asymmetric_step(name: str, real: bool, **changes: Any) -> tuple[Task, Batch]:
    recipe, method = find.recipe(name, "demo"), find.method(name).distillation
    tiny = {**TINY, **TINY_TEACHER, "batch_size": IMAGES} | ({"top_k": 4} if hasattr(recipe, "top_k") else {})
    recipe = changed(recipe, {**tiny, **changes})
    find.method(name).check(recipe)
    recipe = used_views(method, recipe)
    classes = CLASSES if is_supervised(recipe) or method.student_classifier else 0
    student = network(embedder_config(recipe.student, recipe.embedding_dim, classes), not real)
    teacher, neighbours = network(job._teacher_config(recipe), not real).eval(), None
    teacher.classifier = nn.Linear(recipe.embedding_dim, CLASSES, bias=False) if method.teacher_classifier else None
    if count := method.neighbours(recipe):
        index_NK = torch.randint(0, TRAINING_IMAGES, (TRAINING_IMAGES, count))
        gallery_ND = torch.randn(TRAINING_IMAGES, recipe.embedding_dim)
        neighbours = pairs.Neighbours(gallery_ND, index_NK, torch.rand(TRAINING_IMAGES, count))
    online = recipe.views == "online"
    task = pairs.AsymmetricDistillation(
        recipe, method, student, teacher if online else None, teacher.classifier, neighbours
    )
    distill = labelled_batch(recipe) | {"image": torch.randint(0, TRAINING_IMAGES, (IMAGES,))}
    size = recipe.teacher.network.size
    if online:
        distill |= {"teacher_frames": frames(size), "teacher_draws": torch.rand(IMAGES, augmentation.DRAWS)}
    else:
        with torch.no_grad():
            distill["teacher"] = method.teacher_outputs(recipe, teacher, torch.rand(IMAGES, 3, *size))
    return task, {"distill": distill} | ({"labelled": labelled_batch(recipe)} if is_supervised(recipe) else {})


def token_pruning_step(name: str, real: bool, **changes: Any) -> tuple[Task, Batch]:
    recipe = changed(find.recipe(name, "demo"), {**TINY_VIT, **changes})
    find.method(name).check(recipe)
    student = PrunedViT(networks.student_config(recipe, CLASSES, CAMERAS), drop_path=0.1)
    teacher = None
    if recipe.npkd:
        teacher = PrunedViT(networks.teacher_config(recipe, CAMERAS))
        teacher.classifier = nn.Linear(teacher.backbone.embed_dim, CLASSES, bias=False)
    size = recipe.student.size
    batch = {
        "frames": frames(size),
        "draws": [torch.rand(IMAGES, person_views.DRAWS) for _ in range(recipe.num_views)],
        "overlays": [frames(size, channels=4) for _ in range(recipe.num_views)],
        "camera": torch.arange(IMAGES) % CAMERAS,
    } | labels()
    if recipe.hts:
        batch["uniform"] = torch.rand(IMAGES * recipe.num_views, views.STAGES, student.num_tokens, views.COLUMNS)
    if teacher is not None and recipe.teacher_view == "clean":
        batch["teacher"] = torch.randn(IMAGES, teacher.backbone.embed_dim)
    return find.method(name).task(recipe, student, teacher), batch


class LossesAlone(nn.Module):
    """The losses of a person search: what they are made from is sampled before, for which the host waits."""

    def __init__(self, task: Task):
        super().__init__()
        self.task = task

    def forward(self, looked: Any) -> Any:
        return self.task.losses(looked)


def person_search_step(name: str, real: bool, **changes: Any) -> tuple[nn.Module, Any]:
    recipe = changed(find.recipe(name, "folder"), {**person_search.TINY, **changes})
    student = training.build(recipe, CLASSES)
    teacher = memory = None
    if find.method(name).distils(recipe):
        teacher = PersonSearch(network_config(recipe, recipe.teacher.network)).eval()
        memory = training.memory(recipe.memory, recipe.detector.dim, CLASSES)
    task = find.method(name).task(recipe, student, teacher, memory).train()
    boxes = [torch.tensor([[4.0, 4, 20, 40], [30, 2, 50, 45]]), torch.zeros(0, 4)]
    batch = {
        "frames": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), "sizes": [(48, 64), (64, 48)],
        "boxes": boxes, "identity": [torch.tensor([3, 5555]), torch.zeros(0, dtype=torch.int64)], "draws": [1, 2],
    }  # fmt: skip
    # Values alone, as if a network had just computed them: what it computes is watched by nobody here.
    return LossesAlone(task), detached(task.look(batch))


def weak_search_step(name: str, real: bool, **changes: Any) -> tuple[nn.Module, Any]:
    recipe = changed(find.recipe(name, "folder"), {**weak_search.TINY, **changes})
    task = find.method(name).task(recipe, weak_training.build(recipe), TRAINING_IMAGES, CLASSES).train()
    boxes = [torch.tensor([[4.0, 4, 20, 40], [30, 2, 50, 45]]), torch.zeros(0, 4)]
    batch = {
        "frames": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), "sizes": [(48, 64), (64, 48)],
        "boxes": boxes, "people": boxes, "draws": [1, 2], "row": torch.tensor([7, 3]), "counts": [2],
        "row_identity": torch.tensor([3, 5555]), "crops": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
    }  # fmt: skip
    return LossesAlone(task), detached(task.look(batch))


def face_step(name: str, real: bool, **changes: Any) -> tuple[Task, Batch]:
    recipe = find.recipe(name, "folder")
    recipe = changed(recipe, {**own(recipe, face.TINY), **changes})
    method = find.method(name)
    method.check(recipe)
    teacher = centres = None
    images = recipe.batch_size + recipe.balanced.count
    batch = {
        "frames": torch.randint(0, 256, (images, 3, *recipe.student.size), dtype=torch.uint8),
        "mirrored": torch.rand(images) < 0.5, "label": torch.arange(images) % CLASSES, "image": torch.arange(images),
        "names": [f"{i}.png" for i in range(images)],
    }  # fmt: skip
    if method.distils(recipe):
        centres = nn.Linear(recipe.embedding_dim, CLASSES, bias=False)
        teacher = MobileFaceNet(face_config(recipe.teacher.network, recipe.embedding_dim))
        if recipe.targets == "cached":
            batch["teacher"], teacher = torch.randn(images, recipe.embedding_dim), None
    sizes = face_training.Sizes(CLASSES, 10)
    distillation = method.distillation if method.distils(recipe) else face_training.ALONE
    return face_training.FaceTask(
        recipe, distillation, face_training.build(recipe), sizes, teacher, centres
    ), batch  # fmt: skip


def detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.is_floating_point())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(detached, value))
    if isinstance(value, list):
        return [detached(v) for v in value]
    return {k: detached(v) for k, v in value.items()} if isinstance(value, dict) else value


STEPS = {
    "face": face_step,
    "person_search": person_search_step,
    "retrieval": retrieval_step,
    "asymmetric": asymmetric_step,
    "token_pruning": token_pruning_step,
    "weak_search": weak_search_step,
}


# --- Cases: methods × modes × places of the teacher's embeddings, and what a method does differently inside

# Of every family its common cases, of a method its own. The first of each family is in the default suite.
FAMILY = {"asymmetric": ({"mode": "repo", "views": "clean"}, {"mode": "paper", "views": "online"})}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "aml": tuple({"views": "clean", "variant": v, "symmetric": s, "together": 2, "negatives": 3}
                 for v, s in (("contrastive", False), ("contrastive+", True), ("triplet", False))),
    "cckd": ({"views": "clean", "form": "kernel"},),
    "csd": ({"neighbours": "train"},),
    "d3still": ({"mode": "paper", "views": "recorded", "double_losses": True}, {"mode": "repo", "views": "online"},
                {"views": "clean", "reading": "A", "ties": "reference", "pairwise": 1.0, "differential": 1.0},),
    "ddps": (
        {}, {"ld": 0.0, "cd": 0.0, "dfd": 0.0}, {"regions": "teacher", "cd_reduction": "mean", "boxes": "unpadded"},
        {"dfd": 0.0, "pkd": 6.0, "teacher.network.levels": 8}, {"dfd": 0.0, "reviewkd": 1.2},
    ),
    "adadistill": ({}, {"weighted": False, "targets": "cached"}),
    "ekd": ({"balanced.identities": 4},),
    "face_sp": ({}, {"gram": "cosine"}),
    "feature_consistency": tuple({"form": form} for form in ("cos", "l2n", "half", "l2_sum", "l2_mean")),
    "gkd": ({}, {"group": 3, "margin_logits": False}),
    "margin_softmax": ({"head.kind": "adaface"}, {"head.kind": "cosface"},
                       {"head.monotone": True, "head.grad": "exact"},
                       {"head.sample": 0.5}, {"student.name": "iresnet18", "student.color": "bgr"},
                       {"head.kind": "adaface", "head.grad": "exact"}),
    "triplet_distillation": ({"balanced.identities": 4}, {"distance": "angle"}),
    "unified_face": (
        {"balanced.identities": 4, "targets": "cached"},
        {"iled_miner": "topk", "rpsd_miner": "discrepancy", "phi": "huber", "reference": "cross"},
        {"iled_miner": "soft", "rpsd_miner": "teacher_similar", "cls": 0.0, "bank_half": True},
        {"iled_miner": "none", "rpsd_miner": "random", "bank": 8},
        {"centres": "teacher", "bank": 0, "rpsd_miner": "all"},
        {"iled": 0.0, "rpsd": 0.0},
    ),
    "rop": ({"neighbours": "train"},),
    "rsiamnet": (
        {}, {"student.detector": "retinanet", "inter_normalization": "matrix_softmax"},
        {"student.detector": "faster_rcnn", "inter_diagonal": False, "inter_temperature": 0.1, "ins_stop": "crop"},
        {"inter_normalization": "linear", "units": False}, {"path": "crop", "clusters": "singletons"},
        {"path": "scene", "clu": 0.0, "ins": 0.0, "inter": 0.0, "oim": 1.0},
    ),
    "supervised": ({}, {"erase_fill": "zero"}),
    "sureid": (
        {}, {"noda": False}, {"hts": False}, {"npkd": False}, {"hts": False, "npkd": False, "noda": False},
        {"noda": False, "views_without_noda": 2, "teacher_view": "clean", "beta": 0.0},
        {"triplet_mining": "camera", "camera_weight": 3.0, "align": "ts_linear"},
        {"noda_triplet": "per_view", "kl_direction": "st", "align": "st_interpolation"},
        {"triplet_mining": "camera", "noda_triplet": "per_view", "triplet_form": "margin", "predictor": "mlp"},
        {"reweight": "pool", "softmax_guard": 0.0, "ratio_weight": 0.0, "patches.pixels": "imagenet",
         "labelled.neck": "none"},
    ),
}  # fmt: skip
REAL = "d3still"  # with real backbones; the other embedders differ in what is made of the outputs


def cases():
    for name in find.methods():
        for changes in (*FAMILY.get(find.method(name).family, ()), *VARIANTS.get(name, ())) or ({},):
            yield name, changes


@pytest.mark.parametrize(("name", "changes"), parameters(cases(), quick=True))
def test_a_step_stays_on_the_device_and_never_waits(name, changes):
    task, batch = STEPS[find.method(name).family](name, name == REAL, **changes)
    losses = run(task.train(), batch)
    assert losses.terms and losses.terms.keys() == losses.weights.keys()
    assert all(value.device.type == "cuda" for value in losses.observed.values())
