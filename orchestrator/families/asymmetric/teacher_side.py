"""What is made of the teacher before any trial: its outputs, its classifier's check, its own score."""

# Shape legend: Q and G = queries and gallery, D = embedding width.

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.embedder import Embedder
from orchestrator import cache, checkpoint
from orchestrator.datasets.augmentation import Augmentation
from orchestrator.families.asymmetric.recipe import AsymmetricRecipe
from orchestrator.families.retrieval import data, search
from orchestrator.families.retrieval.data import Source
from orchestrator.method import Where
from orchestrator.needs import Need, Place, Prepared, Ready

_BLOCK = 256  # images of one forward pass of the teacher


def load_teacher(place: Place, after: Mapping[str, Ready]) -> Embedder:
    teacher, _ = checkpoint.load_model(place.folder(after["teacher"].path))
    if "classifier" in after:
        teacher.classifier = checkpoint.load_classifier(place.folder(after["classifier"].path))
    return teacher


@dataclass(frozen=True)
class EmbedViews:
    """Row numbers -> columns of the teacher's outputs, a block at a time."""

    outputs: Callable[[Embedder, Tensor], dict[str, Tensor]]
    teacher: Embedder
    source: Source
    device: torch.device
    total: int
    recorded: AsymmetricRecipe | None  # whose augmentation is recorded; None = plain images

    @torch.inference_mode()
    def __call__(self, rows: np.ndarray) -> Iterator[dict[str, Tensor | np.ndarray]]:
        recorded = None if self.recorded is None else _Recorded(self.recorded, self.total, self.teacher.pixels)
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            if recorded is None:
                images_BCHW = search.model_input(self.teacher, self.source(block), self.device)
                yield _columns(self.outputs(self.teacher, images_BCHW))
                continue
            frames = torch.as_tensor(self.source(block // recorded.views)).to(self.device)
            draws = recorded.draws[block]
            images_BCHW = recorded.augment(frames, torch.from_numpy(draws), recorded.pad)
            yield _columns(self.outputs(self.teacher, images_BCHW), draws=draws)


class _Recorded:
    """The augmentation of recorded views, and the random numbers of all of them."""

    def __init__(self, recipe: AsymmetricRecipe, total: int, pixels: Any):
        height, width = recipe.teacher.network.size
        self.augment: Augmentation = data.augmentation(recipe, pixels)
        self.draws = self.augment.draw(total, width / height, (recipe.teacher.train.seed, 7))
        self.pad, self.views = recipe.teacher.network.pad, recipe.num_views


def _columns(outputs: dict[str, Tensor], **more: np.ndarray) -> dict[str, Tensor | np.ndarray]:
    """Teacher outputs as cache columns: the embedding is the value, everything is float32 or whole numbers."""
    outputs = {name: x.float() if x.is_floating_point() else x for name, x in outputs.items()}
    return {"value": outputs.pop("embedding"), **outputs, **more}


def check_classifier(need: Need, after: Mapping[str, Ready], place: Place) -> Ready:
    """Raises ValueError when the teacher's classifier is not known, or not of these classes."""
    path = Path(place.folder(after["teacher"].path))
    classifier = checkpoint.load_classifier(path)
    shape = (data.open_images(place, after["train"]).num_identities, need.made_from["width"])
    if classifier is None:
        remedy = f"remove {path.parent} to train it again, or store" if after["teacher"].kind == "teacher" else "store"
        raise ValueError(
            f"this method needs the teacher's classifier, and {path.with_suffix('.classifier.safetensors')} does not "
            f"exist; {remedy} a matrix 'weight' {shape} there, classes in order of identity"
        )
    if tuple(classifier.weight.shape) != shape:
        raise ValueError(
            f"the classifier beside {path} is {tuple(classifier.weight.shape)}, this data set needs {shape}"
        )
    fingerprint = cache.weights_hash(classifier)
    return Ready(need.key, need.kind, after["teacher"].path, fingerprint, {"classifier_fingerprint": fingerprint})


def references(need: Need, after: Mapping[str, Ready], recipe: AsymmetricRecipe, where: Where) -> Ready:
    place, device = where.place, where.device
    found = data.open_data(Prepared(place, {role: after[role] for role in ("query", "gallery")}))
    gallery_GD = search.whole(cache.open_rows(place.folder(after["embeddings"].path)), device)
    query_QD = gallery_GD
    if not found.leave_one_out:
        teacher = load_teacher(place, after).to(device)
        images = {"images": after["query"], **({"pixels": after["pixels"]} if "pixels" in after else {})}
        source = data.open_after(place, images, recipe.teacher.network.size)
        query_QD = search.embed(teacher, source, len(found.query), device, workers=recipe.run.loader_workers)
    chance_QD = search.random_rows(tuple(query_QD.shape), device)
    told = {
        "teacher": need.made_from["network"],
        "teacher_fingerprint": after["teacher"].fingerprint,
        "views": recipe.views + (f" ({recipe.num_views})" if recipe.views == "recorded" else ""),
    }
    return search.references(need, found, chance_QD, gallery_GD, query_QD, told)
