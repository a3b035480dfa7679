"""The compact, word-level prompt format of the tiny model: every token is one word, every step of the formula is shown.

A prompt states the target, the value of each face card and the hand; a response echoes the cards, gives their
values and reaches the target in binary steps with running results::

    task 24 rule J 11 Q 12 K 13 "cards" : 4 J A 8
    { "cards" 4 J A 8 "number" 4 11 1 8 "formula" 11 + 1 = 12 , 12 + 8 = 20 , 20 + 4 = 24 }

Running results are whole numbers from 0 to `LARGEST`, so a few hands that need fractions or negative results
cannot be written; `canonical_solution` returns None for them and the dataset counts them. (The verifier accepts
fractions all the same.)
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from rlheals.tasks.general_points.rules import FACES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.tasks.general_points.rules import Rule

LARGEST = 144
OPEN, CARDS, NUMBER, FORMULA, CLOSE = "{", '"cards"', '"number"', '"formula"', "}"

Step = tuple[int, str, int, int]
Chain = tuple[Step, ...]

# Cheapest first: the canonical solution is the one a person would find first, so that its rule is learnable.
_OPERATION_COST = {"+": 1, "-": 2, "*": 3, "/": 5}


class CompactFormat:
    """`PromptFormat` of the tiny model."""

    name = "compact"
    max_response_tokens = 56
    """Six cards need 54 tokens with the end token."""

    def prompt(self, cards: Sequence[str], rule: Rule) -> str:
        """Text of the first user turn."""
        values = dict(zip(FACES, rule.values(FACES), strict=True))
        stated = " ".join(f"{face} {value}" for face, value in values.items())
        return f'task {rule.target} rule {stated} "cards" : {" ".join(cards)}'

    def response(self, cards: Sequence[str], rule: Rule, solution: Chain) -> str:
        """The target answer for ``solution``, a chain from `canonical_solution`."""
        numbers = " ".join(map(str, rule.values(cards)))
        return f"{OPEN} {CARDS} {' '.join(cards)} {NUMBER} {numbers} {FORMULA} {chain_text(solution)} {CLOSE}"

    def canonical_solution(self, values: Sequence[int], target: int) -> Chain | None:
        """The cheapest chain of whole-number steps, the same for every order of ``values``; None when there is none."""
        return cheapest_chain(tuple(sorted(values)), target)

    def feedback(self, turn_code: str, detail: Sequence[str], mode: str) -> str:
        """``no``, then the reason code unless ``mode`` is none, then the leaked words when it is leaking."""
        words = ["no"]
        if mode != "none":
            words.append(turn_code)
        if mode == "leaking":
            words.extend(detail)
        return " ".join(words)


def chain_text(chain: Chain) -> str:
    """``a op b = c , …`` with single spaces."""
    return " , ".join(f"{a} {operation} {b} = {result}" for a, operation, b, result in chain)


def cheapest_chain(values: tuple[int, ...], target: int) -> Chain | None:
    """The chain of least cost, then of smallest largest result, then first in order; None when there is none."""
    best = _best(values, target)
    return None if best is None else best[2]


@cache
def _best(values: tuple[int, ...], target: int) -> tuple[int, int, Chain] | None:
    """(cost, largest result, chain) of the best chain over the ascending multiset ``values``."""
    if len(values) == 1:
        return (0, 0, ()) if values[0] == target else None
    best: tuple[int, int, Chain] | None = None
    for i in range(len(values)):
        for j in range(i):
            rest = [value for k, value in enumerate(values) if k not in (i, j)]
            for step in steps(values[i], values[j]):
                tail = _best(tuple(sorted([*rest, step[3]])), target)
                if tail is None:
                    continue
                found = (tail[0] + _OPERATION_COST[step[1]], max(tail[1], step[3]), (step, *tail[2]))
                if best is None or found < best:
                    best = found
    return best


def steps(larger: int, smaller: int) -> list[Step]:
    """The binary steps on two numbers (``larger`` ≥ ``smaller`` ≥ 0) whose result is a whole number up to `LARGEST`."""
    found: list[Step] = [(larger, "-", smaller, larger - smaller)]
    if larger + smaller <= LARGEST:
        found.append((larger, "+", smaller, larger + smaller))
    if larger * smaller <= LARGEST:
        found.append((larger, "*", smaller, larger * smaller))
    if smaller and larger % smaller == 0:
        found.append((larger, "/", smaller, larger // smaller))
    if larger and larger != smaller and smaller == 0:
        found.append((0, "/", larger, 0))
    return found
