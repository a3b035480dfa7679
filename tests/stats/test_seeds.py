"""Means over seeds: against SciPy, against simulation, and permutations against enumeration."""

from __future__ import annotations

from itertools import permutations
from math import isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr, ttest_1samp

from rlheals.stats import permutation_p_value, rank_correlation, seed_mean


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=10, unique=True), st.floats(-0.5, 0.5))
def test_interval_and_tests_are_those_of_students_t(values, null):
    if np.std(values) < 1e-6:
        return
    pooled = seed_mean(values)
    above = ttest_1samp(values, null, alternative="greater")
    assert pooled.p_above(null) == pytest.approx(above.pvalue, abs=1e-9)
    assert pooled.p_below(null) == pytest.approx(1 - above.pvalue, abs=1e-9)
    low, high = ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (pooled.low, pooled.high) == pytest.approx((low, high))


def test_one_seed_has_an_estimate_and_nothing_else():
    one = seed_mean([0.3])
    assert one.estimate == 0.3
    assert isnan(one.low)
    assert isnan(one.high)
    assert one.p_above(0.0) == one.p_below(0.0) == 1.0
    assert isnan(seed_mean([]).estimate)


def test_seeds_that_agree_exactly_leave_no_doubt_but_at_the_boundary():
    same = seed_mean([0.25, 0.25, 0.25])
    assert (same.low, same.high) == (0.25, 0.25)
    assert same.p_above(0.1) == 0.0
    assert same.p_above(0.3) == 1.0


def test_a_missing_estimate_is_refused():
    with pytest.raises(ValueError, match="finite"):
        seed_mean([0.1, float("nan")])


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_interval_covers_the_mean_of_seeds_that_differ(seeds):
    rng = np.random.default_rng(seeds)
    drawn = rng.normal(0.02, 0.05, size=(2000, seeds))
    covered = [(found := seed_mean(row)).low <= 0.02 <= found.high for row in drawn.tolist()]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


@given(st.integers(0, 10_000), st.integers(3, 8))
def test_rank_correlation_is_spearmans(seed, size):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, size), rng.integers(0, 5, size)
    found = rank_correlation(a, b)
    if len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        assert isnan(found)
    else:
        assert found == pytest.approx(spearmanr(a, b).statistic)


def test_permutations_agree_with_all_orders_of_two_blocks():
    first = ([1, 2, 3, 4], [1, 3, 2, 4]), ([1, 2, 3], [1, 2, 3])
    observed = sum(spearmanr(a, b).statistic for a, b in first)
    sums = [
        spearmanr(first[0][0], one).statistic + spearmanr(first[1][0], two).statistic
        for one in permutations(first[0][1])
        for two in permutations(first[1][1])
    ]
    exact = np.mean(np.array(sums) >= observed - 1e-9)
    assert permutation_p_value(first, repeats=20_000) == pytest.approx(exact, abs=0.006)


def test_rungs_that_differ_by_more_than_hands_do_not_make_a_relation():
    rng = np.random.default_rng(5)
    before = np.array([0.2, 0.72, 0.54, 0.28, 0.15])
    wrong = 0
    for _ in range(300):
        after = 0.6 + rng.normal(0, 0.1, size=(3, 5))
        wrong += permutation_p_value([(before, row) for row in after], repeats=400) < 0.05
    assert wrong / 300 < 0.08


def test_blocks_that_do_not_vary_are_left_out():
    assert permutation_p_value([([1, 2, 3], [1, 1, 1])]) == 1.0
