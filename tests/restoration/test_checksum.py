"""Checksums of tensors."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlheals.restoration import checksum as module
from rlheals.restoration.checksum import checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8]


@given(st.integers(2, 3000), st.data())
def test_the_checksum_sees_every_change_and_exchange(length: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    first, second = data.draw(st.lists(st.integers(0, length - 1), min_size=2, max_size=2, unique=True))
    tensor = torch.arange(length).to(dtype)
    changed_one, exchanged = tensor.clone(), tensor.clone()
    changed_one[first] = -1.0
    exchanged[[first, second]] = tensor[[second, first]]
    assert checksum(tensor) == checksum(tensor.clone())
    assert checksum(changed_one) != checksum(tensor)
    assert (checksum(exchanged) == checksum(tensor)) == torch.equal(exchanged, tensor)


def test_the_checksum_tells_shapes_types_and_signs_of_zero_apart() -> None:
    zero = torch.zeros(4, 4)
    others = [zero.reshape(2, 8), zero.to(torch.float64), zero.to(torch.float16), -zero, zero[0], zero[0, 0]]
    assert len({checksum(each) for each in [zero, *others]}) == 7
    offset = torch.arange(9.0)[1:]
    assert checksum(offset) == checksum(offset.clone())
    assert checksum(zero.T) == checksum(zero)


SHAPES = st.sampled_from([(), (0,), (1,), (3,), (64, 128), (65, 127), (128, 64), (4, 5000), (700, 1030)])


@given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 9))
def test_both_ways_to_sum_agree(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    """Of tensors on a GPU torch makes the sums."""
    tensor = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    data = tensor.reshape(-1).view(torch.uint8)
    assert module._sums(data.numpy()) == module._sums_on_device(data)


def test_every_part_of_a_large_tensor_is_read() -> None:
    """Also across the limits of what is summed at a time: 3 MiB take several parts."""
    tensor = torch.randn(3 * 2**18 + 5)
    before = checksum(tensor)
    for place in (0, 2**18 - 1, 2**18, 3 * 2**18 - 1, 3 * 2**18, len(tensor) - 1):
        changed = tensor.clone()
        changed[place] = torch.nextafter(tensor[place], torch.tensor(9.0))
        assert checksum(changed) != before


def test_the_sums_are_those_of_the_table() -> None:
    tensor = torch.randn(3, 1000)  # 1,500 words: two rows of 512 and 476 more
    words = np.frombuffer(tensor.numpy().tobytes(), dtype=np.int64)
    table = words[:1024].reshape(2, 512)
    with np.errstate(over="ignore"):
        expected = [table.sum(axis=0), table.sum(axis=1), words[1024:]]
    assert checksum(tensor) == b"torch.float32 [3, 1000] " + b"".join(part.tobytes() for part in expected)


def test_parameters_and_views_are_read() -> None:
    parameter = torch.nn.Parameter(torch.randn(600, 8))
    assert checksum(parameter) == checksum(parameter.data.clone())
    assert checksum(parameter.data[1:]) == checksum(parameter.data[1:].clone())
    halves = torch.randn(9001).to(torch.bfloat16)
    assert checksum(halves[3:]) == checksum(halves[3:].clone())
    assert checksum(parameter.data.T) == checksum(parameter.data.T.contiguous())
