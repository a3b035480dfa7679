"""What a given number of hands can show: power and minimum detectable effects."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm

from rlheals.stats.intervals import critical_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def power_mcnemar(n: int, only_first: float, only_second: float, alpha: float = 0.05) -> float:
    """Exact power of the exact McNemar test.

    Args:
        n: hands.
        only_first: probability that a hand is solved by the first checkpoint only.
        only_second: the same for the second.
        alpha: two-sided level of the test.

    Raises:
        ValueError: no hands, or probabilities that are negative or add up to more than 1.
    """
    discordant = only_first + only_second
    if n < 1 or min(only_first, only_second) < 0 or discordant > 1 + 1e-12:
        raise ValueError(f"no such experiment: {n} hands, discordant shares {only_first} and {only_second}")
    if discordant == 0:
        return 0.0
    counts = np.arange(n + 1)
    weights = binom.pmf(counts, n, min(discordant, 1.0))
    used = counts[weights > 1e-15]
    limits = _rejection_limits(used, alpha)
    share = only_first / discordant
    rejected = binom.cdf(limits, used, share) + binom.sf(used - limits - 1, used, share)
    return float(np.sum(weights[used] * rejected))


def power_unpaired(n: int, first: float, second: float, alpha: float = 0.05) -> float:
    """Approximate power to tell two accuracies apart on two independent sets of ``n`` hands.

    Source: normal approximation with a pooled null variance; Fleiss, Levin and Paik, Statistical Methods for Rates
    and Proportions (2003), section 4.3, without continuity correction.
    """
    pooled = (first + second) / 2
    null_spread = sqrt(2 * pooled * (1 - pooled))
    spread = sqrt(first * (1 - first) + second * (1 - second))
    if spread == 0:
        return float(first != second)
    shift = abs(first - second) * sqrt(n)
    threshold = critical_value(1 - alpha) * null_spread
    return float(norm.sf((threshold - shift) / spread) + norm.cdf((-threshold - shift) / spread))


def minimum_effect_paired(n: int, discordant: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest accuracy difference that ``n`` shared hands reveal with probability ``power``.

    Args:
        n: hands, each answered by both checkpoints.
        discordant: share of hands on which the two disagree; the difference cannot exceed it.
        power: probability to find the difference.
        alpha: two-sided level of the exact McNemar test.

    Returns:
        The difference in 0 .. ``discordant``, or NaN when even the largest one is found too rarely.
    """

    def reached(effect: float) -> float:
        first = min((discordant + effect) / 2, discordant)
        return power_mcnemar(n, first, discordant - first, alpha)

    return _smallest(reached, discordant, power)


def minimum_effect_unpaired(n: int, baseline: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest rise above ``baseline`` that two independent sets of ``n`` hands reveal; NaN when none is found."""
    return _smallest(lambda effect: power_unpaired(n, baseline, baseline + effect, alpha), 1 - baseline, power)


def _rejection_limits(discordant: NDArray[np.int64], alpha: float) -> NDArray[np.int64]:
    """Largest lower-tail count that the exact test rejects, for each number of discordant hands; -1 for none."""
    limits = binom.ppf(alpha / 2, discordant, 0.5)
    # ppf gives the first count whose tail reaches alpha / 2; only a tail of exactly alpha / 2 is still rejected.
    limits = np.where(binom.cdf(limits, discordant, 0.5) > alpha / 2, limits - 1, limits)
    return limits.astype(np.int64)


def _smallest(reached: Callable[[float], float], largest: float, power: float) -> float:
    """Effect at which ``reached`` crosses ``power``."""
    if largest <= 0 or reached(largest) < power:
        return float("nan")
    return float(brentq(lambda effect: reached(effect) - power, 0.0, largest, xtol=1e-4))
