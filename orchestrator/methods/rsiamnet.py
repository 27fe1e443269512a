"""R-SiamNet, weakly supervised person search (Han et al., ICCV 2021): people are found and recognised from boxes alone.

Every person is embedded twice by the same network, in the whole scene and as a crop. Both shall agree (L_ins), so shall
the likenesses between people (L_int), and people are drawn towards their cluster in a memory of all training people
(L_clu). Before each epoch everybody is embedded and clustered anew.

    python -m orchestrator.train rsiamnet --on demo
    python -m orchestrator.sweep rsiamnet_losses --on prw --data-root DIR

Two minutes on the demo. No code of this paper is public: what it leaves open is a field with its alternatives, and the
defaults are our reading. The paper's detector is RepPoints; here it is torchvision's FCOS, RetinaNet or Faster R-CNN.
``oim`` trains the same network on identities instead, the supervised upper reference; nothing else looks at them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from losses.oim import OIM
from losses.rsiamnet import (
    cluster_contrastive,
    fused,
    inter_instance_consistency,
    self_instance_consistency,
    update_memory,
)
from losses.similarity import unit_rows
from models.network import at_least_float32
from models.person_search import Images
from models.siamese_search import SiameseSearch
from orchestrator.datasets.augmentation import normalised
from orchestrator.families.person_search.training import generators, images_of
from orchestrator.families.weak_search.clustering import (
    STATISTICS,
    TrainingPeople,
    cluster,
    embed_people,
    statistics,
)
from orchestrator.families.weak_search.job import StartEpoch, WeakSearchMethod
from orchestrator.families.weak_search.recipe import SAMPLING, WeakSearchRecipe
from orchestrator.families.weak_search.training import detector_terms, of_all_people
from orchestrator.method import Batch, Losses, Task, Where
from orchestrator.recipe import Range, Weight, changed


@dataclass(frozen=True, kw_only=True)
class Recipe(WeakSearchRecipe):
    """Numbers of one R-SiamNet training."""

    ins: Weight = 1.0  # of L_ins, eq. 1
    inter: Weight = 1.0  # of L_int, eq. 2
    clu: Weight = 1.0  # of L_clu, eq. 3
    det: Weight = 1.0  # of the detector's own losses
    gamma: Annotated[float, Range(0, 1e4, above=True)] = 16.0  # γ of L_clu
    bank_momentum: Annotated[float, Range(0, 1)] = 0.2  # λ, weight of the old row of the memory
    path: Literal["both", "scene", "crop"] = "both"  # by which people are embedded: table 2, rows 1 and 2 have one
    clusters: Literal["neighbours", "singletons"] = "neighbours"  # singletons: instance recognition (IR)
    # What the paper leaves open
    ins_stop: Literal["none", "scene", "crop"] = "none"  # side of L_ins without gradient
    inter_normalization: Literal["row_softmax", "matrix_softmax", "linear"] = "row_softmax"
    inter_temperature: Annotated[float, Range(1e-3)] = 1.0
    inter_diagonal: bool = True
    inter_reduction: Literal["mean", "sum"] = "mean"  # over rows
    rule: Literal["literal", "strict", "other_images"] = "literal"  # who may be a neighbour, and be joined
    cluster_by: Literal["both", "scene"] = "both"  # embeddings that are clustered: scene alone is half the work
    units: bool = True  # within an epoch the memory takes the mean of unit vectors, not of raw ones
    renormalize: bool = True  # a written row of the memory is made a unit vector
    refill: Literal["replace", "blend"] = "replace"  # of the memory before an epoch
    oim: Weight = 0.0  # OIM on identities, the supervised reference; 0 = identities are never looked at


class Looked(NamedTuple):
    """All that the losses of a step are made from."""

    detector: NamedTuple
    scenes: int
    scene_PD: Tensor | None  # raw embeddings of this rank's people
    crop_PD: Tensor | None
    row_P: Tensor  # of the memory
    identity_P: Tensor
    counts: list[int]  # people of every rank


class RSiamNet(Task):
    """The network, and a memory of all training people with their clusters in buffers."""

    bank_ND: Tensor
    label_N: Tensor
    clusters_E5: Tensor  # what is told of every epoch's clusters; nothing is trained on it

    def __init__(self, recipe: Recipe, student: SiameseSearch, people: int, identities: int) -> None:
        super().__init__(student)
        self.recipe = recipe
        rows = people if recipe.clu else 0
        self.register_buffer("bank_ND", torch.zeros(rows, recipe.student.dim))
        self.register_buffer("label_N", torch.arange(rows))
        epochs = recipe.train.epochs if recipe.clu else 0
        self.register_buffer("clusters_E5", torch.zeros(epochs, len(STATISTICS), dtype=torch.float64))
        self.oim = None
        if recipe.oim:
            own = recipe.memory
            self.oim = OIM(recipe.student.dim, identities, own.queue, own.momentum, own.scale)

    # --- before an epoch

    @torch.no_grad()
    def start_epoch(self, people: TrainingPeople, where: Where, epoch: int) -> Mapping[str, float]:
        """Embeds everybody, refills the memory, clusters (section 3.3)."""
        recipe = self.recipe
        how = {"units": recipe.units, "device": where.device, "workers": recipe.run.loader_workers}
        embedding_ND = embed_people(self.student, people, recipe.path, **how)
        if recipe.clusters == "neighbours":
            by_scene = recipe.path == "both" and recipe.cluster_by == "scene"
            compared_ND = embed_people(self.student, people, "scene", **how) if by_scene else embedding_ND
            self.label_N.copy_(cluster(compared_ND, people.image_N, recipe.rule))
        if recipe.refill == "blend" and self.steps:
            embedding_ND = unit_rows(recipe.bank_momentum * self.bank_ND + (1 - recipe.bank_momentum) * embedding_ND)
        self.bank_ND.copy_(embedding_ND)
        told = statistics(self.label_N, people.scenes)
        self.clusters_E5[epoch - 1] = torch.tensor([told[name] for name in STATISTICS], dtype=torch.float64)
        return told

    # --- a step

    def forward(self, batch: Batch) -> Losses:
        return self.losses(self.look(batch))

    def look(self, batch: Batch) -> Looked:
        """Both paths on a batch; pooling people from levels waits for the device."""
        images = images_of(batch, self.student)
        seen = self.student.trained(images, batch["boxes"], SAMPLING, generators(batch))
        scene_PD = crop_PD = None
        if self.recipe.path != "crop":
            scene_PD = self.student.embed_boxes(seen.maps, batch["people"], images.sizes)
        if self.recipe.path != "scene":
            crop_PD = self._crops(batch["crops"], images)
        return Looked(
            seen.detector, len(images.sizes), scene_PD, crop_PD, batch["row"], batch["row_identity"], batch["counts"]
        )

    def losses(self, looked: Looked) -> Losses:
        """Over the batch of all ranks; no step waits here."""
        recipe, counts = self.recipe, looked.counts
        terms: dict[str, Tensor] = {}
        weights = {"ins": recipe.ins, "inter": recipe.inter, "clu": recipe.clu, "oim": recipe.oim}
        if recipe.det:
            terms |= detector_terms(looked.detector, looked.scenes)
            weights |= dict.fromkeys(terms, recipe.det)
        scene_BD, crop_BD = (
            None if raw_PD is None else of_all_people(at_least_float32(raw_PD), counts)
            for raw_PD in (looked.scene_PD, looked.crop_PD)
        )
        if recipe.path == "both":
            terms |= self._consistency(scene_BD, crop_BD)
        feature_BD, kept = self._feature(scene_BD, crop_BD), {}
        if recipe.clu:
            row_B = of_all_people(looked.row_P, counts)
            terms["clu"] = cluster_contrastive(feature_BD, self.bank_ND, self.label_N, row_B, recipe.gamma)
            kept |= {"feature": feature_BD.detach(), "row": row_B}  # of all ranks already
        if self.oim is not None:
            unit_BD, identity_B = unit_rows(feature_BD), of_all_people(looked.identity_P, counts)
            terms["oim"] = self.oim(unit_BD, identity_B)
            kept |= {"unit": unit_BD.detach(), "identity": identity_B}
        return Losses(terms, {name: weights[name] for name in terms}, {}, kept)

    def after_step(self, kept: Mapping[str, Tensor]) -> None:
        """The memory takes the rows of all ranks."""
        recipe = self.recipe
        if "feature" in kept:
            update_memory(
                self.bank_ND, kept["row"], kept["feature"], recipe.bank_momentum, recipe.units, recipe.renormalize
            )
        if self.oim is not None:
            self.oim.update(kept["unit"], kept["identity"])

    def _crops(self, crops_P3hw: Tensor, images: Images) -> Tensor:
        """Raw embeddings of the crops, which are normalised as the frames are."""
        like, linear = images.pixels_BCHW, self.student.embedding
        if not len(crops_P3hw):
            return linear(like.new_zeros(0, linear.in_features))  # nobody, and a gradient of zero
        return self.student.embed_crops(normalised(crops_P3hw, self.student.pixels).to(like.dtype))

    def _consistency(self, scene_BD: Tensor, crop_BD: Tensor) -> dict[str, Tensor]:
        """L_ins and L_int."""
        recipe, terms = self.recipe, {}
        if recipe.ins:
            sides = (scene_BD.detach() if recipe.ins_stop == "scene" else scene_BD,
                     crop_BD.detach() if recipe.ins_stop == "crop" else crop_BD)  # fmt: skip
            terms["ins"] = self_instance_consistency(*sides)
        if recipe.inter:
            terms["inter"] = inter_instance_consistency(
                scene_BD, crop_BD, recipe.inter_normalization, recipe.inter_temperature, recipe.inter_diagonal,
                recipe.inter_reduction,
            )  # fmt: skip
        return terms

    def _feature(self, scene_BD: Tensor | None, crop_BD: Tensor | None) -> Tensor:
        """What the memory is compared with, and takes in."""
        if self.recipe.path == "both":
            return fused(scene_BD, crop_BD, self.recipe.units)
        return scene_BD if self.recipe.path == "scene" else crop_BD


def _start_epoch(recipe: Recipe) -> StartEpoch | None:
    return RSiamNet.start_epoch if recipe.clu else None


def _check_losses(recipe: Recipe) -> None:
    if recipe.inter and recipe.inter_normalization == "linear" and recipe.inter_temperature != 1:
        raise ValueError(
            f"inter_normalization=linear has no temperature, got {recipe.inter_temperature:g}; leave it at 1"
        )
    if not (recipe.clu or recipe.oim or (recipe.path == "both" and (recipe.ins or recipe.inter))):
        raise ValueError("nothing trains the embedding: set one of clu, ins, inter (path=both) or oim above 0")
    if recipe.student.search_by == "crop" and recipe.path == "scene":
        raise ValueError("student.search_by=crop, but path=scene trains no crop; set path to both or crop")


# Small networks from scratch on a CPU.
_SMALL = {
    "student.name": "resnet10t",
    "student.width": 0.25,
    "student.size": (96, 128),
    "student.levels": 64,
    "student.dim": 128,
    "student.crop": (48, 24),
    "student.pretrained": False,
    "student.frozen_stages": 0,
    "student.freeze_norms": False,
    "detections": 20,
    "candidates": 100,
    "batch.scenes": 6,
    "queue": 60,
    "train.optimizer": "adamw",
    "train.rate": 2e-3,
    "weight_decay": 0.01,
    "train.epochs": 20,
    "warmup_steps": 25,
    "falls": (14, 18),
    "evaluate_every": 5,
    "loader_workers": 0,
    "pixel_cache": "on",
    "precision": "float32",
}
_CUHK, _PRW = {"data.name": "cuhk_sysu"}, {"data.name": "prw", "queue": 500}
_BENCHMARKS: dict[str, dict[str, Any]] = {
    "demo": {"data.name": "demo_scenes", **_SMALL},
    "emoji_scenes": {"data.name": "emoji_scenes", **_SMALL, "student.size": (120, 160), "batch.flip": 0.0},
    "cuhk_sysu": _CUHK,
    "prw": _PRW,
    # Tables 3 and 4: more training data, and larger scenes
    "cuhk_sysu_and_prw": {"data.name": "cuhk_sysu+prw"},
    "prw_and_cuhk_sysu": {**_PRW, "data.name": "prw+cuhk_sysu"},
    "cuhk_sysu_and_both": {"data.name": "cuhk_sysu+prw+inria_person"},
    "prw_and_both": {**_PRW, "data.name": "prw+cuhk_sysu+inria_person"},
    "cuhk_sysu_large": {**_CUHK, "student.size": (900, 1500)},
    "prw_large": {**_PRW, "student.size": (900, 1500)},
    "folder": {"data.name": "folder_scenes", "queue": 500},
}

METHOD = WeakSearchMethod(
    paper="R-SiamNet, Han et al., ICCV 2021",
    recipes={name: changed(Recipe(), settings) for name, settings in _BENCHMARKS.items()},
    task=RSiamNet,
    path=lambda recipe: recipe.path,
    start_epoch=_start_epoch,
    check_losses=_check_losses,
    looks_at_identities=lambda recipe: recipe.oim > 0,
)
