"""Changes of a wanted size in weights of a narrow type, where rounding decides how large a change becomes.

In bfloat16 a change below half the distance of two neighbouring numbers rounds away, one just above it doubles. So a
control that has the norm of an edit before it is rounded may have a quarter or one and a half times of it in the
weights. Here the amount is adjusted until the rounded change has the norm.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rlheals.restoration.job import distance

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CLOSE = 1e-3
"""Relative difference of two norms below which they are the same."""
_TRIES = 24
_LARGEST_STEP = 4.0


def of_norm(
    changed: Callable[[float], Tensor], target: Tensor, norm: float, start: float, most: float = math.inf
) -> Tensor:
    """What ``changed`` gives, rounded to the target's type, at the amount where its distance to it is nearest ``norm``.

    The distance should grow with the amount. It does so in steps, as rounded numbers do, so that not every norm exists.

    Args:
        changed: gives the changed tensor for an amount, in any float type; a fresh one each time.
        target: what is changed.
        norm: wanted Frobenius norm of the change.
        start: first guess of the amount, above 0.
        most: largest amount.
    """
    if not norm:
        return target
    low, high, amount = 0.0, math.inf, min(start, most)
    best = (math.inf, amount)
    for attempt in range(_TRIES):
        tensor = changed(amount).to(target.dtype)
        found = distance(tensor, target)
        missed = abs(found - norm)
        best = min(best, (missed, amount))
        if missed <= CLOSE * norm or (found < norm and amount == most):
            break
        low, high = (amount, high) if found < norm else (low, amount)
        amount = _next(low, high, amount, norm / found if found else math.inf, most, bisect=attempt % 2 == 1)
    return tensor if amount == best[1] else changed(best[1]).to(target.dtype)


def _next(low: float, high: float, amount: float, ratio: float, most: float, *, bisect: bool) -> float:
    """The next amount to try: in proportion, or the middle of what is left, which also gets past a step."""
    if math.isinf(high):
        return min(most, amount * min(_LARGEST_STEP, max(ratio, 1.0 + CLOSE)))
    guess = amount * ratio
    return guess if low < guess < high and not bisect else (low + high) / 2
