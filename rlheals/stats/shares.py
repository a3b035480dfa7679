"""Shares of a loss that something gives back, measured on the same hands."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.stats import norm

from rlheals.stats.intervals import Interval, critical_value

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Alternative = Literal["two-sided", "less", "greater"]


@dataclass(frozen=True, slots=True)
class Share:
    """(repaired - worse) / (better - worse), three accuracies on the same hands.

    Attributes:
        estimate: the share; NaN when the two differ in no hand on balance.
        low: lower end of its interval; NaN, like ``high``, when the loss itself is within noise, so that no share of it
            has bounds.
        high: upper end.
        gained: mean of the repaired outcomes minus the worse ones.
        lost: mean of the better outcomes minus the worse ones.
        n: hands.
    """

    estimate: float
    low: float
    high: float
    gained: float
    lost: float
    n: int
    _covariance: NDArray[np.float64]

    def p_value(self, null: float, alternative: Alternative = "two-sided") -> float:
        """p-value of the hypothesis that the share equals ``null``; it agrees with the interval.

        Args:
            null: share to test.
            alternative: which side counts against the hypothesis; "less" means a share below ``null``.
        """
        (aa, ab), (_, bb) = self._covariance
        z = (self.gained - null * self.lost) / sqrt((aa - 2 * null * ab + null * null * bb) / self.n)
        if alternative == "less":
            return float(norm.cdf(z))
        return float(norm.sf(z)) if alternative == "greater" else float(2 * norm.sf(abs(z)))


def share_of_loss(repaired: ArrayLike, worse: ArrayLike, better: ArrayLike, level: float = 0.95) -> Share:
    """How much of what ``worse`` lost against ``better`` is there again in ``repaired``.

    The interval is the set of shares s for which "repaired - worse = s (better - worse)" is not rejected, so it is
    right where the loss is small as well. The covariance is taken after adding a quarter of a hand to each of the eight
    patterns of three outcomes (two hands in all), which keeps it positive when every hand answered alike.

    Args:
        repaired: boolean outcomes of shape (hands,).
        worse: the same hands before the repair.
        better: the same hands before the loss.
        level: confidence level.

    Raises:
        ValueError: the arrays are empty, not one-dimensional, or of different length.

    Source: Fieller, J. R. Stat. Soc. B 16 (1954) 175, for the ratio; that two hands are added follows Agresti and Min,
    Stat. Med. 24 (2005) 729, who do so for the difference of paired proportions.
    """
    outcomes = [np.asarray(values, dtype=bool) for values in (repaired, worse, better)]
    if outcomes[0].ndim != 1 or not outcomes[0].size or len({values.shape for values in outcomes}) > 1:
        raise ValueError(f"a share needs three arrays of one length, got shapes {[v.shape for v in outcomes]}")
    now, before, peak = (values.astype(np.float64) for values in outcomes)
    pairs = np.stack([now - before, peak - before], axis=1)
    gained, lost = (float(mean) for mean in pairs.mean(axis=0))
    covariance = _covariance(pairs)
    low, high = _fieller(gained, lost, covariance / len(pairs), critical_value(level))
    return Share(gained / lost if lost else nan, low, high, gained, lost, len(pairs), covariance)


def _covariance(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Covariance of (gained, lost) over hands, shape (2, 2), with two pseudo-hands."""
    patterns = np.array([[r - w, b - w] for r in (0, 1) for w in (0, 1) for b in (0, 1)], dtype=np.float64)
    values = np.concatenate([pairs, patterns])
    weights = np.concatenate([np.ones(len(pairs)), np.full(len(patterns), 0.25)])
    centred = values - np.average(values, axis=0, weights=weights)
    return np.asarray((centred * weights[:, None]).T @ centred / weights.sum())


def _fieller(a: float, b: float, covariance: NDArray[np.float64], z: float) -> Interval:
    """Roots of (a - s b)² = z² var(a - s b); NaN when the denominator b is within noise."""
    (aa, ab), (_, bb) = z * z * covariance
    square, linear, constant = b * b - bb, a * b - ab, a * a - aa
    inside = linear * linear - square * constant
    if square <= 0 or inside < 0:
        return Interval(nan, nan)
    root = sqrt(inside)
    ends = sorted(((linear - root) / square, (linear + root) / square))
    return Interval(*ends)
