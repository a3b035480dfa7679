"""Verdicts: false alarms by simulation, power on planted changes, exact laws behind the tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from rlheals.spectra.drift import MeasureSettings, measure
from rlheals.spectra.factors import MemoryFactors
from rlheals.spectra.norms import spectral_norm
from rlheals.spectra.verdict import (
    MAGNITUDE,
    NOISE,
    ROTATION,
    UNCHANGED,
    Verdict,
    correct,
    energy_tail,
    judge,
    spectral_norm_tail,
    tracy_widom_tail,
    unchanged,
)
from tests.spectra.planted import noise, plane_turn

SETTINGS = MeasureSettings(ks=(0.125, 0.25, 0.5), parts=())


def verdict_on(base, tuned):
    view = MemoryFactors.of(base)
    return judge(measure(view, MemoryFactors.of(tuned), tuned - base, SETTINGS), view)


@pytest.mark.parametrize("shape", [(16, 16), (12, 30)])
def test_gaussian_changes_are_noise_at_the_nominal_rate(shape):
    draws = 200
    view = MemoryFactors.of(noise(*shape, 0))
    alarms = 0
    for seed in range(draws):
        change = 0.1 * noise(*shape, seed + 1)
        alarms += judge(measure(view, view, change, SETTINGS), view).verdict != NOISE
    assert alarms <= binom.ppf(0.999, draws, 0.05)


def test_each_test_is_valid_and_the_exact_one_is_exact():
    """Under noise the Beta tail is uniform, and the spectral norm's is not below the nominal level."""
    generator = np.random.default_rng(0)
    draws = generator.standard_normal((3000, 20, 30))
    energies = np.square(draws).sum((1, 2))
    stretch = np.square(draws[:, range(20), range(20)]).sum(1) / energies
    tops = np.linalg.svd(draws, compute_uv=False)[:, 0] ** 2 / energies
    exact = np.array([energy_tail(share, 20, 600) for share in stretch])
    safe = np.array([spectral_norm_tail(share, 20, 30) for share in tops])
    for level in (0.2, 0.05, 0.01):
        low, high = binom.ppf([0.001, 0.999], 3000, level)
        assert low <= (exact <= level).sum() <= high
        assert (safe <= level).sum() <= high
    assert (safe <= 0.1).mean() > 0.03  # not so careful that it never speaks


def test_the_tracy_widom_tail_has_the_published_quantiles():
    for quantile, tail in ((0.4501, 0.1), (0.9793, 0.05), (2.0234, 0.01), (3.2724, 0.001)):
        assert tracy_widom_tail(quantile) == pytest.approx(tail, rel=5e-3)
    points = [tracy_widom_tail(s) for s in np.linspace(-2, 30, 80)]
    assert points == sorted(points, reverse=True)
    assert 0 < points[-1] < 1e-40


@pytest.mark.parametrize("shape", [(48, 48), (32, 80), (80, 32)])
def test_planted_changes_are_told_apart(shape):
    """Noise has a rate of false alarms, not a certain verdict: it is tested by simulation above."""
    base = noise(*shape, 0)
    left, values, right = torch.linalg.svd(base, full_matrices=False)
    rank = values.numel()
    low_rank = noise(shape[0], 2, 1) @ noise(2, shape[1], 2)
    block = plane_turn(rank, [(i, i + 2) for i in (0, 1, 4, 5)], [0.2, 0.3, 0.1, 0.4])
    stretched = values * (1 + 0.02 * torch.linspace(-1, 1, rank, dtype=torch.float64))
    cases = {
        "scaled": (1.01 * base, MAGNITUDE),
        "values changed": ((left * stretched) @ right, MAGNITUDE),
        "low rank": (base + 0.01 * low_rank, ROTATION),
        "top block turned": ((left @ block * values) @ right, ROTATION),
        "identical": (base.clone(), UNCHANGED),
    }
    for name, (tuned, expected) in cases.items():
        found = verdict_on(base, tuned)
        assert found.verdict == expected, name
        assert (found.p_value is None) == (expected == UNCHANGED)


def test_a_smooth_turn_within_the_leading_block_is_a_rotation():
    base = noise(64, 64, 0)
    left, values, right = torch.linalg.svd(base)
    skew = torch.zeros(64, 64, dtype=torch.float64)
    skew[:16, :16] = 0.05 * noise(16, 16, 1)
    turn = torch.linalg.matrix_exp(skew - skew.mT)
    found = verdict_on(base, (left @ turn * values) @ right)
    assert found.verdict == ROTATION
    assert "block_share (k = 16)" in found.test


def test_holm_weakens_verdicts_over_a_family():
    weak = Verdict(ROTATION, "stretch_share = 0.1, p = 0.04", 0.04, 0.04, 0.1, 0.1)
    strong = Verdict(MAGNITUDE, "stretch_share = 0.9, p = 1e-9", 1e-9, 1e-9, 0.1, 0.9)
    same = unchanged("bit-identical")
    assert [each.verdict for each in correct([weak])] == [ROTATION]
    found = correct([weak, same, strong, weak])
    assert [each.verdict for each in found] == [NOISE, UNCHANGED, MAGNITUDE, NOISE]
    assert [each.p_holm for each in found] == [pytest.approx(0.08), None, pytest.approx(3e-9), pytest.approx(0.08)]
    assert correct([]) == []
    assert correct([same]) == [same]


def test_a_change_from_a_zero_base_is_judged():
    base = torch.zeros(12, 10, dtype=torch.float64)
    assert verdict_on(base, noise(12, 10, 0)).verdict in (NOISE, MAGNITUDE)
    assert spectral_norm(base) == 0.0
