"""Power against enumeration and simulation."""

from __future__ import annotations

from math import factorial, isnan

import numpy as np
import pytest

from rlheals.stats import (
    mcnemar_exact,
    minimum_effect_paired,
    minimum_effect_unpaired,
    power_mcnemar,
    power_unpaired,
)


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.1), (0.3, 0.3), (0.9, 0.1), (0.0, 0.6)])
def test_mcnemar_power_by_enumerating_every_table(first, second):
    n = 14
    expected = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            ways = factorial(n) // (factorial(b) * factorial(c) * factorial(n - b - c))
            probability = ways * first**b * second**c * max(1 - first - second, 0.0) ** (n - b - c)
            expected += probability * (mcnemar_exact(b, c) <= 0.05)
    assert power_mcnemar(n, first, second) == pytest.approx(expected, abs=1e-9)


def test_minimum_paired_effect_has_the_power_asked_for():
    effect = minimum_effect_paired(300, 0.2)
    assert power_mcnemar(300, 0.1 + effect / 2, 0.1 - effect / 2) == pytest.approx(0.8, abs=0.01)
    assert minimum_effect_paired(1000, 0.2) < effect
    assert isnan(minimum_effect_paired(4, 0.2))
    assert isnan(minimum_effect_paired(100, 0.0))


def test_unpaired_power_agrees_with_simulation():
    n, first, second = 300, 0.40, 0.50
    rng = np.random.default_rng(0)
    a, b = rng.binomial(n, first, 4000) / n, rng.binomial(n, second, 4000) / n
    pooled = (a + b) / 2
    found = np.mean(np.abs(a - b) / np.sqrt(2 * pooled * (1 - pooled) / n) > 1.96)
    assert power_unpaired(n, first, second) == pytest.approx(found, abs=0.03)
    effect = minimum_effect_unpaired(n, first)
    assert power_unpaired(n, first, first + effect) == pytest.approx(0.8, abs=0.01)


def test_degenerate_shares():
    assert power_unpaired(10, 0.0, 0.0) == 0.0
    assert power_unpaired(10, 0.0, 1.0) > 0.99
    assert power_mcnemar(10, 0.0, 0.0) == 0.0


@pytest.mark.parametrize("arguments", [(0, 0.1, 0.1), (10, -0.1, 0.1), (10, 0.8, 0.8)])
def test_impossible_experiments_are_errors(arguments):
    with pytest.raises(ValueError, match="no such experiment"):
        power_mcnemar(*arguments)
