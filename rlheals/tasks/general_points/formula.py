"""Infix formulas: tokens, well-formedness and evaluation without ever executing text.

Work is linear in the length of the text: no recursion, and numbers are compared as strings with the hand before
anything is computed, so neither deep brackets nor long digits can blow up.
"""

from __future__ import annotations

import operator
import re
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_NOT_FORMULA = re.compile(r"[^-+*/()0-9]")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
Number = TypeVar("Number")

PYTHON_OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
"""Python's own int and float arithmetic, for the released code's float equality."""


def has_illegal_characters(text: str) -> bool:
    """Whether anything but ASCII digits, + - * / and brackets occurs."""
    return _NOT_FORMULA.search(text) is not None


def tokenize(text: str) -> list[str]:
    """Numbers, operators and brackets of ``text``, in order; anything else is skipped."""
    return _TOKEN.findall(text)


def violations(tokens: Sequence[str]) -> tuple[int, int]:
    """(number of places where a token may not stand, number of opening brackets that are never closed).

    A token may not stand where it does: a number or ``(`` right after a number or ``)``; an operator without a left
    operand (so a leading minus is one); ``)`` after an operator or ``(``, at the start, or without an open bracket.
    """
    found = depth = 0
    after_operand = False
    for token in tokens:
        if token in _PRECEDENCE:
            found += not after_operand
            after_operand = False
        elif token == "(":
            found += after_operand
            depth += not after_operand
            after_operand = False
        elif token == ")":
            if after_operand and depth:
                depth -= 1
            else:
                found += 1
            after_operand = True
        else:
            found += after_operand
            after_operand = True
    return found, depth


def complete(tokens: Sequence[str]) -> bool:
    """Whether well-placed, closed tokens also end in an operand, so that they can be evaluated."""
    return bool(tokens) and tokens[-1] not in _PRECEDENCE and tokens[-1] != "("


def evaluate(
    tokens: Sequence[str], number: Callable[[str], Number], apply: Callable[[str, Number, Number], Number]
) -> Number:
    """Value of `complete` tokens without `violations`, by the shunting-yard algorithm (Dijkstra 1961).

    Raises:
        ZeroDivisionError: passed through from ``apply``.
    """
    values: list[Number] = []
    waiting: list[str] = []

    def settle() -> None:
        right = values.pop()
        values[-1] = apply(waiting.pop(), values[-1], right)

    for token in tokens:
        if token in _PRECEDENCE:
            while waiting and waiting[-1] != "(" and _PRECEDENCE[waiting[-1]] >= _PRECEDENCE[token]:
                settle()
            waiting.append(token)
        elif token == "(":
            waiting.append(token)
        elif token == ")":
            while waiting[-1] != "(":
                settle()
            waiting.pop()
        else:
            values.append(number(token))
    while waiting:
        settle()
    return values[0]
