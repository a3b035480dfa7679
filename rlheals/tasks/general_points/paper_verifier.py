r"""Grade answers in the paper's JSON-like text: keys ``cards``, ``number``, ``formula``; only the formula decides.

The formula is everything before its first ``=``. Two gradings share the reading and the order of the checks:

- exact: white space is ignored, arithmetic is rational, an unreadable formula costs -3 once;
- official: what the released code does. White space is an illegal character (-3), every misplaced token costs another
  -3, an unclosed bracket passes as a formula that cannot be evaluated, equality is that of Python floats (so
  ``8/(3-8/3)`` is not a success and earns 0), and the beginning of a known solution earns +1.

Both charge -2 for wrong numbers and -2 more for unused ones. Departures of official grading from the released code:
digits are ASCII only, a formula that is no string is a format error where that code would crash, and brackets may be
nested deeper than Python reads them (docs/fidelity.md).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from rlheals.tasks.general_points.formula import (
    PYTHON_OPERATIONS,
    complete,
    evaluate,
    has_illegal_characters,
    tokenize,
    violations,
)
from rlheals.tasks.general_points.rewards import (
    EMPTY,
    FORMAT,
    FORMAT_PENALTY,
    MAX_CHARS,
    NUMBER_PENALTY,
    PREFIX,
    SOLVED,
    TRUNCATED,
    UNUSED_NUMBER,
    WRONG_NUMBER,
    WRONG_VALUE,
    Verdict,
    verdict,
)
from rlheals.tasks.general_points.solver import Rational, Tree, combine, solutions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rlheals.tasks.general_points.rules import Rule

_FORMULA = re.compile(r'"formula"\s*:\s*"([^"]*)"')
_FORMULA_OPENED = re.compile(r'"formula"\s*:\s*"')
_OFFICIAL_FORMULA = re.compile(r'"formula": "(.*?)"')
_LISTS = {key: re.compile(rf'"{key}"\s*:\s*\[([^][]*)\]') for key in ("cards", "number")}
_WHITE_SPACE = re.compile(r"\s+")
_NUMBERS_APART = re.compile(r"[0-9]\s+[0-9]")  # by any white space that the line above removes, ASCII or not
# The released solver's bracket placements for four numbers, as (opening position, closing position) of terms.
_BRACKETS = ((), ((0, 1),), ((0, 2),), ((1, 2),), ((1, 3),), ((2, 3),), ((0, 1), (2, 3)))
_OFFICIAL_CARDS = 4


def verify_paper(text: str, cards: Sequence[str], rule: Rule, official: bool = False) -> Verdict:
    """Grade ``text``; see `verifier.verify`."""
    if len(text) > MAX_CHARS:
        return verdict(FORMAT, False)
    fields = _json_object(text)
    values = rule.value_words(cards)
    fields_ok = _listed(text, fields, "cards") == list(cards) and _listed(text, fields, "number") == values
    formula = read_formula(text, official, fields)
    if formula is None:
        return verdict(TRUNCATED if _breaks_off(text) else FORMAT, fields_ok)
    if has_illegal_characters(formula):
        return verdict(FORMAT, fields_ok)
    return (_grade_official if official else _grade)(formula, values, rule.target, fields_ok)


def read_formula(text: str, official: bool = False, fields: dict[str, Any] | None = None) -> str | None:
    """The formula before its first ``=``, without white space when grading is exact; None when there is none.

    The whole text is tried as JSON first, then the field is searched for.
    """
    fields = _json_object(text) if fields is None else fields
    found = fields.get("formula")
    if found is None:
        match = (_OFFICIAL_FORMULA if official else _FORMULA).search(text)
        found = match[1] if match else None
    if not isinstance(found, str):
        return None
    formula = found.partition("=")[0]
    if official:
        return formula
    # Two numbers with only white space between them must not merge into one.
    return formula if _NUMBERS_APART.search(formula) else _WHITE_SPACE.sub("", formula)


def _json_object(text: str) -> dict[str, Any]:
    """The text as a JSON object; empty when it is none, as answers with the usual trailing comma are."""
    bare = text.strip()
    # The usual answer ends in a comma and a brace, which no JSON object does; reading it to the end is half the work.
    if not bare.startswith("{") or bare[-1] != "}" or bare[:-1].rstrip().endswith(","):
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _listed(text: str, fields: dict[str, Any], key: str) -> list[str]:
    """The items of a list field as bare words."""
    found = fields.get(key)
    if isinstance(found, list):
        return [str(item) for item in found if isinstance(item, str | int)]
    match = _LISTS[key].search(text)
    return [item.strip().strip("'\"") for item in match[1].split(",")] if match else []


def _breaks_off(text: str) -> bool:
    """Whether the text ends inside the formula, or before it, with its object still open."""
    openings = [match.end() for match in _FORMULA_OPENED.finditer(text)]
    return "}" not in text[openings[-1] if openings else 0 :] and text.lstrip().startswith("{")


def _grade(formula: str, values: Sequence[str], target: int, fields_ok: bool) -> Verdict:
    tokens = tokenize(formula)
    misplaced, unclosed = violations(tokens)
    if tokens and (misplaced or unclosed or not complete(tokens)):
        return verdict(FORMAT, fields_ok)
    faulty = _number_fault(tokens, values, fields_ok)
    if faulty is not None:
        return faulty
    try:
        right = evaluate(tokens, _rational, combine) == (target, 1)
    except ZeroDivisionError:
        right = False
    return verdict(SOLVED if right else WRONG_VALUE, fields_ok)


def _rational(word: str) -> Rational:
    return int(word), 1


def _number_fault(tokens: Sequence[str], values: Sequence[str], fields_ok: bool) -> Verdict | None:
    """The verdict on wrong or unused numbers; None when the formula uses exactly the hand."""
    numbers = [token.lstrip("0") or "0" for token in tokens if token.isdigit()]
    if sorted(numbers) == sorted(values):
        return None
    used, hand = Counter(numbers), Counter(values)
    foreign, unused = tuple(used - hand), tuple(hand - used)
    reward = NUMBER_PENALTY * (bool(foreign) + bool(unused))
    if not tokens:
        return verdict(EMPTY, fields_ok, unused, reward)
    return verdict(WRONG_NUMBER if foreign else UNUSED_NUMBER, fields_ok, foreign or unused, reward)


def _grade_official(formula: str, values: Sequence[str], target: int, fields_ok: bool) -> Verdict:
    tokens = tokenize(formula)
    misplaced, unclosed = violations(tokens)
    faulty = _number_fault(tokens, values, fields_ok)
    if misplaced:
        penalty = FORMAT_PENALTY * misplaced + (faulty.reward if faulty else 0.0)
        return verdict(FORMAT, fields_ok, faulty.detail if faulty else (), penalty)
    if faulty is not None:
        return faulty
    known = known_solutions(tuple(sorted(map(int, values))), target)
    try:
        # Python refuses to read unclosed brackets, a hanging operator, and numbers such as 08.
        readable = not unclosed and complete(tokens) and not any(len(t) > 1 and t[0] == "0" for t in tokens)
        if readable and evaluate(tokens, int, _python) == target:
            return verdict(SOLVED, fields_ok)
    except ZeroDivisionError:
        readable = False
    begins = any(solution.startswith(formula) for solution in known)
    if begins and not readable:
        return verdict(PREFIX, fields_ok)
    # A solution that only float equality rejects matches the list to its end, and is charged nothing.
    return verdict(WRONG_VALUE, fields_ok, reward=0.0 if begins else None)


def _python(operation: str, a: float, b: float) -> float:
    return PYTHON_OPERATIONS[operation](a, b)


def longest_known_prefix(formula: str, values: Sequence[int], target: int) -> str:
    """The longest run of leading tokens that begins some known solution; empty when not even the first does."""
    known = known_solutions(tuple(sorted(values)), target)
    prefix = ""
    for token in tokenize(formula):
        if not any(solution.startswith(prefix + token) for solution in known):
            break
        prefix += token
    return prefix


@lru_cache(maxsize=4096)
def known_solutions(values: tuple[int, ...], target: int) -> tuple[str, ...]:
    """The solution strings of the released solver: every solution in each of its seven bracket placements that fits.

    Only for hands of up to four cards (empty beyond: the list would be too long to search).
    """
    if len(values) > _OFFICIAL_CARDS:
        return ()
    templates = _templates(len(values))
    found: dict[str, None] = {}
    for tree in solutions(values, target):
        for ordered in _operand_orders(tree):
            numbers: list[int] = []
            for template in templates.get(_shape(ordered, numbers), ()):
                found[template.format(*numbers)] = None
    return tuple(found)


@lru_cache(maxsize=_OFFICIAL_CARDS)
def _templates(terms: int) -> dict[Any, list[str]]:
    """What Python makes of each bracket placement: shape → format strings that are read in that shape."""
    last = terms - 1
    placements = [
        marks for marks in _BRACKETS if all(end <= last and (start, end) != (0, last) for start, end in marks)
    ]
    found: dict[Any, list[str]] = {}
    place: Callable[[str], Any] = int
    for operations in product("+-*/", repeat=last):
        for marks in placements:
            tokens = _bracketed(operations, marks)
            shape = evaluate(tokens, place, lambda operation, left, right: (operation, left, right))
            found.setdefault(shape, []).append("".join(f"{{{t}}}" if t.isdigit() else t for t in tokens))
    return found


def _bracketed(operations: Sequence[str], marks: Sequence[tuple[int, int]]) -> list[str]:
    """Tokens of the terms 0, 1, … joined by ``operations``, with brackets around the marked runs of terms."""
    tokens: list[str] = []
    for place in range(len(operations) + 1):
        tokens += [operations[place - 1]] if place else []
        tokens += ["("] * sum(opening == place for opening, _ in marks)
        tokens.append(str(place))
        tokens += [")"] * sum(closing == place for _, closing in marks)
    return tokens


def _operand_orders(tree: Tree) -> Iterator[Any]:
    """The tree as nested (operation, left, right), with the operands of + and * in both orders."""
    if len(tree) == 1:
        yield tree[0][0]
        return
    _, operation, left, right = tree
    for a in _operand_orders(left):
        for b in _operand_orders(right):
            yield operation, a, b
            if operation in "+*":
                yield operation, b, a


def _shape(tree: Any, numbers: list[int]) -> Any:
    """The tree with its numbers replaced by their places from left to right; they are appended to ``numbers``."""
    if isinstance(tree, int):
        numbers.append(tree)
        return len(numbers) - 1
    operation, left, right = tree
    return operation, _shape(left, numbers), _shape(right, numbers)
