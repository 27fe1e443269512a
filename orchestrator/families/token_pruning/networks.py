"""Student and teacher of a recipe, and how the teacher is trained."""

import warnings
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from models.backbone import check_backbone, statistics
from models.network import PIXELS
from models.token_pruning import PrunedViT, PrunedViTConfig
from models.weights import stamp_of
from orchestrator import find
from orchestrator.families.retrieval.recipe import check_labelled
from orchestrator.families.token_pruning.recipe import PruningRecipe, Transformer
from orchestrator.recipe import did_you_mean

_OCCLUDERS = ("occluders", "occluder_folder", "occluder_alpha", "occluder_count", "occluder_seed")


def student_config(recipe: PruningRecipe, num_classes: int = 0, cameras: int = 0) -> PrunedViTConfig:
    """The student as the recipe says.

    Args:
        recipe: the whole recipe.
        num_classes: of the training set; no classifier where no loss trains it.
        cameras: of the training set, for a network that is told the camera.
    """
    own, patches, labelled = recipe.pruning, recipe.patches, recipe.labelled
    pruning = {
        name: getattr(own, name)
        for name in (
            "stages", "keep_ratio", "rounding", "predictor", "keep_column", "inference", "token_order", "selection",
            "selection_seed", "softmax_guard", "reweight", "reweight_at_inference",
        )
    }  # fmt: skip
    return PrunedViTConfig(
        backbone=recipe.student.name,
        image_size=recipe.student.size,
        patch_size=patches.patch_size,
        width=recipe.student.width,
        heads=recipe.student.heads,
        depth=patches.depth,
        patch_stride=patches.patch_stride,
        **({"cameras": cameras, "camera_weight": patches.camera_weight} if patches.camera_weight else {}),
        attention_scale=own.attention_scale,
        pruning=recipe.hts,
        **(pruning if recipe.hts else {}),
        neck=labelled.neck == "bn" and recipe.classifies,
        embed_after_neck=labelled.evaluate_neck == "after",
        pixels=_pixels(recipe),
        num_classes=num_classes if recipe.classifies else 0,
    )


def _pixels(recipe: PruningRecipe) -> str:
    """Mean and deviation of the input by name; those of the student's weights where the recipe says so."""
    if recipe.patches.pixels != "weights":
        return recipe.patches.pixels
    asked = statistics("weights", recipe.student.name)
    name = next((name for name, known in PIXELS.items() if known == asked), None)
    if name is None:
        raise ValueError(f"pixels=weights: those of {recipe.student.name} are {asked}; say one of {', '.join(PIXELS)}")
    return name


def teacher_config(recipe: PruningRecipe, cameras: int = 0) -> PrunedViTConfig:
    return student_config(teacher_training(recipe)[1], cameras=cameras)


def teacher_training(recipe: PruningRecipe) -> tuple[str, Any]:
    """How the teacher is trained: the benchmark's own recipe without HTS and NPKD; no field of the student enters.

    Returns:
        The benchmark whose recipe it is, and the recipe.
    """
    recipes = {r.data.name: (benchmark, r) for benchmark, r in reversed(find.method("sureid").recipes.items())}
    if recipe.data.name not in recipes:
        raise ValueError(
            f"no benchmark of sureid has the data set {recipe.data.name!r}, so its teacher's recipe is not known"
            + did_you_mean(recipe.data.name, recipes)
        )
    benchmark, base = recipes[recipe.data.name]
    own, labelled = recipe.teacher, recipe.labelled
    occluders = {name: getattr(recipe.views, name) for name in (_OCCLUDERS if own.noda else ())}
    training = replace(
        base,
        data=recipe.data,
        ap=recipe.ap,
        run=recipe.run,
        student=replace(
            base.student,
            name=own.network.name,
            size=recipe.student.size,  # both see the same images
            width=own.network.width,
            heads=own.network.heads,
            pretrained=own.network.pretrained,
            weights=own.network.weights,
        ),
        patches=recipe.patches,
        labelled=replace(
            base.labelled,
            identities_per_batch=labelled.identities_per_batch,
            images_per_identity=labelled.images_per_identity,
            triplet_mining=own.triplet,
            neck=own.logit_neck,
        ),
        views=replace(base.views, **occluders),
        train=replace(
            base.train,
            rate=own.train.rate,
            epochs=own.train.epochs,
            seed=own.train.seed,
            precision=recipe.train.precision,
        ),
        hts=False,
        npkd=False,
        alpha=1.0,
        beta=1.0,
        noda=own.noda,
    )
    return benchmark, training


def check_networks(recipe: PruningRecipe) -> None:
    """Raises ValueError when a network cannot be built, or not start from the weights it is told to start from."""
    asked: dict[str, tuple[Transformer, PrunedViTConfig, bool]] = {}
    check_backbone(recipe.student.name)
    asked["student"] = recipe.student, student_config(recipe), True
    if recipe.npkd:
        check_backbone(recipe.teacher.network.name)
        asked["teacher.network"] = recipe.teacher.network, teacher_config(recipe), not recipe.teacher.weights
    for whose, (network, config, starts) in asked.items():
        if starts:
            _check_start(network, whose, recipe)
        file = network.weights if starts else ""
        try:
            _build(config, file, stamp_of(file) if file else None, recipe.patches.pos_resize)
        except ValueError as error:
            raise ValueError(f"{whose}: {error}") from error


@lru_cache(maxsize=64)  # every row of a table asks for the same few networks
def _build(config: PrunedViTConfig, weights: str, stamp: tuple[int, int] | None, resize: Any) -> None:
    """The network's own checks, of stages, image size, heads and the file it starts from; it takes no memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a meta tensor takes no weights
        PrunedViT(config, weights=weights, resize=resize)


def check_batch(recipe: PruningRecipe, workers: int) -> None:
    """Raises ValueError for a batch that the workers cannot share."""
    labelled = recipe.labelled.images
    check_labelled(labelled, "identities_per_batch × images_per_identity", workers)
    if labelled * recipe.num_views < 2 * workers:
        raise ValueError(f"a batch of {labelled} images leaves {workers} workers fewer than 2 each; enlarge it")


def _check_start(network: Transformer, whose: str, recipe: PruningRecipe) -> None:
    changed = (network.width, network.heads, recipe.patches.patch_size, recipe.patches.depth)
    if network.pretrained and not network.weights and any(changed):
        raise ValueError(
            f"there are no pretrained weights for a network of another width, heads, depth or patch_size; "
            f"set {whose}.pretrained to false"
        )
