"""What training sees: shuffled faces, in some methods several of one person beside them, mirrored or not."""

# Shape legend: B = images of one rank's batch.

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from orchestrator.cache import Rows
from orchestrator.datasets.images import ImageSet
from orchestrator.datasets.sampling import own_part, shuffled_batches
from orchestrator.families.face.recipe import Balanced, FaceRecipe
from orchestrator.families.retrieval.data import Source, names_of
from orchestrator.method import Batch
from orchestrator.tables import Resident, column

Request = tuple[np.ndarray, np.ndarray]  # image numbers, and which are mirrored


@dataclass(frozen=True)
class FaceRequests:
    """Epoch -> requests of one rank: its part of the shuffled images, then of the balanced ones.

    Draws depend on seed, epoch and step alone, and are made step by step: an epoch of millions of images is one
    permutation of numbers.
    """

    labels: np.ndarray
    batch_size: int
    balanced: Balanced
    flip: float
    seed: int

    @classmethod
    def of(cls, recipe: FaceRecipe, train: ImageSet) -> "FaceRequests":
        return cls(train.labels, recipe.batch_size, recipe.balanced, recipe.flip, recipe.train.seed)

    @property
    def steps(self) -> int:
        return len(self.labels) // self.batch_size

    @property
    def images_per_step(self) -> int:
        return self.batch_size + self.balanced.count

    def __call__(self, epoch: int, rank: int, world: int) -> Iterator[Request]:
        people = _People.of(self.labels) if self.balanced.identities else None
        for step, shuffled in enumerate(shuffled_batches(len(self.labels), self.batch_size, (self.seed, epoch, 1))):
            rng = np.random.default_rng(np.random.SeedSequence((self.seed, epoch, 2, step)))
            parts = [shuffled] if people is None else [shuffled, people.drawn(self.balanced, rng)]
            mirrored = [rng.random(len(part)) < self.flip for part in parts]
            yield tuple(np.concatenate([own_part(p, rank, world) for p in both]) for both in (parts, mirrored))


@dataclass(frozen=True)
class _People:
    """Images by identity, as one sorted list of numbers."""

    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray) -> "_People":
        return cls(np.argsort(labels, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(labels))]))

    def drawn(self, balanced: Balanced, rng: np.random.Generator) -> np.ndarray:
        """Images of different identities; of one that has too few, some twice."""
        found = []
        for identity in rng.choice(len(self.starts) - 1, balanced.identities, replace=False):
            own = self.order[self.starts[identity] : self.starts[identity + 1]]
            found.append(rng.choice(own, balanced.images, replace=len(own) < balanced.images))
        return np.concatenate(found)


@dataclass(frozen=True)
class LoadFaces:
    """Turns a request into what a task is given; picklable for loader processes.

    "frames": uint8 (B, 3, H, W); "mirrored": bool (B,); "label", "image": (B,), class and number of the image;
    "teacher": (B, D) stored embeddings of the faces as they are shown, where there are any; "names".
    """

    pixels: Source
    images: ImageSet
    targets: Rows | Resident | None = None  # two of every image: as it is, and mirrored

    def __call__(self, request: Request) -> Batch:
        rows, mirrored = request
        batch = {
            "frames": torch.as_tensor(self.pixels(rows)),
            "mirrored": torch.from_numpy(mirrored),
            "label": column(self.pixels, "label", self.images.labels, rows),
            "image": torch.from_numpy(rows),
            "names": names_of(self.images, rows),
        }
        if self.targets is not None:
            batch["teacher"] = torch.as_tensor(self.targets(2 * rows + mirrored))
        return batch
