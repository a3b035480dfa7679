"""Confidence intervals for one proportion, and the bootstrap over hands."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import beta, norm

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def critical_value(level: float) -> float:
    """Two-sided standard normal quantile, e.g. 1.96 for ``level`` 0.95.

    Raises:
        ValueError: ``level`` is not strictly between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies strictly between 0 and 1, not at {level}")
    return float(norm.ppf((1 + level) / 2))


def check_counts(k: int, n: int) -> None:
    """Raise `ValueError` unless ``0 <= k <= n``."""
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes of {n} trials is not a proportion")


def score_interval(k: float, n: float, z: float) -> Interval:
    """Wilson's score interval with critical value ``z``; see `wilson`."""
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * sqrt(k * (n - k) / n + z * z / 4)
    return Interval(0.0 if k == 0 else max(0.0, centre - half), 1.0 if k == n else min(1.0, centre + half))


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval for ``k`` successes of ``n`` trials; (0, 1) when there is no trial.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209; without continuity correction.

    Raises:
        ValueError: ``k`` is not within 0 and ``n``, or ``level`` not within 0 and 1.

    >>> low, high = wilson(41, 234)
    >>> round(100 * low, 1), round(100 * high, 1)
    (13.2, 22.9)
    """
    check_counts(k, n)
    return score_interval(k, n, critical_value(level)) if n else Interval(0.0, 1.0)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> Interval:
    """Exact interval for ``k`` successes of ``n`` trials: it covers at least ``level``, at the price of width.

    Source: Clopper and Pearson, Biometrika 26 (1934) 404.

    Raises:
        ValueError: as `wilson`.
    """
    check_counts(k, n)
    critical_value(level)
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return Interval(low, high)


def bootstrap_hands(
    outcomes: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], float],
    *,
    level: float = 0.95,
    repeats: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap that resamples hands, so that everything measured on a hand stays together.

    Args:
        outcomes: shape (hands,) or (hands, measurements); a row is one hand.
        statistic: maps a resampled array of the same shape to a number.
        level: confidence level.
        repeats: number of resamples.
        seed: seed of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: no hands.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    table = np.asarray(outcomes, dtype=np.float64)
    if len(table) == 0:
        raise ValueError("a bootstrap needs at least one hand")
    critical_value(level)
    rng = np.random.default_rng(seed)
    values = [statistic(table[rng.integers(len(table), size=len(table))]) for _ in range(repeats)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
