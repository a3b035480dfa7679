"""Write an edited model as a Hugging Face folder, tensor by tensor: weights in shards, and the files to run it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import torch

from rlheals.errors import UserError
from rlheals.models.checkpoint import INDEX, WEIGHTS, check_finite
from rlheals.progress import Progress
from rlheals.publish import check_target, publish
from rlheals.restoration.card_front import CARD
from rlheals.restoration.patch import digest_of, tensor_digest
from rlheals.restoration.side_files import copy_side_files, side_files
from rlheals.restoration.tensor_file import NAMES, encode_header, raw

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from rlheals.spectra.reader import Weights

SHARD_BYTES = 5 * 10**9
"""Largest shard unless told otherwise."""


def write_model(
    target: Weights,
    changed: Callable[[str], Tensor | None],
    card: Callable[[str], str],
    out: Path,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write the folder ``out``, which appears whole or not at all, with a manifest and readable by all users.

    Args:
        target: the model that is edited; also the source of its config, tokenizer and so on.
        changed: gives the new tensor for a name, None where the target's stays; called once for each name.
        card: gives the text of the model card, told the `model_digest` of what was written; called last.
        out: a new folder, or one that rlheals wrote before.
        shard_bytes: size that no weight file exceeds, unless a single tensor does.

    Returns:
        The `model_digest` of the written weights.

    Raises:
        UserError: ``out`` is not free, holds the target, or cannot be written; an edited tensor is not finite; see also
            `rlheals.restoration.side_files.side_files`.
    """
    check_out(out, target.path)
    files = side_files(target.path)
    shards = _shards(target, shard_bytes)
    progress = Progress(f"writing {out.name}", len(target.shapes), "tensor")
    digests: dict[str, str] = {}

    def tensor(name: str) -> Tensor:
        edited = changed(name)
        if edited is None:
            digests[name] = target.digest(name)
            edited = target.tensor(name)
        else:
            check_finite({name: edited}, f"the edited {target.path.name}")
            digests[name] = tensor_digest(edited)
        progress.update(note=name)
        return edited

    with publish(out) as folder:
        for name, names in shards.items():
            _write_shard(folder / name, names, target, tensor)
        if len(shards) > 1:
            _write_index(folder / INDEX, shards, target)
        copy_side_files(target.path, files, folder)
        (folder / CARD).write_text(card(digest_of(digests)))
    return digest_of(digests)


def check_out(out: Path, *sources: Path) -> None:
    """Make sure that writing to ``out`` deletes nothing that is read or was not published, and adds nothing to it.

    Raises:
        UserError: it would.
    """
    check_target(out)
    for source in sources:
        ours, theirs = out.resolve(), source.resolve()
        if theirs.is_relative_to(ours) or ours.is_relative_to(theirs):
            how = "is" if ours == theirs else "holds" if theirs.is_relative_to(ours) else "lies in"
            raise UserError(f"{out} {how} {source}, which is read; name another folder to write to.")


def _shards(target: Weights, shard_bytes: int) -> dict[str, list[str]]:
    """Names of the tensors in each weight file, in the target's order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in target.shapes:
        bytes_ = _bytes(target, name)
        if groups[-1] and size + bytes_ > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    stem = WEIGHTS.removesuffix(".safetensors")
    return {f"{stem}-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, start=1)}


def _write_shard(path: Path, names: Sequence[str], target: Weights, tensor: Callable[[str], Tensor]) -> None:
    entries = [(name, NAMES[getattr(torch, target.dtypes[name])], target.shapes[name]) for name in names]
    with path.open("wb") as file:
        file.write(encode_header(entries, {"format": "pt"}))
        for name, dtype, shape in entries:
            edited = tensor(name)
            if (NAMES[edited.dtype], tuple(edited.shape)) != (dtype, shape):
                raise ValueError(f"the edited {name} is {edited.dtype} {list(edited.shape)}, not {dtype} {list(shape)}")
            file.write(raw(edited))
            del edited  # before the next one is read


def _write_index(path: Path, shards: Mapping[str, Sequence[str]], target: Weights) -> None:
    index = {
        "metadata": {"total_size": target.weight_bytes},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    path.write_text(json.dumps(index, indent=2))


def _bytes(target: Weights, name: str) -> int:
    dtype: torch.dtype = getattr(torch, target.dtypes[name])
    return math.prod(target.shapes[name]) * dtype.itemsize
