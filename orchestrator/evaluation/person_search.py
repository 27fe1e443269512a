"""How person search is scored: detection, and search among detected people (card "DDPS", section 5).

Frames are numbers 0 … F − 1. A detector gives every frame its boxes with scores and an embedding of each; people are
then searched among all of them at once:

    AP of a query = average precision of the found rows · found targets / frames that hold the person

so that a person who was not detected costs as much as one who was not recognised. As scikit-learn's
``average_precision_score``: rows of equal similarity are one step of the curve.
"""

# Shape legend: Q = queries, D = embedding width, G = detections of all frames together, n = detections of a frame,
# m = persons of a frame, P = targets of a query.

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

TOP = (1, 5, 10)
_BLOCK = 64  # queries compared with everything at once


class Detection(NamedTuple):
    """Fractions in [0, 1]; ``ap`` is the average precision times recall."""

    recall: float
    ap: float


class Search(NamedTuple):
    """Fractions in [0, 1], over the queries."""

    map: float
    top1: float
    top5: float
    top10: float
    average_precision_Q: np.ndarray
    found_QK: np.ndarray  # whether the person is among the 1, 5, 10 most similar


def evaluate_detection(
    detections: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    labelled: Sequence[np.ndarray] | None = None,
    score_threshold: float = 0.01,
    iou_threshold: float = 0.5,
) -> Detection:
    """Recall and average precision of the boxes of people.

    A detection is right when it overlaps a person by the threshold, that person is the one it overlaps most, and it
    is the detection that overlaps this person most.

    Args:
        detections: of every frame (n, 5): x1 y1 x2 y2 score.
        boxes: of every frame (m, 4).
        labelled: (m,) of every frame: only these people count, and a frame without any is left out. None = all.
        score_threshold: detections below are no detections.
        iou_threshold: least overlap.

    Raises:
        ValueError: not as many frames, or tables of another width.

    >>> evaluate_detection([np.array([[0, 0, 10, 10, 0.9], [50, 50, 60, 60, 0.5]])], [np.array([[0, 0, 10, 9]])])
    Detection(recall=1.0, ap=1.0)
    """
    _check_frames(detections, boxes, labelled)
    people, right, score = 0, [np.zeros(0, bool)], [np.zeros(0)]
    for frame, (found_n5, box_m4) in enumerate(zip(detections, boxes, strict=True)):
        if labelled is not None:
            box_m4 = box_m4[np.asarray(labelled[frame], bool)]
            if not len(box_m4):
                continue
        people += len(box_m4)
        found_n5 = found_n5[found_n5[:, 4] >= score_threshold]
        right.append(_matched(found_n5[:, :4], box_m4, iou_threshold))
        score.append(found_n5[:, 4])
    right_G, score_G = np.concatenate(right), np.concatenate(score)
    recall = float(right_G.sum() / people) if people else 0.0
    return Detection(recall, _average_precision(right_G, score_G) * recall)


def evaluate_search(
    query_embedding_QD: np.ndarray,
    targets: Sequence[Mapping[int, np.ndarray]],
    galleries: Sequence[Sequence[int]] | None,
    detections: Sequence[np.ndarray],
    embeddings: Sequence[np.ndarray],
    score_threshold: float = 0.5,
    context_embeddings: Sequence[np.ndarray] | None = None,
    context_detections: int = 10,
    context_people: int = 3,
) -> Search:
    """Mean average precision and how often the person is among the first.

    In a frame that holds the person, the most similar detection that overlaps its box by
    min(0.5, w·h / ((w + 10)(h + 10))) is the one that was found.

    Args:
        query_embedding_QD: unit rows.
        targets: of every query, frame -> box (4,) of the person; only frames of its gallery.
        galleries: of every query the frames that are searched; None = all of them for all.
        detections: of every frame (n, 5): x1 y1 x2 y2 score, in pixels of the original image.
        embeddings: of every frame (n, D), as they are searched: weighted by the score where the protocol does.
        score_threshold: detections below are not searched.
        context_embeddings: of every query (n, D), the people of its image, the query itself first. Switches on the
            matching of contexts (CBGM, Li and Miao, AAAI 2021): the frames of the most similar detections are
            matched with the people around the query, and the detection that falls to the query gets the largest
            similarity of that matching.
        context_detections: k1, how many of the most similar detections name those frames.
        context_people: k2, how many people of the query's image take part.

    Raises:
        ValueError: not as many entries, tables of another width, or a target outside its gallery.

    >>> box, near, far = np.array([0, 0, 50, 90]), np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> found = np.array([[0, 0, 50, 90, 0.9]])
    >>> evaluate_search(near, [{1: box}], None, [found, found], [far, near]).map
    1.0
    """
    rows = _Rows(detections, embeddings, score_threshold)
    queries = len(query_embedding_QD)
    if any(len(of_query) != queries for of_query in (targets, galleries or targets, context_embeddings or targets)):
        raise ValueError(f"need targets, a gallery and a context for each of {queries} queries, or none of them")
    precision_Q, found_QK = np.zeros(queries), np.zeros((queries, len(TOP)), bool)
    for query, similarity_G in _similarities(query_embedding_QD, rows.embedding_GD):
        frames = None if galleries is None else np.asarray(galleries[query], np.int64)
        searched = rows.of(frames, len(detections))
        similarity_G, frame_G, box_G4 = similarity_G[searched], rows.frame_G[searched], rows.box_G4[searched]
        if context_embeddings is not None:
            embedding_GD = rows.embedding_GD[searched]
            people_KD = np.asarray(context_embeddings[query])[:context_people]
            similarity_G = _with_context(similarity_G, frame_G, embedding_GD, people_KD, context_detections)
        held = targets[query]
        if frames is not None and not set(held) <= set(frames.tolist()):
            raise ValueError(f"query {query} has a target in frame {min(set(held) - set(frames.tolist()))}, which is "
                             f"not in its gallery")  # fmt: skip
        right = _found(held, similarity_G, frame_G, box_G4)
        at_least_P = _at_least(similarity_G, similarity_G[right])
        precision_Q[query] = _precision_of(similarity_G[right], at_least_P) * len(right) / max(len(held), 1)
        wrong_P = at_least_P - _at_least(similarity_G[right], similarity_G[right])  # before each, ties against it
        found_QK[query] = [bool((wrong_P < k).any()) for k in TOP]
    top = found_QK.mean(0) if queries else np.zeros(len(TOP))
    return Search(float(precision_Q.mean()) if queries else 0.0, *map(float, top), precision_Q, found_QK)


def best_matching(similarity_RC: np.ndarray) -> tuple[np.ndarray, float]:
    """Pairs (row, column), one to one, of the largest total similarity, and the largest similarity among them.

    >>> pairs, largest = best_matching(np.array([[3.0, 1.0, 0.0], [4.0, 3.0, 0.0]]))
    >>> pairs.tolist(), largest
    ([[0, 0], [1, 1]], 3.0)
    """
    row_M, column_M = linear_sum_assignment(similarity_RC, maximize=True)
    largest = float(similarity_RC[row_M, column_M].max()) if len(row_M) else -np.inf
    return np.stack([row_M, column_M], axis=1), largest


def overlaps(box_n4: np.ndarray, box_m4: np.ndarray) -> np.ndarray:
    """Intersection over union of all pairs, (n, m); 0 where both are empty.

    >>> overlaps(np.array([[0, 0, 2, 2]]), np.array([[1, 0, 3, 2], [5, 5, 6, 6]])).round(3).tolist()
    [[0.333, 0.0]]
    """
    box_n4, box_m4 = np.asarray(box_n4, np.float64), np.asarray(box_m4, np.float64)
    low = np.maximum(box_n4[:, None, :2], box_m4[None, :, :2])
    high = np.minimum(box_n4[:, None, 2:], box_m4[None, :, 2:])
    common_nm = np.clip(high - low, 0, None).prod(-1)
    area_n, area_m = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (box_n4, box_m4))
    union_nm = area_n[:, None] + area_m - common_nm
    return np.divide(common_nm, union_nm, out=np.zeros_like(common_nm), where=union_nm > 0)


def iou_threshold(box_4: np.ndarray) -> float:
    """Least overlap with a person's box (4,): min(0.5, w·h / ((w + 10)(h + 10))), lower for small people.

    >>> iou_threshold(np.array([0, 0, 12, 24])), iou_threshold(np.array([0, 0, 60, 120]))
    (0.3850267379679144, 0.5)
    """
    width, height = (float(high - low) for low, high in zip(box_4[:2], box_4[2:], strict=True))
    return min(0.5, width * height / ((width + 10) * (height + 10)))


class _Rows:
    """The searched detections of all frames, one after the other."""

    def __init__(self, detections: Sequence[np.ndarray], embeddings: Sequence[np.ndarray], score_threshold: float):
        if len(detections) != len(embeddings) or any(len(d) != len(e) for d, e in zip(detections, embeddings)):  # noqa: B905
            raise ValueError("need detections (n, 5) and as many embeddings (n, D) of every frame")
        _check_width("detections", detections, 5)
        kept = [np.asarray(d)[:, 4] >= score_threshold for d in detections]
        count_F = np.array([k.sum() for k in kept], np.int64)
        self.start_F = np.concatenate([[0], np.cumsum(count_F)]).astype(np.int64)
        self.frame_G = np.repeat(np.arange(len(kept)), count_F)
        self.box_G4 = _joined([np.asarray(d)[k, :4] for d, k in zip(detections, kept, strict=True)], 4)
        self.embedding_GD = _joined([np.asarray(e)[k] for e, k in zip(embeddings, kept, strict=True)], 0)

    def of(self, frames: np.ndarray | None, count: int) -> np.ndarray | slice:
        """The rows of some frames, in order of the frames' numbers; None = all frames."""
        if frames is None:
            return slice(None)
        if 2 * len(frames) > count:  # nearly all: a mask is quicker than the numbers of each
            searched_F = np.zeros(count, bool)
            searched_F[frames] = True
            return slice(None) if searched_F.all() else np.flatnonzero(searched_F[self.frame_G])
        frames = np.unique(frames)
        ranges = [np.arange(self.start_F[f], self.start_F[f + 1]) for f in frames]
        return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)


def _similarities(query_QD: np.ndarray, embedding_GD: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Every query with its similarity to all rows, a block at a time."""
    for start in range(0, len(query_QD), _BLOCK):
        block = query_QD[start : start + _BLOCK]
        similarity = block @ embedding_GD.T if embedding_GD.size else np.zeros((len(block), len(embedding_GD)))
        yield from enumerate(similarity, start)


def _found(
    held: Mapping[int, np.ndarray], similarity_G: np.ndarray, frame_G: np.ndarray, box_G4: np.ndarray
) -> np.ndarray:
    """Rows of the detections that are the person, at most one in every frame that holds it."""
    right = []
    for frame, box in held.items():
        first, last = np.searchsorted(frame_G, (frame, frame + 1))
        box = np.asarray(box)
        near_n = overlaps(box_G4[first:last], box[None])[:, 0] >= iou_threshold(box)
        if near_n.any():
            near = first + np.flatnonzero(near_n)
            right.append(near[np.argmax(similarity_G[near])])
    return np.array(right, np.int64)


def _with_context(
    similarity_G: np.ndarray, frame_G: np.ndarray, embedding_GD: np.ndarray, people_KD: np.ndarray, detections: int
) -> np.ndarray:
    """The similarities after the matching of contexts."""
    changed_G = similarity_G.copy()
    nearest = np.argsort(-similarity_G, kind="stable")[:detections]
    for frame in np.unique(frame_G[nearest]):
        first, last = np.searchsorted(frame_G, (frame, frame + 1))
        pairs, largest = best_matching(people_KD @ embedding_GD[first:last].T)
        for person, detection in pairs:
            if person == 0:
                changed_G[first + detection] = largest
    return changed_G


def _at_least(similarity_G: np.ndarray, found_P: np.ndarray) -> np.ndarray:
    """How many rows are at least as similar as each that was found: its rank, ties against it."""
    order = np.argsort(found_P)
    # Of every row: how many of the found ones are at most as similar; only rows above the least matter.
    rows = similarity_G[similarity_G >= found_P[order[0]]] if len(order) else similarity_G[:0]
    count = np.bincount(np.searchsorted(found_P[order], rows, side="right"), minlength=len(order) + 1)
    at_least = np.empty(len(order), np.int64)
    at_least[order] = np.cumsum(count[::-1])[::-1][1:]
    return at_least


def _precision_of(found_P: np.ndarray, at_least_P: np.ndarray) -> float:
    """Average precision from the ranks of the right rows alone; 0 without any."""
    if not len(found_P):
        return 0.0
    return float((_at_least(found_P, found_P) / at_least_P).mean())


def _average_precision(right_G: np.ndarray, score_G: np.ndarray) -> float:
    return _precision_of(score_G[right_G], _at_least(score_G, score_G[right_G]))


def _matched(found_n4: np.ndarray, box_m4: np.ndarray, threshold: float) -> np.ndarray:
    """Which detections are right, at most one for every person."""
    if not len(found_n4) or not len(box_m4):
        return np.zeros(len(found_n4), bool)
    overlap_mn = overlaps(box_m4, found_n4)
    person_n, detection_m = overlap_mn.argmax(0), overlap_mn.argmax(1)
    number_n = np.arange(len(found_n4))
    return (overlap_mn[person_n, number_n] >= threshold) & (detection_m[person_n] == number_n)


def _check_frames(
    detections: Sequence[np.ndarray], boxes: Sequence[np.ndarray], labelled: Sequence[np.ndarray] | None
) -> None:
    if len(detections) != len(boxes) or len(labelled if labelled is not None else boxes) != len(boxes):
        raise ValueError(f"need detections and boxes of every frame, got {len(detections)} and {len(boxes)} frames")
    _check_width("detections", detections, 5)
    _check_width("boxes", boxes, 4)


def _check_width(what: str, tables: Sequence[np.ndarray], width: int) -> None:
    for frame, table in enumerate(tables):
        if np.ndim(table) != 2 or np.shape(table)[1] != width:
            raise ValueError(f"{what} of frame {frame} must be (n, {width}), got {np.shape(table)}; n may be 0")


def _joined(tables: Sequence[np.ndarray], width: int) -> np.ndarray:
    return np.concatenate(tables) if tables else np.zeros((0, width))
