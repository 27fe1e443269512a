"""Intervals, tests and power: against loops, closed forms, and what happens to them in a thousand simulations."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from orchestrator.evaluation import uncertainty
from orchestrator.evaluation.uncertainty import Seeds, difference, holm, of_seeds, pooled


def people(rng, identities: int, apart: float, spread: float = 1.0):
    """Differences of queries of people who have something in common, and whose they are."""
    identity_Q = np.repeat(np.arange(identities), rng.integers(1, 7, identities))
    own_I = rng.normal(0, spread, identities)
    return apart + own_I[identity_Q] + rng.normal(0, 1, len(identity_Q)), identity_Q


def test_every_resample_equals_a_plain_loop():
    rng = np.random.default_rng(3)
    value_Q, identity_Q = people(rng, 7, 0.3)
    of = {i: value_Q[identity_Q == i] for i in range(7)}
    total, count = value_Q.sum(), len(value_Q)
    mean = total / count
    sums, counts = np.array([v.sum() for v in of.values()]), np.array([len(v) for v in of.values()], float)
    ours = uncertainty._studentised(sums, counts, mean, 50, np.random.default_rng(8))
    drawn_RI = np.random.default_rng(8).integers(0, 7, (50, 7), dtype=np.int32)
    for drawn_I, t in zip(drawn_RI, ours, strict=True):
        s, n = [of[i].sum() for i in drawn_I], [len(of[i]) for i in drawn_I]
        m = sum(s) / sum(n)
        variance = 7 / 6 * sum((a - m * b) ** 2 for a, b in zip(s, n, strict=True)) / sum(n) ** 2
        assert t == pytest.approx((m - mean) / math.sqrt(variance), rel=1e-9)


def test_independent_queries_have_the_error_of_a_mean():
    rng = np.random.default_rng(0)
    first_Q, second_Q = rng.normal(2, 1, 400), rng.normal(0, 1, 400)
    found = difference(first_Q, second_Q, np.arange(400))
    apart_Q = first_Q - second_Q
    assert found.value == pytest.approx(apart_Q.mean()) and found.identities == 400
    assert found.error == pytest.approx(apart_Q.std(ddof=1) / 20, rel=1e-12)
    assert (found.high - found.low) / found.error == pytest.approx(2 * 1.966, rel=0.03)  # Student's, 399 degrees
    assert found.detectable / found.error == pytest.approx(1.966 + 0.842, rel=0.04)


def test_whole_identities_are_drawn():
    """Ten equal queries of a person say as much as one."""
    rng = np.random.default_rng(0)
    value_I = rng.normal(0.2, 1, 50)
    once = difference(value_I, np.zeros(50), np.arange(50))
    often = difference(np.repeat(value_I, 10), np.zeros(500), np.repeat(np.arange(50), 10))
    assert often.error == pytest.approx(once.error) and (often.low, often.high) == pytest.approx((once.low, once.high))


@pytest.mark.parametrize("seeds", [0, 3])
def test_95_of_100_intervals_hold_the_true_difference(seeds):
    """Over 1,000 simulations, with the error of the seeds and without; and power is what is said."""
    held, told, seen = 0, 0, 0
    for number in range(1000):
        rng = np.random.default_rng(number)
        value_Q, identity_Q = people(rng, 40, 0.3)
        own = None
        if seeds:
            shift_2S = rng.normal(0, 0.3, (2, seeds))
            value_Q = value_Q + shift_2S[0].mean() - shift_2S[1].mean()
            own = of_seeds(*shift_2S, shift_2S)
        found = difference(value_Q, np.zeros_like(value_Q), identity_Q, own, resamples=999, draw=number)
        held += found.low <= 0.3 <= found.high
        assert found.told_apart == (not found.low <= 0.0 <= found.high) or abs(found.p - 0.05) < 0.01
        told += found.detectable
        seen += found.told_apart
    assert 0.935 <= held / 1000 <= (0.965 if not seeds else 0.99)  # Behrens and Fisher's are wide where seeds are few
    assert told / 1000 > 0.3 and seen / 1000 < 0.8, "0.3 is below what could be seen"


def test_what_could_be_seen_is_seen_in_80_of_100():
    usual = np.mean([
        difference(*_against_zero(np.random.default_rng(n), 0.0), resamples=999).detectable for n in range(100)
    ])  # fmt: skip
    seen = [difference(*_against_zero(np.random.default_rng(n), usual), resamples=999).told_apart for n in range(600)]
    assert 0.75 <= np.mean(seen) <= 0.86


@pytest.mark.parametrize("comparisons", [1, 11])
@pytest.mark.parametrize(
    ("identities", "each_way"), [(320, 0.01), (320, 0.03), pytest.param(2000, 0.005, marks=pytest.mark.slow)]
)
def test_what_could_be_seen_of_rank_1_is_seen_in_80_of_100(identities, each_way, comparisons):
    """A true difference makes more people differ, who are counted one by one."""

    def found(number, apart):
        drawn_Q = np.random.default_rng(number).random(identities)
        side_Q = np.where(drawn_Q < each_way + apart, 1.0, np.where(drawn_Q > 1 - each_way, -1.0, 0.0))
        return difference(side_Q, np.zeros_like(side_Q), np.arange(identities), None, 999, number, comparisons)

    usual = np.median([found(number, 0.0).detectable for number in range(60)])
    seen = [found(number, usual).p * comparisons <= 0.05 for number in range(1000, 1200)]
    assert 0.72 <= np.mean(seen) <= 0.95, (usual, np.mean(seen))


def test_what_could_be_seen_is_that_of_the_worse_side():
    value_Q, zero_Q = np.random.default_rng(0).exponential(1, 40) - 1, np.zeros(40)
    one, other = (difference(side_Q, zero_Q, np.arange(40)) for side_Q in (value_Q, -value_Q))
    assert one.detectable == pytest.approx(other.detectable, rel=0.05) and one.detectable > 2.9 * one.error


@pytest.mark.parametrize(("identities", "comparisons"), [(5, 1), (8, 11)])
def test_of_identities_too_few_for_any_sign_nothing_could_be_seen(identities, comparisons):
    value_Q = np.random.default_rng(0).normal(0, 1, identities)
    found = difference(value_Q, np.zeros(identities), np.arange(identities), comparisons=comparisons)
    assert found.detectable == math.inf


@pytest.mark.parametrize(("spreads", "pair"), [((1,) * 12, (0, 11)), ((1,) * 11 + (5,), (0, 11)), ((1, 1, 5), (0, 1))])
def test_95_of_100_intervals_over_seeds_hold_however_rows_vary(spreads, pair):
    """Three seeds of rows that seeds move alike, and of rows that they do not."""
    held = 0
    for number in range(1000):
        rng = np.random.default_rng(number)
        rows_KS = rng.normal(0, 1, (len(spreads), 3)) * np.array(spreads)[:, None]
        seeds = of_seeds(*rows_KS[list(pair)], rows_KS)
        apart = rows_KS[pair[0]].mean() - rows_KS[pair[1]].mean()
        held += abs(apart) <= stats.t.ppf(0.975, seeds.freedom) * math.sqrt(seeds.variance)
    assert 0.935 <= held / 1000 <= 0.975


@pytest.mark.parametrize(
    ("spreads", "least", "most"),
    [((1,) * 11 + (5,), 0.83, 0.9), ((1,) * 11 + (3,), 0.84, 0.91), ((1,) * 12, 0.935, 0.975)],
)
def test_two_seeds_of_a_restless_row_are_not_believed_to_be_twelve(spreads, least, most):
    held, seen = 0, 0
    level = 0.05 / 66  # of the pairs of twelve rows
    apart = 8 * math.sqrt((1 + spreads[-1] ** 2) / 2)
    for number in range(1000):
        rows_KS = np.random.default_rng(number).normal(0, 1, (12, 2)) * np.array(spreads)[:, None]
        seeds = of_seeds(rows_KS[0], rows_KS[-1], rows_KS)
        found = (rows_KS[0].mean() - rows_KS[-1].mean()) / seeds.variance**0.5
        held += abs(found) <= stats.t.ppf(0.975, seeds.freedom)
        seen += abs(found + apart / seeds.variance**0.5) > stats.t.isf(level / 2, seeds.freedom)
    assert least <= held / 1000 <= most
    if len(set(spreads)) == 1:
        assert seen / 1000 > 0.75, "of a difference of eight deviations"


@pytest.mark.parametrize(("spreads", "comparisons"), [((1.0, 1.0), 2), ((0.3, 1.0), 1)])
def test_what_three_seeds_could_show_is_seen_in_80_of_100(spreads, comparisons):
    """Where seeds move more than queries do: at the median of what tables say."""

    def found(number, apart):
        rng = np.random.default_rng(number)
        seeds_2S = rng.normal(0, 1, (2, 3)) * np.array(spreads)[:, None]
        value_I = rng.normal(0, 0.5, 60) + apart + seeds_2S[0].mean() - seeds_2S[1].mean()
        own = of_seeds(*seeds_2S, seeds_2S)
        return difference(value_I, np.zeros(60), np.arange(60), own, 999, number, comparisons)

    usual = np.median([found(number, 0.0).detectable for number in range(400)])
    seen = [found(number, usual).p * comparisons <= 0.05 for number in range(10_000, 10_400)]
    assert 0.75 <= np.mean(seen) <= 0.86


def _against_zero(rng, apart):
    value_Q, identity_Q = people(rng, 60, apart)
    return value_Q, np.zeros_like(value_Q), identity_Q


def test_nothing_between_equal_sides():
    found = difference(np.full(6, 0.5), np.full(6, 0.5), np.array([0, 0, 1, 1, 2, 3]))
    assert (found.value, found.low, found.high, found.p) == (0, -math.inf, math.inf, 1) and not found.told_apart
    assert found.detectable == math.inf, "of sides that are equal nothing is known"


def test_a_constant_difference_is_certain():
    found = difference(np.full(6, 0.75), np.full(6, 0.5), np.arange(6))
    assert found.low == found.high == found.value == 0.25 and found.told_apart


@pytest.mark.parametrize("wrong", [3, 7])
def test_equal_sides_whose_means_are_rounded_are_not_known_to_be_equal(wrong):
    """0.95 three times over has a variance of 1e-32."""
    side_Q = (np.arange(60) >= wrong).astype(float)
    seeds_S = [float(side_Q.mean())] * 3
    found = difference(side_Q, side_Q, np.arange(60), of_seeds(seeds_S, seeds_S, [seeds_S, seeds_S]))
    assert (found.low, found.high, found.detectable) == (-np.inf, np.inf, np.inf)


@pytest.mark.parametrize("queries", [60, 500])
def test_a_constant_difference_is_certain_however_it_is_rounded(queries):
    side_Q = np.random.default_rng(0).uniform(size=queries)
    for first_Q, second_Q in [(side_Q, side_Q - 0.1), (np.full(queries, 0.3), np.full(queries, 0.2))]:
        found = difference(first_Q, second_Q, np.arange(queries))
        assert (found.low, found.high) == pytest.approx((0.1, 0.1)) and found.error == 0 and found.detectable == np.inf


@pytest.mark.parametrize("rows", [19, 24, 40])
def test_tables_of_many_rows_can_tell_rows_apart(rows):
    """10,000 resamples have no p-value below 2e-4, which is too much 253 times over."""
    value_Q = np.random.default_rng(0).normal(0.5, 1.0, 300)
    comparisons = rows * (rows - 1) // 2
    found = difference(value_Q, np.zeros(300), np.arange(300), Seeds(0.001, 40), comparisons=comparisons)
    assert holm([found.p], comparisons)[0] <= 0.01 and 0.2 < found.detectable < 0.5


def test_of_three_identities_nothing_is_known():
    """One of nine resamples draws a single one of them, which has no spread."""
    found = difference(np.array([1.0, 0.8, 0.9, 0.7]), np.full(4, 0.5), np.array([3, 3, 8, 9]))
    assert (found.low, found.high) == (-math.inf, math.inf) and found.detectable == math.inf and not found.told_apart


def test_queries_that_are_not_counted():
    first_Q, second_Q = np.array([1, np.nan, 0.5, 0.2]), np.array([0.5, np.nan, 0.1, 0.2])
    left = difference(first_Q, second_Q, np.array([0, 1, 2, 3]))
    assert left == difference(first_Q[[0, 2, 3]], second_Q[[0, 2, 3]], np.array([0, 2, 3]))
    with pytest.raises(ValueError, match="1 queries are counted on one side alone"):
        difference(first_Q, np.ones(4), np.arange(4))


def test_what_cannot_be_compared_is_one_line():
    with pytest.raises(ValueError, match="an interval needs two at least"):
        difference(np.ones(3), np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="one number per query"):
        difference(np.ones(3), np.zeros(4), np.zeros(3))
    with pytest.raises(ValueError, match="infinite score"):
        difference(np.array([np.inf, 1.0]), np.zeros(2), np.arange(2))


def test_seeds():
    assert pooled([[1.0], [2.0]]) == (0.0, 0)
    rows = [[1.0, 3.0, 5.0], [0.0, 1.0]]
    assert pooled(rows) == (pytest.approx((8 + 0.5) / 3), 3)
    assert of_seeds([1.0], [2.0], [[1.0], [2.0]]) is None
    assert of_seeds(rows[0], rows[1], rows) == Seeds(pytest.approx(8.5 / 3 / 3 + 8.5 / 3 / 2), 3), "an F of 8"
    restless = of_seeds([0.0, 0.1], [0.0, 9.0], [[0.0, 0.1], [0.0, 9.0], [0.0, 0.2, 0.1], [0.5, 0.4, 0.6]])
    of_all, own = (0.005 + 40.5 + 0.02 + 0.02) / 6 / 2, 40.5 / 2
    assert restless == Seeds(pytest.approx(of_all + own), pytest.approx((of_all + own) ** 2 / (of_all**2 / 6 + own**2)))
    assert of_seeds([1.0], [0.0, 1.0], [*rows, [1.0]]) == Seeds(pytest.approx(8.5 / 3 * 1.5), 3)
    welch = stats.ttest_ind([1.0, 3.0, 5.0], [0.0, 1.0, 1.5, 9.0], equal_var=False)
    found = of_seeds([1.0, 3.0, 5.0], [0.0, 1.0, 1.5, 9.0], rows)
    assert found.freedom == pytest.approx(welch.df)
    assert math.sqrt(found.variance) == pytest.approx((3.0 - 2.875) / welch.statistic)


def test_two_seeds_say_little():
    """One degree of freedom: 12.7 standard errors."""
    rng = np.random.default_rng(0)
    value_Q = rng.normal(0, 1e-6, 400)
    found = difference(value_Q, np.zeros(400), np.arange(400), Seeds(0.01, 1), resamples=100_000)
    assert found.over_seeds and (found.high - found.low) / 2 == pytest.approx(1.27, rel=0.05)


def test_holm_by_hand():
    assert holm([]) == [] and holm([0.2]) == [0.2]
    assert holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02, 0.02]) == [0.04, 0.04]
    assert holm([0.01, 0.02], comparisons=6) == pytest.approx([0.06, 0.1])


@pytest.mark.parametrize(("better", "worse"), [(2, 0), (3, 0), (5, 0), (6, 0), (9, 1), (12, 3)])
def test_few_identities_that_differ_are_told_apart_as_mcnemar_does(better, worse):
    """Rank-1 accuracy of 500 people, one query each: the exact test is that of a fair coin."""
    first_Q, second_Q = np.ones(500), np.ones(500)
    second_Q[:better], first_Q[better : better + worse] = 0.0, 0.0
    exact = stats.binomtest(better, better + worse, 0.5).pvalue
    found = difference(first_Q, second_Q, np.arange(500))
    assert found.p >= exact * 0.9 and found.told_apart == (exact <= 0.05)
    assert found.told_apart == (not found.low <= 0.0 <= found.high)


@pytest.mark.parametrize("expected", [2, 6, 20])
def test_rank_1_of_equal_sides_is_told_apart_in_5_of_100_at_most(expected):
    """Each person has one query, and so many of 300 differ by chance, to either side."""
    told = 0
    for number in range(400):
        rng = np.random.default_rng(number)
        side_Q = np.where(rng.random(300) < expected / 300, rng.choice([-1.0, 1.0], 300), 0.0)
        told += difference(side_Q, np.zeros(300), np.arange(300), resamples=999, draw=number).told_apart
    assert told / 400 <= 0.065


def test_signs_by_a_plain_loop():
    sum_K = np.array([0.5, -0.25, 1.0, 0.75])
    signs = itertools.product((-1, 1), repeat=4)
    loop = np.mean([abs(sum(s * x for s, x in zip(one, sum_K, strict=True))) >= sum_K.sum() for one in signs])
    assert uncertainty._p_by_signs(sum_K, np.random.default_rng(0)) == loop
    many_K = np.random.default_rng(1).normal(0.2, 1, 60)
    z = many_K.sum() / np.sqrt((many_K**2).sum())
    drawn = uncertainty._p_by_signs(many_K, np.random.default_rng(0))
    assert drawn == pytest.approx(2 * stats.norm.sf(z), abs=0.02)


def test_what_could_be_seen_allows_for_the_table():
    """A difference that stands alone in a table of twelve must be larger."""
    rng = np.random.default_rng(0)
    value_Q, zero_Q = rng.normal(0, 1, 400), np.zeros(400)
    alone, among = (difference(value_Q, zero_Q, np.arange(400), comparisons=n) for n in (1, 12))
    expected = (stats.norm.isf(0.025 / 12) + stats.norm.isf(0.2)) / (stats.norm.isf(0.025) + stats.norm.isf(0.2))
    assert among.detectable / alone.detectable == pytest.approx(expected, rel=0.05)
    assert (among.low, among.high) == (alone.low, alone.high)
