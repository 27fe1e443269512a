"""The start of an epoch: every person is embedded anew, the memory refilled, people clustered."""

# Shape legend: N = people of the training set, D = embedding width, n = people of one frame.

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from losses.first_neighbours import Rule, first_neighbour_labels
from losses.oim import UNLABELLED
from losses.rsiamnet import fused
from losses.similarity import unit_rows
from models.person_search import padded
from models.siamese_search import SiameseSearch
from orchestrator import distributed
from orchestrator.cache import Rows
from orchestrator.datasets.augmentation import normalised
from orchestrator.datasets.images import fetch
from orchestrator.datasets.scenes import SceneSet
from orchestrator.evaluation.clusters import agreement
from orchestrator.families.person_search.data import Frames
from orchestrator.families.weak_search.crops import is_usable
from orchestrator.families.weak_search.training import of_all_people

_TOLD = ("count", "largest", "alone", "pair_precision", "pair_recall")
STATISTICS = tuple(f"clusters/{name}" for name in _TOLD)
Path = Literal["both", "scene", "crop"]  # by which of the two a person is embedded


@dataclass(frozen=True)
class TrainingPeople:
    """All that is known of the people who are trained on."""

    frames: Frames
    scenes: SceneSet
    crops: Rows | None  # where they are looked at

    def __len__(self) -> int:
        return len(self.scenes.box_N4)

    @cached_property
    def usable_N(self) -> np.ndarray:
        """bool; False where too little of a box lies in its frame for a crop."""
        size_N2 = self.frames.table.all("size")[:, :2][self.image_N]
        return is_usable(self.scenes.box_N4, size_N2)

    def usable_of_frames(self) -> np.ndarray:
        """How many are large enough, of every frame."""
        return np.bincount(self.image_N, self.usable_N, len(self.scenes)).astype(np.int64)

    @cached_property
    def image_N(self) -> np.ndarray:
        """The frame of every person."""
        return np.repeat(np.arange(len(self.scenes)), self.scenes.count_F)


@torch.no_grad()
def embed_people(
    network: SiameseSearch, people: TrainingPeople, path: Path, units: bool, device: torch.device, workers: int = 0
) -> Tensor:
    """Unit embeddings (N, D) of all training people, not mirrored, equal on every rank; each embeds a share of them.

    People without a crop have their embedding in the scene.
    """
    scenes = people.scenes
    share = -(-len(scenes) // distributed.world_size())
    own = range(min(len(scenes), distributed.rank() * share), min(len(scenes), (distributed.rank() + 1) * share))
    ahead = workers if people.frames.decodes and path != "crop" else 0
    empty = torch.zeros(0, network.config.dim, device=device)
    found = [empty]
    with torch.autocast(device.type, enabled=False):  # stable neighbours
        frames = fetch(people.frames, own, ahead) if path != "crop" else [None] * len(own)
        for frame, pixels in zip(own, frames, strict=True):
            if scenes.count_F[frame]:
                found.append(_of_frame(network, people, frame, pixels, path, units, device))
    starts = np.concatenate([[0], np.cumsum(scenes.count_F)])
    ends = np.minimum(np.arange(distributed.world_size() + 1) * share, len(scenes))
    return of_all_people(torch.cat(found), np.diff(starts[ends]).tolist())


def _of_frame(
    network: SiameseSearch, people: TrainingPeople, frame: int, pixels: Tensor | None, path: Path, units: bool,
    device: torch.device,
) -> Tensor:  # fmt: skip
    rows = np.r_[people.scenes.rows(frame)]
    usable_n = people.usable_N[rows]
    in_scene_nD = None
    if path != "crop" or not usable_n.all():
        pixels = people.frames(frame) if pixels is None else pixels
        images = padded(normalised(pixels[None].to(device), network.pixels))
        box_n4 = torch.from_numpy(people.scenes.boxes(frame) * people.frames.scale(frame)).to(images.pixels_BCHW)
        in_scene_nD = network.embed_boxes(network.trunk(images.pixels_BCHW), [box_n4], images.sizes)
    if path == "scene" or not usable_n.any():
        return unit_rows(in_scene_nD)
    crops = torch.from_numpy(people.crops(rows[usable_n], "crop")).to(device)
    as_crop_nD = network.embed_crops(normalised(crops, network.pixels))
    usable = torch.from_numpy(usable_n).to(device)
    if path == "both":
        as_crop_nD = fused(in_scene_nD[usable], as_crop_nD, units)
    if usable_n.all():
        return unit_rows(as_crop_nD)
    embedded_nD = unit_rows(in_scene_nD)
    embedded_nD[usable] = unit_rows(as_crop_nD)
    return embedded_nD


def cluster(embedding_ND: Tensor, image_N: np.ndarray, rule: Rule) -> Tensor:
    """Pseudo labels (N,), computed by rank 0 for all: another processor might round a tie otherwise."""
    label_N = torch.zeros(len(embedding_ND), dtype=torch.int64, device=embedding_ND.device)
    if distributed.rank() == 0:
        image = torch.from_numpy(image_N).to(embedding_ND.device)
        label_N = first_neighbour_labels(embedding_ND, image, rule)
    return distributed.gather_without_gradient(label_N[None])[0]


def statistics(label_N: Tensor, scenes: SceneSet) -> dict[str, float]:
    """Of a clustering, for the log; the only place that looks at identities, and nothing is trained on it."""
    known_N = scenes.identity_N != UNLABELLED
    found = agreement(label_N.cpu().numpy(), scenes.identity_N, known_N)
    return {f"clusters/{name}": float(getattr(found, name)) for name in _TOLD}
