"""Retrieval metrics against plain loops and recorded numbers; ties, removals, blocks, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.evaluation import retrieval
from orchestrator.evaluation.retrieval import evaluate, nearest

GOLDEN = Path(__file__).parents[1] / "golden"


def naive(query, gallery, qid, gid, qcam=None, gcam=None, leave_one_out=False):
    query = query / np.linalg.norm(query, axis=1, keepdims=True)
    gallery = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    similarity = query @ gallery.T
    precisions, penalties, firsts = [], [], []
    for i in range(len(query)):
        kept = [j for j in range(len(gallery)) if not (leave_one_out and i == j)
                and not (qcam is not None and gid[j] == qid[i] and gcam[j] == qcam[i])]  # fmt: skip
        kept.sort(key=lambda j: (-similarity[i, j], j))
        ranks = [r for r, j in enumerate(kept, 1) if gid[j] == qid[i]]
        if ranks:
            precisions.append(np.mean([(k + 1) / r for k, r in enumerate(ranks)]))
            penalties.append(len(ranks) / ranks[-1])
            firsts.append(ranks[0])
    cmc = [np.mean([f <= r for f in firsts]) for r in range(1, 51)]
    return np.mean(precisions), np.mean(penalties), cmc, len(firsts)


def random_case(seed, q=23, g=61, d=6, lattice=False):
    rng = np.random.default_rng(seed)
    query, gallery = rng.standard_normal((q, d)), rng.standard_normal((g, d))
    if lattice:  # many exactly equal similarities, all exactly representable
        query, gallery = np.eye(d)[rng.integers(0, d, q)], np.eye(d)[rng.integers(0, d, g)]
    return query.astype(np.float32), gallery.astype(np.float32), rng.integers(0, 9, q), rng.integers(0, 9, g), rng


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lattice", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("mode", ["cross", "cameras", "leave_one_out"])
def test_equals_the_loops(seed, lattice, mode):
    query, gallery, qid, gid, rng = random_case(seed, lattice=lattice)
    options = {}
    if mode == "cameras":
        options = {"qcam": rng.integers(0, 3, len(query)), "gcam": rng.integers(0, 3, len(gallery))}
    if mode == "leave_one_out":
        gallery, gid, options = query, qid, {"leave_one_out": True}
    expected = naive(query, gallery, qid, gid, **options)
    metrics = evaluate(query, gallery, qid, gid, *[options[k] for k in ("qcam", "gcam") if k in options],
                       leave_one_out=mode == "leave_one_out")  # fmt: skip
    assert metrics.map == pytest.approx(expected[0], abs=1e-12)
    assert metrics.minp == pytest.approx(expected[1], abs=1e-12)
    assert metrics.cmc == pytest.approx(expected[2], abs=1e-12)
    assert metrics.valid_queries == expected[3]
    assert metrics.rank5 == metrics.cmc[4] and metrics.rank10 == metrics.cmc[9]


def curve_area(relevant):
    """Area under the precision-recall curve, walked image by image as the first tool of Market-1501 did."""
    recall = area = 0.0
    precision, hits = 1.0, 0
    for place, hit in enumerate(relevant, 1):
        hits += int(hit)
        before, precision = precision, hits / place
        area += (hits / sum(relevant) - recall) * (before + precision) / 2
        recall = hits / sum(relevant)
    return area


@pytest.mark.parametrize("lattice", [False, True], ids=["random", "ties"])
def test_average_precision_by_trapezoids(lattice):
    query, gallery, qid, gid, rng = random_case(5, lattice=lattice)
    qcam, gcam = rng.integers(0, 3, len(query)), rng.integers(0, 3, len(gallery))
    found = evaluate(query, gallery, qid, gid, qcam, gcam, ap="trapezoid")
    similarity = (
        torch.nn.functional.normalize(torch.from_numpy(query))
        @ torch.nn.functional.normalize(torch.from_numpy(gallery)).T
    )
    for i, order in enumerate(similarity.argsort(dim=1, descending=True, stable=True).tolist()):
        relevant = [gid[j] == qid[i] for j in order if not (gid[j] == qid[i] and gcam[j] == qcam[i])]
        if any(relevant):
            assert found.average_precision[i] == pytest.approx(curve_area(relevant), abs=1e-12)
    plain = evaluate(query, gallery, qid, gid, qcam, gcam)
    assert found.map < plain.map and found.rank1 == plain.rank1
    first = evaluate(np.eye(2), np.eye(2), [0, 1], [0, 1], ap="trapezoid")
    assert first.map == 1.0


@pytest.mark.parametrize("block_bytes", [1, 400, 4 * 61 * 5, 2**20])
def test_blocks_do_not_change_the_result(block_bytes):
    query, gallery, qid, gid, _ = random_case(1)
    whole = evaluate(query, gallery, qid, gid)
    parts = evaluate(query, gallery, qid, gid, block_bytes=block_bytes)
    assert parts.map == pytest.approx(whole.map, abs=1e-12) and parts.valid_queries == whole.valid_queries


@pytest.mark.parametrize("lattice", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("counted", [0, 48], ids=["sorted", "counted"])
def test_a_device_counts_what_the_host_counts(lattice, counted, monkeypatch):
    """Rows without any relevant entry and rows of removed ones are among them."""
    monkeypatch.setattr(retrieval, "_COUNTED", counted)
    query, gallery, qid, gid, _ = random_case(2, lattice=lattice)
    similarity = torch.from_numpy(query @ gallery.T)
    similarity[3:5, 10:30] = -torch.inf
    relevant = torch.from_numpy((qid[:, None] == gid[None, :]) & (np.arange(23) != 7)[:, None])
    relevant &= similarity > -torch.inf
    padded = torch.where(relevant, similarity, torch.inf).sort(dim=1).values
    counts = relevant.sum(dim=1)
    of_device, of_host = (
        retrieval._count(similarity, padded, counts),
        retrieval._count_on_host(similarity, padded, counts),
    )
    real = torch.arange(61) < counts[:, None]
    for ours, other in zip(of_host, of_device, strict=True):
        assert torch.equal(ours[real], other[real])
    at_least = (similarity[:, None, :] >= padded[:, :, None]).sum(dim=2)
    assert torch.equal(of_host[0][real], at_least[real])


@pytest.mark.parametrize("name", ["eval_cross_small"])
def test_recorded_numbers(name):
    case = next(c for c in json.loads((GOLDEN / "d3still.json").read_text())["cases"] if c["id"] == name)
    with np.load(GOLDEN / "d3still.npz") as z:
        metrics = evaluate(z[f"{name}/query"], z[f"{name}/gallery"], z[f"{name}/q_pid"], z[f"{name}/g_pid"],
                           z[f"{name}/q_cam"], z[f"{name}/g_cam"])  # fmt: skip
        cmc = z[f"{name}/cmc"]
    assert (metrics.map, metrics.rank1, metrics.minp) == pytest.approx(
        (case["mAP"], case["R1"], case["mINP"]), abs=1e-6
    )
    assert metrics.cmc == pytest.approx(cmc[:50], abs=1e-6)


def test_recorded_numbers_with_cameras(shared):
    z = np.load(shared / "golden/d3still/eval_camera_filter.npz")
    metrics = evaluate(z["query"], z["gallery"], z["q_pid"], z["g_pid"], z["q_cam"], z["g_cam"])
    assert metrics.valid_queries == 114
    assert (metrics.map, metrics.minp) == pytest.approx((0.5466743808522305, 0.28150369118025526), abs=1e-6)


def test_one_query_one_gallery_image_and_half_precision():
    e = torch.ones(1, 3, dtype=torch.float16)
    assert evaluate(e, e, [4], [4]).map == 1.0


def test_zero_embeddings_rank_by_index():
    assert evaluate(np.zeros((1, 3)), np.zeros((4, 3)), [1], [0, 0, 1, 0]).map == pytest.approx(1 / 3)


def test_all_relevant_and_more_than_fifty():
    e = np.random.default_rng(0).standard_normal((80, 4))
    metrics = evaluate(e, e, np.zeros(80), np.zeros(80))
    assert metrics.map == 1 and metrics.minp == 1 and len(metrics.cmc) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_QD": np.zeros((0, 3))}, "non-empty matrix"),
        ({"query_QD": np.zeros((2, 4))}, "wide"),
        ({"query_QD": np.full((2, 3), np.nan)}, "2 of 2 query embeddings are not finite"),
        ({"query_identity": [8, 9]}, "no query has a relevant gallery image"),
        ({"ap": "area"}, "ap must be one of precision, trapezoid, got 'area'"),
        ({"query_identity": [1]}, "one entry per image"),
        ({"query_camera": [0, 0]}, "cameras are needed for both"),
        ({"leave_one_out": True}, "one gallery row per query"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "query_QD": np.ones((2, 3)), "gallery_GD": np.ones((3, 3)), "query_identity": [0, 1],
        "gallery_identity": [0, 1, 1],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        evaluate(**{**arguments, **change})


def test_nearest_follows_the_removals():
    e = torch.eye(4)
    removed = np.zeros((4, 4), bool)
    removed[np.arange(4), np.arange(4)] = True
    assert nearest(e, e, 3, removed).tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    with pytest.raises(ValueError, match="between 1 and the 3"):
        nearest(e, e, 4, removed)
