"""Frobenius and spectral norms of a matrix, without a decomposition."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 512
"""Up to this many rows or columns a spectral norm is taken from all eigenvalues of the Gram matrix."""


BLOCK = 1 << 20
"""Elements that a norm is taken of at a time."""


def frobenius(matrix: Tensor) -> float:
    """‖·‖_F, summed in float64; by blocks of rows, because the sum takes a float64 copy of what it is over."""
    rows = max(1, BLOCK // max(1, matrix[0].numel())) if matrix.ndim else 1
    parts = torch.split(matrix, rows) if matrix.ndim else (matrix,)
    return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts))


def spectral_norm(matrix: Tensor) -> float:
    """Largest singular value of an (m, n) matrix, to about 1e-6 of itself or better.

    Small ones through the Gram matrix's largest eigenvalue, large ones by Golub–Kahan–Lanczos bidiagonalisation with
    full reorthogonalisation from a fixed start (Golub & Van Loan, Matrix Computations, 10.4).
    """
    if min(matrix.shape) <= SMALL:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        wide = wide.to(torch.float64)
        return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(wide @ wide.mT)[-1])))
    return _lanczos_norm(matrix)


def _lanczos_norm(matrix: Tensor, most: int = 200, tolerance: float = 1e-7) -> float:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64).to(matrix.device, matrix.dtype)
    right = [start / start.norm()]
    left: list[Tensor] = []
    bidiagonal = torch.zeros(most, most + 1, dtype=torch.float64)
    best = 0.0
    for step in range(most):
        image = _orthogonal(matrix @ right[step], left)
        alpha = float(image.norm())
        if alpha == 0.0:
            return best
        left.append(image / alpha)
        back = _orthogonal(matrix.mT @ left[step], right)
        beta = float(back.norm())
        bidiagonal[step, step], bidiagonal[step, step + 1] = alpha, beta
        if step % 10 == 9 or beta <= tolerance * alpha:
            previous, best = best, float(torch.linalg.svdvals(bidiagonal[: step + 1, : step + 2])[0])
            if beta <= tolerance * alpha or best - previous <= tolerance * best:
                return best
        right.append(back / beta)
    return best


def _orthogonal(vector: Tensor, others: list[Tensor]) -> Tensor:
    """``vector`` without its parts along the orthonormal ``others``; twice is enough."""
    if others:
        basis = torch.stack(others, dim=1)
        for _ in range(2):
            vector = vector - basis @ (basis.mT @ vector)
    return vector
