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
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.similarity import at_least_float32, full_precision
from losses.sureid import Alignment, feature_term, logit_term, ratio_loss
from losses.triplet import batch_hard_triplet, camera_triplet
from models.token_pruning import PrunedViT, Rounding, Trained, gumbel_noise
from orchestrator import distributed
from orchestrator.method import Batch, Count, FilePath, Losses, Method, Positive, Probability, Range, Task, Weight
from orchestrator.methods import sureid_training
from orchestrator.methods.embedding import Pixels, TrainingRecipe, Whole

KeepRatio = Annotated[float, Range(0, 1, above=True)]


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingRecipe):
    """Numbers of one SUReID training; defaults are the paper's on Occluded-DukeMTMC.

    A field marked "ours" is not stated in the paper, one marked "public code" comes from the code it builds on
    (DynamicViT for pruning, TransReID for everything else).
    """

    # The student. Patch size, width, heads and depth: 0 = the network's own.
    student: str = "deit_small_distilled_patch16_224.fb_in1k"  # into the plain network, without distillation token
    student_size: Pixels = (256, 128)
    student_width: Whole = 0
    student_heads: Whole = 0
    patch_size: Whole = 0  # of both networks
    depth: Whole = 0  # of both networks
    patch_stride: Whole = 0  # of both networks: pixels from patch to patch, 0 = no overlap; TransReID*: 12
    camera_weight: Weight = 0.0  # of both networks: λ of TransReID's camera embedding, there 3.0; 0 = none
    weights: FilePath = ""  # a local file instead of timm's download
    pos_resize: Literal["bicubic", "bilinear"] = "bicubic"  # of the position embedding; TransReID: bilinear
    drop_path: Probability = 0.1  # public code
    pixels: Literal["half", "imagenet"] = "half"  # mean and deviation of the input, one for both networks; ours
    # HTS: hierarchical token sparsification.
    hts: bool = True
    keep_ratio: KeepRatio = 0.7  # p; the stages keep p, p², p³
    stages: tuple[int, int, int] = (3, 6, 9)  # before these blocks, from 0: the 4th, 7th and 10th
    predictor: Literal["lg", "mlp"] = "lg"  # DynamicViT's, or eq. 1 to the letter
    keep_column: Literal[1, 0] = 1  # of the predictor; DynamicViT's weights need 0
    gumbel_temperature: Positive = 1.0  # τ
    softmax_guard: Weight = 1e-6  # of masked attention in training, public code; 0 = exact, with huge gradients
    attention_scale: Literal["head", "width"] = "head"  # 1/√(C/H); eq. 4 prints 1/√C
    rounding: Rounding = "floor"  # of N·p, public code
    token_order: Literal["position", "score"] = "position"
    selection: Literal["predictor", "attention", "random"] = "predictor"  # at inference; the others are controls
    selection_seed: Whole = 0  # of "random"
    inference: Literal["topk", "threshold"] = "topk"  # threshold: another count for every image, no speed-up
    reweight: Literal["post", "pre_last", "pool", "off"] = "post"  # eq. 8 as read; inert for the class token
    reweight_at_inference: bool = False
    ratio_weight: Weight = 2.0  # λ_ratio
    # NPKD: distillation from the frozen teacher.
    npkd: bool = True
    logit_weight: Weight = 0.1  # λ of eq. 13
    temperature: Positive = 1.0  # T
    kl_direction: Literal["ts", "st"] = "ts"  # KL(teacher ‖ student); eq. 11 prints st
    align: Alignment = "ts_interpolation"
    feature_reduction: Literal["sum", "mean"] = "sum"  # over channels; sum is eq. 13 to the letter
    teacher_view: Literal["same", "clean"] = "same"  # clean: the plain image, from the cache; ours
    # Total (eq. 14): alpha (NPKD + ratio) + beta (identity + triplet).
    alpha: Weight = 1.0
    beta: Weight = 1.0
    # Identity and triplet losses.
    identities_per_batch: Annotated[int, Range(2)] = 16
    images_per_identity: Count = 4
    label_smoothing: Probability = 0.0  # public code; 0.1 in convolutional recipes
    triplet_mining: Literal["plain", "camera"] = "plain"  # camera: the teacher's, our definition
    triplet_form: Literal["soft", "margin"] = "soft"  # public code
    triplet_margin: Weight = 0.3  # of the form "margin"
    neck: Literal["bn", "none"] = "bn"  # before the classifier
    evaluate_neck: Literal["before", "after"] = "before"  # which feature is searched with; public code
    # NODA and the other augmentation.
    noda: bool = True  # two views of every image, the second occluded
    views_without_noda: Annotated[int, Range(1, 2)] = 1  # 2 = as many images a step as with NODA
    noda_triplet: Literal["joint", "per_view"] = "joint"  # mining over both views together, or in each
    occluders: Literal["procedural", "folder", "train_crops"] = "procedural"  # the authors' photographs are not public
    occluder_folder: FilePath = ""
    occluder_alpha: bool = False  # use the alpha channel of the folder's pictures
    occluder_count: Count = 200  # of drawn patches or strips
    occluder_seed: Whole = 0
    student_pad: Whole = 10  # public code
    erase: Probability = 0.5
    patch: Probability = 0.5  # random patch
    jitter: Probability = 0.0  # colour factors 1 ± this, on both views; "extra" on two benchmarks, there 0.2: ours
    # Optimisation.
    learning_rate: Positive = 0.008
    bias_rate_scale: Positive = 2.0  # public code
    backbone_rate_scale: Positive = 1.0  # DynamicViT: 0.01
    backbone_frozen_epochs: Whole = 0  # at the beginning; DynamicViT: 5
    weight_decay: Weight = 1e-4  # public code; not on λ of eq. 8
    epochs: Count = 200
    warmup_epochs: Whole = 5  # linear from 0.01, public code
    # The teacher: the same network without HTS and NPKD, trained with the camera-constrained triplet.
    teacher: str = "vit_base_patch16_224.orig_in21k_ft_in1k"
    teacher_width: Whole = 0
    teacher_heads: Whole = 0
    teacher_weights: FilePath = ""  # a .safetensors file; empty = found by fingerprint, or trained now
    teacher_logit_neck: Literal["none", "bn"] = "none"  # the paper's g^t is without batch norm
    teacher_triplet: Literal["camera", "plain"] = "camera"
    teacher_noda: bool = False  # "occluded data augmentation" of earlier work: random patch and erasing; ours
    teacher_epochs: Count = 120  # public code
    teacher_learning_rate: Positive = 0.008
    teacher_seed: Whole = 0
    teacher_pretrained: bool = True
    teacher_start: FilePath = ""  # a local file its training starts from, instead of timm's download

    @property
    def views(self) -> int:
        """How many views of every image are in a step."""
        return 2 if self.noda else self.views_without_noda

    @property
    def classifies(self) -> bool:
        """Whether any loss trains the classifier, and so the neck."""
        return self.beta > 0 or (self.npkd and self.logit_weight > 0)


class SUReID(Task):
    """Student, frozen teacher (or none) and the losses of eq. 14."""

    def __init__(self, recipe: Recipe, student: PrunedViT, teacher: PrunedViT | None = None):
        super().__init__(student, teacher)
        self.recipe = recipe
        self.augment = sureid_training.augmentations(recipe)
        self.projection = None
        if teacher is not None and recipe.align.endswith("linear"):
            widths = teacher.backbone.embed_dim, student.backbone.embed_dim
            self.projection = nn.Linear(*(widths if recipe.align.startswith("ts") else widths[::-1]))

    def forward(self, batch: Batch) -> Losses:
        recipe = self.recipe
        views = [
            augment(batch["frames"], draws, overlay, recipe.pixels)
            for augment, draws, overlay in zip(self.augment, batch["draws"], batch["overlays"], strict=True)
        ]
        images_BCHW = torch.cat(views)  # B = views × images, a view after the other
        noise = gumbel_noise(batch["uniform"]) if recipe.hts else None
        student = self.student.trained(images_BCHW, noise, recipe.gumbel_temperature, self._seen_by(batch))
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
        label_B = distributed.gather(batch["label"].repeat(recipe.views))
        camera_B = distributed.gather(batch["camera"].repeat(recipe.views))
        with full_precision(neck_BD):
            logits_BC = self.student.classifier(neck_BD)
            identity = F.cross_entropy(logits_BC, label_B, label_smoothing=recipe.label_smoothing)
        # Mined over both views together, or in each on its own. Rows are ranks × views × images.
        groups = recipe.views if recipe.noda_triplet == "per_view" else 1
        of_view = [
            x.unflatten(0, (distributed.world_size(), groups, -1)).transpose(0, 1).flatten(1, 2)
            for x in (feature_BD, label_B, camera_B)
        ]
        triplet = torch.stack([self._triplet(*view) for view in zip(*of_view, strict=True)]).mean()
        return Losses({"identity": identity, "triplet": triplet}, {"identity": recipe.beta, "triplet": recipe.beta})

    def _triplet(self, feature_BD: Tensor, label_B: Tensor, camera_B: Tensor) -> Tensor:
        recipe = self.recipe
        margin = None if recipe.triplet_form == "soft" else recipe.triplet_margin
        if recipe.triplet_mining == "camera":
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
        targets = [recipe.keep_ratio**stage for stage in (1, 2, 3)]
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
            return batch["teacher"].to(own).repeat(self.recipe.views, 1)
        return at_least_float32(self.teacher.trained(images_BCHW, camera_B=self._seen_by(batch)).feature_BD)

    def _seen_by(self, batch: Batch) -> Tensor | None:
        """The camera of every row, for networks that are told."""
        return batch["camera"].repeat(self.recipe.views) if self.recipe.camera_weight else None


_CROSS_DOMAIN = {
    "student": "vit_base_patch16_224.orig_in21k_ft_in1k", "alpha": 2.0, "beta": 1.0, "jitter": 0.2,
}  # fmt: skip
# Small networks from scratch on a CPU. Without a neck, and with the camera triplet, a teacher that starts from nothing
# collapses to one point (triplet loss ln 2); hence the two other settings of the teacher. Without clipping the gradient
# of the masked attention explodes now and then (norms above 1,000 were seen), as users of DynamicViT report.
_SMALL = {
    "student": "vit_tiny_patch16_224", "student_size": (64, 32), "student_width": 64, "student_heads": 4,
    "patch_size": 8, "depth": 8, "stages": (2, 4, 6), "student_pad": 3, "pretrained": False, "drop_path": 0.0,
    "erase": 0.2, "patch": 0.2, "optimizer": "adamw", "learning_rate": 2e-3, "bias_rate_scale": 1.0,
    "weight_decay": 0.05, "clip_norm": 1.0, "epochs": 15, "warmup_epochs": 3, "evaluate_every": 5, "loader_workers": 0,
    "pixel_cache": "on",
    "teacher": "vit_tiny_patch16_224", "teacher_width": 128, "teacher_heads": 4, "teacher_pretrained": False,
    "teacher_logit_neck": "bn", "teacher_triplet": "plain", "teacher_epochs": 40, "teacher_learning_rate": 2e-3,
}  # fmt: skip

METHOD = Method(
    paper="SUReID, Song and Liu, arXiv 2401.07469",
    recipes={
        "demo": Recipe(dataset="demo_people", **_SMALL),
        "emoji_occluded": Recipe(
            dataset="emoji_occluded",
            **{**_SMALL, "student_size": (48, 48), "flip": 0.0, "epochs": 6, "teacher_epochs": 24},
        ),
        **{name: Recipe(dataset=name) for name in ("occluded_duke", "market1501", "dukemtmc", "msmt17", "msmt17_v2")},
        "folder": Recipe(dataset="folder", teacher_triplet="plain"),  # one's own data may have no cameras
        **{
            name: Recipe(dataset=name, **_CROSS_DOMAIN)
            for name in ("occluded_reid", "partial_reid", "partial_reid_occluded")
        },
    },
    check=sureid_training.check,
    prepare=sureid_training.prepare,
    experiment=partial(sureid_training.experiment, SUReID),
    prepared_by=sureid_training.PREPARED_BY,
    has_teacher=True,
    teacher=sureid_training.teacher,
    teacher_folder=sureid_training.teacher_folder,
    evaluate=sureid_training.evaluate_student,
    after_training=sureid_training.after_training,
    for_evaluation=sureid_training.for_evaluation,
    networks=sureid_training.networks,
    pictures=sureid_training.pictures,
)
