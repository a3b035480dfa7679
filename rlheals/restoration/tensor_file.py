"""Safetensors files written and read one tensor at a time, so that a file may be larger than memory.

A file is the length of its header (8 bytes, little-endian), the header (JSON: type, shape and place of each tensor) and
the bytes of the tensors without gaps; see the format's description at https://huggingface.co/docs/safetensors. Where
all shapes are known the header goes first; else the tensors wait in a second file until the last of them is known.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from typing import TYPE_CHECKING, Self

import torch

from rlheals.claim import claim
from rlheals.errors import UserError, disk_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import BinaryIO

    from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # the limit of safetensors itself
_COPY = 1 << 20


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file with these tensors in this order.

    Args:
        tensors: name, type as safetensors names it (``BF16``) and shape of each.
        metadata: texts about the file.

    Raises:
        UserError: the header would be larger than readers of the format accept.
    """
    content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, as safetensors writes it
    if len(text) > _LARGEST_HEADER:
        raise UserError("a safetensors file cannot name so many tensors in its header; edit fewer layers at a time.")
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class TensorFileWriter:
    """Collects tensors on disk and makes one safetensors file of them; it appears whole at its path, or not at all.

    Raises:
        UserError: the disk is full or not writable, or another run is writing the same file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: list[tuple[str, str, tuple[int, ...]]] = []
        self._data = path.with_name(f".{path.name}.data")
        self._partial = path.with_name(f".{path.name}.partial")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(claim(self._data, path), "w+b")
            self._file.truncate()  # a killed run may have left some

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._partial, self._data):  # the locked one last: when it is gone the next run may begin
            file.unlink(missing_ok=True)
        self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        self._entries.append((name, NAMES[tensor.dtype], tuple(tensor.shape)))
        with disk_errors(self.path):
            self._file.write(raw(tensor))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the file; further tensors cannot be added."""
        with disk_errors(self.path):
            self._file.seek(0)
            with self._partial.open("wb") as file:
                file.write(encode_header(self._entries, metadata))
                shutil.copyfileobj(self._file, file, _COPY)
                file.flush()
                os.fsync(file.fileno())
            self._partial.chmod(0o644)
            self._partial.rename(self.path)


class TensorFile:
    """A safetensors file open for reading tensor by tensor; its header is checked when it is opened.

    Attributes:
        path: the file.
        metadata: its texts.
        shapes: shape of every tensor, by name.

    Raises:
        UserError: it is missing, cut short, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from error
        try:
            self._read_header()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._file.close()
            raise UserError(f"{path} is no safetensors file or is damaged ({error}); copy it again.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self._file.fileno()).st_size

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now.

        Raises:
            UserError: there is none of this name, or the file has become shorter.
        """
        if name not in self._places:
            raise UserError(f"{self.path} lacks its tensor {name}; make it again.")
        offset, size, dtype = self._places[name]
        buffer = torch.empty(size, dtype=torch.uint8)
        rest = buffer.numpy().data
        while rest:
            count = os.preadv(self._file.fileno(), [rest], offset)
            if count == 0:
                raise UserError(f"{self.path} has become shorter since it was opened; copy it again.")
            rest, offset = rest[count:], offset + count
        return buffer.view(dtype).reshape(self.shapes[name])

    def _read_header(self) -> None:
        descriptor = self._file.fileno()
        length = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
        start = _LENGTH_BYTES + length
        if length > _LARGEST_HEADER or start > self.bytes:
            raise ValueError(f"its header would take {length} bytes")
        content = json.loads(os.pread(descriptor, length, _LENGTH_BYTES))
        self.metadata: dict[str, str] = dict(content.pop("__metadata__", {}))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[int, int, torch.dtype]] = {}
        end = 0
        for name, entry in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
            (first, last), shape = entry["data_offsets"], tuple(entry["shape"])
            dtype = DTYPES[entry["dtype"]]
            if any(type(number) is not int for number in (first, last, *shape)):
                raise ValueError(f"tensor {name} has no place or shape")
            if first != end or last - first != math.prod(shape) * dtype.itemsize or any(size < 0 for size in shape):
                raise ValueError(f"tensor {name} is not where it should be")
            self.shapes[name], self._places[name] = shape, (start + first, last - first, dtype)
            end = last
        if start + end != self.bytes:
            raise ValueError(f"its tensors need {start + end} bytes, it has {self.bytes}")
