"""Does a spectrum coincide with the law of a fresh initialiser? Then the weights were never loaded, or never trained.

A spectrum of the published Llama figures does, index by index: a conversion with names that did not match left the
text model as it was initialised, and random matrices were plotted as a finding. Nobody notices by eye.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Allowed: first + second · unit. In 13 740 fresh matrices of ranks 8 to 512 the extremes were 3.6, 4.0 and 4.8 units.
_DISTANCE = (0.005, 4.0)  # of the distributions, in units of 1 / rank
_NORM = (0.01, 5.0)  # of the relative norm, in units of its standard deviation
_EDGE = (0.01, 6.0)  # of the relative largest value, in units of its Tracy-Widom scale
_EDGE_MEAN = -1.21  # of the Tracy-Widom law for real matrices, in the same unit
_SMALLEST_RANK = 32  # below it the limits are so wide that trained matrices would pass
_GRID = 4096


class RandomLawWarning(UserWarning):
    """A weight's singular values are those of its initialiser's random law."""


@dataclass(frozen=True)
class RandomLaw:
    """What was compared when a spectrum matches the random law.

    Attributes:
        standard_deviation: of the fresh entries, the config's ``initializer_range``.
        low: smallest singular value expected, the lower Marchenko-Pastur edge; ``high`` the upper one.
        smallest: smallest singular value found; ``largest`` the largest.
        distance: largest difference between the distribution found and the Marchenko-Pastur law (0 to 1).
    """

    standard_deviation: float
    low: float
    high: float
    smallest: float
    largest: float
    distance: float

    @property
    def text(self) -> str:
        """The warning, to be shown beside the name of the tensor; before the colon stands what others may share."""
        return (
            f"matches the random law of its initialiser (N(0, {self.standard_deviation:g}²)), so its weights were "
            f"probably not loaded or never trained: singular values from {self.smallest:.4g} to {self.largest:.4g}, "
            f"Marchenko-Pastur edges {self.low:.4g} and {self.high:.4g}, distributions {self.distance:.2g} apart"
        )

    def warn(self, tensor: str) -> None:
        """Issue a `RandomLawWarning` that names ``tensor``."""
        warnings.warn(f"{tensor} {self.text}.", RandomLawWarning, stacklevel=2)


def looks_untrained(values: Tensor, shape: tuple[int, int], initializer_range: float) -> RandomLaw | None:
    """Compare singular values with those of an (m, n) matrix of independent N(0, ``initializer_range``²) entries.

    They match when the Frobenius norm, the largest value and the whole distribution do, each within what chance
    explains (about five standard deviations) plus at most one per cent; the norm alone has a relative standard
    deviation of ``1 / √(2mn)``, so that hardly anything else passes. Matrices of rank below 32 are not judged.

    Args:
        values: (r,) all singular values, in any order, r = min(m, n).
        shape: (m, n).
        initializer_range: standard deviation of fresh weights.

    Returns:
        The comparison if they match, else None.

    Source: Marchenko and Pastur 1967 for the law; Johnstone 2001 for the spread of the largest value.
    """
    rank = min(shape)
    ordered = values.double().sort().values
    if rank < _SMALLEST_RANK or initializer_range <= 0 or not bool((ordered[-1] > 0).item()):
        return None
    low, high = marchenko_pastur_edges(shape, initializer_range)
    largest = float(ordered[-1])
    if not norm_fits(float(ordered.norm()), shape, initializer_range):
        return None
    scale = _edge_scale(shape)
    if abs(largest / high - 1 - _EDGE_MEAN * scale) > _EDGE[0] + _EDGE[1] * scale:
        return None
    ranks = (torch.arange(rank, dtype=torch.float64) + 0.5) / rank
    distance = float((marchenko_pastur_cdf(ordered, shape, initializer_range) - ranks).abs().max())
    if distance > _DISTANCE[0] + _DISTANCE[1] / rank:
        return None
    return RandomLaw(initializer_range, low, high, float(ordered[0]), largest, distance)


def norm_fits(norm: float, shape: tuple[int, int], initializer_range: float) -> bool:
    """Whether the Frobenius norm alone is one that the initialiser gives: what it costs no decomposition to know."""
    if min(shape) < _SMALLEST_RANK or initializer_range <= 0:
        return False
    relative = norm / (initializer_range * math.sqrt(math.prod(shape)))
    return abs(relative - 1) <= _NORM[0] + _NORM[1] / math.sqrt(2 * math.prod(shape))


def marchenko_pastur_edges(shape: tuple[int, int], standard_deviation: float) -> tuple[float, float]:
    """Smallest and largest singular value of a large random (m, n) matrix: ``s · |√m ∓ √n|``.

    >>> [round(edge, 3) for edge in marchenko_pastur_edges((1024, 4096), 0.02)]
    [0.64, 1.92]
    """
    m, n = map(math.sqrt, shape)
    return standard_deviation * abs(m - n), standard_deviation * (m + n)


def marchenko_pastur_cdf(values: Tensor, shape: tuple[int, int], standard_deviation: float) -> Tensor:
    """Share of the singular values of a large random (m, n) matrix that lie below each of ``values`` (any shape).

    With c = r / max(m, n) and the square of a value over ``s² · max(m, n)`` written ``x = 1 + c − 2√c · cos θ``, the
    density is ``2/π · sin²θ / x`` on 0 < θ < π; it is summed by the midpoint rule, accurate to better than 1e-6.
    """
    wide = max(shape)
    root = math.sqrt(min(shape) / wide)
    angles = (torch.arange(_GRID, dtype=torch.float64) + 0.5) * (math.pi / _GRID)
    density = 2 / math.pi * angles.sin() ** 2 / ((1 - root) ** 2 + 2 * root * (1 - angles.cos()))
    below = torch.cat([torch.zeros(1, dtype=torch.float64), (density * (math.pi / _GRID)).cumsum(0)])
    squares = (values.double() / standard_deviation) ** 2 / wide
    cosines = ((1 + root**2 - squares) / (2 * root)).clamp(-1, 1)
    position = cosines.arccos() * (_GRID / math.pi)
    left = position.floor().long().clamp(max=_GRID - 1)
    part = position - left
    return below[left] * (1 - part) + below[left + 1] * part


def _edge_scale(shape: tuple[int, int]) -> float:
    """Tracy-Widom scale of the largest singular value relative to the upper edge (half of that of its square)."""
    m, n = map(math.sqrt, shape)
    return 0.5 * math.cbrt(1 / m + 1 / n) / (m + n)
