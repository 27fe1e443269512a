"""What a job of this family opens, and what its networks are given of it."""

# Shape legend: B = images.

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from models.token_pruning import PrunedViT
from orchestrator import cache
from orchestrator.cache import Rows
from orchestrator.datasets import occlusion
from orchestrator.datasets.images import ImageSet, RetrievalData
from orchestrator.datasets.occlusion import Occluders
from orchestrator.families.retrieval import data
from orchestrator.families.retrieval.data import Source
from orchestrator.families.retrieval.search import model_input
from orchestrator.families.token_pruning.recipe import PruningRecipe
from orchestrator.needs import Prepared

SIDES = ("train", "query", "gallery")


@dataclass(frozen=True)
class Opened:
    """Tables and sources of one job."""

    data: RetrievalData
    frames: dict[str, Source]  # by side
    occluders: Occluders | None = None
    cameras: dict[str, np.ndarray] = field(default_factory=dict)  # what networks are told of them, by side
    taught: dict[str, Rows] = field(default_factory=dict)  # the teacher's class tokens of the plain images, by side


def open_all(recipe: PruningRecipe, prepared: Prepared) -> Opened:
    """Opens what is ready by its path."""
    found = data.open_data(prepared)
    size = recipe.student.size
    frames = {"train": data.open_frames(prepared, "train pixels", found.train, size, "bicubic")}
    frames |= data.open_sides(prepared, found, size, "bicubic")
    cameras = {}
    if recipe.patches.camera_weight:
        cameras = {side: camera_index(found.train, getattr(found, side)) for side in SIDES}
    taught = {side: f"{side} embeddings" for side in SIDES}
    return Opened(
        found,
        frames,
        occlusion.stored(prepared.path("occluders")) if "occluders" in prepared else None,
        cameras,
        {side: cache.open_rows(prepared.path(role)) for side, role in taught.items() if role in prepared},
    )


def known_cameras(train: ImageSet) -> np.ndarray:
    """Numbers of the training set's cameras, rising: the rows of the networks' camera embedding."""
    return np.unique(train.camera) if train.camera is not None else np.array([], np.int64)


def camera_index(train: ImageSet, images: ImageSet) -> np.ndarray:
    """Every image's camera as its place among the training set's cameras.

    Raises:
        ValueError: an image of a camera that the training set does not have.
    """
    # Names are those of data set and part. Another data set's cameras are other cameras, whatever their numbers.
    if images.name.split("/")[0] != train.name.split("/")[0]:
        raise ValueError(
            f"the camera embedding needs cameras of the training set, and {images.name} is of other data than "
            f"{train.name}; set camera_weight to 0"
        )
    known = known_cameras(train)
    unseen = np.setdiff1d(images.cameras, known)
    if len(unseen):
        what = "has no cameras" if images.camera is None else f"has camera {unseen[0]}, {train.name} has not"
        raise ValueError(f"the camera embedding needs known cameras, and {images.name} {what}; set camera_weight to 0")
    return np.searchsorted(known, images.cameras)


def inputs(
    network: PrunedViT, opened: Opened, side: str, rows: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Images of one side as the network wants them, and their cameras where it is told."""
    images_BCHW = model_input(network, opened.frames[side](rows), device)
    if not opened.cameras:
        return images_BCHW, None
    return images_BCHW, torch.from_numpy(opened.cameras[side][rows]).to(device)
