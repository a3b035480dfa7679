"""Paired comparisons against enumeration, published values, and simulated coverage."""

from __future__ import annotations

from itertools import product
from math import comb, inf, isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlheals.stats import (
    PairCounts,
    difference_from_counts,
    holm,
    mcnemar_exact,
    mcnemar_pairs,
    pair_counts,
    paired_difference,
    paired_ratio,
    ratio_from_counts,
)

small = st.integers(0, 30)


def brute_force_mcnemar(b: int, c: int) -> float:
    """Add up all sign patterns that are at most as likely as the observed split."""
    n = b + c
    observed = comb(n, b)
    return sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= observed) / 2**n


@given(small, small)
def test_mcnemar_agrees_with_enumeration_and_scipy(b, c):
    assert mcnemar_exact(b, c) == pytest.approx(brute_force_mcnemar(b, c))
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)
    if b + c:
        assert mcnemar_exact(b, c) == pytest.approx(binomtest(b, b + c).pvalue)


def test_mcnemar_by_flipping_every_pair():
    first = np.array([1, 1, 1, 1, 1, 0, 1, 0], dtype=bool)
    second = np.array([0, 0, 0, 0, 1, 0, 0, 1], dtype=bool)
    observed = abs(int(first.sum()) - int(second.sum()))
    extreme = 0
    for flips in product([False, True], repeat=len(first)):
        swapped = np.where(flips, second, first).sum() - np.where(flips, first, second).sum()
        extreme += abs(int(swapped)) >= observed
    assert mcnemar_pairs(first, second) == pytest.approx(extreme / 2 ** len(first))


def test_newcombe_method_10_published_example():
    result = difference_from_counts(PairCounts(36, 12, 2, 0))
    assert (round(result.low, 4), round(result.high, 4)) == (0.0569, 0.3404)


@given(small, small, small, small)
def test_difference_is_antisymmetric_and_contains_its_estimate(a, b, c, d):
    if a + b + c + d == 0:
        return
    result, mirrored = difference_from_counts(PairCounts(a, b, c, d)), difference_from_counts(PairCounts(a, c, b, d))
    assert -1 - 1e-12 <= result.low <= result.estimate <= result.high <= 1 + 1e-12
    assert (mirrored.low, mirrored.high) == pytest.approx((-result.high, -result.low), abs=1e-12)


@given(small, small, small, small, st.floats(0.1, 3))
def test_ratio_p_value_and_interval_tell_the_same(a, b, c, d, null):
    if a + c == 0:
        return
    result = ratio_from_counts(PairCounts(a, b, c, d), null)
    assert result.low <= result.estimate <= result.high
    if abs(result.p_value - 0.05) > 1e-6:
        assert (result.p_value < 0.05) == (not result.low <= null <= result.high)


def test_ratio_when_one_side_solved_nothing():
    assert isnan(ratio_from_counts(PairCounts(0, 3, 0, 5)).estimate)
    assert ratio_from_counts(PairCounts(0, 3, 0, 5)).high == inf
    gone = ratio_from_counts(PairCounts(0, 0, 90, 905), 0.5)
    assert gone.estimate == 0
    assert 0 < gone.high < 0.1
    assert gone.p_value < 1e-6


def test_counts_come_from_aligned_arrays():
    first, second = [True, True, False, False, True], [True, False, True, False, False]
    assert pair_counts(first, second) == PairCounts(1, 2, 1, 1)
    assert paired_difference(first, second).estimate == pytest.approx(0.2)
    assert paired_ratio(first, second).estimate == pytest.approx(1.5)


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False]), ([[True]], [[True]])])
def test_misaligned_arrays_are_an_error(first, second):
    with pytest.raises(ValueError, match="one length"):
        pair_counts(first, second)


def test_impossible_counts_are_an_error():
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)
    with pytest.raises(ValueError, match="positive"):
        ratio_from_counts(PairCounts(1, 1, 1, 1), 0.0)


@pytest.mark.parametrize("shares", [(0.05, 0.02, 0.40, 0.53), (0.30, 0.05, 0.30, 0.35), (0.10, 0.10, 0.10, 0.70)])
def test_simulated_coverage_of_difference_and_ratio(shares):
    rng = np.random.default_rng(0)
    first, second = shares[0] + shares[1], shares[0] + shares[2]
    repeats, hits = 800, np.zeros(2)
    for counts in rng.multinomial(200, shares, size=repeats):
        table = PairCounts(*map(int, counts))
        difference, ratio = difference_from_counts(table), ratio_from_counts(table)
        hits += (difference.low <= first - second <= difference.high, ratio.low <= first / second <= ratio.high)
    # 0.95 -+ four standard errors of 800 repeats, plus the conservatism of the correction.
    assert np.all(hits / repeats > 0.919)
    assert np.all(hits / repeats < 0.99)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    adjusted = holm(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = set()
    for rank, index in enumerate(order):
        if (len(p_values) - rank) * p_values[index] > 0.05:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(adjusted) if p <= 0.05} == rejected
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))


def test_holm_needs_probabilities():
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.1, 1.1])
