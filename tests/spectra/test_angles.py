"""Principal angles against SciPy, planted rotations, and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles as reference_angles

from rlheals.errors import UserError
from rlheals.spectra.angles import (
    BLOCK,
    angle_error_bound,
    blocks,
    columns,
    error_bound,
    part_gap,
    principal_angles,
    resolve_k,
    subspace_angles,
)
from rlheals.spectra.factors import MemoryFactors
from tests.spectra.planted import basis, matrix, plane_turn, spectrum, spoilt, turned

seeds = st.integers(0, 10_000)


def pair(n, k, l, seed):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    return basis(n, k, generator), basis(n, l, generator)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 40), st.integers(1, 40), seeds)
def test_angles_agree_with_scipy(n, k, l, seed):  # noqa: E741
    a, b = pair(n, min(k, n), min(l, n), seed)
    expected = np.sort(reference_angles(a.numpy(), b.numpy()))
    np.testing.assert_allclose(principal_angles(a, b).numpy(), expected, atol=1e-7)


def test_angles_agree_with_scipy_where_both_bases_span_several_blocks():
    a, b = pair(3 * BLOCK, BLOCK + 50, BLOCK + 20, 0)
    kept = (a.clone(), b.clone())
    found = principal_angles(a, b)
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])
    np.testing.assert_allclose(found.numpy(), np.sort(reference_angles(a.numpy(), b.numpy())), atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 30), st.integers(1, 4), seeds, st.floats(0.1, 50))
def test_angles_do_not_change_under_a_turn_within_scaling_and_transposition(n, k, seed, scale):
    a, b = pair(n, k, k, seed)
    expected = principal_angles(a, b)
    within = basis(k, k, torch.Generator().manual_seed(seed + 1))
    assert torch.allclose(principal_angles(a @ within, b), expected, atol=1e-7)
    assert torch.allclose(principal_angles(b, a), expected, atol=1e-7)
    w, v = (matrix(n, n + 2, torch.linspace(2, 1, n, dtype=torch.float64), seed + s) for s in (0, 1))
    angles = {
        (side, name): subspace_angles(MemoryFactors.of(x), MemoryFactors.of(y), side, slice(0, k))
        for side in ("left", "right")
        for name, (x, y) in {"plain": (w, v), "scaled": (scale * w, -v), "transposed": (w.mT, v.mT)}.items()
    }
    assert torch.allclose(angles["left", "plain"], angles["left", "scaled"], atol=1e-7)
    assert torch.allclose(angles["left", "plain"], angles["right", "transposed"], atol=1e-7)
    assert torch.allclose(angles["right", "plain"], angles["left", "transposed"], atol=1e-7)


@pytest.mark.parametrize("shape", [(60, 60), (40, 90), (90, 40)])
@pytest.mark.parametrize("part", ["top", "bottom", "band"])
def test_the_angle_of_a_matrix_with_itself_is_zero(shape, part):
    view = MemoryFactors.of(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    for side in ("left", "right"):
        assert float(subspace_angles(view, view, side, columns(part, 10, view.rank)).max()) < 1e-6


ANGLES = [1e-6, 1e-5, 1e-3, math.radians(1), math.radians(44), math.radians(46), math.radians(80), math.radians(89)]


@pytest.mark.parametrize("shape", [(60, 60), (40, 90), (90, 40)])
def test_planted_rotations_are_recovered_to_a_microradian_where_the_gap_is_half_the_norm(shape):
    rank, k = 40, 8
    turn = plane_turn(rank, [(i, k + i) for i in range(k)], ANGLES)
    base, tuned = turned(*shape, spectrum(rank, k, gap=1.0), turn)
    views = [MemoryFactors.of(w) for w in (base, tuned)]
    found = subspace_angles(*views, "left", slice(0, k))
    assert np.abs(found.numpy() - np.array(ANGLES)).max() < 1e-6
    assert angle_error_bound(*views, slice(0, k)) < 1e-6
    assert float(subspace_angles(*views, "right", slice(0, k)).max()) < 1e-6


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("error", [1e-13, 1e-9, 1e-6])
@pytest.mark.parametrize("part", ["top", "bottom"])
def test_planted_rotations_are_recovered_to_the_printed_bound_elsewhere(gap, error, part):
    rank, k = 30, 8
    values = torch.linspace(1.5, 0.5, rank, dtype=torch.float64)
    border = k if part == "top" else rank - k
    values[border:] += values[border - 1] - values[border] - gap
    turn = plane_turn(rank, [(i, rank - k + i) for i in range(k)], ANGLES)
    base, tuned = turned(45, 30, values, turn)
    views = [spoilt(base, error, 1), spoilt(tuned, error, 2)]
    span = columns(part, k, rank)
    bound = angle_error_bound(*views, span)
    worst = np.abs(subspace_angles(*views, "left", span).numpy() - np.array(ANGLES)).max()
    assert worst <= bound
    if error < 1e-3 * gap:
        assert bound < 0.1  # it says something


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 15), st.floats(-10, -2), st.sampled_from(["top", "bottom", "band"]))
def test_the_error_bound_holds_on_random_matrices(seed, k, exponent, part):
    weight = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    exact, off = MemoryFactors.of(weight), spoilt(weight, 10**exponent, seed)
    span = columns(part, k, 16)
    for side in ("left", "right"):
        assert float(subspace_angles(exact, off, side, span)[-1]) <= error_bound(off, span) + 1e-9


def test_a_full_basis_has_no_angles_on_a_side_of_its_own_length():
    a, b = (MemoryFactors.of(matrix(12, 5, torch.ones(5, dtype=torch.float64), seed)) for seed in (1, 2))
    assert subspace_angles(a, b, "right", slice(0, 5)).tolist() == [0.0] * 5
    assert float(subspace_angles(a, b, "left", slice(0, 5)).max()) > 0.1


def test_the_gap_counts_the_distance_from_zero_only_on_matrices_that_are_not_square():
    values = torch.tensor([5.0, 3.0, 2.5, 0.25], dtype=torch.float64)
    assert part_gap(values, slice(0, 1), square=True) == 2.0
    assert part_gap(values, slice(1, 3), square=True) == 2.0
    assert part_gap(values, slice(0, 2), square=True) == 0.5
    assert part_gap(values, slice(3, 4), square=True) == 2.25
    assert part_gap(values, slice(3, 4), square=False) == 0.25
    assert part_gap(values, slice(0, 4), square=True) == math.inf


def test_k_is_a_count_or_a_share():
    assert [resolve_k(k, 10) for k in (1, 10, 0.25, 1.0, 0.01, 0.5)] == [1, 10, 2, 10, 1, 5]
    assert resolve_k(1, 10) == 1
    assert resolve_k(1.0, 10) == 10


@pytest.mark.parametrize("k", [0, -3, 11, 0.0, 1.5, -0.1, math.nan])
def test_a_k_outside_the_rank_is_refused(k):
    with pytest.raises(UserError, match="k ="):
        resolve_k(k, 10)


def test_parts_and_blocks_cover_what_they_say():
    assert columns("top", 3, 10) == slice(0, 3)
    assert columns("bottom", 3, 10) == slice(7, 10)
    assert columns("band", 4, 10) == slice(3, 7)
    assert blocks(slice(2, 9), 3) == [slice(2, 5), slice(5, 8), slice(8, 9)]
