"""What a comparison of two models did not look at, and whether it differs: a verdict covers what was compared only.

Every tensor of both folders is either compared matrix by matrix or is listed here, with the size of its change. Equal
digests settle most of them without a second look; the others are read once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlheals.models.topology import NOT_A_MATRIX, split_name, tables
from rlheals.spectra.reader import common_rows
from rlheals.spectra.rounding import rounding_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rlheals.spectra.reader import Weights

ADDED_ROWS = "rows that only one of the two models has"
NOT_SELECTED = "not selected"
_PLURAL = {
    "norm scale": "norm scales", "bias": "biases", "embedding": "embedding", "head": "head",
    "positions": "position tables", "gate or other vector": "gates and other vectors",
    "convolution kernel": "convolution kernels", "a single row or column": "single rows or columns",
}  # fmt: skip


@dataclass(frozen=True)
class Uncompared:
    """One tensor that was not compared matrix by matrix.

    Attributes:
        name: of the tensor, or of the rows of it.
        part: what it is, such as ``norm scale``, ``embedding``, ``matrix not selected``.
        reason: why it was left out.
        elements: numbers in it.
        differs: the target's values are not the reference's rounded to the target's type.
        change: ``‖target − reference‖_F``; 0 where it does not differ.
        norm: ``‖reference‖_F``; 0 where it does not differ, as nothing was read then.
        unknown: it may well be a weight like the others, but is not understood.
    """

    name: str
    part: str
    reason: str
    elements: int
    differs: bool
    change: float
    norm: float
    unknown: bool

    @property
    def relative(self) -> float:
        """``‖target − reference‖_F / ‖reference‖_F``; infinite where only the reference is all zero."""
        return _ratio(self.change, self.norm)


@dataclass(frozen=True)
class Coverage:
    """How much of a pair of models was compared, and what the rest did.

    Attributes:
        elements: numbers in all weights of the target, buffers and copies of a tied head left out.
        compared: those of them that were compared.
        rest: every tensor with numbers that were not.
    """

    elements: int
    compared: int
    rest: tuple[Uncompared, ...]

    @property
    def share(self) -> float:
        """Share of the weights that was compared."""
        return self.compared / self.elements if self.elements else 1.0

    @property
    def differing(self) -> tuple[Uncompared, ...]:
        """What was not compared although it differs."""
        return tuple(each for each in self.rest if each.differs)

    @property
    def unknown(self) -> tuple[Uncompared, ...]:
        """What differs and is not understood."""
        return tuple(each for each in self.differing if each.unknown)

    @property
    def text(self) -> str:
        """One sentence on what a verdict on the compared matrices covers."""
        said = f"compared were {100 * self.share:.3g} % of the weights; "
        if not self.differing:
            return said + ("the rest is equal." if self.rest else "nothing is left.")
        said += f"of the rest, {len(self.differing)} of {len(self.rest)} tensors differ ({', '.join(self.parts)})."
        if not self.unknown:
            return said
        return said + (
            f" Of these, {len(self.unknown)} may be weights of the network that rlheals does not understand, such as "
            f"{self.unknown[0].name}: no verdict covers them."
        )

    @property
    def parts(self) -> list[str]:
        """What differs, by part, with its size: ``embedding 0.66 %``, ``61 norm scales 0.32 %``."""
        groups: dict[str, list[Uncompared]] = defaultdict(list)
        for each in self.differing:
            groups[each.part].append(each)
        return [_told(part, members) for part, members in groups.items()]


def coverage(reference: Weights, target: Weights, compared: Iterable[str]) -> Coverage:
    """What comparing the matrices ``compared`` leaves out.

    Args:
        reference: the model before.
        target: the model after, see `rlheals.spectra.reader.check_same`.
        compared: names as in `rlheals.models.topology.Matrix`, of slices too.

    Raises:
        UserError: a tensor cannot be read or holds a NaN or an infinity.
    """
    done = set(compared)
    whole = _wholly(target, done)
    rest = tuple(_uncompared(reference, target, done, whole))
    skipped = {*target.buffers, *_copies(target)}
    elements = sum(math.prod(shape) for name, shape in target.shapes.items() if name not in skipped)
    return Coverage(elements, sum(math.prod(target.shapes[name]) for name in done), rest)


def _wholly(weights: Weights, done: set[str]) -> set[str]:
    """The tensors of the files of which every part is among ``done``."""
    parts: dict[str, int] = defaultdict(int)
    for name in done:
        tensor, place, rows = split_name(name)
        parts[tensor] += 0 if rows is not None else 1 if place is not None else _length(weights, tensor)
    return {tensor for tensor, count in parts.items() if count >= _length(weights, tensor)}


def _length(weights: Weights, tensor: str) -> int:
    """Entries along the first axis; 1 of a single number."""
    return next(iter(weights.shapes[tensor]), 1)


def _uncompared(reference: Weights, target: Weights, done: set[str], whole: set[str]) -> Iterator[Uncompared]:
    for name in dict.fromkeys([*target.shapes, *reference.shapes]):
        if name in whole or name in target.buffers or name in reference.buffers:
            continue
        theirs = counterpart(reference, target, name)
        if theirs is None:
            continue
        if name in reference.shapes and name in target.shapes:
            yield from _in_both(reference, target, name, done)
        elif name in target.shapes:
            yield _row(reference, target, common_rows(reference, target, theirs, name), name, theirs)
        else:
            yield _row(reference, target, common_rows(reference, target, name, theirs), theirs, name)


def counterpart(reference: Weights, target: Weights, name: str) -> str | None:
    """What tensor ``name`` of one model is in the other: itself, or the embedding for a head that only one stores.

    None where nothing is to be compared: a copy of the embedding that is stored as the tied head.
    """
    for ours, theirs in ((target, reference), (reference, target)):
        if name not in ours.shapes:
            continue
        if name in _copies(ours):
            return None
        if name in theirs.shapes:
            return name
        return next(iter(tables(theirs.shapes, "embedding")), None)
    raise KeyError(name)


def _copies(weights: Weights) -> list[str]:
    """Heads that are tied and stored all the same, equal to the embedding."""
    if not weights.tied:
        return []
    embeddings = tables(weights.shapes, "embedding")
    heads = tables(weights.shapes, "head")
    return [head for head in heads if embeddings and weights.digest(head) == weights.digest(embeddings[0])]


def _in_both(reference: Weights, target: Weights, name: str, done: set[str]) -> Iterator[Uncompared]:
    shared, _ = common_rows(reference, target, name, name)
    stacked = [f"{name}[{place}]" for place in range(_length(target, name))]
    for part in stacked if done.intersection(stacked) else [shared]:
        if part not in done:
            yield _row(reference, target, (part, part), part, part)
    if shared != name:
        rows = reference.shapes[name][0] - target.shapes[name][0]
        added = abs(rows) * math.prod(target.shapes[name][1:])
        yield Uncompared(name, "added rows", ADDED_ROWS, added, False, 0.0, 0.0, unknown=False)


def _row(reference: Weights, target: Weights, sides: tuple[str, str], name: str, other: str) -> Uncompared:
    part, reason, unknown = _what(target if split_name(name)[0] in target.shapes else reference, name)
    if name != other:
        reason = f"the head is tied to the embedding in one of the two models only; held against {other}"
    change, norm = _change(reference, target, *sides)
    return Uncompared(name, part, reason, math.prod(target.shapes[sides[1]]), change > 0, change, norm, unknown)


def _what(weights: Weights, name: str) -> tuple[str, str, bool]:
    """Part, reason and whether it is not understood."""
    tensor = split_name(name)[0]
    reason = weights.topology.left_out.get(tensor)
    if reason is not None:
        if tensor in tables(weights.shapes, "head"):
            return "head", reason, False
        part = reason.removesuffix(f", {NOT_A_MATRIX}")
        return part, reason, tensor in weights.topology.unknown
    kind = next(m.kind for m in weights.topology.matrices if split_name(m.name)[0] == tensor)
    return kind if kind in _PLURAL else "matrix not selected", NOT_SELECTED, False


def _change(reference: Weights, target: Weights, before: str, after: str) -> tuple[float, float]:
    """Norms of the change and of the reference; (0, 0) where the two are equal, but for rounding of the reference."""
    if reference.digest(before) == target.digest(after):
        return 0.0, 0.0
    change = norm = 0.0
    for old, new in zip(reference.blocks(before), target.blocks(after), strict=True):
        change = math.hypot(change, float((new.double() - old.double()).norm()))
        norm = math.hypot(norm, float(old.double().norm()))
    if change and rounding_of(zip(reference.blocks(before), target.blocks(after), strict=True)).type:
        return 0.0, 0.0
    return change, norm


def _told(part: str, members: list[Uncompared]) -> str:
    change = math.hypot(*(each.change for each in members))
    relative = _ratio(change, math.hypot(*(each.norm for each in members)))
    count = f"{len(members)} × " if len(members) > 1 else ""
    size = f"{100 * relative:.3g} %" if math.isfinite(relative) else "from all zeros"
    return f"{count}{_PLURAL.get(part, part) if len(members) > 1 else part} {size}"


def _ratio(change: float, norm: float) -> float:
    return change / norm if norm else math.inf if change else 0.0
