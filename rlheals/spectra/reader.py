"""Weights of a Hugging Face folder, one tensor at a time: headers checked when it is opened, data read when asked for.

Tensors are read with ``pread`` at the offsets of the file's header, not through a memory map as ``safe_open`` does: a
map puts the whole shard into the address space, and each page touched stays in the resident set, so a memory limit
would have to cover the file instead of one tensor. The header is checked as strictly as safetensors does: offsets
without gaps or overlaps, sizes that follow from type and shape, and nothing missing or left over at the end, which is
how a truncated file is noticed without reading it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import torch

from rlheals.errors import UserError
from rlheals.models.checkpoint import (
    CONFIG,
    INDEX,
    REPAIR,
    WEIGHTS,
    check_digests,
    check_finite,
    check_floating,
    check_index,
    damaged,
    name_some,
    read_json,
    weight_files,
)
from rlheals.models.topology import Topology, read_topology

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its header, little-endian
_LARGEST_HEADER = 100_000_000  # the limit of safetensors itself
_BLOCK = 1 << 20  # bytes hashed, or values checked, at a time
_DTYPE_NAME = re.compile(r"^(BOOL|BF16|C64|[UIF]\d+(_\w+)?)$")
_PREFIX = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: ``size`` bytes at ``offset`` of an open file."""

    file: BinaryIO
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Weights:
    """One Hugging Face folder, open for reading tensor by tensor; a context manager that closes its files.

    Attributes:
        path: the folder.
        config: content of ``config.json``.
        shapes: shape of every tensor, by name.
        dtypes: type of every tensor as torch names it, such as ``bfloat16``.
        topology: which tensor is which matrix.
        weight_bytes: size of all tensors together, as stored.

    Raises:
        UserError: on opening, for pickled, missing, truncated or damaged files, quantised weights, an index or
            manifest that disagrees with the files, or a model that is not Llama-like.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = ExitStack()
        self._digests: dict[str, str] = {}
        with ExitStack() as on_error:
            on_error.push(self._files)
            self._entries = self._open()
            self.config = _read_config(path)
            self.shapes = {name: entry.shape for name, entry in self._entries.items()}
            self.dtypes = {name: str(DTYPES[e.dtype]).removeprefix("torch.") for name, e in self._entries.items()}
            self.weight_bytes = sum(entry.size for entry in self._entries.values())
            self.topology: Topology = _topology(path, self.config, self.shapes)
            check_digests(path)  # last, because it reads all bytes where there is a manifest
            on_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; harmless when they are closed."""
        self._files.close()

    def tensor(self, name: str) -> Tensor:
        """Tensor ``name`` with the type it is stored in, read now and held by the caller alone.

        Raises:
            UserError: it holds a NaN or an infinity, or the file has shrunk since it was opened.
        """
        entry = self._entries[name]
        buffer = torch.empty(entry.size, dtype=torch.uint8)
        _fill(entry, buffer.numpy().data, 0)
        values = buffer.view(DTYPES[entry.dtype])
        for start in range(0, len(values), _BLOCK):  # by block, because isfinite makes copies
            check_finite({name: values[start : start + _BLOCK]}, str(entry.path))
        return values.reshape(entry.shape)

    def digest(self, name: str) -> str:
        """Hex sha256 over type, shape and bytes of tensor ``name``, computed once without holding the tensor.

        Raises:
            UserError: the file has shrunk since it was opened.
        """
        if name not in self._digests:
            entry = self._entries[name]
            sha = hashlib.sha256(f"{entry.dtype} {list(entry.shape)} ".encode())
            buffer = memoryview(bytearray(min(_BLOCK, entry.size)))
            for start in range(0, entry.size, _BLOCK):
                block = buffer[: min(_BLOCK, entry.size - start)]
                _fill(entry, block, start)
                sha.update(block)
            self._digests[name] = sha.hexdigest()
        return self._digests[name]

    def _open(self) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for path in weight_files(self.path):
            file = self._files.enter_context(path.open("rb", buffering=0))
            for name, entry in _read_header(path, file).items():
                if name in entries:
                    raise damaged(path, f"tensor {name} is also in {entries[name].path.name}")
                entries[name] = entry
        if not (self.path / WEIGHTS).is_file() and (self.path / INDEX).is_file():
            check_index(self.path, set(entries))
        return entries


def check_same(base: Weights, tuned: Weights) -> None:
    """Check that two folders hold the same network, tensor by tensor; their types may differ.

    Where both tie the head to the embedding, either may store it twice.

    Raises:
        UserError: the configs name other architectures or heads, or the tensors that differ in name or shape.
    """
    problems = _config_differences(base, tuned) or _tensor_differences(base, tuned)
    if problems:
        raise UserError(
            f"{tuned.path} is not a fine-tuned version of {base.path}: {'; '.join(problems)}. "
            "Compare a model with one that was trained from it."
        )


def _config_differences(base: Weights, tuned: Weights) -> list[str]:
    def said(weights: Weights) -> dict[str, object]:
        topology = weights.topology
        return {
            "model_type": topology.family,
            "architectures": weights.config.get("architectures"),
            "num_attention_heads": topology.heads,
            "num_key_value_heads": topology.kv_heads,
            "head_dim": topology.head_size,
        }

    ours, theirs = said(base), said(tuned)
    return [
        f"its config has {key} {theirs[key]}, not {ours[key]}"
        for key in ours
        if ours[key] != theirs[key] and None not in (ours[key], theirs[key])
    ]


def _tensor_differences(base: Weights, tuned: Weights) -> list[str]:
    ours, theirs = base.shapes, tuned.shapes
    if base.topology.tied and tuned.topology.tied:
        ours, theirs = ({n: s for n, s in shapes.items() if "lm_head" not in n} for shapes in (ours, theirs))
    lacking = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    if lacking and {_PREFIX.sub("", name) for name in ours} == {_PREFIX.sub("", name) for name in theirs}:
        return [
            f"it holds the same tensors under other names ({extra[0]} for {lacking[0]}), so they would not load into "
            "the same model; save both with the same version of transformers"
        ]
    shapes = [
        f"{name} has shape {list(theirs[name])}, not {list(ours[name])}"
        for name in ours
        if name in theirs and ours[name] != theirs[name]
    ]
    found = [f"it {verb} {name_some(names)}" for names, verb in ((lacking, "lacks"), (extra, "also has")) if names]
    return found + ([name_some(shapes)] if shapes else [])


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} has no {CONFIG}, so it is not a Hugging Face model folder; fix the path or {REPAIR}.")
    return read_json(path / CONFIG)


def _topology(path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Topology:
    try:
        return read_topology(config, shapes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read_header(path: Path, file: BinaryIO) -> dict[str, _Entry]:
    """Every tensor of one safetensors file, from its header, checked against the size of the file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(os.pread(file.fileno(), _LENGTH_BYTES, 0), "little")
    start = _LENGTH_BYTES + length
    if size < _LENGTH_BYTES or length > _LARGEST_HEADER or start > size:
        raise damaged(path, f"its header would take {length} bytes, the file has {size}")
    try:
        header = json.loads(os.pread(file.fileno(), length, _LENGTH_BYTES), object_pairs_hook=_without_repeats)
        tensors = {name: fields for name, fields in header.items() if name != "__metadata__"}
        entries = {name: _entry(path, file, name, fields, start) for name, fields in tensors.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its header is not valid: {error}") from error
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            raise damaged(path, f"tensor {name} does not start where the one before it ends")
        end += entry.size
    if end != size:
        raise damaged(path, f"its tensors need {end} bytes, the file has {size}")
    return entries


def _entry(path: Path, file: BinaryIO, name: str, fields: dict[str, Any], start: int) -> _Entry:
    dtype, shape, (first, last) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if not _DTYPE_NAME.match(dtype):
        raise ValueError(f"tensor {name} has the unknown type {dtype!r}")
    check_floating(path, name, dtype)
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"tensor {name} has a shape or offset that is not a whole number")
    if last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {name} of shape {list(shape)} and type {dtype} cannot take {last - first} bytes")
    return _Entry(file, path, dtype, shape, start + first, last - first)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _fill(entry: _Entry, buffer: memoryview, start: int) -> None:
    """Fill ``buffer`` from byte ``start`` of a tensor; one call reads at most 2 GiB, hence the loop."""
    at = entry.offset + start
    while buffer:
        count = os.preadv(entry.file.fileno(), [buffer], at)
        if count == 0:
            raise damaged(entry.path, "it has become shorter since it was opened")
        buffer, at = buffer[count:], at + count
