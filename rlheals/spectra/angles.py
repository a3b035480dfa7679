"""Principal angles between subspaces in the sine form, and how far a computed angle can be off.

The cosine of a small angle is 1 to working precision, so angles are taken from the sines, the singular values of what
one basis has outside the other's span, wherever those are the smaller ones.

Source: Björck & Golub, Math. Comp. 27 (1973) 579; Knyazev & Argentati, SIAM J. Sci. Comput. 23 (2002) 2008.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from rlheals.errors import UserError
from rlheals.spectra.small_svd import svdvals

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from rlheals.spectra.factors import FactorView

Part = Literal["top", "bottom", "band"]
Side = Literal["left", "right"]
PARTS: tuple[Part, ...] = ("top", "bottom", "band")
SIDES: tuple[Side, ...] = ("left", "right")
BLOCK = 256
"""Columns of a basis that are read at a time."""


def resolve_k(k: float, rank: int) -> int:
    """How many singular triples ``k`` means: a count (an integer), or a share of ``rank`` (a float within 0 and 1).

    Raises:
        UserError: a count below 1 or above the rank, or a share outside (0, 1].

    >>> resolve_k(16, 128), resolve_k(0.25, 128), resolve_k(0.001, 128)
    (16, 32, 1)
    """
    if isinstance(k, int):
        if not 1 <= k <= rank:
            raise UserError(
                f"k = {k} asks for {k} singular vectors of a matrix of rank at most {rank}: give a count within 1 and "
                f"{rank}, or a share of the rank within 0 and 1 such as 0.25."
            )
        return k
    if not 0 < k <= 1:
        raise UserError(
            f"k = {k} is no share of the rank: give a number within 0 and 1 such as 0.25, or a whole count."
        )
    return max(1, round(k * rank))


def columns(part: Part, k: int, rank: int) -> slice:
    """Which columns of a basis of ``rank`` columns the ``k`` of a part are: the first, the last, or the middle ones."""
    start = {"top": 0, "bottom": rank - k, "band": (rank - k) // 2}[part]
    return slice(start, start + k)


def blocks(whole: slice, size: int | None = None) -> list[slice]:
    """``whole`` cut into consecutive slices of at most ``size`` columns, `BLOCK` if None."""
    size = size or BLOCK
    return [slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles between the spans of two orthonormal bases, in radians, smallest first.

    Args:
        a: (n, k) orthonormal columns, float64.
        b: (n, l) orthonormal columns, float64.

    Returns:
        (min(k, l),) angles within 0 and π/2, ascending.
    """
    larger, smaller = (a, b) if a.shape[1] >= b.shape[1] else (b, a)
    return angles_to(lambda part: larger[:, part], slice(0, larger.shape[1]), smaller.clone())


def angles_to(read: Callable[[slice], Tensor], span: slice, basis: Tensor) -> Tensor:
    """`principal_angles` against a basis that is read by column blocks; ``basis`` is overwritten.

    Args:
        read: gives the columns of the other orthonormal basis, (n, columns).
        span: which of its columns span the other subspace; at least as many as ``basis`` has.
        basis: (n, l) orthonormal columns; on return what of them lies outside the other span.

    Returns:
        (l,) angles in radians, ascending.
    """
    overlap = basis.new_empty(span.stop - span.start, basis.shape[1])
    for block in blocks(span):
        other = read(block)
        # Taking away block by block is the modified Gram–Schmidt process: as the blocks are orthogonal to each
        # other, what is left of the basis has the same overlap with the next block as the whole had.
        part = other.mT @ basis
        overlap[block.start - span.start : block.stop - span.start] = part
        basis -= other @ part
    sines = svdvals(basis).flip(0).clamp(0.0, 1.0)
    if float(sines[-1]) ** 2 < 0.5:
        return torch.asin(sines)
    cosines = svdvals(overlap).clamp(0.0, 1.0)
    return torch.where(cosines.square() >= 0.5, torch.asin(sines), torch.acos(cosines))


def side_reader(view: FactorView, side: Side) -> Callable[[slice], Tensor]:
    """The method of ``view`` that reads the basis of one side."""
    return view.left if side == "left" else view.right


def subspace_angles(base: FactorView, tuned: FactorView, side: Side, span: slice) -> Tensor:
    """Principal angles between the same columns of two decompositions' bases; one of the two is read by blocks.

    When the columns span the whole space (all r columns on a side of length r) every angle is 0 by definition; the
    zeros are returned without reading anything, and mean nothing.

    Args:
        base: the reference.
        tuned: the other matrix, of the same shape.
        side: left or right singular vectors.
        span: which columns.

    Returns:
        (columns,) angles in radians, ascending.
    """
    length = base.shape[0 if side == "left" else 1]
    if span.stop - span.start == length:
        return torch.zeros(length, dtype=torch.float64)
    return angles_to(side_reader(base, side), span, side_reader(tuned, side)(span))


def part_gap(values: Tensor, span: slice, *, square: bool) -> float:
    """How far the singular values of some columns lie from all others: what identifies their span.

    On a matrix that is not square the vectors outside the thin basis belong to singular value 0, so the distance from
    0 counts too.

    Args:
        values: (r,) singular values, descending.
        span: which columns.
        square: whether the matrix is square.

    Returns:
        The distance, in the unit of the values; infinite for the whole basis of a square matrix.
    """
    distances = [math.inf]
    if span.start > 0:
        distances.append(float(values[span.start - 1] - values[span.start]))
    if span.stop < values.numel():
        distances.append(float(values[span.stop - 1] - values[span.stop]))
    if not square:
        distances.append(float(values[span.stop - 1]))
    return max(0.0, min(distances))


def error_bound(view: FactorView, span: slice) -> float:
    """How far the computed span of these singular vectors may be from the exact one, in radians.

    The computed factors are the exact ones of a matrix that differs by at most ``E`` in the Frobenius norm, ``E`` being
    the reconstruction error plus what the lack of orthonormality allows. Then ``sin θ ≤ √2 E / (gap − E)`` for every
    principal angle θ between the two spans, on either side.

    Source: Wedin, BIT 12 (1972) 99, in the Frobenius norm, with the computed gap lessened by ``E`` (Weyl).

    Returns:
        The bound, π/2 when the gap does not identify the span at all.
    """
    square = view.shape[0] == view.shape[1]
    norm = float(torch.linalg.vector_norm(view.values))
    backward = (view.reconstruction_error + view.rank * view.orthonormality_error) * norm
    gap = part_gap(view.values, span, square=square) - backward
    sine = math.sqrt(2) * backward / gap if gap > 0 else 1.0
    return math.asin(min(1.0, sine)) + view.rank * view.orthonormality_error


def angle_error_bound(base: FactorView, tuned: FactorView, span: slice) -> float:
    """How far a computed principal angle between two decompositions may be off, in radians, at most π/2.

    Principal angles move by no more than the two spans do: Qiu, Zhang & Li, Linear Algebra Appl. 402 (2005) 111.
    """
    return min(math.pi / 2, error_bound(base, span) + error_bound(tuned, span))
