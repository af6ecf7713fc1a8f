"""Intervals and tests: against scipy and statsmodels, naive loops, and simulated coverage."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from depthmix.statistics import resampling
from depthmix.statistics.intervals import (
    bootstrap_p_value,
    holm,
    mcnemar_p_value,
    mean_interval,
    paired_difference,
    wilson_interval,
)
from depthmix.statistics.resampling import average_seeds, resample_items, resample_seeds


def covers(interval, value):
    return interval.low <= value <= interval.high


@pytest.mark.parametrize(("num_correct", "num_items"), [(0, 5), (1, 1), (3, 10), (524, 800)])
def test_wilson_equals_statsmodels(num_correct, num_items):
    interval = wilson_interval(num_correct, num_items)
    expected = proportion_confint(num_correct, num_items, method="wilson")
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)
    answers = np.arange(num_items) < num_correct
    assert mean_interval(answers) == interval


@pytest.mark.parametrize(
    ("both", "gains", "losses", "neither"),
    [(10, 6, 0, 0), (100, 20, 9, 60), (0, 1, 1, 0), (3, 2, 11, 5), (0, 300, 250, 0)],
)
def test_mcnemar_equals_statsmodels(both, gains, losses, neither):
    before = [1] * both + [0] * gains + [1] * losses + [0] * neither
    after = [1] * both + [1] * gains + [0] * losses + [0] * neither
    expected = mcnemar([[both, losses], [gains, neither]], exact=True).pvalue
    assert mcnemar_p_value(before, after) == pytest.approx(expected, rel=1e-9)
    difference = paired_difference(before, after)
    assert difference.p_value == pytest.approx(expected, rel=1e-9)
    assert difference.test == "mcnemar"
    assert difference.estimate == pytest.approx((gains - losses) / len(before))


def test_mcnemar_without_discordant_items_says_nothing():
    assert mcnemar_p_value([1, 0, 1], [1, 0, 1]) == 1


@pytest.mark.parametrize("num_tests", [1, 12])
def test_holm_equals_statsmodels(num_tests):
    p_values = np.random.default_rng(num_tests).random(num_tests).round(1) / 5  # some are tied
    expected = multipletests(p_values, method="holm")[1]
    assert holm(p_values.tolist()) == pytest.approx(tuple(expected), abs=1e-12)


def test_holm_of_a_known_case_and_of_nothing():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([]) == ()


def test_resampled_items_are_distributed_as_those_of_a_naive_loop():
    rng = np.random.default_rng(0)
    scores = np.stack([rng.random(30) < 0.4, rng.random(30) < 0.6, rng.random(30)]).astype(float)
    means = resample_items(scores, np.random.default_rng(1))
    naive = np.array([scores[:, rng.integers(30, size=30)].mean(axis=1) for _ in range(9999)])
    assert means.shape == naive.shape
    assert means.mean(axis=0) == pytest.approx(scores.mean(axis=1), abs=0.005)
    assert np.cov(means.T) == pytest.approx(np.cov(naive.T), rel=0.1, abs=3e-4)
    for ours, theirs in zip(means.T, naive.T, strict=True):
        ends = [0.025, 0.5, 0.975]
        assert np.quantile(ours, ends) == pytest.approx(np.quantile(theirs, ends), abs=0.034)
    # The same items in every row: a copy of a row moves as the row does.
    twice = resample_items(np.stack([scores[2], scores[2]]), rng)
    assert np.array_equal(twice[:, 0], twice[:, 1])


def test_resampled_means_of_real_scores_agree_with_scipys_bootstrap():
    scores = np.random.default_rng(2).beta(2, 5, size=150)
    ours = mean_interval(scores)
    theirs = stats.bootstrap((scores,), np.mean, method="percentile", rng=0).confidence_interval
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.003)
    assert ours == mean_interval(scores)
    assert ours != mean_interval(scores, seed=1)


def test_blocks_do_not_change_what_is_drawn(monkeypatch):
    scores = np.random.default_rng(3).random((2, 40))
    whole = resample_items(scores, np.random.default_rng(4))
    monkeypatch.setattr(resampling, "DRAWS_PER_BLOCK", 999)
    assert np.allclose(resample_items(scores, np.random.default_rng(4)), whole)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_resampled_seeds_vary_as_much_as_a_mean_over_seeds(num_seeds):
    weights = resample_seeds(num_seeds, np.random.default_rng(0))
    assert weights.sum(axis=1) == pytest.approx(np.ones(len(weights)))
    values = np.random.default_rng(1).random(num_seeds)
    expected = values.var(ddof=1) / num_seeds
    assert (weights @ values).var() == pytest.approx(expected, rel=0.05)


def test_a_single_seed_keeps_its_weight():
    assert (resample_seeds(1, np.random.default_rng(0)) == 1).all()


def test_several_seeds_equal_a_naive_loop_over_resamples():
    rng = np.random.default_rng(5)
    before, after = (rng.random((3, 60)) < 0.4) * 1.0, (rng.random((2, 60)) < 0.6) * 1.0
    naive = []
    for _ in range(9999):
        items = rng.integers(60, size=60)
        first = before[rng.integers(3, size=2)][:, items].mean()
        second = after[rng.integers(2, size=1)][:, items].mean()
        naive.append(second - first)
    difference = paired_difference(before, after)
    assert difference.test == "bootstrap"
    assert difference.estimate == pytest.approx(after.mean() - before.mean())
    ends = (difference.interval.low, difference.interval.high)
    assert ends == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.012)
    smaller = min(np.mean(np.array(naive) <= 1e-12), np.mean(np.array(naive) >= -1e-12))
    assert difference.p_value == pytest.approx(2 * smaller, abs=0.01)


def test_paired_difference_is_narrower_than_unpaired_and_reproducible():
    rng = np.random.default_rng(0)
    before = rng.random(200) < 0.5
    after = before | (rng.random(200) < 0.2)
    difference = paired_difference(before, after)
    assert difference.estimate == pytest.approx(after.mean() - before.mean())
    assert 0 < difference.interval.low < difference.estimate < difference.interval.high
    spread = (after.astype(float) - before).std() / math.sqrt(200)
    width = difference.interval.high - difference.interval.low
    assert width == pytest.approx(2 * 1.96 * spread, rel=0.1)
    unpaired = math.sqrt(before.var() + after.var()) / math.sqrt(200)
    assert width < 0.8 * 2 * 1.96 * unpaired
    assert difference == paired_difference(before, after)


@pytest.mark.parametrize("scores", [[0.5], [0.3] * 8, [[0.3] * 8] * 3])
def test_alike_scores_promise_no_certainty(scores):
    interval = mean_interval(scores)
    assert 0 <= interval.low < np.mean(scores) < interval.high <= 1
    num_items = np.shape(scores)[-1]
    rest = 1 - wilson_interval(num_items, num_items).low
    assert interval.high - interval.low == pytest.approx(rest)


@pytest.mark.parametrize("estimate", [-1, 0, 1])
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_alike_changes_promise_no_certainty(estimate, num_seeds):
    before, after = [[estimate < 0] * 8] * num_seeds, [[estimate > 0] * 8] * num_seeds
    difference = paired_difference(before, after)
    assert difference.estimate == estimate
    assert -1 <= difference.interval.low <= estimate <= difference.interval.high <= 1
    assert difference.interval.high - difference.interval.low > 0.5
    assert difference.p_value == (1.0 if estimate == 0 else 2 / 2**8)


def test_one_item_proves_nothing():
    difference = paired_difference([0.2], [0.9])
    assert difference.p_value == 1
    assert covers(difference.interval, 0)
    assert paired_difference([0], [1]).p_value == 1


def test_the_bootstraps_p_value_has_a_floor():
    assert bootstrap_p_value(np.full(9999, 0.1), num_items=100) == 2 / 10_000
    assert bootstrap_p_value(np.full(9999, 0.1), num_items=3) == 1 / 4
    assert bootstrap_p_value(np.zeros(9999), num_items=100) == 1


def simulate(*, num_seeds, seed_spread, repetitions=150, num_items=120, gain=0.0):
    """Give the shares of intervals that cover the true difference, and of p-values below 0.05."""
    rng = np.random.default_rng(0)
    covered = rejected = 0
    for _ in range(repetitions):
        difficulty = rng.normal(0, 1, num_items)
        tables = []
        for method in range(2):
            own = difficulty + rng.normal(0, 0.5, num_items) + gain * method
            seeds = rng.normal(0, seed_spread, (num_seeds, 1))
            noise = rng.normal(0, 0.3, (num_seeds, num_items))
            tables.append((own + seeds + noise > 0).astype(float))
        difference = paired_difference(*tables)
        total = math.sqrt(1 + 0.5**2 + 0.3**2 + seed_spread**2)
        covered += covers(difference.interval, stats.norm.cdf(gain / total) - 0.5)
        rejected += difference.p_value < 0.05
    return covered / repetitions, rejected / repetitions


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(resampling, "NUM_RESAMPLES", 499)


@pytest.mark.parametrize(
    ("num_seeds", "seed_spread", "gain", "least", "most"),
    [
        (1, 0.0, 0.0, 0.92, 0.99),
        (1, 0.0, 0.3, 0.92, 0.99),
        # Seeds differ by chance alone: crossed resampling is a little too careful.
        (3, 0.0, 0.0, 0.93, 0.99),
        (3, 0.1, 0.3, 0.92, 0.99),
        # Seeds differ more than the items can blur: three of them cannot tell by how much.
        (3, 0.3, 0.0, 0.86, 0.95),
    ],
)
def test_coverage(few_resamples, num_seeds, seed_spread, gain, least, most):
    covered, rejected = simulate(num_seeds=num_seeds, seed_spread=seed_spread, gain=gain)
    assert least <= covered <= most
    if gain == 0:
        assert rejected <= 1 - covered + 0.02
    else:
        assert rejected > 0.4


def test_items_alone_are_too_sure_where_seeds_differ(few_resamples):
    """Without resampling seeds, most intervals would miss: what the hierarchy is for."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(40):
        tables = [
            (rng.normal(0, 1, 400) + rng.normal(0, 0.4, (3, 1)) > 0).astype(float)
            for _method in range(2)
        ]
        pooled = [table.mean(axis=0) for table in tables]
        naive = paired_difference(*pooled)
        ours = paired_difference(*tables)
        missed += not covers(naive.interval, 0)
        assert ours.interval.high - ours.interval.low > naive.interval.high - naive.interval.low
    assert missed > 12


def test_coverage_of_a_mean_of_real_scores(few_resamples):
    rng = np.random.default_rng(0)
    covered = np.mean([covers(mean_interval(rng.beta(2, 5, 60)), 2 / 7) for _ in range(150)])
    assert 0.91 <= covered <= 0.98


def test_means_of_seeds_are_weighted():
    means, weights = np.array([[0.2, 0.4], [0.2, 0.4]]), np.array([[1.0, 0.0], [0.5, 0.5]])
    assert average_seeds(means, weights) == pytest.approx([0.2, 0.3])


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1, 0], [1], "`after` must judge the same 2 items"),
        ([], [], "`before` must hold the scores of at least one item"),
        ([1, 0], [1, 7.5], r"`after` must be scores from 0 to 1, got 1 to 7.5"),
        ([1, math.nan], [1, 0], "`before` must be scores from 0 to 1"),
        ([[[1]]], [1], r"got an array of shape \(1, 1, 1\)"),
    ],
)
def test_scores_that_cannot_be_compared(before, after, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(before, after)
