"""Estimates of several seeds: the seed is the unit, so what differs between seeds is in the interval."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isnan, nan, sqrt
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student

from rlheals.stats.intervals import critical_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class SeedMean:
    """Mean of one number over seeds with Student's t interval.

    Attributes:
        estimate: mean over the seeds; NaN without a seed.
        low: lower end of the interval; NaN with fewer than two seeds.
        high: upper end.
        n: seeds.
        error: standard error of the mean; NaN with fewer than two seeds.
    """

    estimate: float
    low: float
    high: float
    n: int
    error: float

    def p_above(self, null: float) -> float:
        """One-sided p-value of "the mean over seeds is at most ``null``"; 1 with fewer than two seeds."""
        return self._tail(self.estimate - null)

    def p_below(self, null: float) -> float:
        """One-sided p-value of "the mean over seeds is at least ``null``"; 1 with fewer than two seeds."""
        return self._tail(null - self.estimate)

    def _tail(self, distance: float) -> float:
        if isnan(self.error) or distance == 0:
            return 0.5 if self.n > 1 else 1.0
        t = distance / self.error if self.error else inf * distance
        return float(student.sf(t, self.n - 1))


def seed_mean(values: Sequence[float], level: float = 0.95) -> SeedMean:
    """Mean over seeds with the t interval of independent draws, each with its own error in it.

    Args:
        values: one estimate a seed, shape (seeds,).
        level: confidence level.

    Raises:
        ValueError: a value is not finite, or ``level`` is not strictly between 0 and 1.

    Source: Student, Biometrika 6 (1908) 1.

    >>> pooled = seed_mean([-0.016, -0.044, -0.040])
    >>> round(pooled.estimate, 4), round(pooled.low, 3), round(pooled.high, 3)
    (-0.0333, -0.071, 0.004)
    """
    critical_value(level)
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError("a mean over seeds needs finite estimates")
    mean = float(x.mean()) if len(x) else nan
    if len(x) < 2:
        return SeedMean(mean, nan, nan, len(x), nan)
    error = float(x.std(ddof=1)) / sqrt(len(x))
    half = float(student.ppf((1 + level) / 2, len(x) - 1)) * error
    return SeedMean(mean, mean - half, mean + half, len(x), error)


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation of two arrays of shape (items,); NaN where one of them does not vary."""
    a, b = (rankdata(np.asarray(values, dtype=np.float64)) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else nan


def permutation_p_value(
    blocks: Sequence[tuple[ArrayLike, ArrayLike]], *, repeats: int = 20_000, seed: int = 0
) -> float:
    """One-sided p-value of "first and second go together in no block", for the mean rank correlation over blocks.

    The second of each pair is permuted within its block: a block, a seed with its rungs, is never mixed with another.

    Args:
        blocks: pairs of arrays of shape (items,), one pair a block; pairs that do not vary are left out.
        repeats: random permutations; the p-value is at least 1 / (``repeats`` + 1).
        seed: seed of the permutations.

    Source: Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9 (2010) 39, for counting the observed order as one.
    """
    ranked = [[rankdata(np.asarray(values, dtype=np.float64)) for values in block] for block in blocks]
    pairs = [(a, b) for a, b in ranked if not isnan(rank_correlation(a, b))]
    if not pairs:
        return 1.0
    observed = sum(rank_correlation(a, b) for a, b in pairs)
    rng = np.random.default_rng(seed)
    drawn = np.sum([_permuted(a, b, repeats, rng) for a, b in pairs], axis=0)
    return (1 + int(np.count_nonzero(drawn >= observed - 1e-9))) / (repeats + 1)


def _permuted(
    first: NDArray[np.float64], second: NDArray[np.float64], repeats: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Rank correlations of ``repeats`` permutations of one block, shape (repeats,)."""
    a, b = first - first.mean(), second - second.mean()
    orders = rng.permuted(np.tile(b, (repeats, 1)), axis=1)
    return np.asarray(orders @ a / sqrt(float(a @ a) * float(b @ b)))
