"""Checksums of weights that read memory as fast as it comes, of many small tensors in one pass.

The bytes of a tensor are laid out as a table of 64-bit words, and the checksum is all sums over its rows and columns,
modulo 2^64: any one changed word, and any exchange of two unequal ones, changes it. sha256 of the bytes themselves
takes several times as long as copying them, and the calls for one matrix of 128² take as long as reading it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_WORD = 8  # bytes
_WIDTH = 512  # words in a row of the table
_SMALL = 1 << 18  # bytes of a tensor up to which several are worth a copy into one table
_TOGETHER = 1 << 19  # bytes copied at a time, which stay in the cache of one core


def checksum(tensor: Tensor) -> bytes:
    """The checksum of one tensor; about 1/512 of its size, 4 KiB at least where the tensor has as much."""
    return checksums([tensor])[0]


@torch.no_grad()
def checksums(tensors: Sequence[Tensor]) -> list[bytes]:
    """The checksums of tensors on any device, in their order; those of equal type and shape are made together."""
    found = [b""] * len(tensors)
    for group in _groups(tensors):
        first = tensors[group[0]]
        kind = f"{first.dtype} {list(first.shape)} ".encode()
        sums = _sums(_words([tensors[place] for place in group])).cpu().numpy()
        for place, row in zip(group, sums, strict=True):
            found[place] = b"".join((kind, row))
    return found


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of the tensors that go into one table."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, tensor in enumerate(tensors):
        alike.setdefault((tensor.dtype, tensor.shape, tensor.device), []).append(place)
    for places in alike.values():
        size = tensors[places[0]].nbytes
        count = max(1, _TOGETHER // max(1, size)) if size <= _SMALL else 1
        yield from (places[start : start + count] for start in range(0, len(places), count))


def _words(alike: list[Tensor]) -> Tensor:
    """The bytes of each tensor as a row of 64-bit words, with zeros behind where they end within a word."""
    whole = torch.stack(alike) if len(alike) > 1 else alike[0][None]
    data = whole.reshape(len(alike), alike[0].numel()).contiguous().view(torch.uint8)
    words = -(-data.shape[1] // _WORD)
    if data.shape[1] % _WORD:
        data = torch.nn.functional.pad(data, (0, words * _WORD - data.shape[1]))
    elif data.storage_offset() % _WORD:
        data = data.clone()  # words must start where a word may start
    return data.reshape(-1).view(torch.int64).reshape(len(alike), words)


def _sums(table: Tensor) -> Tensor:
    """Sums of each row of words (count, words), laid out as a table of its own; what fills no row of that as it is."""
    count, words = table.shape
    rows, rest = divmod(words, _WIDTH)
    square = table[:, : words - rest].view(count, rows, _WIDTH)
    sums = table.new_empty(count, _WIDTH + rows + rest)
    torch.sum(square, dim=1, out=sums[:, :_WIDTH])
    torch.sum(square, dim=2, out=sums[:, _WIDTH : _WIDTH + rows])
    sums[:, _WIDTH + rows :] = table[:, words - rest :]
    return sums
