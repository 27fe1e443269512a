"""What training sees: which images meet, their views, and the noise of the token decisions."""

# Shape legend: B = images of one rank's batch.

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orchestrator.cache import Rows
from orchestrator.datasets import person_views
from orchestrator.datasets.images import ImageSet
from orchestrator.datasets.occlusion import Occluders
from orchestrator.datasets.person_views import PersonAugmentation
from orchestrator.datasets.sampling import identity_batches, own_part
from orchestrator.families.retrieval.data import Source, names_of
from orchestrator.families.token_pruning.opened import Opened
from orchestrator.families.token_pruning.recipe import PruningRecipe
from orchestrator.method import Batch

STAGES, COLUMNS = 3, 2  # of the Gumbel noise

Request = tuple[np.ndarray, list[np.ndarray], tuple[int, ...]]  # image numbers, draws of every view, key of the noise


def augmentations(recipe: PruningRecipe) -> tuple[PersonAugmentation, ...]:
    """What happens to each view."""
    own, pad = recipe.views, recipe.student.pad
    plain = PersonAugmentation(own.flip, pad, own.patch, own.erase, own.jitter)
    if not recipe.noda:
        return (plain,) * recipe.num_views
    return plain, PersonAugmentation(own.flip, pad, 0.0, 0.0, own.jitter, occlude=True)


def requests(recipe: PruningRecipe, train: ImageSet, epoch: int, rank: int, world: int) -> Iterator[Request]:
    """This rank's part of every P × K batch of an epoch."""
    seed, labelled = recipe.train.seed, recipe.labelled
    batches = identity_batches(
        train.identity, labelled.identities_per_batch, labelled.images_per_identity, (seed, epoch, 1)
    )
    height, width = recipe.student.size
    drawn = [
        augment.draw(batches.size, width / height, (seed, epoch, 2, view)).reshape(*batches.shape, -1)
        for view, augment in enumerate(augmentations(recipe))
    ]
    slots = own_part(np.arange(batches.shape[1]), rank, world)
    for step, indices in enumerate(batches):
        yield indices[slots], [draws[step, slots] for draws in drawn], (seed, epoch, 3, step)


@dataclass(frozen=True)
class LoadViews:
    """Turns a request into what the task is given; picklable for loader processes."""

    source: Source
    train: ImageSet
    camera: np.ndarray  # what networks are told, else only compared by the triplet loss
    occluders: Occluders | None
    taught: Rows | None  # the teacher's class tokens of the plain images
    augments: tuple[PersonAugmentation, ...]
    size: tuple[int, int]
    num_tokens: int  # 0 = no noise is needed
    rank: int
    world: int

    @classmethod
    def of(cls, recipe: PruningRecipe, opened: Opened, num_tokens: int, rank: int, world: int) -> "LoadViews":
        train = opened.data.train
        camera = opened.cameras.get("train", train.camera)
        return cls(
            source=opened.frames["train"],
            train=train,
            camera=np.zeros(len(train), np.int64) if camera is None else camera,
            occluders=opened.occluders,
            taught=opened.taught.get("train"),
            augments=augmentations(recipe),
            size=recipe.student.size,
            num_tokens=num_tokens if recipe.hts else 0,
            rank=rank,
            world=world,
        )

    def __call__(self, request: Request) -> Batch:
        indices, drawn, key = request
        batch: Batch = {
            "frames": torch.as_tensor(self.source(indices)),
            "draws": [torch.from_numpy(draws) for draws in drawn],
            "overlays": [self._overlay(augment, draws) for augment, draws in zip(self.augments, drawn, strict=True)],
            "label": torch.from_numpy(self.train.labels[indices]),
            "camera": torch.from_numpy(self.camera[indices]),
            "names": names_of(self.train, indices),
        }
        if self.num_tokens:
            # Of the whole batch, so that every rank's decisions are those of a single process; resumed runs draw them
            # again from the key.
            shape = (len(self.augments), len(indices) * self.world, STAGES, self.num_tokens, COLUMNS)
            uniform = np.random.default_rng(np.random.SeedSequence(key)).random(shape, dtype=np.float32)
            own = uniform[:, self.rank * len(indices) : (self.rank + 1) * len(indices)]
            batch["uniform"] = torch.from_numpy(own.reshape(-1, *shape[2:]))
        if self.taught is not None:
            batch["teacher"] = torch.from_numpy(self.taught(indices))
        return batch

    def _overlay(self, augment: PersonAugmentation, draws: np.ndarray) -> Tensor:
        if augment.occlude:
            return self.occluders.overlay(person_views.occluder_draws(draws), self.size)
        laid = torch.zeros(len(draws), 4, *self.size, dtype=torch.uint8)
        patched = np.flatnonzero(person_views.has_patch(draws))
        if len(patched):
            frames = torch.as_tensor(self.source(person_views.patch_source(draws[patched], len(self.train))))
            laid[patched] = person_views.patch_overlay(frames, draws[patched])
        return laid
