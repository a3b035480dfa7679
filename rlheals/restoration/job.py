"""One matrix of one edit: both models' tensors and factors, read when an operator asks for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from rlheals.restoration.edit import BY_ANGLES
from rlheals.restoration.orthonormal import gather
from rlheals.spectra.angles import SIDES, Side, side_reader
from rlheals.spectra.clusters import DEGENERATE
from rlheals.spectra.factors import FactorView, MemoryFactors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from rlheals.restoration.edit import Edit

READ_VECTORS = ("directions", "rotate", "random_rotation", "remove_inside", "remove_outside")
"""Operators that read singular vectors of the reference."""
NULL = 4 * torch.finfo(torch.float32).eps
"""Singular values below this share of the largest are zero: rounding a matrix to float32 makes that much."""
_CACHED = 1 << 16  # entries of a block that is worked on at once


@dataclass(frozen=True)
class MatrixView:
    """One tensor of one model: both parts are called only when an operator needs them.

    Attributes:
        tensor: gives it as stored.
        factors: gives its singular value decomposition; never called for a vector.
    """

    tensor: Callable[[], Tensor]
    factors: Callable[[], FactorView]

    @classmethod
    def of(cls, tensor: Tensor) -> MatrixView:
        """A tensor in memory, decomposed with LAPACK in float64 at the first need; for tests and small matrices."""
        made: list[FactorView] = []

        def factors() -> FactorView:
            if not made:
                made.append(MemoryFactors.of(tensor))
            return made[0]

        return cls(lambda: tensor, factors)


@dataclass(frozen=True)
class Pair:
    """The same tensor of the reference and of the target."""

    reference: MatrixView
    target: MatrixView


@dataclass(frozen=True)
class Edited:
    """An edited tensor.

    Attributes:
        tensor: in the target's dtype; may be the very tensor of the target or of the reference, so never write to it.
        orthogonality_defect: ``‖QᵀQ − 1‖_F / √r`` of the bases that hold vectors of both models, put side by side as
            they are: 0 where no basis is mixed, the larger of both sides otherwise. With ``official`` the edited matrix
            has these bases; else it is what was repaired. On the longer side of a matrix that is not square, the new
            vectors are held against all that is orthogonal to the old ones, which makes it an upper bound.
        change_norm: ``‖edited − target‖_F``, after rounding to the dtype.
        note: what was not done, and why, where the reference does not have what the edit takes; empty mostly.
    """

    tensor: Tensor
    orthogonality_defect: float
    change_norm: float
    note: str = ""


@dataclass(frozen=True)
class Job:
    """One matrix of one edit, as the operators see it; ``inputs_first`` where it is stored as (inputs, outputs)."""

    edit: Edit
    name: str
    pair: Pair
    inputs_first: bool = False
    read: dict[tuple[bool, Side, str], Tensor] = field(default_factory=dict)

    @cached_property
    def target(self) -> Tensor:
        """The target as stored."""
        return self.pair.target.tensor()

    @cached_property
    def reference(self) -> Tensor:
        """The reference as stored."""
        return self.pair.reference.tensor()

    @property
    def copy(self) -> Tensor:
        """The reference in the target's dtype; the tensor itself where that is its own."""
        return self.reference.to(self.target.dtype)

    @cached_property
    def base(self) -> FactorView:
        """Factors of the reference."""
        return self.pair.reference.factors()

    @cached_property
    def tuned(self) -> FactorView:
        """Factors of the target."""
        return self.pair.target.factors()

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in; a result is rounded to the target's type once, at the end."""
        return torch.float64 if self.target.dtype == torch.float64 else torch.float32

    @property
    def rounds(self) -> bool:
        """Whether the result is rounded to a narrower type than it is computed in."""
        return self.target.dtype != self.dtype

    @property
    def rank(self) -> int:
        """min(m, n)."""
        return min(self.target.shape)

    @cached_property
    def window(self) -> list[slice]:
        """The edit's columns of this matrix, one run after the other; of those it reads, the ones that are defined."""
        spans = self.edit.window.spans(self.rank)
        if not self.reads_vectors:
            return spans
        return [slice(span.start, min(span.stop, self.defined)) for span in spans if span.start < self.defined]

    @property
    def reads_vectors(self) -> bool:
        """Whether the edit takes singular vectors of the reference, rather than its values or its whole matrix."""
        if self.edit.operator not in READ_VECTORS or self.target.dim() != 2:
            return False
        if self.edit.operator == "random_rotation" and self.name in dict(self.edit.amounts):
            return self.edit.controlled in BY_ANGLES
        return not (self.edit.window.is_full and self.edit.operator == "directions" and self._copies_all)

    @property
    def _copies_all(self) -> bool:
        return self.edit.official or self.edit.basis == "all"

    @cached_property
    def defined(self) -> int:
        """How many leading singular vectors the reference has: those whose value float32 tells from zero.

        The others are whatever the decomposition completed its bases with: a matrix of zeros has none.
        """
        values = self.base.values
        floor = max(NULL, 10 * self.base.reconstruction_error) * float(values[0])
        return int((values > floor).sum())

    @property
    def note(self) -> str:
        """What the reference lacks of the window, or what makes it a matter of chance."""
        if not self.reads_vectors:
            return ""
        wanted = sum(span.stop - span.start for span in self.edit.window.spans(self.rank))
        if self.width < wanted:
            if not self.defined:
                return "the reference is zero and has no singular directions, so the tensor was left as it is"
            done = "those in the window were used" if self.width else "none is in the window: it was left as it is"
            return f"the reference has only {self.defined} of {self.rank} singular directions; {done}"
        return self._cut_group()

    def _cut_group(self) -> str:
        values = self.base.values
        edges = {edge for span in self.window for edge in (span.start, span.stop) if 0 < edge < self.rank}
        for edge in sorted(edges):
            if float(values[edge - 1] - values[edge]) <= DEGENERATE * float(values[0]):
                return f"the window ends at rank {edge} among equal singular values, so its directions are chance"
        return ""

    @property
    def width(self) -> int:
        """How many columns."""
        return sum(span.stop - span.start for span in self.window)

    @property
    def sides(self) -> tuple[Side, ...]:
        """Which bases the edit takes from the reference: u is the side of the outputs, however the matrix is stored."""
        outputs, inputs = SIDES[::-1] if self.inputs_first else SIDES
        return {"u": (outputs,), "v": (inputs,)}.get(self.edit.basis, SIDES)

    def wide(self, tensor: Tensor) -> Tensor:
        """A fresh copy to compute in."""
        return tensor.to(self.dtype, copy=True)

    def columns(self, view: FactorView, side: Side, spans: list[slice]) -> Tensor:
        """Some singular vectors of the reference or the target, each read once."""
        key = (view is self.base, side, str(spans))
        if key not in self.read:
            self.read[key] = gather(side_reader(view, side), spans, self.dtype)
        return self.read[key]

    def spectrum(self, values: Tensor, spans: list[slice]) -> Tensor:
        """Some singular values."""
        return torch.cat([values[span] for span in spans]).to(self.dtype)


@dataclass(frozen=True)
class Result:
    """What an operator returns: a tensor of any float dtype, and the defect that `Edited` describes."""

    tensor: Tensor
    defect: float = 0.0


def distance(one: Tensor, other: Tensor) -> float:
    """``‖one − other‖_F``, a block of rows at a time so that the difference stays in the processor's cache.

    Differences whose squares are too small for the type count as well.
    """
    squares = 0.0
    for part in _differences(one, other):
        squares += float(torch.linalg.vector_norm(part)) ** 2
    return math.sqrt(squares) or _tiny_distance(one, other)


def length(tensor: Tensor) -> float:
    """``‖tensor‖_F``, without a wide copy of it."""
    return distance(tensor, tensor.new_zeros(1).expand_as(tensor))


def _differences(one: Tensor, other: Tensor) -> Iterator[Tensor]:
    wide = torch.float64 if one.dtype == torch.float64 else torch.float32
    one, other = (each.reshape(1) if each.ndim == 0 else each for each in (one, other))
    rows = max(1, _CACHED // max(1, one[:1].numel()))
    for start in range(0, len(one), rows):
        yield one[start : start + rows].to(wide) - other[start : start + rows].to(wide)


def _tiny_distance(one: Tensor, other: Tensor) -> float:
    """`distance` in units of the largest difference; 0 for equal tensors."""
    unit = max((float(part.abs().max()) for part in _differences(one, other) if part.numel()), default=0.0)
    if not unit:
        return 0.0
    scaled = (float(torch.linalg.vector_norm(part.to(torch.float64) / unit)) for part in _differences(one, other))
    return unit * math.hypot(*scaled)
