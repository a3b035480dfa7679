"""Turns of a basis: the smallest rotation that carries some singular vectors' span onto another, as low-rank updates.

When some vectors of an orthonormal basis are replaced by others, what stays is no longer orthogonal to them. Of all
rotations of the space that carry the old span onto the new one, the direct rotation is the smallest; the vectors that
stay ride along with it, which makes them orthogonal to the new ones and moves them as little as any rotation can. On a
square side that is the same as the orthonormal vectors closest to what is left of them outside the new span (the polar
factor).

With T the old and A the new vectors, (n, k) each, ``TᵀA = X cos Yᵀ`` and O = X Yᵀ, the direct rotation is the
reflection across the span of T followed by that across the span of M = TO + A, which lies half-way. What is orthogonal
to T merely changes sign in the first, so it goes to ``R − M (½ MᵀM)⁻¹ MᵀR = R − M Y (1 + cos)⁻¹ Yᵀ AᵀR``: whole at
every angle, also at a right one, and nothing larger than k × k is decomposed. O comes from the singular value
decomposition, because that took 0.4 to 0.9 of the time of scaled Newton–Schulz steps (k = 204 to 819, float32, one
thread of an x86 server with MKL).

Source: Davis & Kahan, SIAM J. Numer. Anal. 7 (1970) 1, for the direct rotation; Björck & Golub, Math. Comp. 27 (1973)
579, for principal vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlheals.spectra.angles import blocks
from rlheals.spectra.small_svd import svd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_COARSE = 1e-3  # mean squared sine below which the cosines, being nearly 1, no longer tell it well


def gather(read: Callable[[slice], Tensor], spans: Sequence[slice], dtype: torch.dtype) -> Tensor:
    """Columns of a basis that is read by column slices, as one (n, columns) tensor of ``dtype``.

    Args:
        read: gives the columns of one slice, in float64.
        spans: which columns, one slice after the other.
        dtype: of the result; the float64 columns are in memory only a block at a time.
    """
    parts = [read(block).to(dtype) for block in blocks_of(spans)]
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(part.shape[1] for part in parts), parts[0].shape[0]).mT
    torch.cat(parts, dim=1, out=whole)
    return whole


def blocks_of(spans: Sequence[slice]) -> list[slice]:
    """The spans cut into what is read at a time."""
    return [block for span in spans for block in blocks(span)]


def rest_of(spans: Sequence[slice], rank: int) -> list[slice]:
    """The columns outside the spans, which are in order."""
    starts = [0, *(span.stop for span in spans)]
    stops = [*(span.start for span in spans), rank]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True) if stop > start]


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal matrix closest to a square one (k, k); one of them where it is singular."""
    left, _, right = svd(matrix)
    return left @ right


def sine_norm(old: Tensor, new: Tensor, overlap: Tensor | None = None) -> float:
    """Frobenius norm of the sines of all principal angles between the spans of two (n, k) orthonormal bases.

    Args:
        old: one basis.
        new: the other.
        overlap: their product ``oldᵀ new``, where it is known.
    """
    overlap = old.mT @ new if overlap is None else overlap
    squared = overlap.shape[0] - float(overlap.square().sum(dtype=torch.float64))
    if squared > _COARSE * overlap.shape[0]:
        return math.sqrt(squared)
    return float(torch.linalg.vector_norm(torch.addmm(new, old, overlap, alpha=-1.0)))


class DirectRotation:
    """The direct rotation from the span of ``old`` to that of ``new``, for what is orthogonal to the first.

    Attributes:
        sine: Frobenius norm of the sines of all principal angles between the two spans.
    """

    def __init__(self, old: Tensor, new: Tensor) -> None:
        """Two bases of orthonormal columns, (n, k) each."""
        overlap = old.mT @ new
        left, cosines, right = svd(overlap)
        self.sine = sine_norm(old, new, overlap)
        self._old, self._new, self._turn = old, new, left @ right
        self._core = (right.mT / (1.0 + cosines)) @ right

    def carry_(self, rest: Tensor) -> Tensor:
        """Turn ``rest`` (n, l), whose columns are orthogonal to the old span, in place; returns it."""
        inner = self._core @ (self._new.mT @ rest)
        if rest.shape[1] > self._old.shape[1]:
            middle = torch.addmm(self._new, self._old, self._turn)
            return rest.addmm_(middle, inner, alpha=-1.0)
        rest.addmm_(self._new, inner, alpha=-1.0)
        return rest.addmm_(self._old, self._turn @ inner, alpha=-1.0)


def carried_by_rest(old_rest: Tensor, new_rest: Tensor) -> tuple[Tensor, float]:
    """What the same rotation makes of the vectors outside the old span, on a square side and from those alone.

    Args:
        old_rest: (n, n − k) all that is orthogonal to the old span.
        new_rest: (n, n − k) all that is orthogonal to the new one.

    Returns:
        ``old_rest`` turned, and the norm of the sines as in `DirectRotation`.
    """
    overlap = new_rest.mT @ old_rest
    return new_rest @ polar(overlap), sine_norm(new_rest, old_rest, overlap)


@dataclass(frozen=True)
class Planes:
    """Planes of a rotation: column i of ``first`` turns towards column i of ``second`` by ``angles[i]`` radians.

    All 2p columns are orthonormal; a column of ``second`` may be anything of norm at most 1 where its angle is 0.
    """

    first: Tensor
    second: Tensor
    angles: Tensor

    def turn_(self, matrix: Tensor, share: float = 1.0) -> Tensor:
        """Turn the columns of ``matrix`` (n, l) by ``share`` of the angles, in place; returns it."""
        along, across = self.first.mT @ matrix, self.second.mT @ matrix
        sine = torch.sin(self.angles * share)[:, None]
        less = -2.0 * torch.sin(self.angles * (0.5 * share)).square()[:, None]  # cos − 1 without cancellation
        matrix.addmm_(self.first, (along * less).addcmul_(across, sine, value=-1.0))
        return matrix.addmm_(self.second, along.mul_(sine).addcmul_(across, less))


def geodesic(old: Tensor, new: Tensor) -> Planes:
    """The planes of the direct rotation from the span of ``old`` to that of ``new``, (n, k) orthonormal columns each.

    Turning by a share t of all angles is the point t on the shortest path between the two spans.
    """
    left, cosines, right = svd(old.mT @ new)
    first = old @ left
    second = (new @ right.mT).addcmul_(first, cosines, value=-1.0)
    sines = torch.linalg.vector_norm(second, dim=0)
    second /= sines.clamp_min(torch.finfo(old.dtype).tiny)
    return Planes(first, second, torch.atan2(sines, cosines))


def principal_angles_of(old: Tensor, new: Tensor) -> Tensor:
    """The angles of `geodesic`, largest first, (k,)."""
    return geodesic(old, new).angles.sort(descending=True).values


def random_planes(within: Tensor, angles: Tensor, generator: torch.Generator) -> Planes:
    """Planes that turn the span of ``within`` (n, k) by these angles in a random direction.

    Args:
        within: orthonormal columns.
        angles: as many as wanted, (p,) with p at most k and n − k.
        generator: what is drawn: which vectors of the span turn, and where to, each uniformly.
    """
    length, width = within.shape
    count = angles.numel()
    chosen = orthonormal(_gaussian(width, count, generator, within))
    towards = _gaussian(length, count, generator, within)
    for _ in range(2):  # once more for what rounding leaves of the span
        towards -= within @ (within.mT @ towards)
        towards = orthonormal(towards)
    return Planes(within @ chosen, towards, angles)


def equal_planes(length: int, count: int, generator: torch.Generator, like: Tensor) -> Planes:
    """So many random planes of a space of ``length`` dimensions, each with an angle of 1."""
    frame = orthonormal(_gaussian(length, 2 * count, generator, like))
    return Planes(frame[:, :count], frame[:, count:], like.new_ones(count))


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns; uniformly distributed when they are Gaussian."""
    parts: tuple[Tensor, Tensor] = torch.linalg.qr(matrix)
    basis, triangle = parts
    signs = torch.sign(triangle.diagonal())
    return basis.mul_(torch.where(signs == 0, torch.ones_like(signs), signs))


def _gaussian(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype)
