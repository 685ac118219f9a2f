from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given
from hypothesis import strategies as st

from cl_bench.report.statistics import (
    BOOTSTRAP_BLOCKS,
    PERMUTATION_BLOCKS,
    bootstrap_interval,
    holm,
    permutation_p,
    statistic,
)

EXACT = 1e-12
PERCENT = (0.0, 100.0)


def _drawn(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.random.default_rng(1).normal(1.0, 2.0, shape)


def test_mean_deviation_and_interval_are_those_of_scipy() -> None:
    values = _drawn(7)
    ours = statistic([*values, math.nan])
    theirs = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert ours.n == 7
    assert ours.std == pytest.approx(float(scipy.stats.tstd(values)), rel=0, abs=EXACT)
    assert (ours.interval.low, ours.interval.high) == pytest.approx(
        (theirs.low, theirs.high), rel=0, abs=EXACT
    )


def test_three_values_have_an_interval_and_two_have_none() -> None:
    assert statistic([1.0, 2.0, 4.0]).interval.exists
    assert not statistic([1.0, 2.0], PERCENT).interval.exists
    assert math.isnan(statistic([1.0]).std)


def test_an_interval_of_percentages_is_student_s_on_the_log_odds() -> None:
    # Values so close that the log odds are a straight line between them: their own t interval is ours.
    values = 97.0 + 1e-3 * _drawn(6)
    odds = np.log(values / (100 - values))
    theirs = scipy.stats.ttest_1samp(odds, 0.0).confidence_interval(0.95)
    ours = statistic(values, PERCENT).interval
    expected = [100 / (1 + math.exp(-end)) for end in (theirs.low, theirs.high)]
    assert (ours.low, ours.high) == pytest.approx(expected, rel=0, abs=1e-6)


@given(st.lists(st.integers(0, 360), min_size=3, max_size=8))
def test_an_interval_of_accuracies_holds_the_mean_and_possible_values(right: list[int]) -> None:
    one_image = 100 / 360
    found = statistic([one_image * count for count in right], PERCENT, one_image)
    interval = found.interval
    assert 0.0 <= interval.low <= found.mean + 1e-9
    assert found.mean - 1e-9 <= interval.high <= 100.0
    assert interval.high - interval.low >= one_image - 1e-9


@given(st.lists(st.floats(-200.0, 200.0), min_size=3, max_size=8))
@example([199.99999999999997] * 3)
def test_an_interval_of_differences_is_mirrored_with_its_sign(values: list[float]) -> None:
    bounds = (-200.0, 200.0)
    one, other = statistic(values, bounds).interval, statistic([-value for value in values], bounds).interval
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-6)
    assert -200.0 <= one.low <= one.high <= 200.0


@given(st.lists(st.floats(0.0, 1e9), min_size=3, max_size=8))
def test_an_interval_of_seconds_is_not_negative(values: list[float]) -> None:
    interval = statistic(values, (0.0, math.inf)).interval
    assert 0.0 <= interval.low <= interval.high < math.inf


def test_95_of_100_intervals_near_the_limit_hold_the_true_accuracy() -> None:
    rng = np.random.default_rng(4)
    values = 100 * rng.beta(97, 3, (2_000, 5))
    held = [97.0 in statistic(row, PERCENT).interval for row in values]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_the_bootstrap_is_that_of_scipy_and_starts_at_ten() -> None:
    values = _drawn(BOOTSTRAP_BLOCKS)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=1_999, rng=np.random.default_rng(0)
    ).confidence_interval
    ours = bootstrap_interval(values)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0, abs=EXACT)
    assert not bootstrap_interval(values[1:]).exists


def test_the_bootstrap_of_equal_values_is_that_value_to_one_image() -> None:
    interval = bootstrap_interval(np.full(12, 3.0))
    assert (interval.low, interval.high) == (3.0, 3.0)
    of_images = statistic([3.0] * 12, PERCENT, 0.5).bootstrap
    assert (of_images.low, of_images.high) == (2.75, 3.25)


def test_the_permutation_test_counts_the_sign_patterns() -> None:
    values = _drawn(3, PERMUTATION_BLOCKS)
    signs = np.array(list(itertools.product([1, -1], repeat=PERMUTATION_BLOCKS)))
    for row, p in zip(values, permutation_p(values), strict=True):
        means = (signs * row).mean(axis=1)
        assert p == pytest.approx(np.mean(np.abs(means) >= abs(row.mean()) - 1e-12), rel=0, abs=EXACT)


def test_random_sign_patterns_agree_with_those_of_scipy() -> None:
    values = _drawn(3, 20) - [[1.0], [0.6], [0.0]]
    theirs = scipy.stats.permutation_test(
        (values,),
        lambda sample, axis: sample.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        axis=-1,
        n_resamples=20_000,
        rng=np.random.default_rng(5),
    ).pvalue
    assert 0.001 < theirs.min() < 0.5 < theirs.max()
    # Three standard errors of twice a share of 20,000.
    assert permutation_p(values) == pytest.approx(theirs, abs=0.022)


def test_a_hundred_blocks_can_distinguish_twenty_strategies() -> None:
    p = permutation_p(np.random.default_rng(2).normal(3.0, 1.0, (190, 100)))
    assert max(holm([float(value) for value in p])) < 0.05


def test_pairs_tested_together_have_their_separate_p_values() -> None:
    values = _drawn(4, 20)
    assert permutation_p(values) == pytest.approx(
        [permutation_p(row[None])[0] for row in values], rel=0, abs=EXACT
    )


def test_below_six_blocks_nothing_is_tested() -> None:
    assert np.isnan(permutation_p(_drawn(2, PERMUTATION_BLOCKS - 1))).all()


def test_holm_multiplies_by_the_tests_left_and_never_decreases() -> None:
    # By hand: 0.01 × 4, 0.02 × 3, then 0.025 × 2 = 0.05, raised to the 0.06 before it, and 0.8 × 1.
    assert holm([0.8, 0.01, math.nan, 0.025, 0.02]) == pytest.approx(
        [0.8, 0.04, math.nan, 0.06, 0.06], nan_ok=True, rel=0, abs=EXACT
    )
    assert all(map(math.isnan, holm([math.nan])))
