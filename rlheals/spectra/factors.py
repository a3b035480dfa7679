"""A thin singular value decomposition as the measures see it: read by column slices, never whole.

The measures are written against the protocol `FactorView`, so that factors may lie on disk (the store), where only
the columns asked for are brought into memory, or in memory (`MemoryFactors`), for tests and null draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from rlheals.spectra.small_svd import svd

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The thin decomposition ``W = left · diag(values) · rightᵀ`` of an (m, n) matrix, with r = min(m, n), in float64.

    Attributes:
        left: (m, r), orthonormal columns: the left singular vectors.
        values: (r,), descending, not negative.
        right: (n, r), orthonormal columns: the right singular vectors.
        driver: name of the method that made it.
        reconstruction_error: ``‖W − left · diag(values) · rightᵀ‖_F / ‖W‖_F`` (0 for the zero matrix).
        orthonormality_error: largest entry of ``|QᵀQ − 1|`` over ``left`` and ``right``.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    driver: str
    reconstruction_error: float
    orthonormality_error: float


class FactorView(Protocol):
    """Read access to a decomposition; see `Factors` for the meaning of each name.

    ``left`` and ``right`` return float64 copies of the columns asked for: (m, columns) and (n, columns).
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): rows and columns of the matrix, out × in as torch stores a weight."""

    @property
    def rank(self) -> int:
        """How many triples the thin decomposition has: r = min(m, n)."""

    @property
    def values(self) -> Tensor:
        """(r,) singular values, descending, float64."""

    @property
    def driver(self) -> str:
        """Name of the method that made the decomposition."""

    @property
    def reconstruction_error(self) -> float:
        """Relative Frobenius norm of what the decomposition misses."""

    @property
    def orthonormality_error(self) -> float:
        """Largest entry of ``|QᵀQ − 1|`` over both bases."""

    def left(self, columns: slice) -> Tensor:
        """These left singular vectors, (m, columns)."""

    def right(self, columns: slice) -> Tensor:
        """These right singular vectors, (n, columns)."""


@dataclass(frozen=True)
class MemoryFactors:
    """`FactorView` of a decomposition that is held in memory."""

    factors: Factors

    @classmethod
    def of(cls, matrix: Tensor) -> MemoryFactors:
        """Decompose ``matrix`` (m, n) with LAPACK in float64; for tests and for small matrices."""
        wide = matrix.to(torch.float64)
        left, values, right_transposed = svd(wide, full_matrices=False)
        right = right_transposed.mT.contiguous()
        norm = float(wide.norm())
        missed = float((wide - (left * values) @ right_transposed).norm())
        unit = torch.eye(values.numel(), dtype=torch.float64)
        orthonormality = max(float((basis.mT @ basis - unit).abs().max()) for basis in (left, right))
        return cls(Factors(left, values, right, "lapack", missed / norm if norm else 0.0, orthonormality))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.factors.left.shape[0], self.factors.right.shape[0]

    @property
    def rank(self) -> int:
        """How many triples: min(m, n)."""
        return self.factors.values.numel()

    @property
    def values(self) -> Tensor:
        """(r,) singular values, descending, float64."""
        return self.factors.values

    @property
    def driver(self) -> str:
        """Name of the method that made the decomposition."""
        return self.factors.driver

    @property
    def reconstruction_error(self) -> float:
        """Relative Frobenius norm of what the decomposition misses."""
        return self.factors.reconstruction_error

    @property
    def orthonormality_error(self) -> float:
        """Largest entry of ``|QᵀQ − 1|`` over both bases."""
        return self.factors.orthonormality_error

    def left(self, columns: slice) -> Tensor:
        """These left singular vectors, (m, columns)."""
        return self.factors.left[:, columns].to(torch.float64, copy=True)

    def right(self, columns: slice) -> Tensor:
        """These right singular vectors, (n, columns)."""
        return self.factors.right[:, columns].to(torch.float64, copy=True)
