"""Networks of a recipe, a batch as losses see it, and the task: a margin softmax and a method's own terms."""

# Shape legend: B = images of all ranks, b = of this rank, D = embedding width, C = classes.

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from losses.margin_softmax import cosines
from losses.similarity import at_least_float32, full_precision
from models import network
from models.embedder import Embedder, EmbedderConfig
from models.network import EmbeddingNetwork, Pixels
from orchestrator import distributed
from orchestrator.datasets.augmentation import normalised
from orchestrator.families.face.heads import MarginHead, norms, own_rows
from orchestrator.families.face.recipe import FaceRecipe, network_config, teacher_dim
from orchestrator.method import Batch, Losses, Task


@dataclass(frozen=True)
class Faces:
    """A batch as losses see it: rows of all ranks, shuffled images first, then balanced ones; embeddings are raw."""

    student_BD: Tensor
    teacher_BD: Tensor | None  # no gradient
    label_B: Tensor
    image_B: Tensor  # which training image
    shuffled: int  # how many of the rows are shuffled images; these are classified


class Sizes(NamedTuple):
    """What a method's memory may depend on."""

    classes: int
    steps: int  # of the whole training


class Terms(NamedTuple):
    """What a method adds to the margin softmax: the terms that are on, unweighted, and what is only logged."""

    terms: dict[str, Tensor]
    observed: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a method of this family is beside its recipe: its terms and their weights, and what these remember.

    Each function has the recipe first. ``memory`` is the module that ``remembers`` has made.
    """

    weights: Callable[[Any], dict[str, float]]  # of the own terms, unweighted by the step; 0 = off
    terms: Callable[[Any, "FaceTask", Faces], Terms]
    check: Callable[[Any], None] = lambda recipe: None  # raises ValueError
    remembers: Callable[[Any, Sizes], nn.Module | None] = lambda recipe, sizes: None  # banks, thresholds, projectors
    # Weights that follow the step: name -> factor on the device, of the number of the step from 1.
    ramps: Callable[[Any, Sizes, Tensor], dict[str, Tensor]] = lambda recipe, sizes, step: {}
    # Before the logits, without gradient: centres that follow the batch.
    before: Callable[[Any, "FaceTask", Faces], None] = lambda recipe, task, faces: None
    after: Callable[[Any, nn.Module | None, Mapping[str, Tensor]], None] = lambda recipe, memory, rows: None
    # Centres that the softmax is on in place of the recipe's, and each row's own margin.
    centres: Callable[[Any, "FaceTask"], Tensor | None] = lambda recipe, task: None
    margins: Callable[[Any, "FaceTask", Faces], Tensor | None] = lambda recipe, task, faces: None
    logits: Callable[[Any], bool] = lambda recipe: False  # both networks' class scores are looked at


ALONE = Distillation(weights=lambda recipe: {}, terms=lambda recipe, task, faces: Terms({}))


class FaceTask(Task):
    """Student, frozen teacher (None where its embeddings are stored, or there is none), head, and a method's terms."""

    frozen = frozenset({"teacher", "teacher_centres"})

    def __init__(
        self, recipe: FaceRecipe, method: Distillation, student: EmbeddingNetwork, sizes: Sizes,
        teacher: EmbeddingNetwork | None = None, teacher_centres: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__(student, teacher)
        self.recipe, self.method, self.sizes = recipe, method, sizes
        self.cls = getattr(recipe, "cls", 1.0)
        self.augment = partial(shown, pixels=student.pixels)
        self.augment_teacher = self.augment if teacher is None else partial(shown, pixels=teacher.pixels)
        self.head = MarginHead(recipe.head)
        self.teacher_centres = None if teacher_centres is None else teacher_centres.requires_grad_(False)
        self.memory = method.remembers(recipe, sizes)
        whole = distributed.world_size() == 1 or method.logits(recipe)
        if trains_centres(recipe, method):
            student.classifier = own_rows(sizes.classes, recipe.embedding_dim, recipe.train.seed, spread=not whole)
            self.sharded = frozenset() if whole else frozenset({"student.classifier"})

    def forward(self, batch: Batch) -> Losses:
        recipe, method = self.recipe, self.method
        local_bD = at_least_float32(self.student(self.augment(batch["frames"], batch["mirrored"])))
        faces = self.faces(batch, local_bD)
        with torch.no_grad():
            method.before(recipe, self, faces)
        terms, weights = {}, {}
        if self.cls:
            terms["cls"], weights["cls"] = self.classified(local_bD, faces), self.cls
        own = method.terms(recipe, self, faces)
        ramps = method.ramps(recipe, self.sizes, self.steps + 1)
        terms |= own.terms
        weights |= {name: method.weights(recipe)[name] * ramps.get(name, 1.0) for name in own.terms}
        kept = {"student": faces.student_BD, "label": faces.label_B, "image": faces.image_B}
        kept |= {} if faces.teacher_BD is None else {"teacher": faces.teacher_BD}
        # Of all ranks already, so that nothing is gathered twice.
        kept = {name: rows.detach() for name, rows in kept.items()}
        return Losses(terms, weights, own.observed, kept)

    def after_step(self, kept: Mapping[str, Tensor]) -> None:
        self.method.after(self.recipe, self.memory, kept)

    def faces(self, batch: Batch, local_bD: Tensor) -> Faces:
        """Both networks' embeddings of the batch of all ranks."""
        teacher_BD = None
        if "teacher" in batch or self.teacher is not None:
            teacher_BD = self._of_all(self._taught(batch))
        label_B, image_B = (self._of_all(batch[name]) for name in ("label", "image"))
        return Faces(self._of_all(local_bD), teacher_BD, label_B, image_B, self.recipe.batch_size)

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Tensor:
        stored = batch.get("teacher")
        if stored is None:
            stored = self.teacher(self.augment_teacher(batch["frames"], batch["mirrored"]))
        return at_least_float32(stored)

    def _of_all(self, local: Tensor) -> Tensor:
        """Rows of all ranks: the shuffled images of all, then the balanced ones, as one process has them."""
        rows, world = distributed.gather(local), distributed.world_size()
        shuffled = self.recipe.batch_size // world
        if world == 1 or len(local) == shuffled:
            return rows
        of_ranks = rows.view(world, len(local), *rows.shape[1:])
        return torch.cat([of_ranks[:, :shuffled].flatten(0, 1), of_ranks[:, shuffled:].flatten(0, 1)])

    def classified(self, local_bD: Tensor, faces: Faces) -> Tensor:
        """The margin softmax on the shuffled images."""
        label_B = faces.label_B[: faces.shuffled]
        if self.sharded:
            shuffled = self.recipe.batch_size // distributed.world_size()
            return self.head.spread_loss(local_bD[:shuffled], label_B, self.student.classifier)
        margins_B = self.method.margins(self.recipe, self, faces)
        margins_B = None if margins_B is None else margins_B[: faces.shuffled]
        if self.recipe.head.sample < 1:
            return self.head.spread_loss(faces.student_BD[: faces.shuffled], label_B, self.student.classifier)
        return self.head.loss(faces.student_BD[: faces.shuffled], label_B, self.centres_CD(), margins_B)

    def centres_CD(self) -> Tensor:
        """The class centres that the softmax is on."""
        given = self.method.centres(self.recipe, self)
        if given is not None:
            return given
        if getattr(self.recipe, "centres", "own") == "teacher":
            return self.teacher_centres.weight
        return self.student.classifier.weight

    def logits(self, faces: Faces, margin: bool) -> tuple[Tensor, Tensor]:
        """Both networks' scaled class scores of the shuffled images, (B, C) each, with or without the head's margin."""
        label_B, rows = faces.label_B[: faces.shuffled], slice(0, faces.shuffled)
        found = []
        for embedding_BD, centres_CD in (
            (faces.student_BD[rows], self.centres_CD()), (faces.teacher_BD[rows], self.teacher_centres.weight)
        ):  # fmt: skip
            cosine_BC = cosines(embedding_BD, centres_CD)
            if margin:
                found.append(self.head.logits(cosine_BC, norms(embedding_BD), label_B))
            else:
                found.append(cosine_BC * self.recipe.head.scale)
        return found[0], found[1]


def trains_centres(recipe: Any, method: Distillation) -> bool:
    """Whether class centres train with the student."""
    if method.centres is not ALONE.centres:
        return False
    looked_at = getattr(recipe, "cls", 1.0) > 0 or method.logits(recipe)
    return looked_at and getattr(recipe, "centres", "own") == "own"


def shown(frames_bCHW: Tensor, mirrored_b: Tensor, pixels: Pixels) -> Tensor:
    """The frames as a network wants its pixels, those that are asked for mirrored left to right."""
    turned_bCHW = torch.where(mirrored_b[:, None, None, None], frames_bCHW.flip(3), frames_bCHW)
    return normalised(turned_bCHW, pixels)


def build(recipe: FaceRecipe) -> EmbeddingNetwork:
    """The student with weights from the recipe's seed, without classifier."""
    torch.manual_seed(recipe.train.seed)
    own = recipe.student
    config = network_config(own, recipe.embedding_dim)
    kind = Embedder if isinstance(config, EmbedderConfig) else network.network_class(network.kind_of(config))
    return kind(config, pretrained=own.pretrained and not own.weights, weights=own.weights)


def projector(own: int, theirs: int) -> dict[str, nn.Module]:
    """A linear map without bias to the teacher's width, which trains and is no part of the student; empty if equal."""
    return {} if own == theirs else {"projector": nn.Linear(own, theirs, bias=False)}


def to_teacher_s_width(recipe: Any, sizes: Sizes) -> nn.Module | None:
    """What a loss of single embeddings remembers: the projector, where there is a loss that trains it."""
    return nn.ModuleDict(projector(recipe.embedding_dim, teacher_dim(recipe))) if recipe.weight else None


def projected(memory: nn.Module | None, student_BD: Tensor) -> Tensor:
    """Student embeddings as wide as the teacher's."""
    if memory is None or "projector" not in memory:
        return student_BD
    with full_precision(student_BD):
        return memory["projector"](student_BD)


def check_margin_logits(recipe: Any) -> None:
    """Raises ValueError for class scores with the margins of AdaFace, whose running norms are of one network's."""
    if recipe.margin_logits and recipe.head.kind == "adaface":
        raise ValueError(
            "margin_logits=true with head.kind=adaface: its margins follow the norms of one network, and here are two; "
            "set margin_logits=false, or take arcface or cosface"
        )
