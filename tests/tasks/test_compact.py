from __future__ import annotations

from fractions import Fraction
from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlheals.tasks.general_points.compact import LARGEST, CompactFormat, chain_text, cheapest_chain
from rlheals.tasks.general_points.pretraining import vocabulary
from rlheals.tasks.general_points.rules import Rule

OPERATIONS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}


@pytest.mark.parametrize(("largest", "count"), [(10, 556), (13, 1344)])
def test_number_of_expressible_multisets(largest: int, count: int):
    multisets = combinations_with_replacement(range(1, largest + 1), 4)
    assert sum(cheapest_chain(values, 24) is not None for values in multisets) == count


def test_hand_that_needs_fractions_is_not_expressible():
    assert cheapest_chain((3, 3, 8, 8), 24) is None


@given(st.lists(st.integers(1, 13), min_size=3, max_size=5), st.integers(1, 60))
def test_chain_is_exact_and_uses_each_number_once(values: list[int], target: int):
    chain = cheapest_chain(tuple(sorted(values)), target)
    if chain is None:
        return
    pool = sorted(values)
    for a, operation, b, result in chain:
        pool.remove(a)
        pool.remove(b)
        assert OPERATIONS[operation](Fraction(a), Fraction(b)) == result
        assert 0 <= result <= LARGEST
        pool.append(result)
    assert pool == [target]


@given(st.permutations([2, 3, 5, 12]))
def test_canonical_solution_ignores_the_order_of_the_hand(values: list[int]):
    assert CompactFormat().canonical_solution(values, 24) == CompactFormat().canonical_solution([2, 3, 5, 12], 24)


def test_prompt_and_response_are_words_of_the_vocabulary():
    form = CompactFormat()
    rule = Rule.faces_as_11_12_13(24)
    cards = ["4", "J", "A", "8"]
    solution = form.canonical_solution(rule.values(cards), 24)
    assert solution is not None
    prompt, response = form.prompt(cards, rule), form.response(cards, rule, solution)
    assert prompt == 'task 24 rule J 11 Q 12 K 13 "cards" : 4 J A 8'
    assert response == f'{{ "cards" 4 J A 8 "number" 4 11 1 8 "formula" {chain_text(solution)} }}'
    assert set(prompt.split()) | set(response.split()) <= set(vocabulary())


@pytest.mark.parametrize(
    ("mode", "text"), [("none", "no"), ("neutral", "no wrong_number"), ("leaking", "no wrong_number 10 7")]
)
def test_feedback_says_as_much_as_its_mode_allows(mode: str, text: str):
    assert CompactFormat().feedback("wrong_number", ["10", "7"], mode) == text


def test_response_budget_covers_six_cards():
    chain = cheapest_chain((1, 2, 3, 4, 5, 6), 24)
    assert chain is not None
    response = CompactFormat().response(["A", "2", "3", "4", "5", "6"], Rule.faces_as_10(24), chain)
    assert len(response.split()) + 1 <= CompactFormat.max_response_tokens
