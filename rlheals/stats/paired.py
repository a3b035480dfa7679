"""Comparisons of two checkpoints on the same hands."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan, sqrt
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binomtest, norm

from rlheals.stats.intervals import Interval, critical_value, score_interval, wilson

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class PairCounts:
    """The 2 x 2 table of two yes/no outcomes on the same hands."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def n(self) -> int:
        """Number of hands."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def first(self) -> int:
        """Hands solved by the first."""
        return self.both + self.only_first

    @property
    def second(self) -> int:
        """Hands solved by the second."""
        return self.both + self.only_second


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Accuracy of the first minus accuracy of the second, on the same hands.

    Attributes:
        estimate: the difference, in -1 .. 1.
        low: lower end of the confidence interval.
        high: upper end.
        p_value: exact two-sided McNemar.
        counts: the table it was computed from.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    counts: PairCounts


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """Accuracy of the first divided by accuracy of the second, on the same hands.

    Attributes:
        estimate: the ratio; NaN when the second solved nothing.
        low: lower end of the confidence interval.
        high: upper end, possibly infinite.
        p_value: two-sided, of the hypothesis that the ratio equals ``null``.
        null: the ratio tested.
        counts: the table it was computed from.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    null: float
    counts: PairCounts


def pair_counts(first: ArrayLike, second: ArrayLike) -> PairCounts:
    """Count agreements of two boolean arrays of shape (hands,), aligned by hand.

    Raises:
        ValueError: the arrays are empty, not one-dimensional, or of different length.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"paired outcomes need two arrays of one length, got shapes {a.shape} and {b.shape}")
    return PairCounts(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


def mcnemar_exact(b: int, c: int) -> float:
    """Exact two-sided McNemar p-value from the discordant counts: a binomial test of ``b`` in ``b + c`` at 1/2.

    Source: McNemar, Psychometrika 12 (1947) 153, with the exact binomial reference distribution.

    Raises:
        ValueError: a negative count.
    """
    if b < 0 or c < 0:
        raise ValueError(f"discordant counts cannot be negative, got {b} and {c}")
    return float(binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0


def mcnemar_pairs(first: ArrayLike, second: ArrayLike) -> float:
    """`mcnemar_exact` from two aligned boolean arrays of shape (hands,)."""
    counts = pair_counts(first, second)
    return mcnemar_exact(counts.only_first, counts.only_second)


def difference_from_counts(counts: PairCounts, level: float = 0.95) -> PairedDifference:
    """Difference of two accuracies with Newcombe's paired score interval (his method 10) and McNemar's p-value.

    Source: Newcombe, Stat. Med. 17 (1998) 2635: Wilson limits of both margins, joined with the continuity-corrected
    correlation.
    """
    n = counts.n
    p1, p2 = counts.first / n, counts.second / n
    low1, high1 = wilson(counts.first, n, level)
    low2, high2 = wilson(counts.second, n, level)
    phi = _newcombe_phi(counts)
    below, above = (p1 - low1, high2 - p2), (high1 - p1, p2 - low2)
    p_value = mcnemar_exact(counts.only_first, counts.only_second)
    return PairedDifference(p1 - p2, p1 - p2 - _joined(*below, phi), p1 - p2 + _joined(*above, phi), p_value, counts)


def paired_difference(first: ArrayLike, second: ArrayLike, level: float = 0.95) -> PairedDifference:
    """`difference_from_counts` from two aligned boolean arrays of shape (hands,).

    With ``first`` the later checkpoint and ``second`` an earlier one this is the test of "accuracy kept rising".
    """
    return difference_from_counts(pair_counts(first, second), level)


def ratio_from_counts(counts: PairCounts, null: float = 1.0, level: float = 0.95) -> PairedRatio:
    """Ratio of two accuracies with the hybrid score interval of Bonett and Price; the p-value inverts the interval.

    Source: Bonett and Price, Biometrics 62 (2006) 964, equation for two paired proportions. It stays sensible when
    one side solved no hand at all, where intervals on the log scale do not exist.

    Raises:
        ValueError: ``null`` is not positive.
    """
    if null <= 0:
        raise ValueError(f"the ratio tested must be positive, not {null}")
    if not counts.second:
        return PairedRatio(nan, 0.0, inf, 1.0, null, counts)
    low, high = _bonett_price(counts, critical_value(level))
    estimate = counts.first / counts.second
    return PairedRatio(estimate, low, high, _ratio_p_value(counts, null, estimate), null, counts)


def paired_ratio(first: ArrayLike, second: ArrayLike, null: float = 1.0, level: float = 0.95) -> PairedRatio:
    """`ratio_from_counts` from two aligned boolean arrays of shape (hands,)."""
    return ratio_from_counts(pair_counts(first, second), null, level)


def _newcombe_phi(counts: PairCounts) -> float:
    """Correlation of the two outcomes with Newcombe's continuity correction of a positive numerator."""
    a, b, c, d = counts.both, counts.only_first, counts.only_second, counts.neither
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if not margins:
        return 0.0
    numerator: float = a * d - b * c
    if numerator > 0:
        numerator = max(numerator - counts.n / 2, 0.0)
    return numerator / sqrt(margins)


def _joined(x: float, y: float, phi: float) -> float:
    """Length of the difference of two limits' distances that correlate with ``phi``."""
    return sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))


def _bonett_price(counts: PairCounts, z: float) -> Interval:
    """Interval of the ratio at critical value ``z``, from the hands that at least one of the two solved."""
    n = counts.n - counts.neither
    first, second = counts.first, counts.second
    spread = sqrt((counts.only_first + counts.only_second + 2) / ((first + 1) * (second + 1)))
    single = sum(sqrt((1 - (k + 1) / (n + 2)) / (k + 1)) for k in (first, second))
    k = z * spread / single
    low1, high1 = score_interval(first, n, k)
    low2, high2 = score_interval(second, n, k)
    return Interval(low1 / high2, high1 / low2 if low2 > 0 else inf)


def _ratio_p_value(counts: PairCounts, null: float, estimate: float) -> float:
    """Level at which the interval just reaches ``null``, by bisection on the critical value."""
    near, far = 0.0, 40.0
    for _ in range(80):
        z = (near + far) / 2
        low, high = _bonett_price(counts, z)
        covered = low <= null if null < estimate else high >= null
        near, far = (near, z) if covered else (z, far)
    return float(2 * norm.sf(near))
