"""The thin singular value decomposition of one weight: driver, refinement, checks, and the safe way when they fail."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlheals.errors import UserError
from rlheals.spectra.drivers import SAFE, choose, decompose, driver_named, singular_values_of
from rlheals.spectra.factors import Factors
from rlheals.spectra.refine import Triples, fix_signs, reconstruction_error, row_blocks

TOLERANCE = 1e-5
"""Above this error of reconstruction or orthonormality, the safe driver takes over."""
_NO_CONVERGENCE = (np.linalg.LinAlgError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


def factorise(matrix: Tensor, driver: str = "auto", device: str = "cpu") -> Factors:
    """Decompose an (m, n) matrix of any floating type; bases are float64 and orthonormal to 1e-12.

    The entry of largest size in each left vector is positive, so that equal matrices on equal threads give equal
    bytes. Values that the rounding of the matrix makes up (below r · eps · largest) may be exactly 0; their vectors
    complete the bases. `drivers.DRIVERS` has the peak memory of each driver.

    Args:
        matrix: (m, n); it stays as it is.
        driver: a name in `drivers.DRIVERS`, or ``auto`` for what the measured table chooses.
        device: where to compute; the result is on the CPU.

    Raises:
        UserError: the matrix is not one, holds NaN or infinite entries, or there is no such driver.
    """
    check_matrix(matrix)
    kind = torch.device(device).type
    name = choose(matrix.shape[0], matrix.shape[1], kind) if driver == "auto" else driver
    chosen = driver_named(name, kind)
    on_device = matrix.detach().to(device)
    try:
        found, error = _checked(on_device, decompose(on_device, chosen))
        good = error <= TOLERANCE and found.orthonormality <= TOLERANCE  # false for NaN, too
    except _NO_CONVERGENCE:
        good = False
    if not good:
        found, error, name = _safely(matrix.detach().cpu())
    return Factors(found.left_rows.mT, found.values, found.right_rows.mT, name, error, found.orthonormality)


def _checked(matrix: Tensor, found: Triples) -> tuple[Triples, float]:
    """The triples with fixed signs on the CPU, and their reconstruction error."""
    fix_signs(found.left_rows, found.right_rows)
    error = reconstruction_error(matrix, found)
    return Triples(found.left_rows.cpu(), found.values.cpu(), found.right_rows.cpu(), found.orthonormality), error


def _safely(matrix: Tensor) -> tuple[Triples, float, str]:
    """The safe driver's result; LAPACK's QR iteration where that does not converge."""
    for name in (SAFE, "gesvd"):
        try:
            return (*_checked(matrix, decompose(matrix, driver_named(name, "cpu"))), name)
        except _NO_CONVERGENCE:
            continue
    raise UserError(
        f"No driver could decompose a {matrix.shape[0]} × {matrix.shape[1]} matrix; check the checkpoint's weights."
    )


def check_matrix(matrix: Tensor) -> None:
    """Make sure that ``matrix`` can be decomposed.

    Raises:
        UserError: it is not a floating-point matrix with rows and columns, or holds NaN or infinite entries.
    """
    if matrix.ndim != 2 or 0 in matrix.shape or not matrix.is_floating_point():
        raise UserError(
            f"A tensor of shape {tuple(matrix.shape)} and type {matrix.dtype} has no singular values; "
            "name a floating-point matrix."
        )
    if not all(bool(torch.isfinite(part).all()) for _, part in row_blocks(matrix)):
        raise UserError(
            f"A {matrix.shape[0]} × {matrix.shape[1]} matrix holds NaN or infinite entries; use an intact checkpoint."
        )


def singular_values(matrix: Tensor, device: str = "cpu") -> Tensor:
    """Singular values (r,) in float64, descending, without vectors.

    Raises:
        UserError: as `factorise`.
    """
    check_matrix(matrix)
    return singular_values_of(matrix.detach().to(device)).cpu()
