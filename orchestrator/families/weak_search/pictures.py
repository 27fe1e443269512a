"""Pictures of a person search trained on boxes: matches, clusters of training people, the price of a larger gallery."""

from dataclasses import dataclass

import numpy as np
import torch

from losses.oim import UNLABELLED
from losses.rsiamnet import first_neighbour_labels
from models.siamese_search import SiameseSearch
from orchestrator.families.person_search import search
from orchestrator.families.person_search.data import Searched
from orchestrator.families.person_search.pictures import gallery_sizes, matches
from orchestrator.families.weak_search.clustering import STATISTICS, Path, TrainingPeople, embed_people
from orchestrator.families.weak_search.recipe import WeakSearchRecipe
from orchestrator.method import Evaluation
from orchestrator.pictures import Lines, Panel, Picture

_FRAMES = 2000  # whose people are clustered for a picture
_CLUSTERS, _MEMBERS = 6, 8


@dataclass(frozen=True)
class Found:
    """What pictures are made from."""

    searched: search.Found
    clusters_E5: np.ndarray | None = None  # what was told of every epoch's clusters, where there were some


def pictures(
    student: SiameseSearch, searched: Searched, evaluation: Evaluation, recipe: WeakSearchRecipe,
    people: TrainingPeople | None, path: Path, device: torch.device,
) -> dict[str, Picture]:  # fmt: skip
    """Of a trained student, from what its evaluation found."""
    found: dict[str, Picture] = {"matches": matches(searched, evaluation.found.searched, recipe.search)}
    if evaluation.found.clusters_E5 is not None and len(evaluation.found.clusters_E5) > 1:
        found |= over_epochs(evaluation.found.clusters_E5)
    curve = gallery_sizes(searched, evaluation)
    if curve:
        found["gallery_size"] = curve
    if people is not None and people.crops is not None and len(people.scenes) <= _FRAMES:
        sheet = clusters(student, people, path, device)
        if sheet is not None:
            found["clusters"] = sheet
    return found


def over_epochs(told_E5: np.ndarray) -> dict[str, Picture]:
    """Numbers and agreement of the clusters over epochs."""
    epochs = range(1, len(told_E5) + 1)
    of = {
        name.partition("/")[2]: tuple(zip(map(float, epochs), told_E5[:, place].tolist(), strict=True))
        for place, name in enumerate(STATISTICS)
    }
    sizes = {"clusters": of["count"], "members of the largest": of["largest"]}
    pairs = {"precision": of["pair_precision"], "recall": of["pair_recall"], "alone": of["alone"]}
    shares = {name: tuple((epoch, 100 * value) for epoch, value in line) for name, line in pairs.items()}
    return {
        "cluster_sizes": Lines("Clusters before each epoch", "epoch", "", sizes),
        "cluster_pairs": Lines("Pairs in clusters against identities", "epoch", "%", shares),
    }


@torch.no_grad()
def clusters(student: SiameseSearch, people: TrainingPeople, path: Path, device: torch.device) -> Panel | None:
    """Contact sheets: some clusters of training people; who is of another identity than the first has a red edge."""
    was_training = student.training
    student.eval()
    embedding_ND = embed_people(student, people, path, True, device)
    student.train(was_training)
    label_N = first_neighbour_labels(embedding_ND, torch.from_numpy(people.image_N)).cpu().numpy()
    sizes_K = np.bincount(label_N)
    shared = np.flatnonzero(sizes_K > 1)
    if not len(shared):
        return None
    chosen = shared[np.argsort(-sizes_K[shared], kind="stable")]
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, _CLUSTERS).astype(int))]  # the largest, smaller ones
    identity_N = people.scenes.identity_N
    first, others, same = [], [], []
    for number in chosen:
        members = np.flatnonzero(label_N == number)[:_MEMBERS]
        crops = people.crops(members, "crop").transpose(0, 2, 3, 1)
        blank = np.full_like(crops[0], 255)
        empty = _MEMBERS - len(members)
        first.append(crops[0])
        others.append([*crops[1:], *[blank] * empty])
        known = identity_N[members[0]] != UNLABELLED
        same.append([*(known & (identity_N[members[1:]] == identity_N[members[0]])), *[False] * empty])
    return Panel(
        "Clusters of training people; green: the identity of the first",
        np.array(first),
        np.array(others),
        np.array(same),
    )
