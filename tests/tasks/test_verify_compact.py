from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.tasks.general_points import verifier
from rlheals.tasks.general_points.compact import CompactFormat
from rlheals.tasks.general_points.compact_verifier import holds
from rlheals.tasks.general_points.rules import Rule
from rlheals.tasks.general_points.solver import chains, integer_chains, rational
from rlheals.tasks.general_points.verifier import Verdict, verify
from tests.tasks.general_points_oracles import OPERATIONS

if TYPE_CHECKING:
    import random

ID, OOD = Rule.faces_as_10(24), Rule.faces_as_11_12_13(24)
CARDS = ["4", "J", "A", "8"]
HEAD = '{ "cards" 4 J A 8 "number" 4 11 1 8 "formula" '
RIGHT = "11 + 1 = 12 , 12 + 8 = 20 , 20 + 4 = 24"


def grade(formula: str, head: str = HEAD, tail: str = " }", rule: Rule = OOD) -> Verdict:
    return verify(f"{head}{formula}{tail}", CARDS, rule, "compact")


@pytest.mark.parametrize(
    ("formula", "code", "reward", "detail"),
    [
        (RIGHT, verifier.SOLVED, 5, ()),
        ("8 - 4 = 4 , 11 + 1 = 12 , 12 + 4 = 16", verifier.WRONG_VALUE, -1, ()),
        ("11 + 1 = 12 , 12 + 8 = 21 , 21 + 4 = 24", verifier.WRONG_ARITHMETIC, -1, ()),
        ("10 + 1 = 11 , 11 + 8 = 19 , 19 + 4 = 23", verifier.WRONG_NUMBER, -4, ("10",)),
        ("11 + 1 = 12 , 12 + 8 = 20 , 20 + 4 = 24 , 24 * 1 = 24", verifier.WRONG_NUMBER, -2, ("1",)),
        ("11 + 1 = 12 , 12 + 8 = 20", verifier.UNUSED_NUMBER, -2, ("4",)),
        ("11 + 1 = 12 , 8 + 4 = 12", verifier.UNUSED_NUMBER, -2, ("12",)),
        ("", verifier.EMPTY, -2, ()),
        ("11 + 1 = 12 ,", verifier.FORMAT, -3, ()),
        ("11 + 1 = 12 12 + 8 = 20", verifier.FORMAT, -3, ()),
        ("11 + 1 = 12 ; 12 + 8 = 20 , 20 + 4 = 24", verifier.FORMAT, -3, ()),
        ("11 ^ 1 = 12", verifier.FORMAT, -3, ()),
        ("11 + 1 > 12", verifier.FORMAT, -3, ()),
        ("011 + 1 = 12", verifier.FORMAT, -3, ()),
        ("1 1 + 1 = 12 , 12 + 8 = 20 , 20 + 4 = 24", verifier.FORMAT, -3, ()),
        ("1\u00a01 + 1 = 12 , 12 + 8 = 20 , 20 + 4 = 24", verifier.FORMAT, -3, ()),  # any white space parts words
        ("11 / 0 = 0", verifier.WRONG_NUMBER, -4, ("0",)),
        (f"{'9' * 13} + 1 = 2", verifier.FORMAT, -3, ()),
    ],
)
def test_code_and_reward(formula: str, code: str, reward: float, detail: tuple[str, ...]):
    verdict = grade(formula)
    assert (verdict.code, verdict.reward, verdict.detail) == (code, reward, detail)
    assert verdict.solved == (code == verifier.SOLVED)
    assert verdict.format_error == (code == verifier.FORMAT)
    assert verdict.fields_ok


def test_a_division_by_zero_is_a_false_step():
    verdict = verify(
        '{ "cards" 5 5 3 "number" 5 5 3 "formula" 5 - 5 = 0 , 3 / 0 = 24 }', ["5", "5", "3"], ID, "compact"
    )
    assert verdict.code == verifier.WRONG_ARITHMETIC


def test_fractions_and_negative_results_are_exact():
    text = '{ "cards" 3 3 8 8 "number" 3 3 8 8 "formula" 8 / 3 = 8/3 , 3 - 8/3 = 1/3 , 8 / 1/3 = 24 }'
    assert verify(text, ["3", "3", "8", "8"], ID, "compact").solved
    assert verify(text.replace("8/3", "16/6"), ["3", "3", "8", "8"], ID, "compact").solved
    assert not verify(text.replace("1/3", "33/100"), ["3", "3", "8", "8"], ID, "compact").solved
    negative = '{ "cards" 2 7 4 "number" 2 7 4 "formula" 2 - 7 = -5 , 4 - -5 = 9 }'
    assert verify(negative, ["2", "7", "4"], Rule.faces_as_10(9), "compact").solved


@pytest.mark.parametrize(
    ("head", "tail", "code", "fields_ok"),
    [
        ('{ "cards" 4 J A 8 "number" 4 10 1 8 "formula" ', " }", verifier.SOLVED, False),
        ('{ "cards" 4 Q A 8 "number" 4 11 1 8 "formula" ', " }", verifier.SOLVED, False),
        ('{ "cards" 4 J A 8 "number" 4 11 1 "formula" ', " }", verifier.SOLVED, False),
        (HEAD, "", verifier.TRUNCATED, True),
        (HEAD, " } }", verifier.FORMAT, True),
        (HEAD, " } 24", verifier.FORMAT, True),
        ('{ "cards" 4 J A 8 "number" 4 11 1 8 ', " }", verifier.FORMAT, False),
        ('{ "cards" 4 J A 8 "number" 4 11 1 8 ', "", verifier.TRUNCATED, False),
        ('hand "cards" 4 J A 8 "number" 4 11 1 8 "formula" ', " }", verifier.FORMAT, False),
    ],
)
def test_only_the_formula_decides_but_the_layout_must_hold(head: str, tail: str, code: str, fields_ok: bool):
    verdict = grade(RIGHT, head, tail)
    assert (verdict.code, verdict.fields_ok) == (code, fields_ok)


def test_the_rule_decides_which_numbers_are_on_the_hand():
    assert grade(RIGHT, rule=OOD).solved
    assert grade(RIGHT, rule=ID).code == verifier.WRONG_NUMBER


WORDS = ["{", "}", '"cards"', '"number"', '"formula"', "4", "J", "A", "8", "11", "1", "12", "20", "24", "0", "-5"]
WORDS += ["8/3", "1/0", "+", "-", "*", "/", "=", ",", "<unk>", "９", "1e9"]


@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)))
def test_total_on_any_text(text: str):
    for candidate in (text, HEAD + text + " }", text * 40):
        verdict = verify(candidate, CARDS, OOD, "compact")
        assert verdict.solved == (verdict.reward == 5)
        assert verdict.format_error == (verdict.reward == -3)


@given(st.lists(st.integers(1, 13), min_size=4, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_solutions_are_solved_in_any_order_of_the_hand_and_changed_ones_are_not(values: list[int], draw: random.Random):
    rule = Rule({"J": 11, "Q": 12, "K": 13}, 24)
    symbols = {1: "A", 11: "J", 12: "Q", 13: "K"}
    found = chains(values, 24)
    for chain in draw.sample(found, min(5, len(found))):
        order = draw.sample(values, 4)
        cards = [symbols.get(value, str(value)) for value in order]
        for place in (None, draw.randrange(3)):
            steps = [list(step) for step in chain]
            if place is not None:
                steps[place][3] += draw.choice([-1, 1, 2])
            text = " , ".join(f"{a} {operation} {b} = {c}" for a, operation, b, c in steps)
            answer = f'{{ "cards" {" ".join(cards)} "number" {" ".join(map(str, order))} "formula" {text} }}'
            verdict = verify(answer, cards, rule, "compact")
            assert verdict.solved == (place is None)
            assert verdict.fields_ok


@given(*[st.tuples(st.integers(-30, 30), st.integers(1, 12))] * 3, st.sampled_from("+-*/"))
def test_steps_agree_with_fractions(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int], operation: str):
    from fractions import Fraction

    if operation == "/" and b[0] == 0:
        assert not holds(a, operation, b, c)
        return
    result = OPERATIONS[operation](Fraction(*a), Fraction(*b))
    assert holds(a, operation, b, c) == (result == Fraction(*c))
    assert holds(a, operation, b, rational(result.numerator, result.denominator))


@given(st.lists(st.integers(1, 10), min_size=3, max_size=6))
@settings(max_examples=40)
def test_the_format_writes_what_the_verifier_accepts(values: list[int]):
    form, cards = CompactFormat(), ["A" if value == 1 else str(value) for value in values]
    solution = form.canonical_solution(values, 24)
    if solution is None:
        assert len(values) > 4 or not integer_chains(values, 24)
        return
    verdict = verify(form.response(cards, ID, solution), cards, ID, form.name)
    assert verdict.solved
    assert verdict.fields_ok


def test_too_long_text_is_a_format_error():
    padding = " " * verifier.MAX_CHARS
    assert grade(RIGHT, tail=" }" + padding).code == verifier.FORMAT


@pytest.mark.parametrize(("form", "fidelity", "sentence"), [("verse", "exact", "verse"), ("paper", "loose", "loose")])
def test_unknown_switches_are_named(form: str, fidelity: str, sentence: str):
    with pytest.raises(UserError, match=sentence):
        verify("", CARDS, ID, form, fidelity)
