"""The distillation batch as losses see it, and the task: both networks' outputs gathered, then the method's terms."""

# Shape legend: B = images of the distillation batch (of one rank before, of all ranks after gathering),
# D = embedding width, C = classes, N = training images, K = neighbours, R = rows of a chunk.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.similarity import at_least_float32, full_precision, in_chunks, nearest_similarities, unit_rows
from models.embedder import Embedder
from orchestrator import distributed
from orchestrator.families.asymmetric.recipe import AsymmetricRecipe, Distillation
from orchestrator.families.retrieval.data import augmentation
from orchestrator.families.retrieval.supervised import supervised_losses
from orchestrator.method import Batch, Losses, Task


@dataclass(frozen=True)
class Neighbours:
    """The whole training set as the teacher sees it: what CSD and ROP originally compare a query with."""

    gallery_ND: Tensor  # raw clean embeddings
    index_NK: Tensor  # each image's nearest, itself included, by the teacher
    cosine_NK: Tensor

    def similarities(self, student_BD: Tensor, image_B: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """S^q and S^g of :func:`losses.similarity.nearest_similarities`, over the training set: (B, K) each."""
        index_BK, cosine_BK = self.index_NK[image_B, :top_k], self.cosine_NK[image_B, :top_k]

        def cosines(student_RD: Tensor, index_RK: Tensor) -> Tensor:
            gallery_RKD = unit_rows(self.gallery_ND[index_RK].flatten(0, 1)).view(*index_RK.shape, -1)
            with full_precision(student_RD):
                return (gallery_RKD.to(student_RD.dtype) @ student_RD[:, :, None])[:, :, 0]

        chunked = in_chunks(top_k * student_BD.shape[1], cosines, unit_rows(student_BD), index_BK)
        return chunked, cosine_BK.to(student_BD.dtype)


@dataclass(frozen=True)
class Pairs:
    """A distillation batch as losses see it: rows of all ranks, raw; the teacher's side has no gradient."""

    student: dict[str, Tensor]  # "embedding" (B, D), and what the method's student_outputs adds
    teacher: dict[str, Tensor]  # likewise
    label_B: Tensor  # class index, the same on both sides
    image_B: Tensor  # which training image
    student_classifier: nn.Module | None = None
    teacher_classifier: nn.Module | None = None
    neighbours: Neighbours | None = None

    @property
    def student_BD(self) -> Tensor:
        return self.student["embedding"]

    @property
    def teacher_BD(self) -> Tensor:
        return self.teacher["embedding"]

    def logits(self) -> tuple[Tensor, Tensor]:
        """Class scores of student and teacher, (B, C) each."""
        with full_precision(self.student_BD):
            student_BC = F.linear(self.student_BD, self.student_classifier.weight.to(self.student_BD.dtype))
            return student_BC, F.linear(self.teacher_BD, self.teacher_classifier.weight.to(self.teacher_BD.dtype))

    def nearest(self, top_k: int) -> tuple[Tensor, Tensor]:
        """Similarities to the teacher's nearest images, of the training set where the method asks for it."""
        if self.neighbours is not None:
            return self.neighbours.similarities(self.student_BD, self.image_B, top_k)
        return nearest_similarities(self.student_BD, self.teacher_BD, top_k)


class AsymmetricDistillation(Task):
    """Student, frozen teacher (None when its outputs come from the cache) and the distillation loss."""

    frozen = frozenset({"teacher", "teacher_classifier"})

    def __init__(
        self,
        recipe: AsymmetricRecipe,
        method: Distillation,
        student: Embedder,
        teacher: Embedder | None = None,
        teacher_classifier: nn.Module | None = None,
        neighbours: Neighbours | None = None,
    ):
        super().__init__(student, teacher)
        self.recipe, self.method, self.weights = recipe, method, method.weights(recipe)
        self.heads = method.heads(recipe, student)
        self.teacher_classifier = None if teacher_classifier is None else teacher_classifier.requires_grad_(False)
        self.neighbours = neighbours
        self.augment = augmentation(recipe, student.pixels)
        self.augment_teacher = self.augment if teacher is None else augmentation(recipe, teacher.pixels)

    def forward(self, batch: Batch) -> Losses:
        recipe, losses = self.recipe, Losses({}, {})
        if "distill" in batch:
            terms = self.method.terms(recipe, self.pairs(batch["distill"]))
            losses = Losses(terms, {name: self.weights[name] for name in terms})
        if "labelled" in batch:
            part = batch["labelled"]
            images_BCHW = self.augment(part["frames"], part["draws"], recipe.student.pad)
            supervised = supervised_losses(recipe.labelled, self.student, images_BCHW, part["label"])
            losses = Losses(losses.terms | supervised.terms, losses.weights | supervised.weights)
        return losses

    def pairs(self, part: Batch) -> Pairs:
        """Both networks' outputs of a distillation batch, gathered from all ranks."""
        images_BCHW = self.augment(part["frames"], part["draws"], self.recipe.student.pad)
        student = self.method.student_outputs(self.recipe, self.student, self.heads, images_BCHW)
        return Pairs(
            student={name: distributed.gather(self._loss_type(x)) for name, x in student.items()},
            teacher={name: distributed.gather_without_gradient(x) for name, x in self._teacher(part).items()},
            label_B=distributed.gather_without_gradient(part["label"]),
            image_B=distributed.gather_without_gradient(part["image"]),
            student_classifier=self.student.classifier,
            teacher_classifier=self.teacher_classifier,
            neighbours=self.neighbours,
        )

    @torch.no_grad()
    def _teacher(self, part: Batch) -> dict[str, Tensor]:
        outputs = part.get("teacher")
        if outputs is None:
            frames, draws = part["teacher_frames"], part["teacher_draws"]
            images_BCHW = self.augment_teacher(frames, draws, self.recipe.teacher.network.pad)
            outputs = self.method.teacher_outputs(self.recipe, self.teacher, images_BCHW)
        return {name: self._loss_type(x) for name, x in outputs.items()}

    def _loss_type(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x.double() if self.recipe.double_losses else at_least_float32(x)
