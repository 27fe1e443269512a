"""The student of a recipe, its detector's losses over all ranks, and people of all ranks in one matrix."""

# Shape legend: P = people of one rank's batch, B = people of all ranks, D = embedding width.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losses.detection import head_losses, proposal_losses
from losses.one_stage import fcos_losses, retinanet_losses
from models.detectors import Anchors, Points, Proposed
from models.siamese_search import SiameseSearch
from orchestrator import distributed
from orchestrator.families.person_search.training import check_built, of_all_ranks
from orchestrator.families.weak_search.recipe import WeakSearchRecipe, network_config


def build(recipe: WeakSearchRecipe) -> SiameseSearch:
    """The student from the recipe's seed."""
    torch.manual_seed(recipe.train.seed)
    own = recipe.student
    network = SiameseSearch(network_config(recipe), own.pretrained, own.weights)
    network.freeze(own.frozen_stages, own.freeze_norms)
    return network


def check_network(recipe: WeakSearchRecipe) -> None:
    """Raises ValueError when the student cannot be built or not start as asked."""
    own = recipe.student
    check_built("student", own, SiameseSearch, network_config(recipe))
    if (own.frozen_stages or own.freeze_norms) and not own.pretrained and not own.weights:
        raise ValueError(
            f"student: frozen_stages={own.frozen_stages} and freeze_norms={own.freeze_norms} of a network from scratch "
            f"keep what was drawn; set frozen_stages=0 and freeze_norms=false, or give it weights"
        )


def detector_terms(said: NamedTuple, scenes: int) -> dict[str, Tensor]:
    """The detector's own losses over the batch of all ranks, unweighted, from what it said of this rank's scenes."""
    if isinstance(said, Points):
        on_people = distributed.gather_without_gradient(said.is_person_BA.sum()[None]).sum()
        terms = fcos_losses(*said, positives=on_people)
        return {f"detector_{name}": _sum_of_ranks(term) for name, term in terms._asdict().items()}
    if isinstance(said, Anchors):
        score, box = (of_all_ranks(term, scenes) for term in retinanet_losses(*said))
        return {"detector_score": score, "detector_box": box}
    return _two_stage_terms(said)


def _two_stage_terms(said: Proposed) -> dict[str, Tensor]:
    anchors, boxes = len(said.anchor_label_A), len(said.regions.label_N)
    rpn = proposal_losses(said.logit_A, said.delta_A4, said.anchor_label_A, said.anchor_target_A4)
    head = head_losses(said.logit_R2, said.delta_R8, said.regions.label_N, said.regions.target_N4)
    names = ("detector_rpn_class", "detector_rpn_box", "detector_person", "detector_box")
    rows = (anchors, anchors, boxes, boxes)
    return {n: of_all_ranks(term, r) for n, term, r in zip(names, (*rpn, *head), rows, strict=True)}


def _sum_of_ranks(term: Tensor) -> Tensor:
    return distributed.gather(term[None]).sum()


def of_all_people(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of all ranks in rank order, of which every rank knows how many there are; gradient flows to its own.

    Departs from :func:`orchestrator.distributed.gather` in that ranks may have different numbers of rows.
    """
    if distributed.world_size() == 1:
        return rows
    longest = max(counts)
    if not longest:
        return rows
    filled = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = distributed.gather(filled).split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
