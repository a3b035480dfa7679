"""Singular value decompositions of small matrices, such as overlaps of two bases, that always converge.

LAPACK's divide and conquer, torch's only driver on a CPU, now and then gives up on a finite matrix whose singular
values lie close together, in float32 more often than in float64, and whether it does depends on the last bits. Where
the first try succeeds its bits are returned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_NO_CONVERGENCE: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def svd(matrix: Tensor, *, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ and Vᵀ as `torch.linalg.svd` gives them; in double precision, then by QR iteration, where that gives up.

    Raises:
        torch.linalg.LinAlgError: the matrix holds NaN or infinite values.
    """
    try:
        found: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(matrix, full_matrices=full_matrices)
    except _NO_CONVERGENCE:
        if not bool(torch.isfinite(matrix).all()):
            raise
        left, values, right = _with_more_care(matrix.to(_WIDE.get(matrix.dtype, matrix.dtype)), full_matrices)
        return left.to(matrix), values.to(device=matrix.device, dtype=matrix.real.dtype), right.to(matrix)
    return found


def svdvals(matrix: Tensor) -> Tensor:
    """The singular values, as `svd` finds them."""
    try:
        found: Tensor = torch.linalg.svdvals(matrix)
    except _NO_CONVERGENCE:
        return svd(matrix, full_matrices=False)[1]
    return found


def _with_more_care(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
    from scipy.linalg import svd as lapack

    try:
        found: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(matrix, full_matrices=full_matrices)
    except _NO_CONVERGENCE:
        parts = lapack(matrix.cpu().numpy(), full_matrices=full_matrices, lapack_driver="gesvd")
        left, values, right = (torch.from_numpy(part) for part in parts)
        return left, values, right
    return found
