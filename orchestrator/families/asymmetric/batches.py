"""Which images meet in a step of an asymmetric distillation, and how they are loaded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orchestrator.cache import Rows
from orchestrator.datasets.images import ImageSet
from orchestrator.datasets.sampling import identity_batches, own_part, shuffled_batches
from orchestrator.families.asymmetric.recipe import AsymmetricRecipe
from orchestrator.families.retrieval import data
from orchestrator.families.retrieval.data import Source
from orchestrator.method import Batch
from orchestrator.tables import Resident


@dataclass(frozen=True)
class PairRequests:
    """An epoch's requests of one rank: (labelled part, distillation part), either of which may be None."""

    recipe: AsymmetricRecipe
    train: ImageSet
    labelled: bool
    distilling: bool

    @property
    def images_per_step(self) -> int:
        labelled = self.recipe.labelled.images if self.labelled else 0
        return labelled + (self.recipe.batch_size if self.distilling else 0)

    def __call__(self, epoch: int, rank: int, world: int) -> Iterator[tuple[Any, Any]]:
        labelled = self._labelled(epoch, rank, world) if self.labelled else None
        distill = self._distill(epoch, rank, world) if self.distilling else None
        if labelled and distill:
            yield from zip(labelled, distill, strict=False)  # the shorter ends the epoch, as in the authors' code
        elif labelled:
            yield from ((request, None) for request in labelled)
        else:
            yield from ((None, request) for request in distill)

    def _labelled(self, epoch: int, rank: int, world: int) -> Iterator[Any]:
        recipe, (height, width) = self.recipe, self.recipe.student.size
        requests = data.LabelledRequests(
            self.train.identity, recipe.labelled, data.augmentation(recipe), width / height, recipe.train.seed,
            recipe.augment.draw_steps,
        )  # fmt: skip
        return iter(requests(epoch, rank, world))

    def _distill(self, epoch: int, rank: int, world: int) -> Iterator[tuple]:
        """(image numbers, student draws, teacher draws, recorded view) of shuffled batches."""
        recipe, seed = self.recipe, self.recipe.train.seed
        if recipe.together == 1:
            batches = shuffled_batches(len(self.train), recipe.batch_size, (seed, epoch, 3))
        else:
            identities = recipe.batch_size // recipe.together
            batches = identity_batches(self.train.identity, identities, recipe.together, (seed, epoch, 3))
        augment, steps = data.augmentation(recipe), recipe.augment.draw_steps

        def drawn(size: tuple[int, int], stream: int) -> data.Drawn:
            return data.Drawn(batches, augment, size[1] / size[0], (seed, epoch, stream), steps, rank, world)

        own = drawn(recipe.student.size, 4)
        teacher = None if recipe.coupled else drawn(recipe.teacher.network.size, 5)
        views = np.zeros((1, batches.shape[1]), np.int64)
        if recipe.views == "recorded":
            rng = np.random.default_rng(np.random.SeedSequence((seed, epoch, 6)))
            views = rng.integers(0, recipe.num_views, batches.shape)
        slots = own_part(np.arange(recipe.batch_size), rank, world)
        for step, (indices, draws) in enumerate(own):
            if step == 0:
                others = iter(teacher) if teacher is not None else None
            teacher_draws = draws if others is None else next(others)[1]
            yield indices, draws, teacher_draws, views[step % len(views), slots]


@dataclass(frozen=True)
class LoadPairs:
    """Turns a request into what the task is given; picklable for loader processes."""

    recipe: AsymmetricRecipe
    labelled: data.LoadLabelled
    teacher_frames: Source | None
    targets: Rows | Resident | None

    def __call__(self, request: tuple[Any, Any]) -> Batch:
        labelled, distill = request
        parts = {"labelled": self.labelled(labelled)} if labelled is not None else {}
        return parts | ({"distill": self._distill(*distill)} if distill is not None else {})

    def _distill(self, indices: np.ndarray, draws: np.ndarray, teacher_draws: np.ndarray, view: np.ndarray) -> Batch:
        recipe, batch = self.recipe, self.labelled((indices, draws))
        batch["image"] = torch.from_numpy(indices)
        if self.targets is None:
            batch["teacher_frames"] = torch.as_tensor(self.teacher_frames(indices))
            batch["teacher_draws"] = torch.from_numpy(teacher_draws)
            return batch
        rows = indices * (recipe.num_views if recipe.views == "recorded" else 1) + view
        batch["teacher"] = {
            "embedding" if column == "value" else column: torch.as_tensor(self.targets(rows, column))
            for column in self.targets.manifest["columns"]
            if column != "draws"
        }
        if recipe.coupled:
            batch["draws"] = torch.as_tensor(self.targets(rows, "draws"))
        return batch
