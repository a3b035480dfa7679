"""Reason codes, rewards (the paper's released text-mode reward table) and the verdict that carries them."""

from __future__ import annotations

from typing import NamedTuple

MAX_CHARS = 4096
"""A longer answer is a format error; this bounds the work of a verdict."""

SOLVED = "solved"
FORMAT = "format"
"""The answer cannot be read."""
TRUNCATED = "truncated"
"""The answer breaks off before its formula is closed; a format error too."""
EMPTY = "empty"
WRONG_NUMBER = "wrong_number"
"""A number that is not on the hand, or one used too often."""
UNUSED_NUMBER = "unused_number"
WRONG_ARITHMETIC = "wrong_arithmetic"
"""The stated result of a step is false (compact answers only)."""
WRONG_VALUE = "wrong_value"
"""A valid formula that does not give the target."""
PREFIX = "prefix"
"""The beginning of a known solution that cannot be evaluated (official fidelity only)."""
CODES = (SOLVED, FORMAT, TRUNCATED, EMPTY, WRONG_NUMBER, UNUSED_NUMBER, WRONG_ARITHMETIC, WRONG_VALUE, PREFIX)
FORMAT_ERRORS = frozenset({FORMAT, TRUNCATED})

FORMAT_PENALTY = -3.0
NUMBER_PENALTY = -2.0
"""Once for wrong numbers and once more when numbers of the hand are unused."""
REWARDS = {
    SOLVED: 5.0,
    PREFIX: 1.0,
    WRONG_VALUE: -1.0,
    WRONG_ARITHMETIC: -1.0,
    EMPTY: NUMBER_PENALTY,
    UNUSED_NUMBER: NUMBER_PENALTY,
    WRONG_NUMBER: NUMBER_PENALTY,
    FORMAT: FORMAT_PENALTY,
    TRUNCATED: FORMAT_PENALTY,
}
ATTEMPT_LIMIT = -1.0
"""What the released environment gives for the ungraded generation after the last attempt."""


class Verdict(NamedTuple):
    """The grade of one answer.

    Attributes:
        code: reason, one of `CODES`.
        reward: see `REWARDS`.
        solved: the formula is valid and gives the target.
        format_error: the answer could not be read.
        fields_ok: the answer echoes the cards and gives their values under the rule.
        detail: the offending numbers, as words, for `WRONG_NUMBER` and `UNUSED_NUMBER`.
    """

    code: str
    reward: float
    solved: bool
    format_error: bool
    fields_ok: bool
    detail: tuple[str, ...]


def verdict(code: str, fields_ok: bool, detail: tuple[str, ...] = (), reward: float | None = None) -> Verdict:
    """A `Verdict` whose other fields follow from ``code``."""
    given = REWARDS[code] if reward is None else reward
    return Verdict(code, given, code == SOLVED, code in FORMAT_ERRORS, fields_ok, detail)
