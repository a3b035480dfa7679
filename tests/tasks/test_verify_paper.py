from __future__ import annotations

import sys
from itertools import combinations_with_replacement, permutations, product
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.tasks.general_points import verifier
from rlheals.tasks.general_points.paper_format import PaperFormat
from rlheals.tasks.general_points.paper_verifier import known_solutions, longest_known_prefix
from rlheals.tasks.general_points.rules import Rule
from rlheals.tasks.general_points.solver import expressions
from rlheals.tasks.general_points.verifier import MAX_CHARS, Verdict, verify
from tests.tasks.general_points_oracles import parsed, tree_value

if TYPE_CHECKING:
    import random

RULE = Rule.faces_as_10(24)
CARDS = ["A", "2", "3", "4"]


def answer(formula: str, cards: list[str] | None = None) -> str:
    cards = cards or CARDS
    return f'{{\n  "cards": {cards},\n  "number": {list(RULE.values(cards))},\n  "formula": "{formula}",\n}}'


def grade(formula: str, fidelity: str, cards: list[str] | None = None) -> Verdict:
    return verify(answer(formula, cards), cards or CARDS, RULE, "paper", fidelity)


@pytest.mark.parametrize(
    ("formula", "exact", "official"),
    [
        ("1*2*3*4", 5, 5),
        ("1*2*3*4=24", 5, 5),
        ("1*2*3*4=99", 5, 5),  # everything behind the first = is cut off
        ("(1+2+3)*4", 5, 5),
        ("((1)*2)*(3*4)", 5, 5),
        ("1+2+3+4", -1, -1),
        ("", -2, -2),
        ("1+2+3", -2, -2),
        ("1+2+3+5", -4, -4),
        ("1+2+3+4+4", -2, -2),
        ("+-", -3, -8),
        ("1+2+3+4)", -3, -3),
        ("(1+2+3+4", -3, -1),
        ("4*(1+2+3", -3, 1),
        ("1+2+3+", -3, -2),
        ("1*2*3*4+", -3, -1),
        ("-1+2*3*4", -3, -3),
        ("1 * 2 * 3 * 4", 5, -3),
        ("1*2*3 4", -3, -3),
        ("12*3*4", -4, -4),
        ("1*2*3*x", -3, -3),
        ("1×2×3×4", -3, -3),
        ("2**3*1*4", -3, -3),
        ("()1*2*3*4", -3, -6),  # ")" with nothing in the brackets, and a number behind it
        ("1/(2-2)*3*4", -2, -2),
        ("01*2*3*4", 5, -1),  # Python does not read a leading zero
        ("None", -3, -3),
    ],
)
def test_rewards(formula: str, exact: float, official: float):
    assert grade(formula, "exact").reward == exact
    assert grade(formula, "official").reward == official
    for fidelity in ("exact", "official"):
        verdict = grade(formula, fidelity)
        assert verdict.solved == (verdict.reward == 5)
        assert verdict.fields_ok


WHITE_SPACE = [character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace()]


def test_no_white_space_joins_two_numbers():
    """12 of a hand 12, 2, 1, 1 may not be written as 1 and 2 with something between that is then taken away."""
    rule, cards = Rule.faces_as_11_12_13(24), ["Q", "2", "A", "A"]
    assert {" ", "\t", "\n", "\x1c", "\x85", "\u00a0", "\u2003", "\u2028", "\u3000"} <= set(WHITE_SPACE)
    for character in WHITE_SPACE:
        for gap in (character, f" {character}", character * 2):
            joined = f'{{"cards": {cards}, "number": [12, 2, 1, 1], "formula": "1{gap}2*2*1*1"}}'.replace("'", '"')
            assert verify(joined, cards, rule, "paper", "exact").code == verifier.FORMAT, repr(gap)
            assert not verify(joined, cards, rule, "paper", "official").solved, repr(gap)
        spaced = f'{{"formula": "12{character}*{character}2*1*1{character}"}}'
        assert verify(spaced, cards, rule, "paper", "exact").solved, repr(character)


def test_official_grading_reads_brackets_of_any_depth():
    """A documented departure: Python gives up a little above 200."""
    assert grade("(" * 500 + "1*2*3*4" + ")" * 500, "official").reward == 5


def test_exact_success_that_float_equality_rejects():
    cards = ["3", "3", "8", "8"]
    assert grade("8/(3-8/3)", "exact", cards).solved
    official = grade("8/(3-8/3)", "official", cards)
    assert (official.code, official.reward, official.solved) == (verifier.WRONG_VALUE, 0, False)


@pytest.mark.parametrize("fidelity", ["exact", "official"])
def test_division_by_zero_is_only_wrong(fidelity: str):
    verdict = grade("4/(3-3)*8", fidelity, ["3", "3", "4", "8"])
    assert (verdict.code, verdict.reward) == (verifier.WRONG_VALUE, -1)


@pytest.mark.parametrize(
    ("text", "code", "fields_ok"),
    [
        (answer("1*2*3*4=24"), verifier.SOLVED, True),
        ('{"cards": ["A", "2", "3", "4"], "number": [1, 2, 3, 4], "formula": "1*2*3*4"}', verifier.SOLVED, True),
        (
            '{"cards": ["A", "2", "3", "4"], "number": ["1", "2", "3", "4"], "formula": "1*2*3*4"}',
            verifier.SOLVED,
            True,
        ),
        ('{"cards": ["A", "2", "3", "4"], "number": [1, 2, 3, 5], "formula": "1*2*3*4"}', verifier.SOLVED, False),
        ("Sure! " + answer("1*2*3*4"), verifier.SOLVED, True),
        ('"formula": "1*2*3*4"', verifier.SOLVED, False),
        ('{"formula": 24}', verifier.FORMAT, False),
        ('{"formula": null}', verifier.FORMAT, False),
        ("[1, 2]", verifier.FORMAT, False),
        ("24", verifier.FORMAT, False),
        ("", verifier.FORMAT, False),
        ("{\n  \"cards\": ['A', '2'", verifier.TRUNCATED, False),
        (answer("1*2*3*4")[:-8], verifier.TRUNCATED, True),
    ],
)
def test_reading(text: str, code: str, fields_ok: bool):
    verdict = verify(text, CARDS, RULE, "paper")
    assert (verdict.code, verdict.fields_ok) == (code, fields_ok)


def random_formula(draw: random.Random, values: list[int]) -> str:
    """A formula over shuffled ``values`` with random operators and (needless) brackets."""
    parts = [str(value) for value in draw.sample(values, len(values))]
    while len(parts) > 1:
        at = draw.randrange(len(parts) - 1)
        joined = parts[at] + draw.choice("+-*/") + parts[at + 1]
        parts[at : at + 2] = [f"({joined})" if draw.random() < 0.6 else joined]
    return parts[0]


@given(st.lists(st.integers(1, 10), min_size=3, max_size=6), st.randoms(use_true_random=False))
def test_value_agrees_with_fractions(values: list[int], draw: random.Random):
    cards = ["A" if value == 1 else str(value) for value in values]
    for _ in range(5):
        formula = random_formula(draw, values)
        value = tree_value(parsed(formula))
        target = int(value) if value is not None and value >= 1 and value.denominator == 1 else 24
        rule = Rule.faces_as_10(target)
        assert verify(answer(formula, cards), cards, rule, "paper").solved == (value == target)


@given(st.lists(st.integers(1, 10), min_size=4, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_official_equality_is_that_of_floats(values: list[int], draw: random.Random):
    cards = ["A" if value == 1 else str(value) for value in values]
    for formula in [random_formula(draw, values) for _ in range(5)]:
        expected = float_value(parsed(formula))
        assert verify(answer(formula, cards), cards, RULE, "paper", "official").solved == (expected == 24)


def float_value(tree: Any) -> float | None:
    if isinstance(tree, int):
        return tree
    left, right = float_value(tree[1]), float_value(tree[2])
    if left is None or right is None or (tree[0] == "/" and right == 0):
        return None
    return {"+": left + right, "-": left - right, "*": left * right, "/": left / right if right else 0}[tree[0]]


@given(st.lists(st.integers(1, 10), min_size=4, max_size=4), st.permutations(range(4)))
@settings(max_examples=40)
def test_solutions_are_solved_in_any_order_of_the_hand(values: list[int], order: list[int]):
    cards = ["A" if values[i] == 1 else str(values[i]) for i in order]
    for formula in expressions(values, 24)[:20]:
        assert grade(formula, "exact", cards).solved


@given(st.one_of(st.text(), st.text('0123456789+-*/()= {}[]":,\\nformulacardsnumber'), st.text("()+-1234")))
def test_total_on_any_text(text: str):
    for candidate in (text, answer(text), text * 50, f'{{"formula": "{text}"}}'):
        for fidelity in ("exact", "official"):
            verdict = verify(candidate, CARDS, RULE, "paper", fidelity)
            assert verdict.solved == (verdict.reward == 5)
            if fidelity == "exact":
                assert verdict.format_error == (verdict.reward == -3)


def hostile(length: int) -> list[str]:
    inner = length - 16
    formulas = ["(" * inner, "(" * (inner // 2) + ")" * (inner // 2), "9" * inner, "9+" * (inner // 2)]
    formulas += ["9**" * (inner // 3), "0" * (inner - 1) + "8", "1" + " " * (inner - 1), "1+2+3+4" + ")" * (inner - 7)]
    texts = [f'{{"formula": "{formula}"}}' for formula in formulas]
    return texts + [
        piece * (length // len(piece)) for piece in ("[", '{"a":', '"formula": "', '"cards":[', "1 + 1 = 2 , ")
    ]


def lines_run(text: str, form: str, fidelity: str) -> int:
    """Lines of Python executed by one verdict."""
    count = 0

    def trace(*_: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        verify(text, CARDS, RULE, form, fidelity)
    finally:
        sys.settrace(previous)
    return count


@pytest.mark.parametrize("fidelity", ["exact", "official"])
@pytest.mark.parametrize("form", ["compact", "paper"])
def test_work_grows_no_faster_than_the_text(form: str, fidelity: str):
    verify(answer("1*2*3*(4"), CARDS, RULE, form, fidelity)  # fills the cache of known solutions
    for text in hostile(MAX_CHARS):
        assert len(text) <= MAX_CHARS
        assert lines_run(text, form, fidelity) < 16 * MAX_CHARS


def test_too_long_text_is_a_format_error():
    assert verify(answer("1*2*3*4") + " " * MAX_CHARS, CARDS, RULE, "paper").code == verifier.FORMAT


def test_known_solutions_have_at_most_the_released_brackets():
    known = known_solutions((1, 2, 3, 4), 24)
    assert {"1*2*3*4", "(1+2+3)*4", "4*(1+2+3)", "(1+3)*(2+4)", "1*(2*3)*4"} <= set(known)
    assert not {"((1+2)+3)*4", "1*(2*(3*4))"} & set(known)
    assert known_solutions((1, 2, 3, 4, 5), 24) == ()


def released_solutions(values: tuple[int, ...], target: int) -> set[str]:
    """The released solver's procedure: permutations x operators x bracket placements, kept when exact."""
    templates = ["{}{}{}{}{}{}{}", "({}{}{}){}{}{}{}", "({}{}{}{}{}){}{}", "{}{}({}{}{}){}{}", "{}{}({}{}{}{}{})"]
    templates += ["{}{}{}{}({}{}{})", "({}{}{}){}({}{}{})"]
    texts = {
        template.format(a, x, b, y, c, z, d)
        for a, b, c, d in set(permutations(values))
        for x, y, z in product("+-*/", repeat=3)
        for template in templates
    }
    return {text for text in texts if tree_value(parsed(text)) == target}


@pytest.mark.parametrize("values", [(3, 3, 8, 8), (2, 2, 6, 9), (5, 5, 5, 11), (6, 6, 6, 6)])
def test_known_solutions_are_those_of_the_released_procedure(values: tuple[int, ...]):
    known = known_solutions(values, 24)
    assert len(known) == len(set(known))
    assert set(known) == released_solutions(values, 24)


@pytest.mark.parametrize(("formula", "prefix"), [("(1+2)*3*4", "(1+2"), ("4*(1+2)*3", "4*(1+2"), ("7+1+2+3", "")])
def test_longest_known_prefix(formula: str, prefix: str):
    assert longest_known_prefix(formula, (1, 2, 3, 4), 24) == prefix


def test_multisets_with_solutions_that_floats_reject():
    # Documented for the released verifier: 45 of 1362 multisets, one of them with no accepted solution at all.
    some = every = 0
    for values in combinations_with_replacement(range(1, 14), 4):
        known = known_solutions(values, 24)
        rejected = sum(float_value(parsed(text)) != 24 for text in known)
        some += rejected > 0
        every += bool(known) and rejected == len(known)
    assert (some, every) == (45, 1)


@pytest.mark.parametrize("values", [(3, 3, 8, 8), (1, 2, 3, 4), (5, 5, 5, 1), (1, 2, 3, 4, 5), (2, 3, 5, 7, 9, 10)])
def test_the_format_writes_what_both_gradings_read(values: tuple[int, ...]):
    form, cards = PaperFormat(), ["A" if value == 1 else str(value) for value in values]
    solution = form.canonical_solution(values, 24)
    assert solution is not None
    verdict = verify(form.response(cards, RULE, solution), cards, RULE, form.name)
    assert verdict.solved
    assert verdict.fields_ok
    assert verify(form.response(cards, RULE, solution), cards, RULE, form.name, "official").fields_ok
