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
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar

import torch

from rlheals.errors import UserError
from rlheals.models.checkpoint import (
    CONFIG,
    INDEX,
    REPAIR,
    check_digests,
    check_finite,
    check_floating,
    check_index,
    damaged,
    is_buffer,
    name_some,
    read_json,
    weight_files,
)
from rlheals.models.families import setting
from rlheals.models.folders import check_names
from rlheals.models.topology import BUFFER, Topology, is_tied, read_topology, split_name, tables, text_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_T = TypeVar("_T")
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its header, little-endian
_LARGEST_HEADER = 100_000_000  # the limit of safetensors itself
_BLOCK = 1 << 20  # bytes hashed, or values checked, at a time
_DTYPE_NAME = re.compile(r"^(BOOL|BF16|C64|[UIF]\d+(_\w+)?)$")
_PREFIX = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")
# What torch.compile, DistributedDataParallel and PEFT put before or into names; no loader knows such names.
_WRAPPERS = (re.compile(r"(?:^|(?<=\.))_orig_mod\."), re.compile(r"^module\."), re.compile(r"^base_model\.model\."))


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: ``size`` bytes at ``offset`` of an open file."""

    file: BinaryIO
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class SliceTable(Mapping[str, _T]):
    """A value for every tensor, which also answers for the slices that `rlheals.models.topology.split_name` reads.

    Iterating gives the tensors alone.
    """

    def __init__(self, whole: Mapping[str, _T], of_slice: Callable[[str], _T]) -> None:
        self._whole, self._of_slice = whole, of_slice

    def __getitem__(self, name: str) -> _T:
        return self._whole[name] if name in self._whole else self._of_slice(name)

    def __contains__(self, name: object) -> bool:
        return name in self._whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


class Weights:
    """One Hugging Face folder, open for reading tensor by tensor; a context manager that closes its files.

    Attributes:
        path: the folder.
        config: content of ``config.json``.
        shapes: shape of every tensor, by name; also of a slice, such as an expert's ``….gate_up_proj[3]``.
        dtypes: type of every tensor as torch names it, such as ``bfloat16``.
        tied: the head is the embedding.
        buffers: tensors that are no weights, which the model computes from its config.
        renamed: what was left off the names that a wrapper (torch.compile and so on) had put there; empty mostly.
        weight_bytes: size of all tensors together, as stored.

    Raises:
        UserError: on opening, for pickled, missing, truncated or damaged files, quantised weights, weights that were
            not gathered or merged, an index or manifest that disagrees with the files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = ExitStack()
        self._digests: dict[str, str] = {}
        with ExitStack() as on_error:
            on_error.push(self._files)
            self._entries, self.renamed = _unwrapped(path, self._open())
            self.config = _read_config(path)
            self.shapes: Mapping[str, tuple[int, ...]] = SliceTable(
                {name: entry.shape for name, entry in self._entries.items()}, lambda name: self._entry(name).shape
            )
            self.dtypes: Mapping[str, str] = SliceTable(
                {name: _torch_name(entry) for name, entry in self._entries.items()},
                lambda name: _torch_name(self._entry(name)),
            )
            self.buffers = {name for name, entry in self._entries.items() if is_buffer(name, entry.dtype)}
            self.weight_bytes = sum(entry.size for entry in self._entries.values())
            self.tied = is_tied(self.config, self.shapes)
            _check_gathered(path, self._entries)
            check_digests(path)  # last, because it reads all bytes where there is a manifest
            on_error.pop_all()

    @cached_property
    def topology(self) -> Topology:
        """Which tensor is which matrix.

        Raises:
            UserError: the model is no decoder that can be read, or its config and weights do not fit.
        """
        weights = {name: shape for name, shape in self.shapes.items() if name not in self.buffers}
        try:
            found = read_topology(self.config, weights)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        return replace(found, left_out=found.left_out | dict.fromkeys(sorted(self.buffers), BUFFER))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; harmless when they are closed."""
        self._files.close()

    def tensor(self, name: str) -> Tensor:
        """Tensor ``name``, or a slice of one, with the type it is stored in, read now and held by the caller alone.

        Raises:
            UserError: it holds a NaN or an infinity, or the file has shrunk since it was opened.
        """
        entry = self._entry(name)
        buffer = torch.empty(entry.size, dtype=torch.uint8)
        _fill(entry, buffer.numpy().data, 0)
        values = buffer.view(DTYPES[entry.dtype])
        for start in range(0, len(values), _BLOCK):  # by block, because isfinite makes copies
            check_finite({name: values[start : start + _BLOCK]}, str(entry.path))
        return values.reshape(entry.shape)

    def blocks(self, name: str, numbers: int = _BLOCK // 4) -> Iterator[Tensor]:
        """The numbers of tensor ``name``, or of a slice of one, flat and so many at a time, without holding the tensor.

        Raises:
            UserError: as `tensor`.
        """
        entry = self._entry(name)
        size = DTYPES[entry.dtype].itemsize
        for start in range(0, entry.size, numbers * size):
            buffer = torch.empty(min(numbers * size, entry.size - start), dtype=torch.uint8)
            _fill(entry, buffer.numpy().data, start)
            values = buffer.view(DTYPES[entry.dtype])
            check_finite({name: values}, str(entry.path))
            yield values

    def _entry(self, name: str) -> _Entry:
        """Where a tensor lies, or one of the slices along its first axis."""
        if name in self._entries:
            return self._entries[name]
        tensor, place, rows = split_name(name)
        whole = self._entries[tensor]
        size = whole.size // whole.shape[0]
        if place is not None and place < whole.shape[0]:
            return replace(whole, shape=whole.shape[1:], offset=whole.offset + place * size, size=size)
        if rows is not None and 0 < rows <= whole.shape[0]:
            return replace(whole, shape=(rows, *whole.shape[1:]), size=rows * size)
        raise KeyError(name)

    def digest(self, name: str) -> str:
        """Hex sha256 over type, shape and bytes of tensor ``name``, computed once without holding the tensor.

        Raises:
            UserError: the file has shrunk since it was opened.
        """
        if name not in self._digests:
            entry = self._entry(name)
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
                    raise _twice(self.path, name, entries[name].path.name, path.name)
                entries[name] = entry
        if (self.path / INDEX).is_file():
            check_index(self.path, set(entries))
        return entries


def check_same(base: Weights, tuned: Weights) -> None:
    """Check that two folders hold the same network, tensor by tensor; their types may differ.

    Apart may be: buffers; a tied head, which either may store or not, or which one of the two has untied; and the
    number of rows of embedding and head, as tokens are added and padded.

    Raises:
        UserError: the configs name other architectures or heads, or the tensors that differ in name or shape.
    """
    problems = _config_differences(base, tuned) or _tensor_differences(base, tuned)
    if problems:
        raise UserError(
            f"{tuned.path} is not a fine-tuned version of {base.path}: {'; '.join(problems)}. "
            "Compare a model with one that was trained from it."
        )


def common_rows(reference: Weights, target: Weights, before: str, after: str) -> tuple[str, str]:
    """What to read of tensor ``before`` of one folder and ``after`` of another: all of them, or the rows both have.

    Of an embedding with 32,000 rows and one with 32,002: ``model.embed_tokens.weight[:32000]``.
    """
    ours, theirs = reference.shapes[before], target.shapes[after]
    if ours == theirs:
        return before, after
    rows = min(ours[0], theirs[0])
    return f"{before}[:{rows}]", f"{after}[:{rows}]"


def _config_differences(base: Weights, tuned: Weights) -> list[str]:
    def said(weights: Weights) -> dict[str, object]:
        text = text_config(weights.config)
        heads, width = setting(text, "num_attention_heads"), setting(text, "hidden_size")
        whole = type(heads) is int and type(width) is int and heads > 0
        return {
            "model_type": weights.config.get("model_type"),
            "architectures": weights.config.get("architectures"),
            "num_attention_heads": heads,
            "num_key_value_heads": setting(text, "num_key_value_heads"),
            "head_dim": text.get("head_dim") or (width // heads if whole else None),
        }

    ours, theirs = said(base), said(tuned)
    return [
        f"its config has {key} {theirs[key]}, not {ours[key]}"
        for key in ours
        if ours[key] != theirs[key] and None not in (ours[key], theirs[key])
    ]


def _tensor_differences(base: Weights, tuned: Weights) -> list[str]:
    heads = {*tables(base.shapes, "head"), *tables(tuned.shapes, "head")} if base.tied or tuned.tied else set()
    apart = base.buffers | tuned.buffers | heads
    ours, theirs = ({n: s for n, s in w.shapes.items() if n not in apart} for w in (base, tuned))
    lacking = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    if lacking and {_PREFIX.sub("", name) for name in ours} == {_PREFIX.sub("", name) for name in theirs}:
        return [
            f"it holds the same tensors under other names ({extra[0]} for {lacking[0]}), so they would not load into "
            "the same model; save both with the same version of transformers"
        ]
    rows = {*tables(ours, "embedding"), *tables(ours, "head")}
    shapes = [
        f"{name} has shape {list(theirs[name])}, not {list(ours[name])}"
        for name in ours
        if name in theirs
        and ours[name] != theirs[name]
        and not (name in rows and len(ours[name]) == len(theirs[name]) and ours[name][1:] == theirs[name][1:])
    ]
    found = [f"it {verb} {name_some(names)}" for names, verb in ((lacking, "lacks"), (extra, "also has")) if names]
    return found + ([name_some(shapes)] if shapes else [])


def _unwrapped(path: Path, entries: dict[str, _Entry]) -> tuple[dict[str, _Entry], str]:
    """The entries under the names that a loader knows, and what a wrapper had added to them.

    Raises:
        UserError: the weights were saved with an adapter's layers, or two names become one.
    """
    check_names(path, entries)
    renamed = ""
    for wrapper in _WRAPPERS:
        if entries and all(wrapper.search(name) for name in entries):
            renamed += wrapper.search(next(iter(entries)))[0]  # type: ignore[index]
            fewer = {wrapper.sub("", name): entry for name, entry in entries.items()}
            if len(fewer) < len(entries):
                raise damaged(path, "two of its names differ by a wrapper's prefix only")
            entries = fewer
    return entries, renamed


def _check_gathered(path: Path, entries: Mapping[str, _Entry]) -> None:
    """Refuse the empty tensors that DeepSpeed's ZeRO-3 saves where nobody gathered the weights."""
    empty = [name for name, entry in entries.items() if 0 in entry.shape]
    if empty:
        raise UserError(
            f"{path} holds tensors without a number in them ({name_some(empty)}), as DeepSpeed's ZeRO-3 leaves when "
            "the weights are not gathered; gather them (zero_to_fp32.py, or stage3_gather_16bit_weights_on_model_save) "
            "and point to the result."
        )


def _twice(path: Path, name: str, first: str, second: str) -> UserError:
    where = f"{path / INDEX} names one of the two" if (path / INDEX).is_file() else "nothing says which one counts"
    return UserError(
        f"tensor {name} is in {first} and in {second}, and {where}; one is a stale copy, so copy the folder again from "
        "its source, or save the model anew into an empty folder."
    )


def _torch_name(entry: _Entry) -> str:
    return str(DTYPES[entry.dtype]).removeprefix("torch.")


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} has no {CONFIG}, so it is not a Hugging Face model folder; fix the path or {REPAIR}.")
    return read_json(path / CONFIG)


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
