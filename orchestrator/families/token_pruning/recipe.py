"""Recipe groups of token-pruning transformers; defaults are SUReID's on Occluded-DukeMTMC.

A field marked "ours" is not stated in the paper, one marked "public code" comes from the code it builds on
(DynamicViT for pruning, TransReID for everything else).
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from models.token_pruning import Rounding
from orchestrator.datasets import occlusion
from orchestrator.families.retrieval.recipe import RetrievalRecipe
from orchestrator.recipe import (
    Count,
    FilePath,
    Pixels,
    Positive,
    Probability,
    Range,
    Share,
    Teacher,
    Train,
    Weight,
    Whole,
)


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A plain vision transformer and what it starts from. Width and heads: 0 = the network's own."""

    name: str = "vit_base_patch16_224.orig_in21k_ft_in1k"
    width: Whole = 0
    heads: Whole = 0
    pretrained: bool = True  # start from timm's weights
    weights: FilePath = ""  # start from a local file instead


@dataclass(frozen=True, kw_only=True)
class StudentTransformer(Transformer):
    """The network that is trained; the teacher sees the same images."""

    name: str = "deit_small_distilled_patch16_224.fb_in1k"  # into the plain network, without distillation token
    size: Pixels = (256, 128)
    pad: Whole = 10  # public code
    drop_path: Probability = 0.1  # public code


@dataclass(frozen=True, kw_only=True)
class Patches:
    """What both networks share. 0 = the network's own."""

    patch_size: Whole = 0
    depth: Whole = 0
    patch_stride: Whole = 0  # pixels from patch to patch, 0 = no overlap; TransReID*: 12
    camera_weight: Weight = 0.0  # λ of TransReID's camera embedding, there 3.0; 0 = none
    pos_resize: Literal["bicubic", "bilinear"] = "bicubic"  # of the position embedding; TransReID: bilinear
    pixels: Literal["half", "imagenet", "weights"] = "half"  # mean and deviation of the input; ours


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """HTS: hierarchical token sparsification."""

    keep_ratio: Share = 0.7  # p; the stages keep p, p², p³
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


@dataclass(frozen=True, kw_only=True)
class LabelledPeople:
    """Batches of P identities × K images, and the identity and triplet losses on them."""

    identities_per_batch: Annotated[int, Range(2)] = 16  # P
    images_per_identity: Count = 4  # K
    label_smoothing: Probability = 0.0  # public code; 0.1 in convolutional recipes
    triplet_mining: Literal["plain", "camera"] = "plain"  # camera: the teacher's, our definition
    triplet_form: Literal["soft", "margin"] = "soft"  # public code
    triplet_margin: Weight = 0.3  # of the form "margin"
    neck: Literal["bn", "none"] = "bn"  # before the classifier
    evaluate_neck: Literal["before", "after"] = "before"  # which feature is searched with; public code

    @property
    def images(self) -> int:
        return self.identities_per_batch * self.images_per_identity


@dataclass(frozen=True, kw_only=True)
class PersonViews:
    """NODA and the other augmentation."""

    views_without_noda: Annotated[int, Range(1, 2)] = 1  # 2 = as many images a step as with NODA
    noda_triplet: Literal["joint", "per_view"] = "joint"  # mining over both views together, or in each
    flip: Probability = 0.5
    erase: Probability = 0.5
    patch: Probability = 0.5  # random patch
    jitter: Probability = 0.0  # colour factors 1 ± this, on both views; "extra" on two benchmarks, there 0.2: ours
    occluders: Literal["procedural", "folder", "train_crops"] = "procedural"  # the authors' photographs are not public
    occluder_folder: FilePath = ""
    occluder_alpha: bool = False  # use the alpha channel of the folder's pictures
    occluder_count: Count = 200  # of drawn patches or strips
    occluder_seed: Whole = 0


@dataclass(frozen=True, kw_only=True)
class TransformerTrain(Train):
    """Linear warm-up inside a cosine that ends at 0.002 of the rate (TransReID's code)."""

    rate: Positive = 0.008
    weight_decay: Weight = 1e-4  # public code; not on λ of eq. 8
    epochs: Count = 200
    warmup_epochs: Whole = 5  # from 0.01, public code
    bias_rate_scale: Positive = 2.0  # public code
    backbone_rate_scale: Positive = 1.0  # DynamicViT: 0.01
    backbone_frozen_epochs: Whole = 0  # at the beginning; DynamicViT: 5


@dataclass(frozen=True, kw_only=True)
class TransformerTeacherTrain:
    """What is the teacher's own; the optimiser is as the benchmark trains a student."""

    rate: Positive = 0.008
    epochs: Count = 120  # public code
    seed: Whole = 0


@dataclass(frozen=True, kw_only=True)
class TransformerTeacher(Teacher):
    """The same network without HTS and NPKD."""

    network: Transformer = field(default_factory=Transformer)
    train: TransformerTeacherTrain = field(default_factory=TransformerTeacherTrain)
    logit_neck: Literal["none", "bn"] = "none"  # the paper's g^t is without batch norm
    triplet: Literal["camera", "plain"] = "camera"  # mining
    noda: bool = False  # "occluded data augmentation" of earlier work: random patch and erasing; ours


@dataclass(frozen=True, kw_only=True)
class PruningRecipe(RetrievalRecipe):
    """What the training of such a network is made of; a method adds its losses' numbers."""

    student: StudentTransformer = field(default_factory=StudentTransformer)
    patches: Patches = field(default_factory=Patches)
    pruning: Pruning = field(default_factory=Pruning)
    labelled: LabelledPeople = field(default_factory=LabelledPeople)
    views: PersonViews = field(default_factory=PersonViews)
    teacher: TransformerTeacher = field(default_factory=TransformerTeacher)
    train: TransformerTrain = field(default_factory=TransformerTrain)
    hts: bool = True  # hierarchical token sparsification
    npkd: bool = True  # distillation from the frozen teacher
    noda: bool = True  # two views of every image, the second occluded
    logit_weight: Weight = 0.1  # λ of eq. 13
    teacher_view: Literal["same", "clean"] = "same"  # clean: the plain image, from the cache; ours
    # Total (eq. 14): alpha (NPKD + ratio) + beta (identity + triplet).
    alpha: Weight = 1.0
    beta: Weight = 1.0

    @property
    def num_views(self) -> int:
        """How many views of every image are in a step."""
        return 2 if self.noda else self.views.views_without_noda

    @property
    def classifies(self) -> bool:
        """Whether any loss trains the classifier, and so the neck."""
        return self.beta > 0 or (self.npkd and self.logit_weight > 0)


def check_losses(recipe: PruningRecipe) -> None:
    """Raises ValueError where nothing is trained, or a loss or a neck would have nothing to work on."""
    if recipe.npkd and not recipe.alpha:
        raise ValueError("alpha is 0, so the teacher would be trained and never used; set npkd to false as well")
    if not recipe.beta and not recipe.npkd:
        raise ValueError("nothing to train on: beta is 0 and npkd is off")
    frozen, epochs = recipe.train.backbone_frozen_epochs, recipe.train.epochs
    if frozen >= epochs:
        raise ValueError(f"backbone_frozen_epochs ({frozen}) must be below epochs ({epochs})")
    if recipe.labelled.evaluate_neck == "after" and not (recipe.labelled.neck == "bn" and recipe.classifies):
        raise ValueError("evaluate_neck=after needs neck=bn and a loss that trains it: beta, or npkd with logit_weight")
    if recipe.views.occluders == "folder" and recipe.noda:
        if not recipe.views.occluder_folder:
            raise ValueError("occluders=folder needs occluder_folder, a folder of RGB or RGBA pictures")
        occlusion.pictures_in(recipe.views.occluder_folder)


def check_selection(recipe: PruningRecipe) -> None:
    """Raises ValueError for a choice of tokens where there is none."""
    own = recipe.pruning
    if own.selection != "predictor" and not recipe.hts:
        raise ValueError(f"selection={own.selection} chooses among tokens, and hts is off; leave it at predictor")
    if own.selection_seed and own.selection != "random":
        raise ValueError(f"selection_seed={own.selection_seed} is of selection=random; leave it at 0")
