"""Numbers as a reader wants them."""

from __future__ import annotations

from math import isfinite, isnan
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 0 to 1 in per cent.

    >>> percent(0.0644)
    '6.4 %'
    """
    return "–" if share is None or isnan(share) else f"{100 * share:.{digits}f} %"


def points(difference: float | None) -> str:
    """A difference of shares in signed percentage points, with a true minus sign.

    >>> points(-0.05)
    '−5.0'
    """
    if difference is None or not isfinite(difference):
        return "–"
    return f"{100 * difference:+.1f}".replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """An interval of shares in per cent.

    >>> interval(0.927, 0.956)
    '[92.7, 95.6]'
    """
    if low is None or high is None or isnan(low) or isnan(high):
        return "–"
    return "[" + ", ".join(f"{100 * end:.1f}" if isfinite(end) else "∞" for end in (low, high)).replace("-", "−") + "]"


def p_value(p: float) -> str:
    """A p-value with two digits, and no more than it can bear; a dash where there is no test.

    >>> p_value(0.0412), p_value(3e-9), p_value(1), p_value(float("nan"))
    ('0.041', '< 0.0001', '1', '–')
    """
    if isnan(p):
        return "–"
    if p < 1e-4:
        return "< 0.0001"
    return "1" if p >= 0.995 else f"{p:.2g}"


def span(values: Sequence[float]) -> str:
    """One share, or the range of several.

    >>> span([0.5]), span([0.061, 0.07])
    ('50.0 %', '6.1 % to 7.0 %')
    """
    low, high = min(values), max(values)
    return percent(low) if percent(low) == percent(high) else f"{percent(low)} to {percent(high)}"


def listed(items: Sequence[object]) -> str:
    """Items in a sentence.

    >>> listed([1, 2, 3])
    '1, 2 and 3'
    """
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"
