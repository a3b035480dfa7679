"""What every drift number would be if nothing but chance were at work: two nulls, as 95 % prediction intervals.

- Independent random subspaces (`random_subspace_bands`): both bases uniform on the Stiefel manifold. The squared
  cosines of the angles between a k- and an l-dimensional random subspace of an n-dimensional space follow the Jacobi
  ensemble; it is sampled through Sutton's bidiagonal model, at O(k) random numbers a draw.
- The base plus Gaussian noise of the change's Frobenius norm (`same_norm_bands`). Gaussian noise looks the same in
  every orthonormal basis, so the draws are made in the base's own singular basis, where the base is diagonal; each is
  decomposed and put through the very code that measures real changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from scipy.stats import beta
from scipy.stats import t as student

from rlheals.spectra.angles import SIDES, Part, Side, resolve_k
from rlheals.spectra.drift import Key, MeasureSettings, series, thinned
from rlheals.spectra.factorise import factorise
from rlheals.spectra.factors import Factors, MemoryFactors
from rlheals.spectra.norms import SMALL, frobenius, spectral_norm
from rlheals.spectra.small_svd import svd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from rlheals.spectra.factors import FactorView

LEVEL = 0.95
DRAWS = 200
"""Draws behind a band of the random-subspace null; a quarter for k above 512, where the law hardly varies."""
SHARES = ("vectors_identified", "intruders", "weyl_ratio", "sigma_change_norm")
FIXED = ("relative_change", "sigma_before", "stable_rank_before", "angle_error_bound")
"""What noise of the same norm has in common with the real change by construction; it gets no band."""
COARSE = 1e-3
"""Small matrices are decomposed in float32 when the noise is more than this share of the base, else in float64."""


@dataclass(frozen=True)
class Band:
    """95 % prediction interval of one number under a null."""

    low: float
    high: float


def prediction_band(draws: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Low and high ends of the interval that holds the next draw with 95 %: mean ± t · sd · √(1 + 1/d), (numbers,).

    Args:
        draws: (d, numbers), d at least 2.

    Source: the prediction interval of a normal sample (Hahn & Meeker, Statistical Intervals, 1991).
    """
    count = draws.shape[0]
    centre, spread = draws.mean(0), draws.std(0, ddof=1)
    half = float(student.ppf((1 + LEVEL) / 2, count - 1)) * spread * math.sqrt(1 + 1 / count)
    return centre - half, centre + half


def jacobi_edges(n: int, k: int, l: int) -> tuple[float, float]:  # noqa: E741
    """Smallest and largest angle between random k- and l-dimensional subspaces as n grows at fixed shares, in radians.

    ``cos² = (√(f(1 − g)) ± √(g(1 − f)))²`` with f = k/n and g = l/n; for k = l the smallest is arccos √(4f(1 − f)) and
    the largest π/2. With k + l > n at least k + l − n angles are exactly 0.

    Source: Wachter, Ann. Stat. 8 (1980) 937.

    >>> [round(math.degrees(jacobi_edges(4096, k, k)[0]), 1) for k in (512, 768, 1024)]
    [48.6, 38.7, 30.0]
    """
    f, g = k / n, l / n
    upper = (math.sqrt(f * (1 - g)) + math.sqrt(g * (1 - f))) ** 2
    lower = (math.sqrt(f * (1 - g)) - math.sqrt(g * (1 - f))) ** 2
    smallest = 0.0 if k + l > n else math.acos(math.sqrt(min(1.0, upper)))
    return smallest, math.acos(math.sqrt(min(1.0, lower)))


def random_angles(n: int, k: int, l: int, draws: int, seed: int) -> NDArray[np.float64]:  # noqa: E741
    """Principal angles between independent uniform subspaces of dimensions k and l in n, (draws, min(k, l)), ascending.

    The first max(0, k + l − n) angles are 0; the rest are those between the two complements.

    Source: Edelman & Sutton, Found. Comput. Math. 8 (2008) 259, for real matrices (β = 1).
    """
    few, many = min(k, l), max(k, l)
    certain = max(0, k + l - n)
    angles = np.zeros((draws, few))
    if certain < few:
        small, large = (few, many) if not certain else (n - many, n - few)
        generator = np.random.default_rng([seed, n, k, l])
        for draw in range(draws):
            squares = _jacobi_draw(small, large - small, n - large - small, generator)
            angles[draw, certain:] = np.arccos(np.sqrt(np.clip(squares, 0.0, 1.0)))[::-1]
    return angles


def _jacobi_draw(size: int, a: int, b: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Squared cosines, ascending: squared singular values of Edelman and Sutton's upper bidiagonal matrix."""
    i = np.arange(size, 0, -1)
    cosine = generator.beta((a + i) / 2, (b + i) / 2)
    j = np.arange(size - 1, 0, -1)
    other = generator.beta(j / 2, (a + b + 1 + j) / 2)
    if size == 1:
        return cosine
    main = np.concatenate([cosine[:1], cosine[1:] * (1 - other)])
    above = (1 - cosine[:-1]) * other
    diagonal = main + np.append(above, 0.0)
    return np.asarray(eigvalsh_tridiagonal(diagonal, np.sqrt(above * main[1:])))


@lru_cache(maxsize=256)
def _random_summary(n: int, k: int, curve_points: int) -> tuple[tuple[Key, float, float], ...]:
    """Bands of all angle quantities of two random k-dimensional subspaces of n dimensions; side and part left empty."""
    angles = random_angles(n, k, k, DRAWS if k <= 512 else DRAWS // 4, seed=0)
    sines = np.sqrt(np.square(np.sin(angles)).mean(1))
    names = ("angle_mean", "angle_max", "angle_min", "angle_rms_sine")
    points = thinned(k, curve_points)
    numbers = np.column_stack([angles[:, points], angles.mean(1), angles[:, -1], angles[:, 0], sines])
    keys = [Key("angle", k=k, index=point) for point in points] + [Key(name, k=k) for name in names]
    low, high = (np.clip(end, 0.0, math.pi / 2) for end in prediction_band(numbers))
    return tuple(zip(keys, low.tolist(), high.tolist(), strict=True))


def random_vector_band(n: int) -> Band:
    """Angle between two independent random lines in n dimensions: cos² is exactly Beta(1/2, (n − 1)/2)."""
    if n == 1:
        return Band(0.0, 0.0)
    high, low = (math.acos(math.sqrt(beta.ppf(p, 0.5, (n - 1) / 2))) for p in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Band(low, high)


@lru_cache(maxsize=64)
def _intruder_probability(n: int, rank: int, cutoff: float) -> float:
    """Probability that a random line has |cosine| below ``cutoff`` with each of ``rank`` orthonormal vectors.

    From the union bound where that is below 0.001 (exact to its square), simulated otherwise.
    """
    if n == 1:
        return 0.0
    union = rank * float(beta.sf(cutoff**2, 0.5, (n - 1) / 2))
    if union < 1e-3:
        return 1.0 - union
    lines = np.random.default_rng([0, n, rank]).standard_normal((20_000, n))
    lines /= np.linalg.norm(lines, axis=1, keepdims=True)
    return float((np.abs(lines[:, :rank]).max(1) < cutoff).mean())


def random_subspace_bands(
    shape: tuple[int, int], settings: MeasureSettings, groups: list[Key] | None = None
) -> dict[Key, Band]:
    """Bands of every angle quantity and of ``intruders`` when the tuned matrix has nothing to do with the base.

    Args:
        shape: (m, n) of the matrix.
        settings: those of the measures.
        groups: keys of measured ``vector_angle`` and ``cluster_angle``, whose ranks depend on the matrix; others in
            the list are ignored.

    Raises:
        UserError: a k that is larger than the rank, or no share of it.
    """
    rank = min(shape)
    ks = sorted({resolve_k(k, rank) for k in settings.ks})
    found: dict[Key, Band] = {}
    for side, length in zip(SIDES, shape, strict=True):
        for k in ks:
            found |= _angle_bands(side, settings.parts, length, k, settings.curve_points)
            found[Key("intruders", side, "top", k)] = _share_band(
                _intruder_probability(length, rank, settings.intruder_cutoff), k
            )
    for key in groups or []:
        if key.quantity == "vector_angle":
            found[key] = random_vector_band(shape[SIDES.index("left" if key.side == "left" else "right")])
        elif key.quantity == "cluster_angle" and key.k is not None:
            length = shape[SIDES.index("left" if key.side == "left" else "right")]
            ends = {entry[0].quantity: entry[1:] for entry in _random_summary(length, key.k, 2)}
            found[key] = Band(*ends["angle_max"])
    return found


def embedding_head_bands(width: int, rank: int, settings: MeasureSettings, suffix: str) -> dict[Key, Band]:
    """Bands of `rlheals.spectra.drift.embedding_head_angles` for unrelated matrices of ``width`` columns."""
    found: dict[Key, Band] = {}
    for k in sorted({resolve_k(k, rank) for k in settings.ks}):
        for key, low, high in _random_summary(width, k, settings.curve_points):
            if key.quantity in ("angle", "angle_mean"):
                name = key.quantity.replace("angle", "embedding_head_angle") + f"_{suffix}"
                found[Key(name, "right", "top", k, key.index)] = Band(low, high)
    return found


def _angle_bands(side: Side, parts: tuple[Part, ...], length: int, k: int, points: int) -> Iterator[tuple[Key, Band]]:
    for key, low, high in _random_summary(length, k, points):
        for part in parts:
            yield Key(key.quantity, side, part, k, key.index), Band(low, high)


def _share_band(probability: float, count: int) -> Band:
    """Of the share of ``count`` independent events, normal approximation, clipped."""
    half = 1.96 * math.sqrt(probability * (1 - probability) / count)
    return Band(max(0.0, probability - half), min(1.0, probability + half))


def same_norm_bands(
    base: FactorView,
    norm: float,
    settings: MeasureSettings,
    draws: int,
    seed: int,
    *,
    spectral: float | None = None,
    device: str = "cpu",
) -> dict[Key, Band]:
    """Bands of every measure under W' = W + Gaussian noise with ‖noise‖_F = ``norm``.

    Args:
        base: decomposition of W; only its shape and singular values are read.
        norm: Frobenius norm of the real change.
        settings: those of the measures.
        draws: how many; below 2 there is no band.
        seed: of the draws.
        spectral: spectral norm of the real change, by which singular vectors are grouped, so that the real change's
            ``vector_angle`` and ``cluster_angle`` find their bands; that of the first draw if None.
        device: where large draws are decomposed.

    Returns:
        Bands by `Key`; none for a norm of 0.
    """
    if draws < 2 or norm == 0.0:
        return {}
    generator = torch.Generator().manual_seed(seed)
    own = _OwnBasis(base)
    values: list[NDArray[np.float64]] = []
    keys: list[Key] = []
    for _ in range(draws):
        noise = _noise(own, norm, base.shape, generator)
        spectral = spectral_norm(noise) if spectral is None else spectral
        found = series(own, _with_noise(own, noise, device), noise, settings, spectral)
        values.append(found.vector())
        keys = keys or found.keys()
    with np.errstate(invalid="ignore"):  # a zero base has infinite relative changes; they get no band
        low, high = prediction_band(np.stack(values))
    bands = zip(keys, low.tolist(), high.tolist(), strict=True)
    return {key: _clipped(key, a, b) for key, a, b in bands if math.isfinite(a) and key.quantity not in FIXED}


def _clipped(key: Key, low: float, high: float) -> Band:
    """The band within the quantity's range."""
    if "angle" in key.quantity:
        return Band(max(0.0, low), min(math.pi / 2, high))
    if key.quantity.endswith("_share") or key.quantity in SHARES:
        return Band(max(0.0, low), min(1.0, high))
    return Band(low, high)


class _OwnBasis:
    """The base in its own singular basis (`FactorView`): unit vectors, made when read.

    Of the long side only r further dimensions are kept: all noise outside the base's space fits into them after a
    rotation of that space, which no measure sees.
    """

    orthonormality_error = 0.0
    driver = "own basis"

    def __init__(self, base: FactorView) -> None:
        self.rank = base.rank
        self.values = base.values.to("cpu", torch.float64)
        rows, columns = (min(length, 2 * base.rank) for length in base.shape)
        self.shape = (rows, columns)
        self.reconstruction_error = base.reconstruction_error

    def left(self, columns: slice) -> Tensor:
        """Unit vectors, (m, columns)."""
        return self._units(self.shape[0], columns)

    def right(self, columns: slice) -> Tensor:
        """Unit vectors, (n, columns)."""
        return self._units(self.shape[1], columns)

    def _units(self, length: int, columns: slice) -> Tensor:
        units = torch.zeros(length, columns.stop - columns.start, dtype=torch.float64)
        units[columns].fill_diagonal_(1.0)
        return units


def _noise(own: _OwnBasis, norm: float, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Gaussian noise of an (m, n) matrix, compressed to ``own.shape``, scaled to the Frobenius norm ``norm``.

    A Gaussian block with more columns q than rows r is a lower triangular matrix times a rotation, the triangle's
    diagonal being χ of q, q − 1, … degrees of freedom (Bartlett, Proc. R. Soc. Edinb. 53 (1933) 260).
    """
    coarse = own.rank > SMALL or norm > COARSE * float(torch.linalg.vector_norm(own.values))
    dtype = torch.float32 if coarse else torch.float64
    rank, outside = own.rank, max(shape) - own.rank
    noise = torch.randn(rank, max(own.shape), generator=generator, dtype=dtype)
    if outside > rank:
        degrees = torch.arange(outside, outside - rank, -1, dtype=torch.float64)
        gamma = torch._standard_gamma(degrees / 2, generator=generator)
        triangle = noise[:, rank:]
        triangle.tril_(-1)
        triangle.diagonal().copy_((2 * gamma).sqrt())
    noise *= norm / frobenius(noise)
    return noise if shape[0] <= shape[1] else noise.mT.contiguous()


def _with_noise(own: _OwnBasis, noise: Tensor, device: str) -> MemoryFactors:
    """Decomposition of the base plus noise, in the base's singular basis."""
    matrix = noise.clone()
    matrix.diagonal().add_(own.values.to(matrix))
    if own.rank > SMALL:
        return MemoryFactors(factorise(matrix, device=device))
    left, values, right = svd(matrix, full_matrices=False)
    return MemoryFactors(Factors(left, values.to("cpu", torch.float64), right.mT, "null draw", 0.0, 0.0))
