"""The ways to decompose a matrix, as small registered functions, and the measured table that chooses one.

A driver takes an (m, n) matrix with m ≥ n and returns its `Triples` in float64. The exact ones work in float64
throughout. The rough ones work in float32 and end in `refine`, because angles of 1e-6 rad need bases that are
orthonormal to 1e-12; what that costs is part of their time in the table.

Sources: LAPACK Users' Guide (gesdd: divide and conquer; gesvd: QR iteration); Chan 1982 (QR first for tall matrices);
Golub and Van Loan 8.6 (eigenvectors of the Gram matrix); the cuSOLVER manual (gesvdj: Jacobi; gesvda: approximate).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlheals.errors import UserError
from rlheals.spectra.refine import Triples, orthonormalise_rows, refine

if TYPE_CHECKING:
    from collections.abc import Callable

SAFE = "gesdd"
"""What `factorise` falls back to: LAPACK's divide and conquer on the float64 matrix.

It takes twice the memory of the table's drivers, so the bound on a diagnosis's memory does not cover a fall-back.
"""
TALL = 2.0
"""From this ratio of rows to columns on, a matrix counts as tall."""
LARGE = 512
"""From this rank on, a matrix counts as large."""


@dataclass(frozen=True)
class Driver:
    """A registered way to decompose.

    Attributes:
        name: as in the table, the store's entries and the report.
        devices: kinds of device it runs on.
        decompose: (m, n) matrix with m ≥ n, not written to → `Triples` on the same device.
        peak: memory it takes beyond the matrix, in units of the matrix's float32 size, for a square one; measured on a
            CPU at 2048 × 2048 (gesvd: 1024 × 1024; gram: of rank 8, its worst case, 5.6 at full rank). Those of
            gesdd_float32 and cuSOLVER's are estimates.
    """

    name: str
    devices: tuple[str, ...]
    decompose: Callable[[Tensor], Triples]
    peak: float


DRIVERS: dict[str, Driver] = {}


def register(
    name: str, *devices: str, peak: float
) -> Callable[[Callable[[Tensor], Triples]], Callable[[Tensor], Triples]]:
    """Add the decorated function to `DRIVERS` under ``name``."""

    def add(decompose: Callable[[Tensor], Triples]) -> Callable[[Tensor], Triples]:
        DRIVERS[name] = Driver(name, devices, decompose, peak)
        return decompose

    return add


# (device, shape class) -> driver. CPU: `python -m bench.bench_spectra_drivers`, 2026-11-20, Gaussian float32 matrices,
# one thread, best seconds, on a machine with other work; torch32 and torch64 are torch.linalg.svd on either type.
#              gram   torch32  torch64    others in a separate run: gesdd  qr_gesdd  gesdd_float32  eigh_float32
# 256 × 256    0.010  0.006    0.010                                0.012  0.018     0.030          0.023
# 1024 × 1024  0.328  0.289    0.411                                0.479  0.614     0.797          0.649
# 2048 × 2048  2.362  2.134    4.085
# 4096 × 1024  0.637  0.662    1.167                                1.218  1.293     1.647          1.135
# 8192 × 1024  1.043  1.014    1.664
# 1024 × 4096  0.637  1.593    2.914
# Bases of float64 quality cost about what torch32 takes; only on wide matrices is gram faster than torch32 by half or
# more. Larger matrices and the CUDA rows are not measured.
TABLE: dict[tuple[str, str], str] = {
    ("cpu", "small"): "gram",
    ("cpu", "square"): "gram",
    ("cpu", "tall"): "gram",
    ("cuda", "small"): "gram",
    ("cuda", "square"): "gram",
    ("cuda", "tall"): "gram",
}


def shape_class(rows: int, columns: int) -> str:
    """``small`` below rank 512, else ``tall`` from 2:1 on (or 1:2, by transposition), else ``square``."""
    shorter, longer = sorted((rows, columns))
    if shorter < LARGE:
        return "small"
    return "tall" if longer >= TALL * shorter else "square"


def choose(rows: int, columns: int, device: str) -> str:
    """Name of the driver that the measured table gives for this shape on this kind of device (``cpu`` or ``cuda``)."""
    return TABLE[device, shape_class(rows, columns)]


def driver_named(name: str, device: str) -> Driver:
    """The registered driver.

    Raises:
        UserError: no driver of this name runs on this kind of device.
    """
    fitting = sorted(each.name for each in DRIVERS.values() if device in each.devices)
    if name not in fitting:
        raise UserError(f"There is no driver {name!r} for {device}; choose auto or one of {', '.join(fitting)}.")
    return DRIVERS[name]


def decompose(matrix: Tensor, driver: Driver) -> Triples:
    """Run a driver on a matrix of any shape; a wide one goes through its transpose."""
    if matrix.shape[0] >= matrix.shape[1]:
        return driver.decompose(matrix)
    found = driver.decompose(matrix.mT)
    return Triples(found.right_rows, found.values, found.left_rows, found.orthonormality)


@register("gram", "cpu", "cuda", peak=6.7)
def gram(matrix: Tensor) -> Triples:
    """Eigenvectors of the float64 Gram matrix, in rounds where the condition number asks for it; see `refine`."""
    return refine(matrix)


@register("gesdd", "cpu", peak=14.7)
def gesdd(matrix: Tensor) -> Triples:
    """LAPACK's divide and conquer in float64, `torch.linalg.svd`'s only driver on a CPU."""
    return _exact(*torch.linalg.svd(matrix.to(torch.float64), full_matrices=False))


@register("gesvd", "cpu", peak=8.4)
def gesvd(matrix: Tensor) -> Triples:
    """LAPACK's QR iteration in float64: slow, small workspace, converges where divide and conquer may not."""
    from scipy.linalg import svd

    wide = matrix.to(torch.float64).numpy()
    left, values, right = svd(wide, full_matrices=False, check_finite=False, overwrite_a=True, lapack_driver="gesvd")
    return _exact(torch.from_numpy(left), torch.from_numpy(values), torch.from_numpy(right))


@register("qr_gesdd", "cpu", "cuda", peak=16.6)
def qr_gesdd(matrix: Tensor) -> Triples:
    """QR first, then the decomposition of the square triangle: for tall matrices (Chan 1982)."""
    basis, triangle = torch.linalg.qr(matrix.to(torch.float64))
    left, values, right = torch.linalg.svd(triangle, full_matrices=False)
    return _exact(basis @ left, values, right)


@register("gesdd_float32", "cpu", peak=10.0)
def gesdd_float32(matrix: Tensor) -> Triples:
    """`torch.linalg.svd`'s default in float32, refined in float64."""
    rough = torch.linalg.svd(matrix.to(torch.float32), full_matrices=False)[2]
    return refine(matrix, rough.to(torch.float64, memory_format=torch.contiguous_format))


@register("eigh_float32", "cpu", "cuda", peak=8.2)
def eigh_float32(matrix: Tensor) -> Triples:
    """Eigenvectors of the float32 Gram matrix, refined in float64."""
    single = matrix.to(torch.float32)
    vectors = torch.linalg.eigh(single.mT @ single)[1]
    return refine(matrix, vectors.mT.flip(0).to(torch.float64))


def _register_cuda(name: str) -> None:
    """Register one of cuSOLVER's methods, in float64."""

    @register(f"cusolver_{name}", "cuda", peak=12.0)
    def run(matrix: Tensor) -> Triples:
        return _exact(*torch.linalg.svd(matrix.to(torch.float64), full_matrices=False, driver=name))


for _name in ("gesvdj", "gesvd", "gesvda"):
    _register_cuda(_name)


def _exact(left: Tensor, values: Tensor, right_rows: Tensor) -> Triples:
    """The result of a float64 routine with its bases laid out as rows, checked, and repaired where not orthonormal."""
    left_rows, right_rows = left.mT.contiguous(), right_rows.contiguous()
    error = max(orthonormalise_rows(left_rows), orthonormalise_rows(right_rows))
    return Triples(left_rows, values, right_rows, error)


def singular_values_of(matrix: Tensor) -> Tensor:
    """Singular values (r,) of an (m, n) matrix in float64, descending; a tall matrix is reduced to its triangle."""
    tall = (matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT).to(torch.float64)
    if tall.shape[0] >= TALL * tall.shape[1]:
        tall = torch.linalg.qr(tall, mode="r")[1]
    values: Tensor = torch.linalg.svdvals(tall)
    return values
