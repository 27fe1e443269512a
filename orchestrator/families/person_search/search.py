"""One pass over the gallery: people of every frame, the true boxes' embeddings, the queries'; and their scores."""

# Shape legend: F = frames of the gallery, Q = queries, D = embedding width, n = detections and m = people of a frame.

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.person_search import Images, PersonSearch, padded, postprocess
from orchestrator import distributed
from orchestrator.datasets.augmentation import normalised
from orchestrator.datasets.images import fetch
from orchestrator.datasets.scenes import Gallery
from orchestrator.evaluation.person_search import TOP, evaluate_detection, evaluate_search, overlaps
from orchestrator.evaluation.person_search import Search as Scores
from orchestrator.families.person_search.data import UNLABELLED, Searched
from orchestrator.families.person_search.recipe import Search
from orchestrator.method import Evaluation, Queries


@dataclass(frozen=True)
class Found:
    """What a network found in every frame of the gallery, in pixels of the original frames."""

    detections: list[np.ndarray]  # (n, 5) x1 y1 x2 y2 score, by falling score
    embeddings: list[np.ndarray]  # (n, D) unit rows
    true_embeddings: list[np.ndarray]  # (m, D) of the people's own boxes
    query_QD: np.ndarray
    scores: Scores | None = None  # of the first gallery

    def searched(self, own: Search) -> list[np.ndarray]:
        """Embeddings as a gallery is searched: times score, where that is asked for."""
        if not own.weigh:
            return self.embeddings
        return [e * d[:, 4:] for e, d in zip(self.embeddings, self.detections, strict=True)]


@torch.no_grad()
def embedded(network: PersonSearch, searched: Searched, device: torch.device, workers: int = 0) -> Found:
    """Every rank looks at a share of the frames, one at a time, and receives what all have found."""
    was_training = network.training
    network.eval()
    count = len(searched.scenes)
    share = -(-count // distributed.world_size())
    own = range(min(count, distributed.rank() * share), min(count, (distributed.rank() + 1) * share))
    ahead = workers if searched.frames.decodes else 0
    queries_of = [np.flatnonzero(searched.queries.frame_Q == frame) for frame in range(count)]
    parts = [
        _of_frame(network, searched, frame, queries_of[frame], pixels, device)
        for frame, pixels in zip(own, fetch(searched.frames, own, ahead), strict=True)
    ]
    network.train(was_training)
    dim = network.config.dim
    people = _gathered([found for found, _ in parts], 5 + dim, device)
    truth = _gathered([given for _, given in parts], dim, device)
    query_QD = np.zeros((len(searched.queries), dim), np.float32)
    true = []
    for frame, rows in enumerate(truth):
        people_here = int(searched.scenes.count_F[frame])
        true.append(rows[:people_here])
        query_QD[queries_of[frame]] = rows[people_here:]
    return Found([p[:, :5] for p in people], [p[:, 5:] for p in people], true, query_QD)


def _of_frame(
    network: PersonSearch, searched: Searched, frame: int, queries: np.ndarray, pixels: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(n, 5 + D) detections with embeddings, and (m + queries, D) embeddings of given boxes."""
    images: Images = padded(normalised(pixels[None].to(device), network.pixels))
    maps = network.pyramid(images.pixels_BCHW)
    found = network.found(maps, images)[0]
    scale_4 = searched.frames.scale(frame)
    given_m4 = np.concatenate([searched.scenes.boxes(frame), searched.queries.box_Q4[queries]]) * scale_4
    given = torch.from_numpy(given_m4).to(images.pixels_BCHW)
    embedding_mD = network.embed(maps, [given], images.sizes)
    box_n4 = found.boxes_N4 / torch.from_numpy(scale_4).to(found.boxes_N4)
    return torch.cat([box_n4, found.score_N[:, None], found.embedding_ND], 1).float(), embedding_mD.float()


def _gathered(parts: list[Tensor], width: int, device: torch.device) -> list[np.ndarray]:
    """Rows of the frames of all ranks, frame by frame; ranks have different numbers of both."""
    counts = np.array([len(part) for part in parts], np.int64)
    rows = torch.cat([torch.zeros(0, width, device=device), *parts])
    if distributed.world_size() > 1:
        rows, counts = _of_all(rows), _of_all(torch.from_numpy(counts).to(rows.device)).cpu().numpy()
    return np.split(rows.cpu().numpy(), np.cumsum(counts)[:-1])


def _of_all(local: Tensor) -> Tensor:
    """Rows of all ranks, which have different numbers of them."""
    longest = int(distributed.largest(len(local)))
    filled = torch.cat([local, local.new_zeros(longest - len(local), *local.shape[1:])])
    lengths = distributed.gather_without_gradient(torch.full((1,), len(local), device=local.device)).tolist()
    return torch.cat(
        [p[:n] for p, n in zip(distributed.gather_without_gradient(filled).split(longest), lengths, strict=True)]
    )


def scored(found: Found, searched: Searched, own: Search) -> Evaluation:
    """Detection, search in every gallery, and search among the true boxes, which no detector can beat."""
    scenes, galleries = searched.scenes, searched.galleries
    frames = range(len(scenes))
    boxes = [scenes.boxes(frame) for frame in frames]
    labelled = [scenes.identity_N[scenes.rows(frame)] != UNLABELLED for frame in frames]
    all_people = evaluate_detection(found.detections, boxes)
    known = evaluate_detection(found.detections, boxes, labelled)
    metrics = {
        "detection/ap": all_people.ap,
        "detection/recall": all_people.recall,
        "detection/labelled_ap": known.ap,
        "detection/labelled_recall": known.recall,
    }
    weighted, first = found.searched(own), next(iter(galleries))
    scores = {name: _search(found, gallery, found.detections, weighted, own) for name, gallery in galleries.items()}
    named = {f"gallery_{name.replace(' ', '_')}": one for name, one in scores.items() if name != first}
    named = {"val": scores[first], **named}
    certain = [np.concatenate([b, np.ones((len(b), 1))], 1) for b in boxes]
    named["bound"] = _search(found, galleries[first], certain, found.true_embeddings, own)
    if own.context:
        context = [_around(found, searched, query) for query in range(len(searched.queries))]
        named["context"] = _search(found, galleries[first], found.detections, weighted, own, context)
    of_queries: dict[str, np.ndarray] = {}
    for group, one in named.items():
        metrics |= _named(group, one)
        of_queries[f"{group}/map"] = one.average_precision_Q
        of_queries |= {f"{group}/top{k}": one.found_QK[:, column].astype(float) for column, k in enumerate(TOP)}
    return Evaluation(
        metrics,
        Found(found.detections, found.embeddings, found.true_embeddings, found.query_QD, scores[first]),
        Queries(identities(searched, galleries[first]), of_queries),
    )


def identities(searched: Searched, gallery: Gallery) -> np.ndarray:
    """(Q,) whose query each is, by the box of its first target; one without a target or a name is alone."""
    identity_Q = np.empty(len(gallery.targets), np.int64)
    for query, held in enumerate(gallery.targets):
        identity_Q[query] = -2 - query
        for frame, box in list(held.items())[:1]:
            person = overlaps(searched.scenes.boxes(frame), box[None])[:, 0].argmax()
            identity = searched.scenes.identity_N[searched.scenes.rows(frame)][person]
            if identity != UNLABELLED:
                identity_Q[query] = identity
    return identity_Q


def _search(
    found: Found, gallery: Gallery, detections: list[np.ndarray], embeddings: list[np.ndarray], own: Search,
    context: list[np.ndarray] | None = None,
) -> Scores:  # fmt: skip
    return evaluate_search(
        found.query_QD, gallery.targets, gallery.frames, detections, embeddings, own.least_score, context,
        own.context_detections, own.context_people,
    )  # fmt: skip


def _named(group: str, scores: Scores) -> dict[str, float]:
    return {f"{group}/{name}": getattr(scores, name) for name in ("map", "top1", "top5", "top10")}


def _around(found: Found, searched: Searched, query: int) -> np.ndarray:
    """Embeddings of the people in a query's frame, the query first."""
    frame = int(searched.queries.frame_Q[query])
    detections = found.detections[frame]
    box_n4 = np.concatenate([searched.queries.box_Q4[query][None], detections[:, :4]])
    score_n = np.concatenate([[1.0], detections[:, 4]])
    embedding_nD = np.concatenate([found.query_QD[query][None], found.embeddings[frame]])
    rows = (torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (box_n4, score_n, embedding_nD))
    return postprocess(*rows, weigh=False).embedding_ND.numpy()


def by_chance(searched: Searched, own: Search, dim: int = 128) -> dict[str, float]:
    """Search among the true boxes with random embeddings: what a network that recognises nobody gets."""
    rng = np.random.default_rng(0)

    def unit(rows: int) -> np.ndarray:
        values = rng.standard_normal((rows, dim)).astype(np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    boxes = [searched.scenes.boxes(frame) for frame in range(len(searched.scenes))]
    certain = [np.concatenate([b, np.ones((len(b), 1))], 1) for b in boxes]
    random = Found(certain, [unit(len(b)) for b in boxes], [], unit(len(searched.queries)))
    first = next(iter(searched.galleries.values()))
    scores = _named("val", _search(random, first, certain, random.embeddings, own))
    return scores | {name.replace("val/", "bound/"): value for name, value in scores.items()}
