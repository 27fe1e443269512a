"""What training sees: batches of scenes, and the crops of their people mirrored as their scenes are."""

# Shape legend: N = people of the training set, P = people of one rank's batch.

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from orchestrator.cache import Rows
from orchestrator.datasets.sampling import own_part
from orchestrator.families.person_search.batches import LoadScenes, Request, SceneRequests
from orchestrator.method import Batch


@dataclass(frozen=True)
class PeopleRequest:
    """One rank's part of a batch, and how many people every rank has in it."""

    scenes: Request
    counts: tuple[int, ...]


@dataclass(frozen=True)
class PeopleRequests:
    """Epoch -> requests.

    All ranks draw the same epoch, so each knows the others' numbers of people without asking: embeddings are gathered
    without a wait.
    """

    scenes: SceneRequests
    usable_F: np.ndarray  # people who are large enough, of every frame

    def __call__(self, epoch: int, rank: int, world: int) -> Iterator[PeopleRequest]:
        whole = self.scenes(epoch, 0, 1)
        for own, batch in zip(self.scenes(epoch, rank, world), whole, strict=True):
            counts = (int(self.usable_F[own_part(batch.frames, r, world)].sum()) for r in range(world))
            yield PeopleRequest(own, tuple(counts))


@dataclass(frozen=True)
class LoadPeople:
    """Turns a request into what a task is given; picklable for loader processes.

    What :class:`LoadScenes` gives, and "people": boxes (n, 4) of each scene's people who are large enough; "row":
    their row numbers (P,); "row_identity": (P,); "crops": uint8 (P, 3, h, w), where they are looked at; "counts": P of
    every rank.
    """

    frames: LoadScenes
    crops: Rows | None
    usable_N: np.ndarray

    def __call__(self, request: PeopleRequest) -> Batch:
        batch, scenes = self.frames(request.scenes), self.frames.scenes
        rows = [np.r_[scenes.rows(number)] for number in request.scenes.frames.tolist()]
        usable = [self.usable_N[own] for own in rows]
        batch["people"] = [box_n4[torch.from_numpy(own)] for box_n4, own in zip(batch["boxes"], usable, strict=True)]
        row_P = np.concatenate(rows)[np.concatenate(usable)]
        batch |= {
            "row": torch.from_numpy(row_P),
            "row_identity": torch.from_numpy(scenes.identity_N[row_P]),
            "counts": list(request.counts),
        }
        if self.crops is not None:
            crops_P3hw = torch.from_numpy(self.crops(row_P, "crop"))
            mirrored = np.repeat(request.scenes.mirrored, [int(own.sum()) for own in usable])
            is_mirrored_P111 = torch.from_numpy(mirrored)[:, None, None, None]
            batch["crops"] = torch.where(is_mirrored_P111, crops_P3hw.flip(3), crops_P3hw)
        return batch
