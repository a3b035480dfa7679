"""Which ranks of a spectrum an edit takes: a window [from, to), rank 0 being the largest singular value."""

from __future__ import annotations

from dataclasses import dataclass

from rlheals.errors import UserError


@dataclass(frozen=True, eq=False)
class Window:
    """Ranks from ``rank_from`` up to, but without, ``rank_to``; two windows are equal when their texts are.

    Whole numbers are ranks, and negative ones count from the end as in Python. Floats within 0 and 1 are shares of the
    matrix's own rank, so the float 1.0 is the end of every spectrum. Ranks beyond the rank of a matrix are cut off, so
    a window of whole ranks may hold none of a small matrix; one of shares holds at least one unless its ends are equal.

    >>> head(0.2).slice(128), tail(4).slice(128), band(0.25, 0.5).slice(128), FULL.slice(128)
    (slice(0, 26, None), slice(124, 128, None), slice(32, 64, None), slice(0, 128, None))

    Raises:
        UserError: an end that is neither, or ends in the wrong order.
    """

    rank_from: float
    rank_to: float

    def __post_init__(self) -> None:
        for end in (self.rank_from, self.rank_to):
            if isinstance(end, bool) or (isinstance(end, float) and not 0.0 <= end <= 1.0):
                raise UserError(
                    f"{end!r} is no end of a window of ranks: give a whole rank, or a share within 0 and 1 such as 0.2."
                )
        if min(self.rank_from, self.rank_to) < 0 and self.rank_to != 1.0:
            raise UserError(f"only a window that reaches the last rank may count from the end, not {self.rank_from}.")
        alike = isinstance(self.rank_from, float) == isinstance(self.rank_to, float)
        if alike and self.rank_from > self.rank_to:
            raise UserError(
                f"the window of ranks {self.rank_from}-{self.rank_to} ends before it starts; swap its ends."
            )

    @property
    def text(self) -> str:
        """Its short name, which `parse_window` reads: ``full``, ``head:0.2``, ``tail:64``, ``band:0.25-0.5``."""
        whole = isinstance(self.rank_to, float) and self.rank_to == 1.0
        if self.rank_from == 0:
            return "full" if whole else f"head:{_text(self.rank_to)}"
        if whole and (isinstance(self.rank_from, float) or self.rank_from < 0):
            return f"tail:{_text(_complement(self.rank_from))}"
        return f"band:{_text(self.rank_from)}-{_text(self.rank_to)}"

    @property
    def is_full(self) -> bool:
        """Every rank of every matrix lies in it."""
        return self.text == "full"

    def slice(self, rank: int) -> slice:
        """The columns that a basis of ``rank`` columns has in the window."""
        start, stop = _index(self.rank_from, rank), _index(self.rank_to, rank)
        if stop <= start and isinstance(self.rank_to, float) and self.rank_to > self.rank_from >= 0:
            start = min(start, rank - 1)  # a share too small for one rank takes one
            stop = start + 1
        return slice(start, max(start, stop))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Window) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


def head(k: float) -> Window:
    """The first ``k`` ranks: a count (an integer) or a share (a float within 0 and 1)."""
    return Window(0, k)


def tail(k: float) -> Window:
    """The last ``k`` ranks: a count or a share."""
    return Window(_complement(k), 1.0) if k else Window(0, 0)


def band(rank_from: float, rank_to: float) -> Window:
    """The ranks from ``rank_from`` up to, but without, ``rank_to``: counts or shares."""
    return Window(rank_from, rank_to)


FULL = Window(0, 1.0)


def parse_window(text: str) -> Window:
    """The window of a text: ``full``, ``head:K``, ``tail:K`` or ``band:FROM-TO``, a number with a point being a share.

    >>> [parse_window(text).slice(128) for text in ("head:64", "tail:0.25", "band:0.5-0.75")]
    [slice(0, 64, None), slice(96, 128, None), slice(64, 96, None)]

    Raises:
        UserError: the text is none of these.
    """
    kind, _, rest = text.strip().partition(":")
    try:
        if kind == "full" and not rest:
            return FULL
        if kind == "head":
            return head(_parse(rest))
        if kind == "tail":
            return tail(_parse(rest))
        if kind == "band":
            first, _, last = rest.partition("-")
            return band(_parse(first), _parse(last))
    except ValueError:
        pass
    raise UserError(
        f"{text!r} is no window of ranks; write full, head:0.2, tail:64 or band:0.25-0.5 (a number with a point is a "
        "share of the rank, one without is a count)."
    )


def _parse(text: str) -> float:
    """A count or a share; a `ValueError` for anything else."""
    if text.isdecimal():
        return int(text)
    share = float(text)
    if not 0.0 <= share <= 1.0:
        raise ValueError(text)
    return share


def _text(end: float) -> str:
    """A share always with its point, so that it reads as one."""
    if isinstance(end, int):
        return str(end)
    short = f"{end:.9f}".rstrip("0")
    return f"{short}0" if short.endswith(".") else short


def _complement(k: float) -> float:
    """Where the last ``k`` ranks start, and the other way round."""
    return -k if isinstance(k, int) else round(1.0 - k, 9)


def _index(end: float, rank: int) -> int:
    """The rank that an end means, within 0 and ``rank``."""
    if isinstance(end, float):
        return round(end * rank)
    return max(0, min(rank, end if end >= 0 else rank + end))
