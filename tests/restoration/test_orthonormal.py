"""Rotations between spans against dense oracles, at every angle from 0 to a right one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.restoration.orthonormal import (
    DirectRotation,
    carried_by_rest,
    equal_planes,
    gather,
    geodesic,
    orthonormal,
    polar,
    random_planes,
    rest_of,
    sine_norm,
)
from rlheals.spectra.angles import principal_angles
from tests.restoration.pairs import turn

ANGLES = [0.0, 1e-9, 1e-4, 0.3, 1.0, 1.5, math.pi / 2 - 1e-9, math.pi / 2]


def frame(length: int, seed: int) -> torch.Tensor:
    return orthonormal(torch.randn(length, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def planted(length: int, angles: list[float], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bases of spans with these principal angles, each in a random frame of its own."""
    whole, count = frame(length, seed), len(angles)
    turns = torch.tensor(angles, dtype=torch.float64)
    first, second = whole[:, :count], whole[:, count : 2 * count]
    tilted = first * turns.cos() + second * turns.sin()
    return first @ frame(count, seed + 1), tilted @ frame(count, seed + 2)


@given(st.integers(1, 20), st.integers(0, 1000), st.sampled_from([1e-9, 1e-5, 0.1, 0.9]))
@settings(max_examples=40, deadline=None)
def test_polar_is_the_closest_orthogonal_matrix(size: int, seed: int, smallest: float) -> None:
    cosines = torch.linspace(smallest, 1.0, size, dtype=torch.float64)
    matrix = (frame(size, seed) * cosines) @ frame(size, seed + 1).mT
    found = polar(matrix)
    assert torch.linalg.matrix_norm(found.mT @ found - torch.eye(size, dtype=torch.float64)) < 1e-12
    np.testing.assert_allclose(found, scipy.linalg.polar(matrix.numpy())[0], atol=1e-14 / smallest)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5, 0.01, 0.1, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sines_are_right_for_small_angles_too(angle: float, dtype: torch.dtype) -> None:
    old, new = (basis.to(dtype) for basis in planted(30, [angle] * 10, 1))
    floor = 10 * torch.finfo(dtype).eps
    assert sine_norm(old, new) == pytest.approx(math.sqrt(10) * math.sin(angle), rel=1e-3, abs=floor)


@pytest.mark.parametrize("length", [17, 40])
def test_direct_rotation_against_its_definition(length: int) -> None:
    old, new = planted(length, ANGLES[:-2], 5)
    rest = frame(length, 9)
    rest -= old @ (old.mT @ rest)
    expected = turn(old.numpy(), new.numpy()) @ rest.numpy()
    rotation = DirectRotation(old, new)
    found = rotation.carry_(rest.clone())
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert rotation.sine == pytest.approx(math.sqrt(sum(math.sin(a) ** 2 for a in ANGLES[:-2])), rel=1e-9)


def test_direct_rotation_at_a_right_angle_is_still_a_rotation() -> None:
    old, new = planted(20, ANGLES, 5)
    rest = frame(20, 6)
    rest = orthonormal(rest - old @ (old.mT @ rest))[:, :12]
    rest = orthonormal(rest - old @ (old.mT @ rest))
    moved = DirectRotation(old, new).carry_(rest.clone())
    assert (new.mT @ moved).abs().max() < 1e-12
    torch.testing.assert_close(moved.mT @ moved, torch.eye(12, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("count", [1, 3, 6, 10])
def test_both_ways_to_the_direct_rotation_agree(count: int) -> None:
    old, new = frame(12, 1), frame(12, 2)
    one = DirectRotation(old[:, :count], new[:, :count])
    other, sine = carried_by_rest(old[:, count:], new[:, count:])
    torch.testing.assert_close(one.carry_(old[:, count:].clone()), other, atol=1e-12, rtol=0)
    assert one.sine == pytest.approx(sine)


@pytest.mark.parametrize("count", [3, 9])
def test_a_transposed_matrix_is_turned_in_place(count: int) -> None:
    old, new = frame(12, 1), frame(12, 2)
    rotation = DirectRotation(old[:, :count], new[:, :count])
    rest = old[:, count:].contiguous()
    flat = rest.mT.contiguous()
    rotation.carry_(flat.mT)
    torch.testing.assert_close(flat.mT, rotation.carry_(rest.clone()))


@given(st.floats(0, 1), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_a_geodesic_turns_every_angle_by_its_share(share: float, seed: int) -> None:
    angles = [0.0, 0.2, 0.7, 1.5]
    old, new = planted(15, angles, seed)
    moved = geodesic(old, new).turn_(old.clone(), share)
    expected = torch.tensor(angles, dtype=torch.float64)
    torch.testing.assert_close(principal_angles(old, moved), expected * share, atol=1e-7, rtol=0)
    torch.testing.assert_close(principal_angles(moved, new), expected * (1 - share), atol=1e-7, rtol=0)
    turned = geodesic(old, new).turn_(frame(15, seed), share)
    torch.testing.assert_close(turned.mT @ turned, torch.eye(15, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_geodesic_ends_as_the_direct_rotation() -> None:
    old, new = planted(15, [0.1, 0.5, 1.4], 3)
    unit = torch.eye(15, dtype=torch.float64)
    np.testing.assert_allclose(geodesic(old, new).turn_(unit.clone()), turn(old.numpy(), new.numpy()), atol=1e-12)
    torch.testing.assert_close(geodesic(old, new).turn_(unit.clone(), 0.0), unit, atol=1e-15, rtol=0)


def test_random_planes_turn_by_the_angles_and_differ_by_draw() -> None:
    old = frame(20, 1)[:, :4]
    angles = torch.tensor([1.2, 0.5, 0.1], dtype=torch.float64)
    moved = [
        random_planes(old, angles, torch.Generator().manual_seed(seed)).turn_(torch.eye(20, dtype=torch.float64))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(moved[0], moved[1])
    assert principal_angles(moved[0] @ old, moved[2] @ old).max() > 0.1
    expected = torch.tensor([0.0, 0.1, 0.5, 1.2], dtype=torch.float64)
    torch.testing.assert_close(principal_angles(old, moved[0] @ old), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_equal_planes_turn_by_one_angle(count: int) -> None:
    unit = torch.eye(9, dtype=torch.float64)
    turned = equal_planes(9, count, torch.Generator().manual_seed(1), unit).turn_(unit.clone(), 0.4)
    cosines = torch.linalg.eigvals(turned).real.sort().values
    expected = [math.cos(0.4)] * (2 * count) + [1.0] * (9 - 2 * count)
    torch.testing.assert_close(cosines, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_columns_are_gathered_in_order() -> None:
    basis = frame(600, 1)[:, :520]
    spans = rest_of([slice(3, 200)], 520)
    assert spans == [slice(0, 3), slice(200, 520)]
    assert rest_of([slice(0, 520)], 520) == []
    assert rest_of([slice(0, 3), slice(200, 520)], 520) == [slice(3, 200)]
    found = gather(lambda part: basis[:, part], spans, torch.float32)
    torch.testing.assert_close(found, torch.cat([basis[:, span] for span in spans], 1).to(torch.float32))
