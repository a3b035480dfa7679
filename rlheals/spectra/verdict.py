"""What kind of change a matrix went through: a verdict with the test behind it.

The question is whether ΔW could be isotropic Gaussian noise of its own Frobenius norm. Under that hypothesis ΔW is
uniform on a sphere of the m·n coordinates of the base's singular basis, so that the share of its energy in any s
coordinates chosen beforehand is exactly Beta(s/2, (mn − s)/2), whatever the base. Three kinds of test, all one-sided:

- T1 ``stretch_share``: the diagonal (r coordinates), where a change of singular values alone puts everything;
- T2 ``block_share`` for each k below the rank: the top-k × top-k corner without its diagonal (k² − k coordinates),
  where rotations among the leading singular vectors put everything;
- T3 ``spectral_norm``: the largest singular value of ΔW for its Frobenius norm, which any change of low rank raises;
  its law is Tracy and Widom's (`tracy_widom_tail`).

The matrix's p-value is the smallest times their number (Bonferroni); `correct` adjusts over matrices (Holm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from scipy.integrate import quad
from scipy.special import airy
from scipy.stats import beta

from rlheals.spectra.clusters import stretch_coordinates
from rlheals.spectra.rounding import NONE as NO_ROUNDING
from rlheals.spectra.rounding import Rounding
from rlheals.stats import holm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.spectra.drift import Measure
    from rlheals.spectra.factors import FactorView

UNCHANGED = "unchanged"
NOISE = "indistinguishable from same-norm noise"
ROTATION = "structured rotation"
MAGNITUDE = "magnitude change"
VERDICTS = (UNCHANGED, NOISE, ROTATION, MAGNITUDE)

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Verdict:
    """The verdict on one matrix.

    Attributes:
        verdict: one of `VERDICTS`.
        test: the test with the smallest p-value and its statistic, or why none was needed.
        p_value: Bonferroni over the tests of this matrix; None when the matrix is unchanged.
        p_holm: adjusted over matrices by `correct`; equal to ``p_value`` before.
        relative_change: ‖ΔW‖_F / ‖W‖_F.
        stretch_share: share of ΔW's energy on the diagonal of the base's singular basis.
    """

    verdict: str
    test: str
    p_value: float | None
    p_holm: float | None
    relative_change: float
    stretch_share: float


def unchanged(reason: str, relative_change: float = 0.0, stretch_share: float = 0.0) -> Verdict:
    """The verdict on a matrix that needs no test, e.g. on bit-identical ones (``reason`` "bit-identical")."""
    return Verdict(UNCHANGED, reason, None, None, relative_change, stretch_share)


def judge(measures: Sequence[Measure], base: FactorView, rounding: Rounding = NO_ROUNDING) -> Verdict:
    """The verdict on one matrix by itself; `correct` a family of them before reporting several.

    Args:
        measures: what `rlheals.spectra.drift.measure` found.
        base: decomposition of W, for its shape and degenerate groups.
        rounding: what storing W in a coarser type explains of the change.
    """
    values = {(measure.quantity, measure.k): measure.value for measure in measures if measure.index is None}
    relative, share = values["relative_change", None], values["stretch_share", None]
    norm = relative * float(torch.linalg.vector_norm(base.values)) if math.isfinite(relative) else math.inf
    if norm == 0.0:
        return unchanged("bit-identical")
    if rounding.type:
        return unchanged(f"every number is the reference's, rounded to {rounding.type}", relative, share)
    tests = _tests(values, base)
    p_value, test = min(tests)
    corrected = min(1.0, p_value * len(tests))
    told = f"{test}, {_p_text(corrected)}"
    if rounding.share is not None:
        told += f"; rounding alone makes {rounding.share:.2g} of the change's norm"
    return Verdict(_decide(corrected, share), told, corrected, corrected, relative, share)


def correct(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The same verdicts after Holm's correction over the family of all that were tested."""
    tested = [index for index, verdict in enumerate(verdicts) if verdict.p_value is not None]
    adjusted = holm([verdicts[index].p_value or 0.0 for index in tested])
    found = list(verdicts)
    for index, p_holm in zip(tested, adjusted, strict=True):
        old = verdicts[index]
        found[index] = replace(old, verdict=_decide(p_holm, old.stretch_share), p_holm=p_holm)
    return found


def _decide(p_value: float, stretch_share: float) -> str:
    if p_value > SIGNIFICANCE:
        return NOISE
    return MAGNITUDE if stretch_share >= 0.5 else ROTATION


def _p_text(p_value: float) -> str:
    """``p = 0.012``; below the smallest float, that it is."""
    return f"p = {p_value:.2g}" if p_value > 0 else "p < 1e-300"


def _tests(values: dict[tuple[str, int | None], float], base: FactorView) -> list[tuple[float, str]]:
    """(p-value, name and statistic) of each test."""
    rows, columns = base.shape
    share = values["stretch_share", None]
    tests = [(energy_tail(share, stretch_coordinates(base), rows * columns), f"stretch_share = {share:.3g}")]
    for (quantity, k), value in values.items():
        if quantity == "block_share" and k is not None and 1 < k < base.rank:
            name = f"block_share (k = {k}) = {value:.3g}"
            tests.append((energy_tail(value, k * k - k, rows * columns), name))
    stable_rank = values["stable_rank_of_change", None]
    tail = spectral_norm_tail(1.0 / stable_rank, rows, columns)
    return [*tests, (tail, f"spectral_norm (share of the energy) = {1.0 / stable_rank:.3g}")]


def energy_tail(share: float, coordinates: int, all_coordinates: int) -> float:
    """Probability that isotropic noise has at least this share of its energy in given coordinates (exact).

    >>> round(energy_tail(0.5, 2, 4), 3)
    0.5
    """
    if coordinates >= all_coordinates:
        return 1.0
    return float(beta.sf(share, coordinates / 2, (all_coordinates - coordinates) / 2))


def spectral_norm_tail(share: float, rows: int, columns: int) -> float:
    """Probability that the largest squared singular value of Gaussian noise has at least this share of its energy.

    Source: Johnstone, Ann. Stat. 29 (2001) 295, with the centring of Ma, Bernoulli 18 (2012) 322, for the largest
    eigenvalue of GGᵀ; that the energy is fixed rather than random makes the test conservative, the more the smaller
    the matrix (simulated: 0.9 of the nominal level at 128 × 384, 0.1 at 8 × 8).
    """
    low, high = math.sqrt(min(rows, columns) - 0.5), math.sqrt(max(rows, columns) - 0.5)
    centre, scale = (low + high) ** 2, (low + high) * (1 / low + 1 / high) ** (1 / 3)
    return tracy_widom_tail((share * rows * columns - centre) / scale)


def tracy_widom_tail(s: float) -> float:
    """Upper tail of the Tracy–Widom law of order 1.

    ``1 − exp(−½ ∫ q(x) + (x − s) q(x)² dx)`` from s on, with the Airy function for Painlevé's q, which it approaches:
    right to three digits for ``s`` above 0 (probabilities below 0.17); below −1 the value returned is 1.

    Source: Tracy & Widom, Commun. Math. Phys. 177 (1996) 727.

    >>> round(tracy_widom_tail(0.9793), 3), round(tracy_widom_tail(2.0234), 3)
    (0.05, 0.01)
    """
    if s < -1:
        return 1.0
    integral, _ = quad(lambda x: airy(x)[0] + (x - s) * airy(x)[0] ** 2, s, s + 25, epsabs=0.0)
    return -math.expm1(-0.5 * float(integral))
