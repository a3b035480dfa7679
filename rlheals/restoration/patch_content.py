"""What a patch file says of itself, written and read back with every type and size checked.

The description is JSON in the file's metadata, with its own sha256 beside it: a patch is composed and inverted without
any model, so nothing else would tell a damaged shape or digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from rlheals import __version__
from rlheals.errors import UserError
from rlheals.restoration.tensor_file import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rlheals.restoration.exact import Counts, Step

FORMAT = "rlheals.patch"
CHECK = f"{FORMAT}.sha256"
VERSION = 1
_FLOATS = ("F64", "F32", "F16", "BF16")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Origin:
    """What one of the changes in a patch is.

    Attributes:
        recipe: `Edit.recipe` of the edit; empty for the plain difference of two models.
        reference: name and sha256 of the weights that were gone back to; empty for a plain difference.
        target: the same of the weights that were changed.
        inverted: the patch undoes this change.
        version: of rlheals.
    """

    recipe: Mapping[str, Any]
    reference: Mapping[str, str]
    target: Mapping[str, str]
    inverted: bool = False
    version: str = __version__


@dataclass(frozen=True)
class Entry:
    """One tensor of a patch.

    Attributes:
        dtype: as safetensors names it.
        shape: of the weight.
        before: `tensor_digest` of what the patch applies to.
        after: the same of what it gives.
        ranks: of each step, in order; 0 for a step that has no factors.
    """

    dtype: str
    shape: tuple[int, ...]
    before: str
    after: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Ends:
    """`model_digest` of the whole model that a patch is for and of the one it leads to; empty where it is not known."""

    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Content:
    """All that a patch says: the changes in order, the tensors by name in the model's order, and the two models."""

    origins: tuple[Origin, ...] = ()
    entries: Mapping[str, Entry] = field(default_factory=dict)
    models: Ends = Ends()


def encode(content: Content) -> dict[str, str]:
    """The metadata of a file."""
    text = json.dumps(
        {
            "version": VERSION,
            "origins": [asdict(origin) for origin in content.origins],
            "models": asdict(content.models),
            "tensors": {name: asdict(entry) for name, entry in content.entries.items()},
        }
    )
    return {FORMAT: text, CHECK: _digest(text)}


def decode(metadata: Mapping[str, str], path: Path) -> Content:
    """What `encode` wrote into the metadata of the file ``path``.

    Raises:
        UserError: the file is no patch, or a later version's.
        ValueError: it is damaged; so are a `TypeError`, a `KeyError` and an `AttributeError`.
    """
    text = metadata.get(FORMAT)
    if not text:
        raise UserError(f"{path} is no patch of rlheals; name a file that `rlheals patch make` wrote.")
    read = json.loads(text)
    if read["version"] != VERSION:
        raise UserError(
            f"{path} is a patch of format {read['version']}, this rlheals {__version__} reads {VERSION}; "
            "update rlheals."
        )
    if metadata.get(CHECK) != _digest(text):
        raise ValueError("its description is not what was written, or was written before descriptions were checked")
    entries = {name: _entry(found) for name, found in read["tensors"].items()}
    return Content(tuple(_origin(found) for found in read["origins"]), entries, _ends(read["models"]))


def check_step(step: Step, entry: Entry, rank: int) -> None:
    """Check that a step that was read fits its tensor, so that it can be applied, inverted and added.

    Raises:
        ValueError: it does not.
    """
    if rank:
        rows, columns = entry.shape
        wanted = [(rows, rank), (rank, columns)]
        factors = [factor for factor in (step.left, step.right) if factor is not None]
        _check([tuple(factor.shape) for factor in factors] == wanted, "its factors have other shapes")
        _check(all(factor.dtype == torch.float32 for factor in factors), "its factors are of another type")
    for counts in (step.forward, step.backward):
        if counts is not None:
            _check_counts(counts, math.prod(entry.shape), DTYPES[entry.dtype].itemsize)


def _check_counts(counts: Counts, numel: int, width: int) -> None:
    if counts.dense is not None:
        _check(counts.dense.shape == (numel,), "its numbers are not as many as the weight's")
        _check(_is_whole(counts.dense, width), "its numbers are of another type")
    positions, values = counts.positions, counts.values
    _check((positions is None) == (values is None), "it lacks positions or values")
    if positions is None or values is None:
        return
    _check(positions.ndim == 1 and positions.shape == values.shape, "its positions and values are not as many")
    _check(_is_whole(positions, 8) and _is_whole(values, width), "its positions or values are of another type")
    ascending = bool((positions[1:] > positions[:-1]).all())
    inside = not len(positions) or (int(positions[0]) >= 0 and int(positions[-1]) < numel)
    _check(ascending and inside, "its positions are not those of the weight")


def _is_whole(tensor: torch.Tensor, width: int) -> bool:
    return not tensor.is_floating_point() and tensor.element_size() <= width


def _entry(found: Mapping[str, Any]) -> Entry:
    entry = Entry(**{**found, "shape": tuple(found["shape"]), "ranks": tuple(found["ranks"])})
    numbers = (*entry.shape, *entry.ranks)
    _check(entry.dtype in _FLOATS, f"a tensor is of type {entry.dtype}")
    _check(all(type(number) is int and number >= 0 for number in numbers), "a shape or rank is no number")
    _check(len(entry.shape) == 2 or not any(entry.ranks), "a tensor that is no matrix has factors")
    _check(bool(_DIGEST.fullmatch(entry.before) and _DIGEST.fullmatch(entry.after)), "a digest is none")
    return entry


def _origin(found: Mapping[str, Any]) -> Origin:
    origin = Origin(**found)
    models = {**origin.reference, **origin.target}
    _check(isinstance(origin.recipe, dict) and type(origin.inverted) is bool, "an origin is none")
    _check(all(isinstance(value, str) for value in (origin.version, *models.values())), "a name is none")
    return origin


def _ends(found: Mapping[str, Any]) -> Ends:
    ends = Ends(**found)
    known = [digest for digest in (ends.before, ends.after) if digest]
    _check(all(_DIGEST.fullmatch(digest) for digest in known), "a digest is none")
    return ends


def _check(true: bool, otherwise: str) -> None:
    if not true:
        raise ValueError(otherwise)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
