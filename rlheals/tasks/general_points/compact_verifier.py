"""Grade compact answers: ``{ "cards" … "number" … "formula" a op b = c , a op b = c }``, one word per token.

Every step must be true, use numbers of the hand or earlier results, and use each once; the last result is the value
of the formula. Numbers are whole (``7``, ``-5``) or fractions (``8/3``) without leading zeros.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rlheals.tasks.general_points.compact import CARDS, CLOSE, FORMULA, NUMBER, OPEN
from rlheals.tasks.general_points.rewards import (
    EMPTY,
    FORMAT,
    MAX_CHARS,
    NUMBER_PENALTY,
    SOLVED,
    TRUNCATED,
    UNUSED_NUMBER,
    WRONG_ARITHMETIC,
    WRONG_NUMBER,
    WRONG_VALUE,
    Verdict,
    verdict,
)
from rlheals.tasks.general_points.solver import Rational, rational

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.tasks.general_points.rules import Rule

# Twelve digits hold every result of six cards and keep arithmetic in machine-sized steps.
_NUMBER_WORD = re.compile(r"(-?(?:0|[1-9][0-9]{0,11}))(?:/([1-9][0-9]{0,11}))?", re.ASCII)
_SMALL: dict[str, Rational] = {str(number): (number, 1) for number in range(-1000, 1001)}
_OPERATIONS = frozenset("+-*/")
_STEP_WORDS = 6

Step = tuple[Rational, str, Rational, Rational]

# Verdicts without detail are shared: making one costs as much as checking a step.
_PLAIN = {
    (code, fields_ok): verdict(code, fields_ok)
    for code in (SOLVED, FORMAT, TRUNCATED, EMPTY, WRONG_ARITHMETIC, WRONG_VALUE)
    for fields_ok in (False, True)
}


def verify_compact(text: str, cards: Sequence[str], rule: Rule) -> Verdict:
    """Grade ``text``; see `verifier.verify`."""
    if len(text) > MAX_CHARS:
        return _PLAIN[FORMAT, False]
    words = text.split()
    if words[:2] != [OPEN, CARDS]:
        return _PLAIN[FORMAT, False]
    try:
        number_at = words.index(NUMBER, 2)
        formula_at = words.index(FORMULA, number_at)
    except ValueError:
        return _PLAIN[FORMAT if CLOSE in words else TRUNCATED, False]
    values = rule.values(cards)
    fields_ok = words[2:number_at] == list(cards) and words[number_at + 1 : formula_at] == rule.value_words(cards)
    if words[-1] != CLOSE:
        return _PLAIN[FORMAT if CLOSE in words else TRUNCATED, fields_ok]
    formula = words[formula_at + 1 : -1]
    if not formula:
        return _PLAIN[EMPTY, fields_ok]
    steps = parse_steps(formula)
    if steps is None:
        return _PLAIN[FORMAT, fields_ok]
    return _grade(steps, values, rule.target, fields_ok)


def parse_steps(words: Sequence[str]) -> list[Step] | None:
    """``a op b = c , …`` as steps; None when the words are anything else."""
    if len(words) % _STEP_WORDS != _STEP_WORDS - 1:
        return None
    steps: list[Step] = []
    for at in range(0, len(words), _STEP_WORDS):
        left, operation, right, equals, result = words[at : at + _STEP_WORDS - 1]
        if operation not in _OPERATIONS or equals != "=" or (at and words[at - 1] != ","):
            return None
        # Nearly every number is a small whole one, and a look-up is all it costs.
        a = _SMALL.get(left) or _number(left)
        b = _SMALL.get(right) or _number(right)
        c = _SMALL.get(result) or _number(result)
        if a is None or b is None or c is None:
            return None
        steps.append((a, operation, b, c))
    return steps


def formula_words(text: str) -> list[str]:
    """The words of a readable answer's formula."""
    words = text.split()
    return words[words.index(FORMULA) + 1 : -1]


def _number(word: str) -> Rational | None:
    match = _NUMBER_WORD.fullmatch(word)
    return rational(int(match[1]), int(match[2] or 1)) if match else None


def _grade(steps: Sequence[Step], values: Sequence[int], target: int, fields_ok: bool) -> Verdict:
    pool: list[Rational] = [(value, 1) for value in values]
    foreign: list[str] = []
    true_steps = True
    # One step more than the hand allows is enough to meet a number that is not there.
    for a, operation, b, c in steps[: len(values)]:
        for number in (a, b):
            try:
                pool.remove(number)
            except ValueError:
                foreign.append(_word(number))
        true_steps = true_steps and holds(a, operation, b, c)
        pool.append(c)
    unused = tuple([_word(number) for number in pool[:-1]])
    if foreign:
        reward = 2 * NUMBER_PENALTY if unused else NUMBER_PENALTY
        return verdict(WRONG_NUMBER, fields_ok, tuple(foreign), reward)
    if unused:
        return verdict(UNUSED_NUMBER, fields_ok, unused)
    if not true_steps:
        return _PLAIN[WRONG_ARITHMETIC, fields_ok]
    return _PLAIN[SOLVED if pool[-1] == (target, 1) else WRONG_VALUE, fields_ok]


def holds(a: Rational, operation: str, b: Rational, c: Rational) -> bool:
    """Whether ``a operation b = c`` exactly; a division by zero never does."""
    (a_top, a_low), (b_top, b_low), (c_top, c_low) = a, b, c
    if operation == "/":
        return b_top != 0 and a_top * b_low * c_low == c_top * a_low * b_top
    if operation == "*":
        return a_top * b_top * c_low == c_top * a_low * b_low
    right = b_top if operation == "+" else -b_top
    return (a_top * b_low + right * a_low) * c_low == c_top * a_low * b_low


def _word(number: Rational) -> str:
    return str(number[0]) if number[1] == 1 else f"{number[0]}/{number[1]}"
