"""Changes of a tensor that can be undone and redone bit for bit on any machine.

Two ideas make it so. Floating-point numbers are counted: the n-th number above another is n further, so the difference
of two tensors is a tensor of whole numbers that is added, taken back and summed without rounding, modulo the width of
the type. And factors are rounded to a grid on which every partial sum of their product fits into the 53 bits of a
float64, so that the product is the same in whatever order a library adds it up; what the product misses is a count
again, mostly zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlheals.spectra.small_svd import svd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_COUNTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_NARROW = (torch.int8, torch.int16, torch.int32, torch.int64)
_BLOCK = 1 << 16  # numbers worked on at a time, in float64
_MANTISSA = 53
_FACTOR_BITS = 24  # a float32 holds whole numbers up to 2^24
_FIRST_RANKS = 8
# How much more than one rounding an edit may leave: edits of float32 weights are computed in several float32 steps.
_SLACK = {2: 1.2, 4: 4.0, 8: 4.0}


@dataclass(frozen=True)
class Counts:
    """A tensor of whole numbers, small ones dense and the rest by position; None for a part that is all zero.

    Attributes:
        dense: (numel,) of a narrow type.
        positions: flat indices of the numbers that are too large for ``dense``, int32 or int64.
        values: those numbers.
    """

    dense: Tensor | None
    positions: Tensor | None
    values: Tensor | None

    def negated(self) -> Counts:
        """The numbers with the other sign, modulo their width."""
        return Counts(
            None if self.dense is None else -self.dense, self.positions, None if self.values is None else -self.values
        )


@dataclass(frozen=True)
class Step:
    """One change of a tensor: ``after = round(before + left · right) + forward`` in counts, and back.

    Attributes:
        left: (m, k) float32 on the grid of `exact_factors`, or None for a change without factors.
        right: (k, n).
        forward: what the factors miss on the way there; without factors the whole change.
        backward: what they miss on the way back; None without factors, where it is ``forward`` negated.
    """

    left: Tensor | None
    right: Tensor | None
    forward: Counts
    backward: Counts | None

    @property
    def rank(self) -> int:
        """Columns of the factors; 0 without factors."""
        return 0 if self.left is None else self.left.shape[1]

    def inverted(self) -> Step:
        """The way back."""
        if self.left is None or self.backward is None:
            return Step(None, None, self.forward.negated(), None)
        return Step(-self.left, self.right, self.backward, self.forward)

    def apply(self, tensor: Tensor) -> Tensor:
        """The changed tensor; bit for bit what the step was made from."""
        return move(predict(tensor, self.left, self.right), self.forward)


def count(before: Tensor, after: Tensor) -> Tensor:
    """How many floating-point numbers ``after`` lies above ``before``, flat, modulo the width of their type."""
    counts = _ordered(after)
    for start, block in _blocks(before.contiguous().reshape(-1)):  # a second whole copy would be the peak of a patch
        counts[start : start + len(block)] -= _ordered(block)
    return counts


def move(tensor: Tensor, counts: Counts) -> Tensor:
    """The numbers that lie ``counts`` further; a fresh tensor."""
    ordered = _ordered(tensor)
    if counts.dense is not None:
        ordered += counts.dense
    if counts.positions is not None and counts.values is not None:
        ordered[counts.positions.long()] += counts.values.to(ordered.dtype)
    return _order_(ordered).view(tensor.dtype).reshape(tensor.shape)


def pack(counts: Tensor) -> Counts:
    """The smallest of the ways to store these numbers, (numel,): how wide the dense part is, if there is one."""
    place = torch.int32 if counts.numel() <= torch.iinfo(torch.int32).max else torch.int64
    widths = [None, *(dtype for dtype in _NARROW if dtype.itemsize <= counts.element_size())]
    each = place.itemsize + counts.element_size()

    def size(dtype: torch.dtype | None) -> int:
        large = sum(int(_outside(block, dtype).sum()) for _, block in _blocks(counts))
        return large * each + (dtype.itemsize if dtype else 0) * counts.numel()

    dtype = min(widths, key=size)
    found = [_outside(block, dtype).nonzero().reshape(-1) + start for start, block in _blocks(counts)]
    positions = torch.cat(found) if found else counts.new_empty(0, dtype=torch.int64)
    dense = None
    if dtype is not None:
        dense = torch.empty(counts.numel(), dtype=dtype)
        for start, block in _blocks(counts):
            dense[start : start + len(block)] = block.masked_fill(_outside(block, dtype), 0)
    if not positions.numel():
        return Counts(dense, None, None)
    return Counts(dense, positions.to(place), _narrowed(counts[positions]))


def unpack(counts: Counts, numel: int, dtype: torch.dtype) -> Tensor:
    """The numbers of ``counts`` for a tensor of this size and floating-point type."""
    whole = torch.zeros(numel, dtype=_COUNTS[dtype.itemsize])
    if counts.dense is not None:
        whole += counts.dense
    if counts.positions is not None and counts.values is not None:
        whole[counts.positions.long()] += counts.values.to(whole.dtype)
    return whole


def predict(tensor: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``tensor + left · right``, computed in float64 and rounded once more to the type of ``tensor``."""
    if left is None or right is None:
        return tensor
    wide, predicted = right.to(torch.float64), torch.empty_like(tensor)
    for rows in _row_blocks(tensor):
        block = tensor[rows].to(torch.float64)
        predicted[rows] = block.add_(left[rows].to(torch.float64) @ wide).to(tensor.dtype)
    return predicted


def exact_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (m, k) and (k, n) rounded to grids on which their float64 product is exact, as float32."""
    headroom = math.ceil(math.log2(left.shape[1])) if left.shape[1] > 1 else 0
    bits = min(_FACTOR_BITS, (_MANTISSA - headroom) // 2)
    return _on_grid(left, bits), _on_grid(right, bits)


def make_step(before: Tensor, after: Tensor) -> Step:
    """The smallest exact change from one tensor to another of the same shape and type.

    Factors are tried for a matrix whose difference is, but for rounding, of at most an eighth of its rank.
    """
    factored = _factored(before, after)
    plain = Step(None, None, pack(count(before, after)), None)
    return factored if factored and stored_bytes(factored) < stored_bytes(plain) else plain


def difference(before: Tensor, after: Tensor) -> Tensor:
    """``after - before`` in float32, in float64 for float64 weights; a fresh tensor."""
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    return after.to(wide, copy=True).sub_(before)


def _factored(before: Tensor, after: Tensor) -> Step | None:
    most = min(before.shape) // 8 if before.dim() == 2 else 0
    change = difference(before, after)
    factors = low_rank(change, most, rounding_slack(after, change))
    if factors is None:
        return None
    left, right = exact_factors(*factors)
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):  # beyond float32, from float64 weights
        return None
    forward = pack(count(predict(before, left, right), after))
    return Step(left, right, forward, pack(count(predict(after, -left, right), before)))


def stored_bytes(step: Step) -> int:
    """What the tensors of a step take on disk."""
    parts = [step.left, step.right]
    for counts in (step.forward, step.backward):
        parts += [] if counts is None else [counts.dense, counts.positions, counts.values]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def rounding_slack(tensor: Tensor, change: Tensor) -> float:
    """Frobenius norm up to which a part of ``change``, which gave ``tensor``, is taken for rounding."""
    own = 4.0 * torch.finfo(change.dtype).eps * float(torch.linalg.vector_norm(change))
    return rounding_norm(tensor) * _SLACK[tensor.element_size()] + own


def rounding_norm(tensor: Tensor) -> float:
    """Expected Frobenius norm of the error of rounding to the numbers of ``tensor``: a uniform error in each."""
    total = 0.0
    limits = torch.finfo(tensor.dtype)
    for _, block in _blocks(tensor.reshape(-1)):
        _, exponent = torch.frexp(block.to(torch.float64).abs().clamp_min(limits.tiny))
        spacing = torch.ldexp(torch.full(exponent.shape, limits.eps, dtype=torch.float64), exponent - 1)
        total += float(spacing.square().sum())
    return math.sqrt(total / 12.0)


def low_rank(change: Tensor, most: int, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Factors (m, k) and (k, n) of a matrix up to an error of Frobenius norm ``tolerance``; None unless 1 <= k <= most.

    Finds the range with random projections, a block of columns at a time, and then drops what the tolerance allows.
    ``change`` is overwritten.

    Source: Halko, Martinsson & Tropp, SIAM Review 53 (2011) 217, algorithm 4.4 with one power step, in blocks.
    """
    if most < 1:
        return None
    rows, columns = change.shape
    generator = torch.Generator().manual_seed(0)
    basis = change.new_empty(rows, 0)
    inner = change.new_empty(0, columns)
    while not (missed := float(torch.linalg.vector_norm(change))) <= tolerance:  # true for NaN
        found = basis.shape[1]
        if found >= most or not math.isfinite(missed):
            return None
        width = min(max(_FIRST_RANKS, found), most - found)
        start = torch.randn(columns, width, generator=generator, dtype=change.dtype)
        new = torch.linalg.qr(change @ start).Q
        new = torch.linalg.qr(change @ (change.mT @ new)).Q
        new = torch.linalg.qr(new - basis @ (basis.mT @ new)).Q
        part = new.mT @ change
        change.addmm_(new, part, alpha=-1.0)
        basis, inner = torch.cat([basis, new], dim=1), torch.cat([inner, part])
    if not basis.shape[1]:
        return None
    turn, triangle = torch.linalg.qr(inner.mT)
    left, values, right = svd(triangle.mT.to(torch.float64), full_matrices=False)
    lost = values.square().flip(0).cumsum(0).flip(0) + missed**2  # when the triples from this one on are dropped
    rank = int((lost > tolerance**2).sum())
    root = values[:rank].sqrt()
    inside = (left[:, :rank] * root).to(change.dtype)
    outside = (right[:rank] * root[:, None]).to(change.dtype)
    return basis @ inside, outside @ turn.mT


def _ordered(tensor: Tensor) -> Tensor:
    """Bits of a flat copy as whole numbers in the order of the values they stand for; -0 comes right before 0."""
    bits = tensor.contiguous().reshape(-1).view(_COUNTS[tensor.element_size()])
    return _order_(bits.clone())


def _order_(bits: Tensor) -> Tensor:
    """Swap bits and order in place: negative numbers have their magnitude bits flipped, which is its own inverse."""
    mask = torch.iinfo(bits.dtype).max
    for _, block in _blocks(bits):
        block ^= (block >> (8 * bits.element_size() - 1)) & mask
    return bits


def _outside(counts: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Which numbers do not fit into the type; all that are not zero when it is None."""
    if dtype is None:
        return counts != 0
    if dtype.itemsize >= counts.element_size():
        return torch.zeros_like(counts, dtype=torch.bool)
    limits = torch.iinfo(dtype)
    return (counts < -limits.max) | (counts > limits.max)


def _narrowed(values: Tensor) -> Tensor:
    """The values in the narrowest type that holds them and their negatives."""
    for dtype in _NARROW:
        if dtype.itemsize < values.element_size() and not bool(_outside(values, dtype).any()):
            return values.to(dtype)
    return values


def _on_grid(factor: Tensor, bits: int) -> Tensor:
    """Rounded to whole multiples of a power of two, at most ``2^bits`` of them."""
    wide = factor.to(torch.float64)
    _, exponent = math.frexp(float(wide.abs().max()))
    step = math.ldexp(1.0, exponent - bits)
    return wide.div_(step).round_().mul_(step).to(torch.float32)


def _blocks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Where each block starts, and a view of it."""
    for start in range(0, flat.numel(), _BLOCK):
        yield start, flat[start : start + _BLOCK]


def _row_blocks(tensor: Tensor) -> Iterator[slice]:
    height = max(1, _BLOCK // max(1, tensor.shape[1]))
    for start in range(0, tensor.shape[0], height):
        yield slice(start, start + height)
