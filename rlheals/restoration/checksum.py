"""Checksums of weights that read memory about as fast as it comes.

The bytes of a tensor are laid out as a table of 64-bit words, and the checksum is all sums over its rows and columns,
modulo 2^64: any one changed word, and any exchange of two unequal ones, changes it. sha256 of the bytes takes several
times as long as copying them. On a CPU the sums are NumPy's: with matrices of 128² the calls of torch around them would
take longer than the sums.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

_WORD = 8  # bytes
_WIDTH = 512  # words in a row of the table
_ROW = _WORD * _WIDTH
_ROWS = 256  # rows summed at a time, which stay in the cache of one core from the first sum to the second


def checksum(tensor: Tensor) -> bytes:
    """The checksum of a tensor on any device; about 1/512 of its size, 4 KiB at least where the tensor has as much."""
    data = tensor.detach().reshape(-1).view(torch.uint8)
    return _kind(tensor.dtype, tensor.shape) + (_sums(data.numpy()) if data.is_cpu else _sums_on_device(data))


@lru_cache(maxsize=1024)
def _kind(dtype: torch.dtype, shape: torch.Size) -> bytes:
    return f"{dtype} {list(shape)} ".encode()


def _sums(data: np.ndarray) -> bytes:
    """Sums over the columns and the rows of the table that whole rows of these bytes make, and the bytes behind it."""
    size = len(data) - len(data) % _ROW
    table = data[:size].view(np.int64).reshape(-1, _WIDTH)
    parts = [table[start : start + _ROWS] for start in range(0, len(table), _ROWS)]
    sums = [(np.add.reduce(part, 0), np.add.reduce(part, 1)) for part in parts]
    columns = sum((columns for columns, _ in sums[1:]), sums[0][0]).tobytes() if sums else b""
    return b"".join([columns, *(rows.tobytes() for _, rows in sums), data[size:].tobytes()])


def _sums_on_device(data: Tensor) -> bytes:
    """The same, with torch where the bytes are."""
    size = len(data) - len(data) % _ROW
    whole = data[:size].clone() if data.storage_offset() % _WORD else data[:size]
    table = whole.view(torch.int64).view(-1, _WIDTH)
    sums = [table.sum(0), table.sum(1)] if size else []
    return b"".join(part.cpu().numpy().tobytes() for part in (*sums, data[size:]))
