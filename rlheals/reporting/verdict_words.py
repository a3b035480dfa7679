"""The words in which verdicts, turns and warnings are shown; the tables keep the registered ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Sequence

WORDS = {
    "unchanged": "unchanged",
    "indistinguishable from same-norm noise": "like noise",
    "structured rotation": "structured",
    "magnitude change": "magnitude",
}
"""A verdict in a column's width. "Rotation" is left out: how far directions turned is for `TURNS` to say."""
TURNS = {"less than noise": "less", "as noise": "as noise", "more than noise": "more"}
"""How far the leading singular vectors turned against noise of the same norm, where that is defined."""
TOLD = 3
"""Names that a summary gives before it counts."""


def counted(verdicts: pl.DataFrame) -> list[str]:
    """How many matrices have each verdict, in the order of `WORDS`, such as ``7 structured``."""
    return _counts(verdicts["verdict"], WORDS)


def turns(verdicts: pl.DataFrame) -> list[str]:
    """How many matrices turned less than, as, or more than noise, such as ``7 less``; none without a band.

    >>> turns(pl.DataFrame({"turn": ["as noise", "", "as noise", "less than noise"]}))
    ['1 less', '2 as noise']
    """
    return _counts(verdicts["turn"].filter(verdicts["turn"] != ""), TURNS)


def warning_lines(verdicts: pl.DataFrame, *, every: bool = False) -> list[str]:
    """The warnings of the verdicts as sentences: one a kind, with its count and first names, or all of them.

    The kind of a warning is what stands before its first colon; the numbers of one matrix come behind it.
    """
    rows = verdicts.filter(pl.col("warning") != "").select("tensor", "warning").unique(maintain_order=True)
    kinds: dict[str, dict[str, str]] = {}
    for tensor, warning in rows.iter_rows():
        for said in warning.split("; "):
            kinds.setdefault(said.partition(": ")[0], {})[tensor] = said
    lines = []
    for kind, tensors in kinds.items():
        if every or len(tensors) == 1:
            lines += [f"{tensor}: {said}." for tensor, said in tensors.items()]
        else:
            lines.append(f"{len(tensors)} matrices ({some(list(tensors))}): {kind}.")
    return lines


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"]), some(["a"])
    ('a, b, c and 2 more', 'a')
    """
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join(names[:TOLD]) + more


def _counts(values: pl.Series, words: dict[str, str]) -> list[str]:
    found = dict(values.value_counts().iter_rows())
    known = [f"{found.pop(value)} {word}" for value, word in words.items() if value in found]
    return known + [f"{count} {value}" for value, count in sorted(found.items())]
