"""Pictures of a person search trained on boxes: matches, clusters of training people, the price of a larger gallery."""

import numpy as np
import torch

from losses.oim import UNLABELLED
from losses.rsiamnet import first_neighbour_labels
from models.siamese_search import SiameseSearch
from orchestrator.families.person_search.data import Searched
from orchestrator.families.person_search.pictures import gallery_sizes, matches
from orchestrator.families.weak_search.clustering import Path, TrainingPeople, embed_people
from orchestrator.families.weak_search.recipe import WeakSearchRecipe
from orchestrator.method import Evaluation
from orchestrator.pictures import Panel, Picture

_FRAMES = 2000  # whose people are clustered for a picture
_CLUSTERS, _MEMBERS = 6, 8


def pictures(
    student: SiameseSearch, searched: Searched, evaluation: Evaluation, recipe: WeakSearchRecipe,
    people: TrainingPeople | None, path: Path, device: torch.device,
) -> dict[str, Picture]:  # fmt: skip
    """Of a trained student, from what its evaluation found."""
    found: dict[str, Picture] = {"matches": matches(searched, evaluation.found, recipe.search)}
    curve = gallery_sizes(searched, evaluation)
    if curve:
        found["gallery_size"] = curve
    if people is not None and people.crops is not None and len(people.scenes) <= _FRAMES:
        sheet = clusters(student, people, path, device)
        if sheet is not None:
            found["clusters"] = sheet
    return found


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
    return Panel("Clusters of training people, the largest first", np.array(first), np.array(others), np.array(same))
