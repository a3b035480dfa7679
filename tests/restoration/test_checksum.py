"""Checksums of one tensor and of many at once."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlheals.restoration import checksum as module
from rlheals.restoration.checksum import checksum, checksums

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


shapes = st.sampled_from([(), (0,), (1,), (3,), (64, 128), (65, 127), (128, 64), (4, 5000)])


@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=8), st.integers(0, 100))
def test_many_at_once_are_the_ones_alone(kinds: list[tuple[tuple[int, ...], torch.dtype]], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.randint(-100, 100, shape, generator=draw).to(dtype) for shape, dtype in kinds]
    assert checksums(tensors) == [checksum(tensor) for tensor in tensors]


def test_a_changed_tensor_among_many_is_the_one_that_differs() -> None:
    """Also across the limits of what is put into one table: 40 tensors of 64 KiB take several."""
    tensors = [torch.randn(128, 128) for _ in range(40)]
    assert 40 * tensors[0].nbytes > 2 * module._TOGETHER > 4 * tensors[0].nbytes
    before = checksums(tensors)
    for place in (0, 31, 32, 39):
        tensors[place][5, 7] = torch.nextafter(tensors[place][5, 7], torch.tensor(9.0))
    after = checksums(tensors)
    assert [place for place in range(40) if before[place] != after[place]] == [0, 31, 32, 39]


def test_the_sums_are_those_of_the_table() -> None:
    tensor = torch.randn(3, 1000)  # 1,500 words: two rows of 512 and 476 more
    words = np.frombuffer(tensor.numpy().tobytes(), dtype=np.int64)
    table = words[:1024].reshape(2, 512)
    with np.errstate(over="ignore"):
        expected = [table.sum(axis=0), table.sum(axis=1), words[1024:]]
    assert checksum(tensor) == b"torch.float32 [3, 1000] " + b"".join(part.tobytes() for part in expected)


def test_parameters_are_read_without_a_graph() -> None:
    parameters = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    assert checksums(parameters) == [checksum(parameter.data) for parameter in parameters]
