"""How face verification is scored: recorded numbers, plain loops, ties, memory that does not grow, bad input."""

import math
import tracemalloc

import numpy as np
import pytest

from orchestrator.evaluation import identification, templates
from orchestrator.evaluation.verification import (
    area_under_roc,
    equal_error_rate,
    flip_summed,
    mate_ranks,
    pair_scores,
    roc,
    tar_at_far,
    template_embeddings,
    template_scores,
    ten_fold_accuracy,
    tpir_at_fpir,
    val_at_far,
)

FARS = (0.0, 1e-3, 0.01, 0.05, 0.1, 0.125, 0.3, 0.5, 0.999, 1.0)


def drawn(seed, pairs=200, decimals=None, dtype=np.float64):
    """Scores of both kinds that overlap; few decimals make ties."""
    rng = np.random.default_rng(seed)
    same = rng.random(pairs) < 0.4
    score = np.clip(rng.normal(np.where(same, 0.4, 0.0), 0.25), -1, 1)
    return (score if decimals is None else score.round(decimals)).astype(dtype), same


def unit(row):
    norm = math.sqrt(sum(float(x) ** 2 for x in row))
    return [float(x) / max(norm, 1e-12) for x in row]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


# --- Folds ------------------------------------------------------------------------------------------------------------


def slow_folds(score, same, folds, grid, choose):
    """Threshold of every fold, with the accuracy, VAL and FAR there."""
    size, rows = len(score) // folds, []
    distance = [max(0.0, 2 - 2 * float(s)) for s in score]
    for fold in range(folds):
        inside = set(range(fold * size, (fold + 1) * size))
        outside = [p for p in range(len(score)) if p not in inside]
        threshold = choose([(distance[p], same[p]) for p in outside], grid)
        accepted = {p: distance[p] < threshold for p in inside}
        genuine, impostor = ([p for p in inside if same[p] == kind] for kind in (True, False))
        rows.append((threshold, sum(accepted[p] == same[p] for p in inside) / size,
                     sum(accepted[p] for p in genuine) / max(1, len(genuine)),
                     sum(accepted[p] for p in impostor) / max(1, len(impostor))))  # fmt: skip
    return np.array(rows).T


def most_accurate(pairs, grid):
    return max(grid, key=lambda t: sum((d < t) == s for d, s in pairs))  # the first of equal ones


def largest_below(far):
    def choose(pairs, grid):
        impostors = [d for d, s in pairs if not s]
        return max(t for t in grid if sum(d < t for d in impostors) <= far * len(impostors) + 1e-9)

    return choose


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("folds", [2, 10])
@pytest.mark.parametrize("decimals", [None, 2])
def test_accuracy_in_folds_equals_the_loop(seed, folds, decimals):
    score, same = drawn(seed, decimals=decimals)
    found = ten_fold_accuracy(score, same, folds)
    threshold, accuracy, *_ = slow_folds(score, same, folds, [k / 100 for k in range(400)], most_accurate)
    np.testing.assert_array_equal(found.threshold_F, threshold)
    np.testing.assert_allclose(found.accuracy_F, accuracy, atol=1e-12)
    assert found[:2] == pytest.approx((accuracy.mean(), accuracy.std())) and 0.5 < found.mean < 1


@pytest.mark.parametrize("far", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("decimals", [None, 2])
def test_val_equals_the_loop(far, decimals):
    score, same = drawn(3, decimals=decimals)
    found = val_at_far(score, same, far, folds=5)
    threshold, _, val, rate = slow_folds(score, same, 5, [k / 1000 for k in range(4000)], largest_below(far))
    np.testing.assert_array_equal(found.threshold_F, threshold)
    np.testing.assert_allclose([found.val_F, found.far_F], [val, rate], atol=1e-12)
    assert found[:3] == pytest.approx((val.mean(), val.std(), rate.mean()))


def test_recorded_folds(shared):
    data = np.load(shared / "golden" / "face" / "verification_10fold.npz")
    rows, flipped = (np.concatenate([data[f"{name}{side}"] for side in "12"]) for name in ("emb", "flip"))
    first, second = np.arange(600), np.arange(600, 1200)
    score = pair_scores(flip_summed(rows, flipped), first, second)
    np.testing.assert_allclose(score, data["cosine"], rtol=1e-9)
    found = ten_fold_accuracy(score, data["same"])
    np.testing.assert_allclose(found.accuracy_F, data["acc"], atol=1e-12)
    np.testing.assert_allclose(found.threshold_F, data["thr"], atol=1e-9)
    assert found[:2] == pytest.approx((float(data["acc_mean"]), float(data["acc_std"])), abs=1e-12)
    alone = ten_fold_accuracy(pair_scores(flip_summed(rows, None), first, second), data["same"])
    np.testing.assert_allclose(alone.accuracy_F, data["acc_noflip"], atol=1e-12)
    val = val_at_far(score, data["same"], 0.01)
    np.testing.assert_allclose(val.val_F, data["val"], atol=1e-12)
    np.testing.assert_allclose(val.far_F, data["val_far"], atol=1e-12)
    np.testing.assert_allclose(val.threshold_F, data["val_thr"], atol=1e-9)


def test_a_set_that_is_told_apart_and_one_where_all_is_equal():
    same = np.tile([True, False], 30)
    assert ten_fold_accuracy(np.where(same, 0.9, 0.1), same)[:2] == (1, 0)
    equal = ten_fold_accuracy(np.full(60, 0.5), same)
    assert equal[:2] == (0.5, 0) and not equal.threshold_F.any(), "nothing is accepted: the first of equal thresholds"
    assert val_at_far(np.full(60, 0.5), same, 0.1).mean == 0


@pytest.mark.parametrize("rounded", [1.0, 1 + 1e-7, 1 + 2**-52])
def test_an_image_beside_itself_is_at_distance_zero_however_it_is_rounded(rounded):
    found = ten_fold_accuracy(np.array([rounded, 0.0] * 4), np.array([True, False] * 4), folds=2)
    assert found.threshold_F.tolist() == [0.01, 0.01] and found.mean == 1


def test_half_precision_scores_are_compared_as_they_are():
    score, same = drawn(0, dtype=np.float16)
    wide = score.astype(np.float64)
    assert ten_fold_accuracy(score, same)[:2] == ten_fold_accuracy(wide, same)[:2]
    assert tar_at_far(score, same, 0.1) == tar_at_far(wide, same, 0.1)
    assert equal_error_rate(score, same) == equal_error_rate(wide, same)


# --- The curve --------------------------------------------------------------------------------------------------------


def slow_curve(score, same):
    """(FPR, TPR, threshold), from (0, 0): accept score >= threshold, over all distinct scores."""
    genuine, impostor = ([float(s) for s, is_same in zip(score, same, strict=True) if is_same == kind]
                         for kind in (True, False))  # fmt: skip
    return [(sum(s >= t for s in impostor) / len(impostor), sum(s >= t for s in genuine) / len(genuine), t)
            for t in [math.inf, *sorted({*genuine, *impostor}, reverse=True)]]  # fmt: skip


def slow_strict(score, same, far):
    genuine, impostor = ([float(s) for s, is_same in zip(score, same, strict=True) if is_same == kind]
                         for kind in (True, False))  # fmt: skip
    k = math.floor(far * len(impostor) + 1e-9)
    threshold = sorted(impostor, reverse=True)[k] if k < len(impostor) else -math.inf
    return (sum(s > threshold for s in genuine) / len(genuine), threshold,
            sum(s > threshold for s in impostor) / len(impostor))  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("pairs", [3, 40, 200])
@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_rates_equal_the_loops(seed, pairs, decimals, dtype):
    score, same = drawn(seed, pairs, decimals, dtype)
    same[:2] = True, False
    curve = slow_curve(score, same)
    for far in FARS:
        strict = tar_at_far(score, same, far)
        assert strict == pytest.approx(slow_strict(score, same, far), abs=1e-12) and strict.far <= far + 1e-9
        nearest = min(curve, key=lambda point: (abs(point[0] - far), -point[0], -point[1]))
        found = tar_at_far(score, same, far, "nearest")
        assert (found.far, found.tar, found.threshold) == pytest.approx(nearest, abs=1e-12)
    false, true = np.array([point[:2] for point in curve]).T
    first = min(range(len(curve)), key=lambda i: (round(abs(false[i] - 1 + true[i]), 12), i))
    assert equal_error_rate(score, same) == pytest.approx((false[first] + 1 - true[first]) / 2, abs=1e-12)
    won = [(g > i) + (g == i) / 2 for g in score[same] for i in score[~same]]
    assert area_under_roc(score, same) == pytest.approx(np.mean(won), abs=1e-12)


@pytest.mark.parametrize("decimals", [None, 2])
def test_nearest_is_what_the_public_scripts_say(decimals):
    metrics = pytest.importorskip("sklearn.metrics", reason="the curve that the public scripts use")
    score, same = drawn(5, 3000, decimals)
    false, true, _ = metrics.roc_curve(same, score, drop_intermediate=False)
    false, true = np.flipud(false), np.flipud(true)
    for far in (1e-6, 1e-4, 1e-3, 0.01, 0.1):
        _, best = min(zip(abs(false - far), range(len(false)), strict=True))
        assert tar_at_far(score, same, far, "nearest").tar == pytest.approx(true[best], abs=1e-12)
    assert area_under_roc(score, same) == pytest.approx(metrics.roc_auc_score(same, score), abs=1e-12)


def test_ties_at_the_threshold_are_refused_by_the_strict_rule_alone():
    score, same = np.array([0.5, 0.5, 0.5, 0.5, 0.1, 0.1]), np.array([True, True, False, False, False, False])
    assert tar_at_far(score, same, 0.25) == (0, 0.5, 0), "half of the impostors would pass together"
    assert tar_at_far(score, same, 0.25, "nearest") == (1, 0.5, 0.5), "0 and 0.5 are equally near: the larger"
    assert tar_at_far(score, same, 0.2, "nearest") == (0, math.inf, 0)
    assert tar_at_far(score, same, 1.0) == (1, -math.inf, 1)


def test_a_rate_that_is_whole_but_for_rounding_counts_as_whole():
    score, same = np.append(np.arange(100) / 100, 0.705), np.append(np.zeros(100, bool), True)
    assert 0.29 * 100 < 29, "what the test is about"
    assert tar_at_far(score, same, 0.29) == (1, 0.7, 0.29)


def test_all_told_apart_all_confused_all_equal():
    same = np.array([True, True, False, False])
    for score, area, rate in (([4, 3, 2, 1], 1, 0), ([1, 2, 3, 4], 0, 1), ([1, 1, 1, 1], 0.5, 0.5)):
        assert area_under_roc(np.array(score), same) == area
        assert equal_error_rate(np.array(score), same) == rate
        assert tar_at_far(np.array(score), same, 0).tar == (area == 1)


@pytest.mark.parametrize("points", [4, 20, 1000])
@pytest.mark.parametrize("decimals", [None, 1])
def test_the_drawn_curve_is_a_part_of_the_whole_one(points, decimals):
    score, same = drawn(7, 400, decimals)
    found = roc(score, same, points)
    whole = set(slow_curve(score, same))
    assert len(found.far) <= points and {*zip(*(column.tolist() for column in found), strict=True)} <= whole
    assert (found.far[0], found.tar[0], found.threshold[0]) == (0, 0, math.inf)
    assert (found.far[-1], found.tar[-1]) == (1, 1) and (np.diff(found.threshold) < 0).all()
    for far, tar in zip(found.far[1:], found.tar[1:], strict=True):
        assert tar == max(t for f, t, _ in whole if f == far)


def test_a_long_curve_is_drawn_with_few_points():
    rng = np.random.default_rng(0)
    found = roc(rng.normal(size=100_000).astype(np.float32), np.arange(100_000) % 50 == 0, points=200)
    assert 100 < len(found.far) <= 200 and found.far[1] == 1 / 98_000


# --- One among many ---------------------------------------------------------------------------------------------------


def people(seed, probes=30, faces=25, dim=6, identities=40):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(identities, dim))
    faces_of, probes_of = rng.permutation(identities)[:faces], rng.integers(0, identities, probes)
    gallery, probe = (centre[of] + 0.6 * rng.normal(size=(len(of), dim)) for of in (faces_of, probes_of))
    return probe, gallery, probes_of, faces_of


def slow_search(probe, gallery, probe_identity, gallery_identity):
    rows = []
    for p, who in zip(probe, probe_identity, strict=True):
        score = [dot(unit(p), unit(g)) for g in gallery]
        mates = [s for s, of in zip(score, gallery_identity, strict=True) if of == who]
        mate = max(mates, default=-math.inf)
        rows.append((1 + sum(s > mate + 1e-12 for s in score) if mates else 0, mate, max(score)))
    return rows


def slow_tpir(rows, fpir, rule):
    others = sorted((top for rank, _, top in rows if not rank), reverse=True)
    k = math.floor(fpir * len(others) + 1e-9)
    threshold = others[k] if k < len(others) else -math.inf
    if rule == "released":
        threshold = others[max(int(len(others) * fpir) - 1, 0)]
    mated = [row for row in rows if row[0]]
    return sum(rank == 1 and mate > threshold for rank, mate, _ in mated) / len(mated)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("block_bytes", [1, 700, 2**20])
def test_search_equals_the_loop_whatever_the_block(monkeypatch, seed, dtype, block_bytes):
    monkeypatch.setattr(identification, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(identification, "_GALLERY_ROWS", 7)
    probe, gallery, *identities = people(seed)
    rows = slow_search(probe, gallery, *identities)
    probe, gallery = 3 * probe.astype(dtype), gallery.astype(dtype)
    found = mate_ranks(probe, gallery, *identities)
    assert found.tolist() == [rank for rank, *_ in rows] and 0 in found and 1 in found and found.max() > 1
    for rule in ("strict", "released"):
        for fpir in (0, 0.1, 0.3, 0.5, 1):
            assert tpir_at_fpir(probe, gallery, *identities, fpir, rule) == slow_tpir(rows, fpir, rule)


def test_the_two_rules_of_the_open_set_differ():
    probe, gallery, *identities = people(1, probes=200)
    strict, released = (tpir_at_fpir(probe, gallery, *identities, 0.02, rule) for rule in ("strict", "released"))
    assert strict > released


@pytest.mark.parametrize("width", [3, 64, 512])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_face_that_is_there_twice_is_not_nearer_than_itself(width, dtype):
    rng = np.random.default_rng(width)
    probe, face = rng.normal(size=(5, width)).astype(dtype), rng.normal(size=(1, width)).astype(dtype)
    gallery = np.repeat(face, 333, axis=0)
    for mate in (0, 7, 332):
        assert mate_ranks(probe, gallery, np.full(5, mate), np.arange(333)).tolist() == [1] * 5


def test_faces_that_are_nearly_one_are_still_told_apart():
    """Of a network that has collapsed all cosines are within the rounding of float32: chance, not rank 1."""
    rng = np.random.default_rng(0)
    gallery = (rng.normal(size=64) + 1e-4 * rng.normal(size=(200, 64))).astype(np.float32)
    probe = (gallery.mean(0) + 1e-4 * rng.normal(size=(200, 64))).astype(np.float32)
    people = np.arange(200)
    found = mate_ranks(probe, gallery, people, people)
    assert (found == mate_ranks(probe.astype(np.float64), gallery.astype(np.float64), people, people)).mean() > 0.99
    assert (found == 1).mean() < 0.03 and 60 < np.median(found) < 140


def test_a_mate_at_the_threshold_of_the_open_set_is_refused():
    gallery, probe = np.eye(2), np.array([[1.0, 0], [0, 1], [1, 0]])  # the last one is nobody in the gallery
    assert tpir_at_fpir(probe, gallery, [0, 1, 7], [0, 1], 0) == 0
    assert tpir_at_fpir(probe, gallery, [0, 1, 7], [0, 1], 1) == 1


def test_of_several_mates_the_nearest_counts_and_nobody_is_zero():
    gallery = np.array([[0.0, 1], [0.8, 0.6], [1, 0.1]])
    assert mate_ranks(np.array([[1.0, 0], [0, 1]]), gallery, [7, 9], [7, 7, 8]).tolist() == [2, 0]
    assert mate_ranks(np.zeros((0, 2)), gallery, [], [7, 7, 8]).tolist() == []
    assert mate_ranks(np.array([[1.0, 0]]), gallery[:1], ["anna"], np.array(["anna"])).tolist() == [1]


def test_half_precision_galleries_are_searched():
    probe, gallery, *identities = people(2)
    gallery = gallery.astype(np.float16)
    found = mate_ranks(probe.astype(np.float32), gallery, *identities)
    assert found.tolist() == mate_ranks(probe, gallery.astype(np.float64), *identities).tolist()


def test_a_large_gallery_is_never_compared_at_once(monkeypatch):
    monkeypatch.setattr(identification, "_BLOCK_BYTES", 2**20)
    rng = np.random.default_rng(0)
    probe, gallery = (rng.normal(size=(n, 4)).astype(np.float32) for n in (500, 20_000))
    peak = peak_bytes(lambda: mate_ranks(probe, gallery, np.arange(500), np.arange(20_000)))
    assert peak < 4 * 2**20 < 500 * 20_000 * 4 / 8


# --- Embeddings, pairs, templates -------------------------------------------------------------------------------------


def peak_bytes(work):
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_flip_sums_are_unit_rows_and_weighted_by_norm():
    rng = np.random.default_rng(0)
    rows, flipped = rng.normal(size=(2, 5, 3))
    np.testing.assert_allclose(flip_summed(rows, flipped), [unit(a + b) for a, b in zip(rows, flipped, strict=True)])
    np.testing.assert_allclose(flip_summed(rows, None), [unit(a) for a in rows])
    kept = rows.copy()
    flip_summed(rows, flipped)
    assert (rows == kept).all(), "the caller's rows are left alone"
    assert not flip_summed(rows, -rows).any() and flip_summed(rows[:0], None).shape == (0, 3)
    half = flip_summed(np.full((1, 4), 6e4, np.float16), np.full((1, 4), 6e4, np.float16))
    assert half.dtype == np.float32 and half == pytest.approx(0.5), "the sum is beyond half precision"


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 2e-6), (np.float16, 2e-6)])
@pytest.mark.parametrize("chunk", [1, 7, 65_536])
@pytest.mark.parametrize("dense", [0, 64])
def test_pair_scores_equal_the_loop_whatever_the_chunk(monkeypatch, dtype, tolerance, chunk, dense):
    monkeypatch.setattr(templates, "_DENSE", dense)
    monkeypatch.setattr(templates, "_ROWS", 3)
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(20, 9)).astype(dtype)
    rows[4] = 0
    first, second = rng.integers(0, 20, 60), rng.integers(3, 20, 60)
    found = pair_scores(rows, first, second, chunk)
    expected = [dot(unit(rows[a]), unit(rows[b])) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert found.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(template_scores(rows, second, first, chunk=chunk), found, atol=tolerance)


def test_pairs_of_no_row_of_one_row_and_of_equal_rows():
    rows = np.random.default_rng(0).normal(size=(200, 512)).astype(np.float32).repeat(3, axis=0)
    none = np.zeros(0, np.int64)
    assert pair_scores(rows, none, none).tolist() == [] and pair_scores(rows[:0], [], []).tolist() == []
    score = pair_scores(rows, np.arange(1, 600, 3), np.arange(0, 600, 3, dtype=np.uint16))
    np.testing.assert_allclose(score, 1, atol=1e-6)
    assert score.max() <= 1


def test_a_long_list_of_pairs_never_holds_a_row_for_each():
    rng = np.random.default_rng(0)
    for rows in (300, 30_000):  # the product of a chunk, and pair by pair
        embedding = rng.normal(size=(rows, 64)).astype(np.float32)
        first, second = rng.integers(0, rows, (2, 100_000))
        peak = peak_bytes(lambda table=embedding, pairs=(first, second): pair_scores(table, *pairs, chunk=2048))
        assert peak < 100_000 * 64 * 4 / 4 and peak > 100_000 * 4


def slow_templates(rows, flipped, score, template, medium, keep_norm):
    found = {}
    for t in sorted(set(template.tolist())):
        total = np.zeros(rows.shape[1])
        for m in sorted(set(medium[template == t].tolist())):
            faces = []
            for i in np.flatnonzero((template == t) & (medium == m)):
                face = rows[i].astype(float) + (0 if flipped is None else flipped[i])
                face = face if keep_norm else np.array(unit(face))
                faces.append(face * (1 if score is None else score[i]))
            total += np.mean(faces, axis=0)
        found[t] = unit(total)
    return list(found), np.array(list(found.values()))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("detector", [False, True])
@pytest.mark.parametrize("block", [1, 5, 4096])
def test_templates_equal_the_loop(monkeypatch, flip, keep_norm, detector, block):
    monkeypatch.setattr(templates, "_ROWS", block)
    rng = np.random.default_rng(3)
    rows, flipped = rng.normal(size=(2, 40, 5))
    template, medium = rng.choice([900, 3, 17, 55], 40), rng.choice([8, 2, 70], 40)  # media of several templates
    arguments = (rows, flipped if flip else None, rng.uniform(0.1, 1, 40) if detector else None, template, medium)
    ids, found = template_embeddings(*arguments, keep_norm=keep_norm)
    expected_ids, expected = slow_templates(*arguments, keep_norm)
    assert ids.tolist() == expected_ids == [3, 17, 55, 900]
    np.testing.assert_allclose(found, expected, atol=1e-13)
    half = template_embeddings(rows.astype(np.float16), *arguments[1:], keep_norm=keep_norm)[1]
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, expected, atol=5e-3)


def test_templates_of_one_image_of_zeros_and_of_nothing():
    rows = np.array([[3.0, 4], [0, 0], [1, 0]])
    ids, found = template_embeddings(rows, None, np.array([1.0, 1, 0]), np.array([5, 6, 7]), np.array([1, 1, 1]))
    assert ids.tolist() == [5, 6, 7] and found.tolist() == [pytest.approx([0.6, 0.8]), [0, 0], [0, 0]]
    ids, found = template_embeddings(rows[:0], None, None, np.zeros(0, int), np.zeros(0, int))
    assert ids.tolist() == [] and found.shape == (0, 2)


# --- Bad input --------------------------------------------------------------------------------------------------------

SCORE, SAME = np.array([0.9, 0.1, 0.8, 0.2]), np.array([True, False, True, False])
ROWS, ONE = np.eye(3), np.zeros(1, int)


@pytest.mark.parametrize("rule", [
    lambda score, same: ten_fold_accuracy(score, same, 2), lambda score, same: val_at_far(score, same, 0.5, 2),
    lambda score, same: tar_at_far(score, same, 0.1), lambda score, same: tar_at_far(score, same, 0.1, "nearest"),
    equal_error_rate, area_under_roc, roc,
])  # fmt: skip
def test_every_rate_refuses_what_cannot_be_measured(rule):
    for score, same, words in (
        (SCORE[:0], SAME[:0], "0 genuine and 0 impostor pairs; both kinds are needed"),
        (SCORE, SAME | True, "4 genuine and 0 impostor pairs"),
        (SCORE, SAME & False, "0 genuine and 4 impostor pairs"),
        (np.array([0.9, np.nan, 0.8, np.inf]), SAME, "2 of 4 scores are not finite, first nan of pair 1; give a pair"),
        (SCORE[:3], SAME, r"one score for each pair, got scores \(3,\) and pairs \(4,\)"),
        (SCORE[:, None], SAME[:, None], r"got scores \(4, 1\)"),
        (SCORE, np.array([1, -1, 1, -1]), "must be True or False, got -1; -1 often means False"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            rule(score, same)
        assert "\n" not in str(error.value)
    rule(SCORE.tolist(), [1, 0, 1, 0])


def test_what_cannot_be_scored_is_one_line():
    nan, mirrored = np.array([[1.0, 0, 0], [np.nan, 0, 0]]), r"embeddings \(2, 3\), the images \(3, 3\); both must be"
    ids = np.arange(3)
    for call, words in (
        (lambda: ten_fold_accuracy(SCORE, SAME), "4 pairs cannot be 10 folds of equal size"),
        (lambda: ten_fold_accuracy(SCORE, SAME, 1), "cannot be 1 folds"),
        (lambda: ten_fold_accuracy(SCORE * 3, SAME, 2), "scores must be cosines, got 2.7"),
        (lambda: val_at_far(SCORE, SAME, 0.1, 2), "0.1 cannot be measured on 2 impostor pairs; ask for 0.5 or more"),
        (lambda: val_at_far(SCORE, np.sort(SAME), 0.5, 2), "fold 0 has no genuine pair; order pairs"),
        (lambda: val_at_far(SCORE, [1, 1, 1, 0], 1, 2), "fold 0 has no impostor pair"),
        (lambda: val_at_far(SCORE, SAME, 2, 2), r"far must be a share in \[0, 1\], got 2"),
        (lambda: tar_at_far(SCORE, SAME, math.nan), "far must be a share in .*, got nan"),
        (lambda: tar_at_far(SCORE, SAME, -0.1), "far must be a share in .*, got -0.1"),
        (lambda: tar_at_far(SCORE, SAME, 0.1, "linear"), '"strict" or "nearest", got \'linear\''),
        (lambda: roc(SCORE, SAME, 3), "at least 4 points, got 3"),
        (lambda: mate_ranks(ROWS, ROWS[:0], ids, []), r"gallery as wide as the probes, got \(3, 3\) and \(0, 3\)"),
        (lambda: mate_ranks(ROWS[:, :2], ROWS, ids, ids), r"got \(3, 2\) and \(3, 3\)"),
        (lambda: mate_ranks(ROWS, ROWS, ids[:2], ids), r"probes: need one identity for each of 3 rows, got \(2,\)"),
        (lambda: mate_ranks(ROWS, ROWS, ids, ids[:2]), "gallery: need one identity"),
        (lambda: mate_ranks(ROWS, nan, ids, ids[:2]), "the gallery: row 1 is not finite"),
        (lambda: mate_ranks(nan, ROWS, ids[:2], ids), "probes: row 1 is not finite"),
        (lambda: mate_ranks(ROWS.astype(int), ROWS, ids, ids), "probes must be a matrix .* of floating numbers"),
        (lambda: tpir_at_fpir(ROWS, ROWS, ids, ids, 0.1), "3 probes with a mate in the gallery and 0 without"),
        (lambda: tpir_at_fpir(ROWS, ROWS, ids + 9, ids, 0.1), "0 probes with a mate in the gallery and 3 without"),
        (lambda: tpir_at_fpir(ROWS, ROWS, ids, ids, 1.5), "fpir must be a share in .*, got 1.5"),
        (lambda: tpir_at_fpir(ROWS, ROWS, ids, ids, 0.1, "nearest"), '"strict" or "released", got \'nearest\''),
        (lambda: flip_summed(ROWS, ROWS[:2]), mirrored),
        (lambda: flip_summed(nan, None), r"embeddings: row 1 is not finite \(norm nan\)"),
        (lambda: flip_summed(ROWS[0], None), r"embeddings must be a matrix .*, got \(3,\) of float64"),
        (lambda: flip_summed(ROWS > 0, None), r"of floating numbers, got \(3, 3\) of bool"),
        (lambda: pair_scores(ROWS, ids, ids[:2]), "as many first as second rows, got 3 and 2"),
        (lambda: pair_scores(ROWS, ids, ids + 1), "names row 3, there are 0 to 2; ids of templates are not"),
        (lambda: pair_scores(ROWS, ids - 1, ids), "names row -1"),
        (lambda: pair_scores(ROWS, ids / 1, ids), r"one column of integers, got \(3,\) of float64"),
        (lambda: pair_scores(ROWS, ids[None], ids), r"one column of integers, got \(1, 3\)"),
        (lambda: pair_scores(ROWS[:0], ONE, ONE), "there are 0 to -1"),
        (lambda: pair_scores(ROWS, ids, ids, chunk=0), "chunk must be at least 1 pair, got 0"),
        (lambda: pair_scores(nan, ONE, ONE), "row 1 is not finite"),
        (lambda: template_embeddings(ROWS, ROWS[:2], None, ids, ids), mirrored),
        (lambda: template_embeddings(ROWS, None, None, ids[:2], ids), "templates must be one for each of 3 images"),
        (lambda: template_embeddings(ROWS, None, None, ids, ids[:2]), "media must be one"),
        (lambda: template_embeddings(ROWS, None, SCORE, ids, ids), r"detector scores must be one .* got \(4,\)"),
        (lambda: template_embeddings(ROWS, None, [1, np.nan, 1], ids, ids), "detector score of image 1 is nan; give"),
        (lambda: template_embeddings(nan, None, None, np.array([4, 90]), ids[:2]), "templates: row 90 is not finite"),
        (lambda: template_embeddings(nan, None, None, ids[:2], ids[:2], keep_norm=False), "embeddings: row 1 is not"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value), error.value
