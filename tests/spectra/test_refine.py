"""Rayleigh–Ritz refinement against LAPACK, on spectra that break naive Gram methods."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.spectra import refine as module
from rlheals.spectra.refine import Triples, fix_signs, orthonormalise_rows, reconstruction_error, refine

DOUBLE = torch.float64


def orthogonal(size: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=DOUBLE))[0]


def planted(values: list[float], rows: int, seed: int = 0) -> torch.Tensor:
    """A (rows, n) matrix with these singular values."""
    rank = len(values)
    left, right = orthogonal(rows, seed)[:, :rank], orthogonal(rank, seed + 1)
    return (left * torch.tensor(values, dtype=DOUBLE)) @ right


def worst_orthonormality(rows: torch.Tensor) -> float:
    return float((rows @ rows.mT - torch.eye(rows.shape[0], dtype=DOUBLE)).abs().max())


def exact_reconstruction(matrix: torch.Tensor, found: Triples) -> float:
    wide = matrix.to(DOUBLE)
    missed = wide - (found.left_rows.mT * found.values) @ found.right_rows
    return float(missed.norm()) / max(float(wide.norm()), 1e-300)


def assert_decomposes(matrix: torch.Tensor, found: Triples) -> None:
    rank = min(matrix.shape)
    assert found.left_rows.shape == (rank, matrix.shape[0])
    assert found.right_rows.shape == (rank, matrix.shape[1])
    for rows in (found.left_rows, found.right_rows):
        assert worst_orthonormality(rows) <= 1e-12
        assert worst_orthonormality(rows) <= found.orthonormality + 1e-13
    assert exact_reconstruction(matrix, found) < 1e-11
    assert bool((found.values >= 0).all())
    assert bool((found.values.diff() <= 0).all())
    expected = torch.linalg.svdvals(matrix.to(DOUBLE))
    assert float((found.values - expected).abs().max()) <= 1e-12 * max(float(expected[0]), 1e-300)


HARD = {
    "spread": planted([10.0 ** (-i / 10) for i in range(190)], 250),
    "clusters": planted([1.0] * 60 + [1e-5] * 60 + [1e-9] * 60, 180),
    "one large": planted([1.0] + [1e-7] * 149, 150),
    "deficient": planted([3.0, 2.0, 1.0] + [0.0] * 147, 150),
    "deficient in float32": planted([3.0, 2.0, 1.0] + [0.0] * 147, 150).float(),
    "zero": torch.zeros(140, 140),
    "identity": torch.eye(150),
    "constant": torch.ones(300, 140),
    "repeated and empty lines": torch.cat([torch.ones(150, 1), torch.zeros(150, 9), orthogonal(150, 3)[:, :130]], 1),
    "column": torch.arange(5.0)[:, None],
    "number": torch.tensor([[-2.0]]),
    "minute": torch.randn(150, 150, generator=torch.Generator().manual_seed(1)) * 1e-30,
}


@pytest.mark.parametrize("name", HARD)
def test_hard_spectra(name: str) -> None:
    assert_decomposes(HARD[name], refine(HARD[name]))


@pytest.mark.parametrize("name", HARD)
def test_hard_spectra_from_a_rough_basis(name: str) -> None:
    matrix = HARD[name]
    rough = torch.linalg.svd(matrix.float(), full_matrices=False)[2].to(DOUBLE)
    assert_decomposes(matrix, refine(matrix, rough))


@settings(max_examples=25, deadline=None)
@given(
    exponents=st.lists(st.floats(-18, 2), min_size=1, max_size=24),
    extra=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_any_spectrum(exponents: list[float], extra: int, seed: int) -> None:
    matrix = planted([10.0**each for each in exponents], len(exponents) + extra, seed)
    assert_decomposes(matrix, refine(matrix))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_types(dtype: torch.dtype) -> None:
    matrix = torch.randn(200, 150, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = matrix.clone()
    assert_decomposes(matrix, refine(matrix))
    assert torch.equal(matrix, before)


def test_vectors_are_those_of_lapack_where_gaps_identify_them() -> None:
    matrix = planted([float(40 - i) for i in range(40)], 60)
    found = refine(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    for rows, expected in ((found.left_rows, left.mT), (found.right_rows, right)):
        sine = (expected - (expected * rows).sum(1, keepdim=True) * rows).norm(dim=1)
        assert float(sine.max()) < 1e-11


def test_small_values_keep_their_vectors() -> None:
    """A plain Gram method loses vectors below sqrt(eps) = 1.5e-8 of the largest value."""
    matrix = planted([1.0, 1e-3, 1e-6, 1e-9, 1e-11], 8)
    found = refine(matrix)
    _, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert float(((found.right_rows * right).sum(1).abs() - 1).abs().max()) < 1e-6


def test_orthonormalise_repairs_only_from_start_on() -> None:
    rows = orthogonal(300, 5)[:200].contiguous()
    rows[150:] += 1e-4 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    before = rows[:150].clone()
    error = orthonormalise_rows(rows, 150)
    assert torch.equal(rows[:150], before)
    assert worst_orthonormality(rows) <= 1e-12
    assert error == pytest.approx(worst_orthonormality(rows), rel=0.9, abs=1e-14)


def test_orthonormal_rows_are_left_alone() -> None:
    rows = orthogonal(200, 6)
    before = rows.clone()
    assert 0 < orthonormalise_rows(rows) < module.ORTHONORMAL
    assert torch.equal(rows, before)


def test_signs() -> None:
    left, right = -torch.eye(3, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE)
    fix_signs(left, right)
    assert torch.equal(left, torch.eye(3, dtype=DOUBLE))
    assert torch.equal(right, -torch.eye(3, dtype=DOUBLE))


@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.3])
def test_reconstruction_error_is_estimated_to_a_quarter(size: float) -> None:
    matrix = planted([float(50 - i) for i in range(50)], 70)
    found = refine(matrix)
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(9), dtype=DOUBLE)
    wrong = matrix + noise * size * matrix.norm() / noise.norm()
    exact = exact_reconstruction(wrong, found)
    assert math.isclose(reconstruction_error(wrong, found), exact, rel_tol=0.25)


def test_reconstruction_error_sees_one_wrong_vector() -> None:
    matrix = planted([float(50 - i) for i in range(50)], 70)
    found = refine(matrix)
    found.left_rows[20] *= -1
    assert reconstruction_error(matrix, found) == pytest.approx(exact_reconstruction(matrix, found), rel=0.4)


def test_reconstruction_error_of_zero() -> None:
    assert reconstruction_error(torch.zeros(4, 3), refine(torch.zeros(4, 3))) == 0.0
