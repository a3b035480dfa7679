"""Whether two tensors differ by rounding alone, decided number by number.

A model saved in a coarser type differs from the one it was in every number, and nothing was learnt. That is told
exactly, and in one direction only: the target is the reference, stored in a coarser type. The reference has no rounding
error with respect to itself, whatever its type: a model trained from bfloat16 weights began at those very numbers, so
what differs from them was changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_COARSE = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rounding:
    """What rounding explains of a change.

    Attributes:
        type: the type whose rounding explains all of it, as torch names it; empty where none does.
        share: ``‖stored(reference) − reference‖_F / ‖target − reference‖_F`` for a target of a coarser type, whose
            change is made of rounding and of what was learnt; None for other types.
    """

    type: str
    share: float | None


NONE = Rounding("", None)


def rounding_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> Rounding:
    """What rounding explains of the change between two tensors that are given in blocks.

    Args:
        pairs: blocks of reference and target, of equal shapes; each side has one floating type throughout.
    """
    still: set[torch.dtype] | None = None
    missed = change = 0.0
    coarser = False
    for old, new in pairs:
        if still is None:
            still = _candidates(old.dtype, new.dtype)
            coarser = _step(new.dtype) > _step(old.dtype)
        still = {kind for kind in still if torch.equal(old.to(kind).to(new.dtype), new)}
        if not still and not coarser:
            return NONE
        if coarser:
            wide = old.double()
            missed = math.hypot(missed, float((old.to(new.dtype).double() - wide).norm()))
            change = math.hypot(change, float((new.double() - wide).norm()))
    name = next((str(kind).removeprefix("torch.") for kind in (*_COARSE, torch.float32) if kind in (still or ())), "")
    return Rounding(name, missed / change if coarser and change and not name else None)


def _candidates(old: torch.dtype, new: torch.dtype) -> set[torch.dtype]:
    """The coarser types that the reference may have been stored in on its way to the target's type."""
    return {kind for kind in (*_COARSE, new) if _step(kind) > _step(old) and _step(kind) >= _step(new)}


def _step(kind: torch.dtype) -> float:
    return torch.finfo(kind).eps
