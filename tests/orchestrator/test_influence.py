"""What pairs add to a rate: against the rates themselves, plain loops, and what simulated data do."""

import math
import statistics

import numpy as np
import pytest

from orchestrator.evaluation import influence, uncertainty, verification
from orchestrator.method import PairScores


def compared(rng, people: int = 60, pairs: int = 1200, folds: int = 10, own: float = 0.35, better: float = 0.0):
    """Scores of two networks on the same pairs, in which people are easy or hard to know, and whose pairs they are."""
    same_P = np.arange(pairs) % 2 == 0
    people_P2 = np.stack([rng.integers(0, people, pairs), rng.integers(0, people, pairs)], axis=1)
    people_P2[same_P, 1] = people_P2[same_P, 0]
    clash_P = ~same_P & (people_P2[:, 0] == people_P2[:, 1])
    people_P2[clash_P, 1] = (people_P2[clash_P, 0] + 1) % people
    found = []
    for shift in (better, 0.0):
        ease_I = rng.normal(0, own, people)
        score_P = np.where(same_P, 1.5 + shift, 0.0) + ease_I[people_P2].sum(1) / 2 + rng.normal(0, 1, pairs)
        found.append(PairScores(np.tanh(score_P / 4), same_P, people_P2, folds))
    return found


RATES = ["accuracy", "eer", "auc", "tar_1e-1", "tar_1e-2"]


def test_values_are_those_of_the_metrics():
    pairs, _ = compared(np.random.default_rng(0))
    score_P, same_P = pairs.score_P, pairs.same_P
    expected = {
        "accuracy": verification.ten_fold_accuracy(score_P, same_P, 10).mean,
        "eer": verification.equal_error_rate(score_P, same_P),
        "auc": verification.area_under_roc(score_P, same_P),
        **{f"tar_1e-{k}": verification.tar_at_far(score_P, same_P, 10.0**-k).tar for k in (1, 2)},
    }
    assert influence.rates(pairs) == list(expected)
    for name, value in expected.items():
        assert influence.rate(pairs, name).value == pytest.approx(value, abs=1e-12)
    plain = PairScores(score_P, same_P, pairs.people_P2)
    assert influence.rate(plain, "accuracy").value == 1 - influence.rate(plain, "eer").value
    of_templates = PairScores(score_P, same_P, pairs.people_P2, templates=True)
    assert influence.rates(of_templates) == ["tar_1e-1", "tar_1e-2", "tar_strict_1e-1", "tar_strict_1e-2"]
    nearest = verification.tar_at_far(score_P, same_P, 1e-2, "nearest").tar
    assert influence.rate(of_templates, "tar_1e-2").value == nearest
    with pytest.raises(ValueError, match="no rate 'tar_1e-4'; there are accuracy, eer"):
        influence.rate(pairs, "tar_1e-4")


@pytest.mark.parametrize("name", RATES)
def test_influences_sum_to_nothing(name):
    pairs, _ = compared(np.random.default_rng(1))
    influence_P = influence.rate(pairs, name).influence_P
    assert abs(influence_P.sum()) < 1e-9 and np.isfinite(influence_P).all() and influence_P.any()


@pytest.mark.parametrize("name", RATES)
def test_the_error_is_that_of_data_drawn_again(name):
    """Of independent pairs: the spread over 300 data sets against what one data set says of itself."""
    values, errors = [], []
    for number in range(300):
        rng = np.random.default_rng(number)
        pairs, _ = compared(rng, own=0.0, pairs=2000)
        alone = np.arange(4000).reshape(-1, 2)
        alone[pairs.same_P, 1] = alone[pairs.same_P, 0]
        found = influence.rate(pairs, name)
        values.append(found.value)
        errors.append(math.sqrt(influence.variance(found.influence_P, alone)[0]))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


@pytest.mark.parametrize(("name", "far"), [("tar_1e-1", 1e-1), ("tar_1e-2", 1e-2), ("eer", None)])
def test_the_error_is_that_of_two_normal_distributions(name, far):
    """Closed form, of few impostors, whose threshold moves a rate by the slope of the ROC curve. Ten draws, their mean.

    Genuine scores are N(2, 1), impostors' N(0, 1): at a threshold z the slope is φ(z − 2) / φ(z), 1 where errors are
    equal, at z = 1. EER moves by what both errors move, weighted so that the threshold's own error cancels.
    """
    normal, genuine, impostors, errors = statistics.NormalDist(), 200_000, 40_000, []
    threshold = 1.0 if far is None else normal.inv_cdf(1 - far)
    accepted, wrongly = 1 - normal.cdf(threshold - 2), 1 - normal.cdf(threshold)
    slope = normal.pdf(threshold - 2) / normal.pdf(threshold)
    variance = accepted * (1 - accepted) / genuine + slope**2 * wrongly * (1 - wrongly) / impostors
    expected = math.sqrt(variance) / (1 + slope if far is None else 1)
    same_P, alone = np.arange(genuine + impostors) < genuine, np.arange(2 * (genuine + impostors)).reshape(-1, 2)
    for number in range(10):
        drawn_P = np.random.default_rng(number).normal(size=len(same_P))
        found = influence.rate(PairScores(np.tanh((2 * same_P + drawn_P) / 6), same_P, alone), name)
        errors.append(math.sqrt(influence.variance(found.influence_P, alone)[0]))
        accepted = found.influence_P[genuine + drawn_P[genuine:].argmax()]
        assert accepted > 0 if far is None else accepted < 0  # an impostor who is let in lifts errors, lowers TAR
    assert np.mean(errors) == pytest.approx(expected, rel=0.05)


def test_pairs_that_share_a_person_are_a_plain_double_loop():
    rng = np.random.default_rng(2)
    people_P2 = np.array([[0, 0], [0, 1], [1, 2], [2, 2], [3, 0], [4, 5], [1, 0], [2, 1], [0, 1], [2, 2]])
    influence_P = rng.normal(size=10)
    shared = sum(
        influence_P[p] * influence_P[q]
        for p in range(10)
        for q in range(10)
        if set(people_P2[p]) & set(people_P2[q])
    )  # fmt: skip
    expected = max(shared, (influence_P**2).sum()) * 6 / 5
    assert influence.variance(influence_P, people_P2) == (pytest.approx(expected), 6)
    assert influence.variance(influence_P, 7 + 10 * people_P2)[0] == pytest.approx(expected)  # names mean nothing


@pytest.mark.parametrize("name", ["accuracy", "tar_1e-1"])
def test_95_of_100_intervals_hold_the_true_difference(name):
    """Over 200 simulations of two networks that are equally good; people are easy or hard for each of them."""
    held = 0
    for number in range(200):
        first, second = compared(np.random.default_rng(number))
        rates = [influence.rate(pairs, name) for pairs in (first, second)]
        found = uncertainty.difference_of_rates(*rates, first.people_P2, draw=number)
        held += found.low <= 0.0 <= found.high
        assert found.identities == 60 and not found.over_seeds
    assert 0.91 <= held / 200 <= 0.985


def test_a_large_difference_is_told_apart_and_a_seed_widens_it():
    first, second = compared(np.random.default_rng(0), better=1.0)
    rates = [influence.rate(pairs, "auc") for pairs in (first, second)]
    found = uncertainty.difference_of_rates(*rates, first.people_P2)
    wider = uncertainty.difference_of_rates(*rates, first.people_P2, uncertainty.Seeds(0.01, 2))
    assert found.told_apart and found.value > 0 and wider.high - wider.low > found.high - found.low
    none = uncertainty.difference_of_rates(rates[0], rates[0], first.people_P2)
    assert (none.value, none.low, none.high) == (0, -math.inf, math.inf)


@pytest.mark.parametrize(("differ", "least"), [(4, 2 / 16), (5, 2 / 32), (6, 2 / 64)])
def test_few_pairs_that_differ_are_a_test_by_signs(differ, least):
    """McNemar's test: of two ten-fold accuracies that differ in few pairs, all of them for one side."""
    same_P, alone = np.arange(2000) % 2 == 0, np.arange(4000).reshape(-1, 2)
    better = PairScores(np.where(same_P, 0.9, 0.1), same_P, alone, 10)
    worse = PairScores(better.score_P.copy(), same_P, alone, 10)
    worse.score_P[np.flatnonzero(same_P)[:differ]] = 0.1
    rates = [influence.rate(pairs, "accuracy") for pairs in (better, worse)]
    assert rates[0].share_P.sum() == pytest.approx(rates[0].value)
    found = uncertainty.difference_of_rates(*rates, alone)
    assert found.value == pytest.approx(differ / 2000) and found.p == pytest.approx(least)
    assert found.told_apart == (least <= 0.05) == (found.low > 0)
    # The mean over this set and an equal one says no more.
    both = [influence.mean_over_sets([one, rates[0]]) for one in rates]
    twice = uncertainty.difference_of_rates(*both, np.concatenate([alone, alone + 4000]))
    assert twice.value == pytest.approx(differ / 4000) and twice.p == pytest.approx(least)


def test_few_pairs_that_differ_without_a_reason_are_rarely_told_apart():
    """Of 2,000 pairs of different people a few are right by one network alone, by either as often."""
    told, alone, influences = 0, np.arange(4000).reshape(-1, 2), []
    for number in range(1000):
        rng = np.random.default_rng(number)
        right_2P = np.ones((2, 2000))
        right_2P[rng.integers(0, 2, differ := rng.integers(3, 9)), rng.integers(0, 2000, differ)] = 0
        influences = [influence.Rate(r.mean(), (r - r.mean()) / 2000, r / 2000) for r in right_2P]
        told += uncertainty.difference_of_rates(*influences, alone, draw=number).told_apart
    assert told / 1000 <= 0.05


def test_bad_pairs_are_refused():
    rate = influence.Rate(0.5, np.zeros(3))
    with pytest.raises(ValueError, match="pairs differ in number: 3, 3 and people 2"):
        uncertainty.difference_of_rates(rate, rate, np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="of 1 person"):
        uncertainty.difference_of_rates(rate, rate, np.zeros((3, 2), int))


def test_people_are_whom_genuine_pairs_join():
    rows_P2 = np.array([[0, 1], [1, 2], [3, 4], [0, 3], [5, 6]])
    same_P = np.array([True, True, True, False, False])
    found = influence.people_of(rows_P2, same_P)
    assert len({*found[0], *found[1]}) == 1 and found[2, 0] == found[2, 1] == found[3, 1]
    assert len(np.unique(found)) == 4 and (found[same_P, 0] == found[same_P, 1]).all()
    assert (found[~same_P, 0] != found[~same_P, 1]).all()
