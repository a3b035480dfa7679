"""Which ranks of a spectrum an edit takes: a window [from, to) or both ends, rank 0 being the largest value."""

from __future__ import annotations

from dataclasses import dataclass

from rlheals.errors import UserError

_PLACES = 9  # of a share in a window's text


def _check_told(end: float) -> None:
    """Refuse a share that the text of a window, which has nine places, would tell as none."""
    if 0 < end < 0.5 * 10**-_PLACES:
        raise UserError(
            f"{end!r} of the ranks is less than a rank of any matrix and makes no window; give a share such as 0.01."
        )


@dataclass(frozen=True, eq=False)
class Window:
    """Ranks from ``rank_from`` up to, but without, ``rank_to``, and the ``last`` ones; equal when their texts are.

    Whole numbers are ranks, and negative ones count from the end as in Python. Floats within 0 and 1 are shares of the
    matrix's own rank, so the float 1.0 is the end of every spectrum. Ranks beyond the rank of a matrix are cut off, so
    a window of whole ranks may hold none of a small matrix; one of shares holds at least one unless its ends are equal.

    >>> head(0.2).spans(128), tail(4).spans(128), ends(4, 0.25).spans(128)
    ([slice(0, 26, None)], [slice(124, 128, None)], [slice(0, 4, None), slice(96, 128, None)])

    Attributes:
        rank_from: first rank.
        rank_to: first rank that no longer belongs to it.
        last: how many trailing ranks belong to it as well, a count or a share; only where ``rank_from`` is 0.

    Raises:
        UserError: an end that is neither count nor share, or ends in the wrong order.
    """

    rank_from: float
    rank_to: float
    last: float = 0

    def __post_init__(self) -> None:
        for end in (self.rank_from, self.rank_to, self.last):
            if isinstance(end, bool) or (isinstance(end, float) and not 0.0 <= end <= 1.0):
                raise UserError(
                    f"{end!r} is no end of a window of ranks: give a whole rank, or a share within 0 and 1 such as 0.2."
                )
            _check_told(end)
        if min(self.rank_from, self.rank_to) < 0 and self.rank_to != 1.0:
            raise UserError(f"only a window that reaches the last rank may count from the end, not {self.rank_from}.")
        alike = isinstance(self.rank_from, float) == isinstance(self.rank_to, float)
        if alike and self.rank_from > self.rank_to:
            raise UserError(
                f"the window of ranks {self.rank_from}-{self.rank_to} ends before it starts; swap its ends."
            )
        if self.last < 0 or (self.last and (self.rank_from != 0 or self.rank_to == 0)):
            raise UserError("a window of both ends has leading ranks and some trailing ones; give how many of each.")

    @property
    def text(self) -> str:
        """Its name, which `parse_window` reads: ``full``, ``head:0.2``, ``tail:64``, ``ends:8-8``, ``band:4-9``."""
        if self.is_full:
            return "full"
        if self.last:
            return f"ends:{_text(self.rank_to)}-{_text(self.last)}"
        if self.rank_from == 0:
            return f"head:{_text(self.rank_to)}"
        if _is_end(self.rank_to) and (isinstance(self.rank_from, float) or self.rank_from < 0):
            return f"tail:{_text(_complement(self.rank_from))}"
        return f"band:{_text(self.rank_from)}-{_text(self.rank_to)}"

    @property
    def is_full(self) -> bool:
        """Every rank of every matrix lies in it."""
        leading = self.rank_to if isinstance(self.rank_to, float) else 0.0
        shares_meet = isinstance(self.last, float) and self.last > 0 and _complement(self.last) <= leading
        return self.rank_from == 0 and (_is_end(self.rank_to) or shares_meet)

    def spans(self, rank: int) -> list[slice]:
        """The columns that a basis of ``rank`` columns has in the window: none, one run of them, or two apart."""
        found = [_span(self.rank_from, self.rank_to, rank)]
        if self.last:
            found.append(_span(_complement(self.last), 1.0, rank))
            if found[1].start <= found[0].stop:
                return [slice(0, rank)]
        return [span for span in found if span.stop > span.start]

    def shares(self, rank: int) -> tuple[float, float]:
        """Where it starts and ends, as shares of the rank; both ends of a spectrum start where the trailing ranks do.

        So the first is larger than the second for these, and for no other window.

        >>> head(0.2).shares(128), tail(32).shares(128), ends(0.1, 0.2).shares(128), ends(32, 64).shares(128)
        ((0.0, 0.2), (0.75, 1.0), (0.8, 0.1), (0.5, 0.25))

        Args:
            rank: of a matrix; only windows of counts depend on it.
        """
        if self.is_full:
            return 0.0, 1.0
        first = _complement(self.last) if self.last else self.rank_from
        if isinstance(self.rank_to, float) and (isinstance(first, float) or first == 0):
            return float(first), self.rank_to
        found = self.spans(rank) or [slice(0, 0)]
        return found[-1].start / rank, found[0].stop / rank

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Window) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


def head(k: float) -> Window:
    """The first ``k`` ranks: a count (an integer) or a share (a float within 0 and 1)."""
    return Window(0, k)


def tail(k: float) -> Window:
    """The last ``k`` ranks: a count or a share."""
    _check_told(k)
    return Window(_complement(k), 1.0) if k else Window(0, 0)


def ends(k_head: float, k_tail: float) -> Window:
    """The first ``k_head`` and the last ``k_tail`` ranks: counts or shares; where the two meet it is every rank."""
    return Window(0, k_head, k_tail) if k_head else tail(k_tail)


def band(rank_from: float, rank_to: float) -> Window:
    """The ranks from ``rank_from`` up to, but without, ``rank_to``: counts or shares."""
    return Window(rank_from, rank_to)


FULL = Window(0, 1.0)


def parse_window(text: str) -> Window:
    """The window of a text: ``full``, ``head:K``, ``tail:K``, ``ends:K-K`` or ``band:FROM-TO``.

    A number with a point is a share.

    >>> [parse_window(text).spans(128) for text in ("head:64", "tail:0.25", "ends:4-0.25")]
    [[slice(0, 64, None)], [slice(96, 128, None)], [slice(0, 4, None), slice(96, 128, None)]]

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
        if kind in ("band", "ends"):
            first, _, last = rest.partition("-")
            return (band if kind == "band" else ends)(_parse(first), _parse(last))
    except ValueError:
        pass
    raise UserError(
        f"{text!r} is no window of ranks; write full, head:0.2, tail:64, ends:64-64 or band:0.25-0.5 (a number with a "
        "point is a share of the rank, one without is a count)."
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
    short = f"{end:.{_PLACES}f}".rstrip("0")
    return f"{short}0" if short.endswith(".") else short


def _complement(k: float) -> float:
    """Where the last ``k`` ranks start, and the other way round."""
    return -k if isinstance(k, int) else round(1.0 - k, _PLACES)


def _is_end(end: float) -> bool:
    """Whether it is the end of every spectrum."""
    return isinstance(end, float) and end == 1.0


def _span(rank_from: float, rank_to: float, rank: int) -> slice:
    start, stop = _index(rank_from, rank), _index(rank_to, rank)
    if stop <= start and isinstance(rank_to, float) and rank_to > rank_from >= 0:
        start = min(start, rank - 1)  # a share too small for one rank takes one
        stop = start + 1
    return slice(start, max(start, stop))


def _index(end: float, rank: int) -> int:
    """The rank that an end means, within 0 and ``rank``."""
    if isinstance(end, float):
        return round(end * rank)
    return max(0, min(rank, end if end >= 0 else rank + end))
