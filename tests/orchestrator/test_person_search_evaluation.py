"""How person search is scored: recorded numbers of the public code, double loops, and frames without anybody."""

import json
from pathlib import Path

import numpy as np
import pytest

from orchestrator.evaluation.person_search import (
    Detection,
    best_matching,
    evaluate_detection,
    evaluate_search,
    iou_threshold,
    overlaps,
)

sklearn = pytest.importorskip("sklearn.metrics", reason="the average precision that the public code uses")


def slow_overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union else 0.0


def slow_detection(detections, boxes, labelled=None, threshold=0.01, iou=0.5):
    right, score, people = [], [], 0
    for frame, (found, box) in enumerate(zip(detections, boxes, strict=True)):
        if labelled is not None:
            box = box[labelled[frame]]
            if not len(box):
                continue
        people += len(box)
        found = [d for d in found.tolist() if d[4] >= threshold]
        table = [[slow_overlap(b, d) for d in found] for b in box.tolist()]
        for j, d in enumerate(found):
            column = [row[j] for row in table]
            i = column.index(max(column)) if column else None
            right.append(i is not None and column[i] >= iou and table[i].index(max(table[i])) == j)
            score.append(d[4])
    recall = sum(right) / people if people else 0.0
    return recall, (sklearn.average_precision_score(right, score) if any(right) else 0.0) * recall


def slow_search(queries, targets, galleries, detections, embeddings, threshold=0.5, context=None, k1=10, k2=3):
    precision, top = [], []
    for q, query in enumerate(queries):
        frames = range(len(detections)) if galleries is None else sorted(galleries[q])
        rows = [(f, i) for f in frames for i in range(len(detections[f])) if detections[f][i][4] >= threshold]
        similarity = {row: float(query @ embeddings[row[0]][row[1]]) for row in rows}
        if context is not None:
            nearest = sorted(rows, key=lambda row: -similarity[row])[:k1]
            for frame in {f for f, _ in nearest}:
                own = [row for row in rows if row[0] == frame]
                table = np.array([[p @ embeddings[f][i] for f, i in own] for p in context[q][:k2]])
                pairs, largest = best_matching(table)
                for person, column in pairs.tolist():
                    if person == 0:
                        similarity[own[column]] = largest
        right = set()
        for frame, box in targets[q].items():
            width, height = box[2] - box[0], box[3] - box[1]
            least = min(0.5, width * height / ((width + 10) * (height + 10)))
            for row in sorted((r for r in rows if r[0] == frame), key=lambda r: -similarity[r]):
                if slow_overlap(detections[frame][row[1]], box) >= least:
                    right.add(row)
                    break
        labels, scores = [row in right for row in rows], [similarity[row] for row in rows]
        found = sklearn.average_precision_score(labels, scores) if right else 0.0
        precision.append(found * len(right) / max(len(targets[q]), 1))
        best = sorted(rows, key=lambda row: -similarity[row])
        top.append([any(row in right for row in best[:k]) for k in (1, 5, 10)])
    return np.array(precision), np.array(top)


def scenes(seed, frames=12, queries=7, dim=6, gallery=None):
    """People that walk through frames, found more or less well; two queries have nobody to find."""
    rng = np.random.default_rng(seed)
    people = rng.normal(size=(9, dim))
    boxes, identities, detections, embeddings = [], [], [], []
    for _ in range(frames):
        own = rng.permutation(9)[: rng.integers(0, 5)]
        corner = rng.uniform(0, 100, (len(own), 2))
        box = np.concatenate([corner, corner + rng.uniform(6, 60, (len(own), 2))], 1)
        wrong = rng.uniform(0, 150, (3, 4))
        wrong[:, 2:] += wrong[:, :2]
        moved = np.concatenate([box + rng.normal(0, 3, box.shape), box + rng.normal(0, 6, box.shape), wrong])
        moved = moved[rng.permutation(len(moved))]
        detections.append(np.concatenate([moved, rng.uniform(0.2, 1, (len(moved), 1))], 1))
        near = overlaps(moved, box) if len(box) else np.zeros((len(moved), 1))
        whose = [people[own[row.argmax()]] if row.max() > 0 else rng.normal(size=dim) for row in near]
        found = np.array(whose).reshape(len(moved), dim) + 0.7 * rng.normal(size=(len(moved), dim))
        embeddings.append(found / np.linalg.norm(found, axis=1, keepdims=True) * detections[-1][:, 4:])
        boxes.append(box)
        identities.append(own)
    galleries = None if gallery is None else [sorted(rng.permutation(frames)[:gallery]) for _ in range(queries)]
    targets = []
    for q in range(queries):
        allowed = range(frames) if galleries is None else galleries[q]
        held = {f: boxes[f][list(identities[f]).index(q)] for f in allowed if q in identities[f]}
        targets.append({} if q < 2 else held)
    query = people[:queries] / np.linalg.norm(people[:queries], axis=1, keepdims=True)
    context = [
        np.concatenate([query[q : q + 1], query[rng.permutation(np.delete(np.arange(queries), q))[:3]]])
        for q in range(queries)
    ]
    return query, targets, galleries, detections, embeddings, boxes, identities, context


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gallery", [None, 3, 8])
@pytest.mark.parametrize("context", [False, True])
def test_search_equals_the_double_loop(seed, gallery, context):
    query, targets, galleries, detections, embeddings, _, _, people = scenes(seed, gallery=gallery)
    options = {"context_embeddings": people, "context_detections": 5, "context_people": 3} if context else {}
    found = evaluate_search(query, targets, galleries, detections, embeddings, **options)
    slow = {"context": people, "k1": 5, "k2": 3} if context else {}
    precision, top = slow_search(query, targets, galleries, detections, embeddings, **slow)
    np.testing.assert_allclose(found.average_precision_Q, precision, atol=1e-12)
    assert found.found_QK.tolist() == top.tolist()
    assert found.map == pytest.approx(precision.mean()) and 0 < found.map < 1
    assert [found.top1, found.top5, found.top10] == pytest.approx(top.mean(0).tolist())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.01, 0.5])
@pytest.mark.parametrize("only_labelled", [False, True])
def test_detection_equals_the_double_loop(seed, threshold, only_labelled):
    *_, detections, _, boxes, identities, _ = scenes(seed)
    labelled = [np.asarray(own) < 4 for own in identities] if only_labelled else None
    found = evaluate_detection(detections, boxes, labelled, threshold)
    assert found == pytest.approx(slow_detection(detections, boxes, labelled, threshold), abs=1e-12)
    assert 0 < found.ap < found.recall <= 1


def test_detections_counted_by_hand():
    box = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10.0]])
    found = np.array([[0, 0, 10, 10, 0.9], [0, 1, 10, 10, 0.8], [70, 0, 80, 10, 0.7], [20, 0, 30, 4.5, 0.6]])
    assert evaluate_detection([found], [box]) == pytest.approx(Detection(1 / 3, 1 / 3), abs=1e-12)


def test_nobody_and_nothing():
    nobody, nothing = np.zeros((0, 4)), np.zeros((0, 5))
    assert evaluate_detection([], []) == (0, 0) and evaluate_detection([nothing], [nobody]) == (0, 0)
    box = np.array([[0.0, 0, 10, 10]])
    found = np.array([[0.0, 0, 10, 10, 0.9]])
    assert evaluate_detection([nothing, found], [box, box]) == (0.5, 0.5)
    assert evaluate_detection([found, found], [nobody, box]).ap == pytest.approx(0.5), "half of the finds are false"
    assert evaluate_detection([found, found], [box, box], [np.array([False]), np.array([True])]) == (1, 1)
    one = np.ones((1, 2))
    assert evaluate_search(np.zeros((0, 2)), [], None, [found], [one]).map == 0
    for detections, embeddings in (([nothing], [np.zeros((0, 2))]), ([found * [1, 1, 1, 1, 0.1]], [one])):
        missed = evaluate_search(one, [{0: box[0]}], None, detections, embeddings)
        assert missed.map == missed.top10 == 0
    assert evaluate_search(one, [{}], [[]], [found], [one]).map == 0
    assert evaluate_search(one, [{0: box[0], 1: box[0]}], None, [found, nothing], [one, one[:0]]).map == 0.5


def test_equal_similarities_count_against_the_person():
    found = np.array([[0.0, 0, 10, 10, 0.9]])
    frames = [found] * 12
    same = evaluate_search(np.ones((1, 2)), [{11: found[0, :4]}], None, frames, [np.ones((1, 2))] * 12)
    assert same.map == pytest.approx(1 / 12) and same.top10 == 0


def test_what_cannot_be_scored_is_one_line():
    found, one = np.array([[0.0, 0, 10, 10, 0.9]]), np.ones((1, 2))
    for call, words in (
        (lambda: evaluate_detection([found], []), "of every frame, got 1 and 0 frames"),
        (lambda: evaluate_detection([found[:, :4]], [found[:, :4]]), r"detections of frame 0 must be \(n, 5\)"),
        (lambda: evaluate_detection([found], [np.zeros(0)]), r"boxes of frame 0 must be \(n, 4\), got \(0,\)"),
        (lambda: evaluate_search(one, [{}], None, [found], [one[:0]]), "as many embeddings"),
        (lambda: evaluate_search(one, [], None, [found], [one]), "for each of 1 queries"),
        (lambda: evaluate_search(one, [{1: found[0, :4]}], [[0]], [found] * 2, [one] * 2), "target in frame 1"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_least_overlap_is_lower_for_small_people():
    for box, expected in (((12, 24), 0.38502674), ((60, 100), 0.5), ((10, 10), 0.25)):
        assert iou_threshold(np.array([5, 7, 5 + box[0], 7 + box[1]])) == pytest.approx(expected)


def test_matching_is_the_best_one_to_one():
    rng = np.random.default_rng(0)
    from itertools import permutations

    for _ in range(10):
        table = rng.normal(size=(3, 4))
        pairs, largest = best_matching(table)
        totals = [sum(table[i, j] for i, j in enumerate(p)) for p in permutations(range(4), 3)]
        assert table[tuple(pairs.T)].sum() == pytest.approx(max(totals)) and largest == table[tuple(pairs.T)].max()


# --- The public code's numbers ----------------------------------------------------------------------------------------


def recorded(shared, case):
    folder = shared / "golden" / "ddps"
    data = dict(np.load(folder / f"{case}.npz"))
    split = {
        name: np.split(data[name], np.cumsum(data[count])[:-1])
        for name, count in (("gal_det", "gal_count"), ("gal_feat", "gal_count"), ("q_feat", "q_count"))
    }
    return data, split, json.loads((folder / "dataset_parse_expected.json").read_text())


def check_recorded(data, prefix, found):
    np.testing.assert_allclose(found.average_precision_Q, data[f"{prefix}_aps"], atol=1e-6)
    assert found.found_QK.astype(int).tolist() == data[f"{prefix}_top"].tolist()
    assert found.map == pytest.approx(float(data[f"{prefix}_mAP"]), abs=1e-6)


def check_detection(data, split, frames):
    boxes = [np.array(f["boxes"], float).reshape(-1, 4) for f in frames]
    labelled = [np.array(f["pids"]) != 5555 for f in frames]
    for threshold in ("0.01", "0.5"):
        for only in (0, 1):
            found = evaluate_detection(split["gal_det"], boxes, labelled if only else None, float(threshold))
            assert found == pytest.approx(data[f"det_recall_ap_th{threshold}_lab{only}"].tolist(), abs=1e-9)


def test_recorded_numbers_of_prw(shared: Path):
    data, split, expected = recorded(shared, "eval_prw_easy")
    frames, queries = expected["prw"]["gallery"], expected["prw"]["query"]
    check_detection(data, split, frames)
    names = [f["img_name"] for f in frames]
    for every_camera in (0, 1):
        galleries, targets = [], []
        for query in queries:
            (identity,) = query["pids"]
            allowed = [i for i, f in enumerate(frames) if f["img_name"] != query["img_name"]
                       and (every_camera or f["cam_id"] != query["cam_id"])]  # fmt: skip
            galleries.append(allowed)
            targets.append({i: np.array(frames[i]["boxes"][frames[i]["pids"].index(identity)])
                            for i in allowed if identity in frames[i]["pids"]})  # fmt: skip
        assert len(names) == len(split["gal_det"])
        arguments = (data["query_feat"], targets, galleries, split["gal_det"], split["gal_feat"])
        check_recorded(data, f"allcam{every_camera}_cbgm0", evaluate_search(*arguments))
        context = {"context_embeddings": split["q_feat"], "context_detections": 30, "context_people": 4}
        check_recorded(data, f"allcam{every_camera}_cbgm1", evaluate_search(*arguments, **context))
