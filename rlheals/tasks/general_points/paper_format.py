"""The paper's prompt and answer for real chat models: its sections, fields and meaning, in our own sentences.

One template serves training and probing. Its formula ends in ``=24`` and its last field in a comma, as the paper's
training data do. White space around a message is left out because some chat templates trim it and others do not. The
paper's out-of-distribution *loss* was measured on another template (other face-card wording, numbers as strings, no
``=24``, no trailing comma); `PaperFormat.mismatched` reproduces that difference so that its share can be measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlheals.tasks.general_points.rewards import (
    EMPTY,
    FORMAT,
    PREFIX,
    TRUNCATED,
    UNUSED_NUMBER,
    WRONG_ARITHMETIC,
    WRONG_NUMBER,
    WRONG_VALUE,
)
from rlheals.tasks.general_points.rules import FACES, Rule
from rlheals.tasks.general_points.solver import Tree, first_solution, infix, solutions

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROMPT = """[Task Description]
You are an expert {target} points card game player. You receive a hand of {count} cards.
{faces} Every card must be used exactly once.
Your goal is to write a formula that reaches {target}, using the value of each card and the signs '+', '-', '*', '/', \
'(', ')' and '='.

[Input]
Cards: {cards}

[Output]
Answer in exactly this form:
{{
  "cards": [the {count} cards],
  "number": [the value of each card],
  "formula": "the formula that reaches {target}",
}}"""

_REASONS = {
    FORMAT: "the answer could not be read",
    TRUNCATED: "the answer could not be read",
    EMPTY: "the formula is empty",
    WRONG_NUMBER: "the formula uses numbers that are not on the hand, or uses a number too often",
    UNUSED_NUMBER: "the formula does not use every card",
    WRONG_VALUE: "the formula does not reach the target",
    WRONG_ARITHMETIC: "the result of a step is wrong",
    PREFIX: "the formula is not finished",
}
_LEAKS = {
    WRONG_NUMBER: "the formula uses these numbers wrongly: {}",
    UNUSED_NUMBER: "the formula does not use these numbers: {}",
    WRONG_VALUE: "{} is right so far, but the whole formula does not reach the target",
    PREFIX: "{} is right so far, but the formula is not finished",
}
# All trees of a larger hand are too many to compare.
_COMPARED_CARDS = 4
_WHOLE_NUMBERS = 10**6
_OPERATION_COST = {"+": 1, "-": 2, "*": 2, "/": 4}
_FRACTION_COST = 10


class PaperFormat:
    """`PromptFormat` in the paper's JSON-like text."""

    name = "paper"
    max_response_tokens = 256

    def prompt(self, cards: Sequence[str], rule: Rule) -> str:
        """Text of the first user turn."""
        return self._fill(cards, rule, rule.description())

    def response(self, cards: Sequence[str], rule: Rule, solution: str) -> str:
        """The target answer for ``solution``, an infix formula without ``=``."""
        return (
            f'{{\n  "cards": {list(cards)},\n  "number": {list(rule.values(cards))},\n'
            f'  "formula": "{solution}={rule.target}",\n}}'
        )

    def mismatched(self, cards: Sequence[str], rule: Rule, solution: str) -> tuple[str, str]:
        """(prompt, response) of the paper's out-of-distribution loss file; see the module's text."""
        faces = ", ".join(f"{face} = {word}" for face, word in zip(FACES, rule.value_words(FACES), strict=True))
        answer = f'{{\n  "cards": {list(cards)},\n  "number": {rule.value_words(cards)},\n  "formula": "{solution}"\n}}'
        return self._fill(cards, rule, f"Face cards have these values: {faces}."), answer

    def canonical_solution(self, values: Sequence[int], target: int) -> str | None:
        """The plainest infix formula, the same for every order of ``values``; None when there is none.

        Plain means few fractions and negative results, cheap operations, few brackets, then alphabetical order. For
        more than four cards it is the solver's first formula, with whole-number results if possible.
        """
        if len(values) <= _COMPARED_CARDS:
            found = [(_cost(tree), infix(tree)) for tree in solutions(values, target)]
            return min(found, key=_plainness)[1] if found else None
        tree = first_solution(values, target, _WHOLE_NUMBERS) or first_solution(values, target)
        return infix(tree) if tree else None

    def feedback(self, turn_code: str, detail: Sequence[str], mode: str) -> str:
        """Text of the user turn after a failed attempt: that it failed, why unless ``mode`` is none, and leaks."""
        if mode == "none":
            return "This answer is not right. Try again in the same form."
        reason = _REASONS[turn_code]
        if mode == "leaking" and detail and turn_code in _LEAKS:
            reason = _LEAKS[turn_code].format(", ".join(detail))
        return f"This answer is not right: {reason}. Try again in the same form."

    def _fill(self, cards: Sequence[str], rule: Rule, faces: str) -> str:
        return _PROMPT.format(target=rule.target, count=len(cards), faces=faces, cards=list(cards))


def _cost(tree: Tree) -> int:
    """Sum over the nodes of what makes a formula hard to find."""
    if len(tree) == 1:
        return 0
    (numerator, denominator), operation, left, right = tree
    unusual = _FRACTION_COST if denominator != 1 or numerator < 0 else 0
    return unusual + _OPERATION_COST[operation] + _cost(left) + _cost(right)


def _plainness(item: tuple[int, str]) -> tuple[int, int, str]:
    cost, text = item
    return cost, text.count("("), text
