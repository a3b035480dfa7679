"""Intervals against scipy, the literature, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from rlheals.stats import bootstrap_hands, clopper_pearson, wilson

proportions = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(proportions, st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_intervals_agree_with_scipy(counts, level):
    k, n = counts
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        reference = binomtest(k, n).proportion_ci(level, method=method)
        assert ours(k, n, level) == pytest.approx((reference.low, reference.high), abs=1e-12)


@given(proportions)
def test_wilson_contains_the_estimate_and_mirrors(counts):
    k, n = counts
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_reproduces_the_published_intervals_of_234_games():
    for k, expected in ((41, (13.2, 22.9)), (21, (5.9, 13.3)), (16, (4.3, 10.8)), (46, (15.1, 25.2))):
        assert tuple(round(100 * x, 1) for x in wilson(k, 234)) == expected


def test_wilson_covers_nominally_by_enumeration():
    n, p = 100, 0.17
    covered = sum(binom.pmf(k, n, p) for k in range(n + 1) if wilson(k, n).low <= p <= wilson(k, n).high)
    assert 0.93 < covered < 0.97


def test_no_trials_say_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    assert clopper_pearson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("arguments", [(5, 4), (-1, 4), (1, 2, 1.0), (1, 2, 0.0)])
def test_impossible_input_is_an_error(arguments):
    for interval in (wilson, clopper_pearson):
        with pytest.raises(ValueError, match=r"level|proportion"):
            interval(*arguments)


def test_bootstrap_is_seeded_and_close_to_the_normal_interval():
    values = np.random.default_rng(1).random(400)
    first, again = (bootstrap_hands(values, lambda x: float(x.mean()), seed=3) for _ in range(2))
    assert first == again != bootstrap_hands(values, lambda x: float(x.mean()), seed=4)
    half = 1.96 * values.std() / 20
    assert first == pytest.approx((values.mean() - half, values.mean() + half), abs=0.004)


def test_bootstrap_keeps_measurements_of_a_hand_together():
    rng = np.random.default_rng(0)
    x = rng.random(200)
    pairs = np.column_stack([x, x + 0.25])
    assert bootstrap_hands(pairs, lambda t: float((t[:, 1] - t[:, 0]).mean())) == pytest.approx((0.25, 0.25))


def test_bootstrap_without_hands_is_an_error():
    with pytest.raises(ValueError, match="at least one hand"):
        bootstrap_hands([], lambda x: float(x.mean()))
