"""Shares of a loss: against simulation, against the interval's own definition, and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlheals.stats import paired_difference
from rlheals.stats.shares import share_of_loss


def hands(rng, n, repaired, worse, better):
    luck = 0.7 * rng.random(n)
    return [luck + 0.3 * rng.random(n) < rate for rate in (repaired, worse, better)]


def test_estimate_is_the_ratio_of_differences():
    rng = np.random.default_rng(0)
    repaired, worse, better = hands(rng, 400, 0.6, 0.2, 0.9)
    share = share_of_loss(repaired, worse, better)
    expected = (repaired.mean() - worse.mean()) / (better.mean() - worse.mean())
    assert share.estimate == pytest.approx(expected)
    assert share.low < share.estimate < share.high
    assert share.gained == pytest.approx(paired_difference(repaired, worse).estimate)


@given(st.integers(0, 10_000), st.floats(0.3, 0.9), st.sampled_from([0.9, 0.95]))
def test_the_interval_is_what_the_test_does_not_reject(seed, rate, level):
    outcomes = hands(np.random.default_rng(seed), 200, rate, 0.2, 0.9)
    share = share_of_loss(*outcomes, level=level)
    for end in (share.low, share.high):
        assert share.p_value(end) == pytest.approx(1 - level, abs=1e-6)
    assert share.p_value(share.high, "less") == pytest.approx((1 - level) / 2, abs=1e-6)
    assert share.p_value(share.low, "greater") == pytest.approx((1 - level) / 2, abs=1e-6)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    # Rates on the scale of `hands`: the true share is that of a large sample.
    truth = share_of_loss(*hands(rng, 400_000, 0.55, 0.25, 0.8)).estimate
    found = [share_of_loss(*hands(rng, 150, 0.55, 0.25, 0.8)) for _ in range(600)]
    covered = np.mean([share.low <= truth <= share.high for share in found])
    assert 0.93 <= covered <= 0.975


def test_no_loss_has_no_share():
    same = np.array([True, False] * 50)
    share = share_of_loss(~same, same, same)
    assert np.isnan(share.estimate)
    assert np.isnan(share.low)
    assert np.isnan(share.high)


def test_hands_that_all_answer_alike_leave_an_interval():
    zeros, ones = np.zeros(50, dtype=bool), np.ones(50, dtype=bool)
    share = share_of_loss(zeros, zeros, ones)
    assert share.estimate == 0
    assert share.low < 0 < share.high < 0.2
    assert 0 < share.p_value(0.5) < 1e-6
    full = share_of_loss(ones, zeros, ones)
    assert full.low < 1 < full.high


@pytest.mark.parametrize("arrays", [([], [], []), ([True], [True, False], [True]), ([[True]], [[True]], [[True]])])
def test_misaligned_hands_are_refused(arrays):
    with pytest.raises(ValueError, match="three arrays of one length"):
        share_of_loss(*arrays)
