"""SUReID: occluded person re-identification with token pruning (Song and Liu, arXiv 2401.07469).

A vision transformer drops the tokens that say nothing about the person (HTS), and a frozen teacher that keeps all of
its tokens shows it what to keep (NPKD), on images with pasted occluders (NODA).

    python -m orchestrator.train sureid --on demo
    python -m orchestrator.sweep sureid_components --on occluded_duke --data-root DIR

Minutes on the demo. On Occluded-DukeMTMC the authors needed one RTX 2080 Ti; a ViT-B teacher is trained first.

The authors published no code. Where the paper is silent or contradicts itself and readings differ, the recipe has a
field: the default is our reading, the comment says so, and the alternatives are its other values. Choices without a
field: α, β = 2, 1 of the two small sets are read in that order; the features are interpolated linearly with
align_corners off; the logit term has the factor T²; occluders are jittered by ±0.5 and keep at least 0.6 of each side;
random patches and erasing have the areas and ratios of the public code; the warm-up starts at 0.01 of the rate and the
cosine ends at 0.002. Left out: the jigsaw branch of TransReID, whose groups of tokens mean nothing when most are gone.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.similarity import at_least_float32, full_precision
from losses.sureid import Alignment, feature_term, logit_term, ratio_loss
from losses.triplet import batch_hard_triplet, camera_triplet
from models.token_pruning import PrunedViT, Trained, gumbel_noise
from orchestrator import distributed
from orchestrator.families.token_pruning.job import TokenPruning
from orchestrator.families.token_pruning.recipe import PruningRecipe
from orchestrator.families.token_pruning.views import augmentations
from orchestrator.method import Batch, Losses, Task
from orchestrator.recipe import Positive, Weight, changed


@dataclass(frozen=True, kw_only=True)
class Recipe(PruningRecipe):
    """Numbers of one SUReID training; defaults are the paper's on Occluded-DukeMTMC."""

    ratio_weight: Weight = 2.0  # λ_ratio
    temperature: Positive = 1.0  # T
    kl_direction: Literal["ts", "st"] = "ts"  # KL(teacher ‖ student); eq. 11 prints st
    align: Alignment = "ts_interpolation"
    feature_reduction: Literal["sum", "mean"] = "sum"  # over channels; sum is eq. 13 to the letter


class SUReID(Task):
    """Student, frozen teacher (or none) and the losses of eq. 14."""

    def __init__(self, recipe: Recipe, student: PrunedViT, teacher: PrunedViT | None = None):
        super().__init__(student, teacher)
        self.recipe = recipe
        self.augment = augmentations(recipe)
        self.projection = None
        if teacher is not None and recipe.align.endswith("linear"):
            widths = teacher.backbone.embed_dim, student.backbone.embed_dim
            self.projection = nn.Linear(*(widths if recipe.align.startswith("ts") else widths[::-1]))

    def forward(self, batch: Batch) -> Losses:
        recipe = self.recipe
        views = [
            augment(batch["frames"], draws, overlay, self.student.pixels)
            for augment, draws, overlay in zip(self.augment, batch["draws"], batch["overlays"], strict=True)
        ]
        images_BCHW = torch.cat(views)  # B = views × images, a view after the other
        noise = gumbel_noise(batch["uniform"]) if recipe.hts else None
        student = self.student.trained(images_BCHW, noise, recipe.pruning.gumbel_temperature, self._seen_by(batch))
        # The neck sees the class tokens of all ranks: its statistics, like every loss here, are of the whole batch.
        feature_BD = distributed.gather(at_least_float32(student.feature_BD))
        neck_BD = self.student.after_neck(feature_BD) if recipe.classifies else feature_BD
        parts = (
            self._identity(feature_BD, neck_BD, batch),
            self._sparsity(student),
            self._distillation(feature_BD, neck_BD, images_BCHW, batch),
        )
        terms, weights, observed = ({k: v for part in parts for k, v in part[i].items()} for i in range(3))
        return Losses(terms, weights, observed)

    def _identity(self, feature_BD: Tensor, neck_BD: Tensor, batch: Batch) -> Losses:
        """L_cls + L_tri: cross-entropy after the neck, triplet before it."""
        recipe = self.recipe
        if not recipe.beta:
            return Losses({}, {})
        label_B = distributed.gather(batch["label"].repeat(recipe.num_views))
        camera_B = distributed.gather(batch["camera"].repeat(recipe.num_views))
        with full_precision(neck_BD):
            logits_BC = self.student.classifier(neck_BD)
            identity = F.cross_entropy(logits_BC, label_B, label_smoothing=recipe.labelled.label_smoothing)
        # Mined over both views together, or in each on its own. Rows are ranks × views × images.
        groups = recipe.num_views if recipe.views.noda_triplet == "per_view" else 1
        of_view = [
            x.unflatten(0, (distributed.world_size(), groups, -1)).transpose(0, 1).flatten(1, 2)
            for x in (feature_BD, label_B, camera_B)
        ]
        triplet = torch.stack([self._triplet(*(x[view] for x in of_view)) for view in range(groups)]).mean()
        return Losses({"identity": identity, "triplet": triplet}, {"identity": recipe.beta, "triplet": recipe.beta})

    def _triplet(self, feature_BD: Tensor, label_B: Tensor, camera_B: Tensor) -> Tensor:
        recipe = self.recipe
        margin = None if recipe.labelled.triplet_form == "soft" else recipe.labelled.triplet_margin
        if recipe.labelled.triplet_mining == "camera":
            return camera_triplet(feature_BD, label_B, camera_B, margin)
        return batch_hard_triplet(feature_BD, label_B, margin)

    def _sparsity(self, student: Trained) -> Losses:
        """L_ratio, and the share of tokens that each stage keeps."""
        recipe = self.recipe
        if student.masks_BSN is None:
            return Losses({}, {})
        masks_BSN = distributed.gather(at_least_float32(student.masks_BSN))
        kept = {f"kept_{stage + 1}": share for stage, share in enumerate(masks_BSN.detach().mean(dim=(0, 2)))}
        if not recipe.alpha * recipe.ratio_weight:
            return Losses({}, {}, kept)
        targets = [recipe.pruning.keep_ratio**stage for stage in (1, 2, 3)]
        return Losses({"ratio": ratio_loss(masks_BSN, targets)}, {"ratio": recipe.alpha * recipe.ratio_weight}, kept)

    def _distillation(self, feature_BD: Tensor, neck_BD: Tensor, images_BCHW: Tensor, batch: Batch) -> Losses:
        """L_KD: λ L_KL of class predictions and the distance of class tokens."""
        recipe = self.recipe
        if self.teacher is None:
            return Losses({}, {})
        taught_BE = distributed.gather_without_gradient(self._taught(images_BCHW, batch))
        align = partial(feature_term, feature_BD, taught_BE, recipe.align, projection=self.projection)
        terms, weights = {"feature": align(recipe.feature_reduction)}, {"feature": recipe.alpha}
        # The two reductions differ by the width alone; the paper does not say which, so both are logged.
        width = (feature_BD if recipe.align.startswith("ts") else taught_BE).shape[1]
        total = terms["feature"].detach() * (1 if recipe.feature_reduction == "sum" else width)
        observed = {"feature_sum": total, "feature_mean": total / width}
        if recipe.logit_weight:
            with full_precision(neck_BD):
                own_BC = self.student.classifier(neck_BD)
                logits_BC = self.teacher.classifier(self.teacher.after_neck(taught_BE))
            terms["logit"] = logit_term(own_BC, logits_BC, recipe.temperature, recipe.kl_direction)
            weights["logit"] = recipe.alpha * recipe.logit_weight
        return Losses(terms, weights, observed)

    @torch.no_grad()
    def _taught(self, images_BCHW: Tensor, batch: Batch) -> Tensor:
        """The teacher's class tokens of this rank's views."""
        if self.recipe.teacher_view == "clean":
            own = self.teacher.backbone.norm.weight.dtype
            return batch["teacher"].to(own).repeat(self.recipe.num_views, 1)
        return at_least_float32(self.teacher.trained(images_BCHW, camera_B=self._seen_by(batch)).feature_BD)

    def _seen_by(self, batch: Batch) -> Tensor | None:
        """The camera of every row, for networks that are told."""
        return batch["camera"].repeat(self.recipe.num_views) if self.recipe.patches.camera_weight else None


_CROSS_DOMAIN = {
    "student.name": "vit_base_patch16_224.orig_in21k_ft_in1k",
    "alpha": 2.0,
    "beta": 1.0,
    "jitter": 0.2,
}
# Small networks from scratch on a CPU. Without a neck, and with the camera triplet, a teacher that starts from nothing
# collapses to one point (triplet loss ln 2); hence the two other settings of the teacher. Without clipping the gradient
# of the masked attention explodes now and then (norms above 1,000 were seen), as users of DynamicViT report.
_SMALL = {
    "student.name": "vit_tiny_patch16_224",
    "student.size": (64, 32),
    "student.width": 64,
    "student.heads": 4,
    "student.pad": 3,
    "student.pretrained": False,
    "drop_path": 0.0,
    "patch_size": 8,
    "depth": 8,
    "stages": (2, 4, 6),
    "erase": 0.2,
    "patch": 0.2,
    "train.optimizer": "adamw",
    "train.rate": 2e-3,
    "bias_rate_scale": 1.0,
    "weight_decay": 0.05,
    "clip_norm": 1.0,
    "train.epochs": 15,
    "warmup_epochs": 3,
    "evaluate_every": 5,
    "loader_workers": 0,
    "pixel_cache": "on",
    "teacher.name": "vit_tiny_patch16_224",
    "teacher.width": 128,
    "teacher.heads": 4,
    "teacher.pretrained": False,
    "teacher.logit_neck": "bn",
    "teacher.triplet": "plain",
    "teacher.epochs": 40,
    "teacher.rate": 2e-3,
}
_EMOJI = {**_SMALL, "student.size": (48, 48), "flip": 0.0, "train.epochs": 6, "teacher.epochs": 24}
_BENCHMARKS: dict[str, dict[str, Any]] = {
    "demo": {"data.name": "demo_people", **_SMALL},
    "emoji_occluded": {"data.name": "emoji_occluded", **_EMOJI},
    **{name: {"data.name": name} for name in ("occluded_duke", "market1501", "dukemtmc", "msmt17", "msmt17_v2")},
    # One's own data may have no cameras, and its networks other pixels.
    "folder": {"data.name": "folder", "teacher.triplet": "plain", "pixels": "weights"},
    **{
        name: {"data.name": name, **_CROSS_DOMAIN}
        for name in ("occluded_reid", "partial_reid", "partial_reid_occluded")
    },
}

METHOD = TokenPruning(
    paper="SUReID, Song and Liu, arXiv 2401.07469",
    recipes={name: changed(Recipe(), settings) for name, settings in _BENCHMARKS.items()},
    task=SUReID,
)
