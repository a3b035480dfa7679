from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.restoration.exact import (
    Step,
    count,
    exact_factors,
    low_rank,
    make_step,
    move,
    pack,
    predict,
    rounding_norm,
    stored_bytes,
    unpack,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def any_bits(draw: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Finite numbers of every size and sign, both zeros and subnormals among them."""
    generator = torch.Generator().manual_seed(draw)
    size = torch.Size(shape).numel() * dtype.itemsize
    tensor = torch.randint(0, 256, (size,), generator=generator).to(torch.uint8).view(dtype).reshape(shape)
    tensor = torch.where(torch.isfinite(tensor), tensor, torch.zeros_like(tensor))
    tensor.view(-1)[0] = -0.0
    return tensor


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(DTYPES), st.sampled_from([(5,), (3, 4), (20, 33)]))
def test_any_change_is_exact_both_ways(draw: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    before, after = any_bits(draw, dtype, shape), any_bits(draw + 1, dtype, shape)
    step = make_step(before, after)
    assert same_bits(step.apply(before), after)
    assert same_bits(step.inverted().apply(after), before)
    assert same_bits(step.inverted().inverted().apply(before), after)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_numbers_are_one_apart(dtype: torch.dtype) -> None:
    numbers = torch.tensor([-1.0, 0.0, 0.5, 3.0, torch.finfo(dtype).tiny], dtype=dtype)
    above = torch.nextafter(numbers, torch.full_like(numbers, torch.inf))
    assert count(numbers, above).tolist() == [1] * 5
    assert count(torch.tensor([-0.0], dtype=dtype), torch.tensor([0.0], dtype=dtype)).tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50), st.integers(0, 3))
def test_packed_numbers_come_back(values: list[int], narrow: int) -> None:
    counts = torch.tensor([value >> (8 * narrow) for value in values] * 3, dtype=torch.int32)
    packed = pack(counts)
    assert torch.equal(unpack(packed, counts.numel(), torch.float32), counts)
    wrapped = unpack(packed.negated(), counts.numel(), torch.float32)
    assert np.array_equal(wrapped.numpy(), -counts.numpy())
    tensors = [part for part in (packed.dense, packed.positions, packed.values) if part is not None]
    assert sum(part.numel() * part.element_size() for part in tensors) <= counts.numel() * 4


def test_few_large_numbers_are_stored_by_position() -> None:
    counts = torch.zeros(1000, dtype=torch.int32)
    counts[7] = 10**6
    packed = pack(counts)
    assert packed.dense is None
    assert (packed.positions.tolist(), packed.values.tolist()) == ([7], [10**6])
    packed = pack(counts + 3)
    assert packed.dense.dtype == torch.int8
    assert (packed.positions.tolist(), packed.values.tolist()) == ([7], [10**6 + 3])
    assert pack(torch.zeros(9, dtype=torch.int16)).dense is None


@pytest.mark.parametrize("scale", [0.002, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_change_is_stored_as_factors(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    before = (torch.randn(400, 600, generator=generator) * 0.02).to(dtype)
    change = torch.randn(400, 3, generator=generator) @ torch.randn(3, 600, generator=generator)
    after = (before + scale * change).to(dtype)
    step = make_step(before, after)
    assert step.rank == 3
    assert stored_bytes(step) < 0.8 * before.numel() * before.element_size()
    assert same_bits(step.apply(before), after)
    assert same_bits(step.inverted().apply(after), before)


def test_a_change_of_full_rank_is_stored_number_by_number() -> None:
    before, after = torch.randn(64, 64), torch.randn(64, 64)
    assert make_step(before, after).rank == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.floats(-8, 4))
def test_the_product_of_factors_does_not_depend_on_the_order(draw: int, rank: int, scale: float) -> None:
    """Adding up in any order gives the same bits, and Python's exact fractions agree."""
    generator = torch.Generator().manual_seed(draw)
    left, right = exact_factors(
        torch.randn(4, rank, generator=generator) * 10.0**scale, torch.randn(rank, 5, generator=generator)
    )
    order = torch.randperm(rank, generator=generator)
    one, other = left.double() @ right.double(), left.double()[:, order] @ right.double()[order]
    assert torch.equal(one, other)
    products = [Fraction(a) * Fraction(b) for a, b in zip(left[0].tolist(), right[:, 0].tolist(), strict=True)]
    assert sum(products) == Fraction(one[0, 0].item())
    assert left.dtype == torch.float32


def test_prediction_is_the_sum_rounded_once_more() -> None:
    before = torch.randn(7, 9).bfloat16()
    left, right = exact_factors(torch.randn(7, 2), torch.randn(2, 9))
    expected = before.double() + left.double() @ right.double()
    assert torch.equal(predict(before, left, right), expected.to(torch.bfloat16))
    assert predict(before, None, None) is before


def test_low_rank_finds_the_smallest_rank_within_the_tolerance() -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(60, 20, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(40, 20, generator=generator)).Q
    values = 2.0 ** -torch.arange(20.0)
    matrix = (left * values) @ right.mT
    best = {k: float(values[k:].norm()) for k in range(20)}
    for rank in (1, 5, 9):
        found = low_rank(matrix.clone(), 20, best[rank] * 1.001)
        assert found is not None
        assert found[0].shape[1] == rank
        assert float((found[0] @ found[1] - matrix).norm()) <= best[rank] * 1.01
    assert low_rank(matrix.clone(), 4, best[9]) is None
    assert low_rank(torch.zeros(5, 5), 4, 0.0) is None


def test_rounding_norm_is_what_rounding_does() -> None:
    exact = torch.randn(300, 300, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = exact.to(dtype)
        assert rounding_norm(rounded) == pytest.approx(float((rounded.double() - exact).norm()), rel=0.02)


def test_counts_wrap_around_in_a_composition() -> None:
    before, middle, after = (any_bits(draw, torch.bfloat16, (300,)) for draw in range(3))
    total = count(before, middle).add_(count(middle, after))
    assert same_bits(move(before, pack(total)), after)
    assert same_bits(Step(None, None, pack(total), None).inverted().apply(after), before)
