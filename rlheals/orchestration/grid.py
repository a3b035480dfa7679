"""The text form of a grid of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BRACKETS = {"[": "]", "{": "}", "(": ")"}


class Axis(NamedTuple):
    """One parameter of a grid and the values it takes, as text."""

    key: str
    values: tuple[str, ...]


def parse_grid(texts: Sequence[str]) -> list[Axis]:
    """The axes of a grid written as ``key=value,value``; only commas outside brackets and quotes separate values.

    >>> parse_grid(["sft.learning_rate=1e-4,5e-4", "seeds=[0],[1,2]"])
    [Axis(key='sft.learning_rate', values=('1e-4', '5e-4')), Axis(key='seeds', values=('[0]', '[1,2]'))]

    Raises:
        UserError: nothing to sweep, an axis not of that form, a key or value given twice, or an empty value.
    """
    if not texts:
        raise UserError("a sweep needs at least one key=value,value, for example sft.learning_rate=1e-4,5e-4.")
    axes: list[Axis] = []
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key:
            raise UserError(f"{text!r} is not of the form key=value,value, for example sft.learning_rate=1e-4,5e-4.")
        axis = Axis(key, tuple(_split(text, values)))
        if "" in axis.values:
            raise UserError(f"{text!r} has an empty value; write an empty text as {key}=''.")
        if len(set(axis.values)) < len(axis.values):
            raise UserError(f"{text!r} gives a value twice; leave one out.")
        if key in {other.key for other in axes}:
            raise UserError(f"the grid names {key} twice; write all its values behind one {key}=.")
        axes.append(axis)
    return axes


def _split(axis: str, text: str) -> Iterator[str]:
    """Parts between the commas that are outside brackets and quotes."""
    closing: list[str] = []
    begin = 0
    for place, sign in enumerate(text):
        if closing and closing[-1] in "'\"":
            if sign == closing[-1]:
                closing.pop()
        elif sign in BRACKETS:
            closing.append(BRACKETS[sign])
        elif sign in "]})":
            if not closing or closing.pop() != sign:
                raise UserError(f"{axis!r}: the bracket {sign!r} closes nothing; check the brackets.")
        elif sign in "'\"" and not text[begin:place].strip("[{(, "):
            closing.append(sign)
        elif sign == "," and not closing:
            yield text[begin:place].strip()
            begin = place + 1
    if closing:
        raise UserError(f"{axis!r} lacks a closing {closing[-1]}; add it, and quote the argument for the shell.")
    yield text[begin:].strip()
