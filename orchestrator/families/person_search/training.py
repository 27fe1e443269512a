"""Networks of a recipe, and the task losses that every person search is trained with."""

# Shape legend: B = scenes of one rank's batch, R and P = rows of the first and the second head, D = embedding width.

import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from losses.detection import head_losses, proposal_losses
from losses.oim import OIM
from models.backbone import check_backbone
from models.network import at_least_float32
from models.person_search import Images, PersonSearch, Trained
from models.siamese_search import SiameseSearch
from models.weights import stamp_of
from orchestrator import distributed
from orchestrator.families.person_search.recipe import Memory, SearchNetwork, SearchRecipe, network_config
from orchestrator.method import Batch, Losses
from orchestrator.recipe import Network

_BOX_WEIGHT = 10.0  # of the first head's offsets


def build(recipe: SearchRecipe, identities: int) -> PersonSearch:
    """The student with its memory, from the recipe's seed."""
    torch.manual_seed(recipe.train.seed)
    own = recipe.student
    network = PersonSearch(network_config(recipe, own), own.pretrained, own.weights)
    network.freeze(own.freeze_stem, own.freeze_norms)
    network.memory = memory(recipe.memory, recipe.detector.dim, identities)
    return network


def memory(own: Memory, dim: int, identities: int) -> OIM:
    return OIM(dim, identities, own.queue, own.momentum, own.scale)


def check_network(whose: str, network: SearchNetwork, recipe: SearchRecipe, starts: bool = True) -> None:
    """Raises ValueError, which says whose, when a network cannot be built or not start as asked."""
    check_built(whose, network, PersonSearch, network_config(recipe, network), starts)


def check_built(whose: str, network: Network, kind: type[nn.Module], config: Any, starts: bool = True) -> None:
    """The same of any network of scenes."""
    check_backbone(network.name)
    file = network.weights if starts else ""
    try:
        if network.size[0] > network.size[1]:
            raise ValueError(f"size {network.size[0]}x{network.size[1]}: the shorter side comes first")
        if starts and network.width != 1.0 and network.pretrained and not file:
            raise ValueError(f"there are no pretrained weights for width {network.width}; set pretrained to false")
        _build(kind, config, file, stamp_of(file) if file else None)
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from error


@lru_cache(maxsize=64)  # every row of a table asks for the same few networks
def _build(kind: type[nn.Module], config: Any, weights: str, stamp: tuple[int, int] | None) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a meta tensor takes no weights
        kind(config, weights=weights)


def images_of(batch: Batch, network: PersonSearch | SiameseSearch) -> Images:
    """The batch's frames as the network wants them: normalised, zero where they are padded."""
    mean, std = network.pixels
    frames_BCHW = batch["frames"]
    pixels_BCHW = frames_BCHW.to(next(network.parameters()).dtype) / 255
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        pixels_BCHW[:, channel].sub_(m).div_(s)
    sizes = [(int(height), int(width)) for height, width in batch["sizes"]]
    for image, (height, width) in enumerate(sizes):
        pixels_BCHW[image, :, height:] = 0
        pixels_BCHW[image, :, :, width:] = 0
    return Images(pixels_BCHW, sizes)


def generators(batch: Batch) -> list[torch.Generator]:
    """Of each scene, for what is sampled in it."""
    return [torch.Generator().manual_seed(seed) for seed in batch["draws"]]


def task_losses(seen: Trained, own: OIM) -> Losses:
    """What a detector with an identity memory is trained with, over the batch of all ranks."""
    anchors, boxes = len(seen.anchor_label_A), len(seen.regions.label_N)
    rpn_class, rpn_box = proposal_losses(seen.logit_A, seen.delta_A4, seen.anchor_label_A, seen.anchor_target_A4)
    person, box = head_losses(seen.logit_R2, seen.delta_R8, seen.regions.label_N, seen.regions.target_N4)
    label_P = seen.people.label_N
    labelled = ((label_P > 0) & (label_P <= own.num_identities)).sum()
    terms = {
        "rpn_class": of_all_ranks(rpn_class, anchors),
        "rpn_box": of_all_ranks(rpn_box, anchors),
        "person": of_all_ranks(person, boxes),
        "box": of_all_ranks(box, boxes),
        "oim": of_all_ranks(own(at_least_float32(seen.embedding_PD), label_P), labelled),
    }
    return Losses(terms, {**dict.fromkeys(terms, 1.0), "box": _BOX_WEIGHT})


def of_all_ranks(mean: Tensor, rows: int | Tensor) -> Tensor:
    """The mean over the rows of all ranks, of a mean over this rank's rows; alone it is the same number."""
    if distributed.world_size() == 1:
        return mean
    own = rows if isinstance(rows, Tensor) else torch.full((), rows, device=mean.device)
    sums = distributed.gather((mean * own)[None])
    return sums.sum() / distributed.gather_without_gradient(own.to(mean)[None]).sum().clamp(min=1)


def in_places(rows: Tensor, places: int) -> Tensor:
    """The rows, then zeros: as many on every rank, so that they can be gathered."""
    if len(rows) > places:
        raise ValueError(f"{len(rows)} rows for {places} places")
    return torch.cat([rows, rows.new_zeros(places - len(rows), *rows.shape[1:])])


def people_rows(seen: Trained, places: int) -> dict[str, Tensor]:
    """Embedding and label of every sampled person, detached, with background rows behind: what the memory takes in."""
    label_P = seen.people.label_N
    rows = (label_P > 0).nonzero()[:, 0]
    embedding = at_least_float32(seen.embedding_PD.detach())[rows]
    return {"embedding": in_places(embedding, places), "label": in_places(label_P[rows], places)}


def remember(own: OIM, kept: Mapping[str, Tensor]) -> None:
    """The rows of all ranks, in rank order, go into the memory."""
    own.update(*(distributed.gather_without_gradient(kept[name]) for name in ("embedding", "label")))
