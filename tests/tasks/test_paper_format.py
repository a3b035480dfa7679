from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.tasks.general_points.paper_format import PaperFormat
from rlheals.tasks.general_points.rewards import CODES, SOLVED
from rlheals.tasks.general_points.rules import Rule
from rlheals.tasks.general_points.solver import solvable
from tests.tasks.general_points_oracles import leaves, parsed, tree_value

FORM = PaperFormat()
ID, OOD = Rule.faces_as_10(24), Rule.faces_as_11_12_13(24)
CARDS = ["2", "Q", "7", "Q"]


def test_prompt_has_the_sections_in_order_and_states_the_rule():
    prompt = FORM.prompt(CARDS, OOD)
    places = [
        prompt.index(part)
        for part in ("[Task Description]", "'13'", "[Input]", "Cards: ['2', 'Q', '7', 'Q']", "[Output]")
    ]
    assert places == sorted(places)
    assert [prompt.index(f'"{key}"') for key in ("cards", "number", "formula")] == sorted(
        prompt.index(f'"{key}"') for key in ("cards", "number", "formula")
    )
    assert OOD.description() in prompt
    assert ID.description() in FORM.prompt(CARDS, ID)
    assert "reaches 30" in FORM.prompt(CARDS, Rule.faces_as_10(30))
    assert prompt == prompt.strip()


def test_response_is_json_but_for_its_last_comma():
    assert FORM.response(CARDS, OOD, "(12-12)*7+24") == (
        "{\n  \"cards\": ['2', 'Q', '7', 'Q'],\n  \"number\": [2, 12, 7, 12],\n  \"formula\": \"(12-12)*7+24=24\",\n}"
    )


def test_mismatched_template_differs_where_the_paper_s_does():
    prompt, response = FORM.mismatched(CARDS, OOD, "7*2+12-2")
    assert prompt != FORM.prompt(CARDS, OOD)
    assert OOD.description() not in prompt
    assert all(f"{face} = {value}" in prompt for face, value in (("J", 11), ("Q", 12), ("K", 13)))
    assert "\"number\": ['2', '12', '7', '12']" in response
    assert '"7*2+12-2"\n}' in response


@given(st.permutations([3, 5, 7, 13]))
def test_canonical_solution_ignores_the_order_of_the_hand(values: list[int]):
    assert FORM.canonical_solution(values, 24) == FORM.canonical_solution([3, 5, 7, 13], 24)


@given(st.lists(st.integers(1, 13), min_size=3, max_size=6))
@settings(max_examples=60)
def test_canonical_solution_exists_exactly_when_there_is_one_and_is_right(values: list[int]):
    text = FORM.canonical_solution(values, 24)
    assert (text is not None) == solvable(values, 24)
    if text is not None:
        assert sorted(leaves(parsed(text))) == sorted(values)
        assert tree_value(parsed(text)) == 24


@pytest.mark.parametrize(
    ("values", "plain"), [((1, 2, 3, 4), "(1+2+3)*4"), ((4, 4, 7, 9), "4+4+7+9"), ((3, 3, 8, 8), "8/(3-8/3)")]
)
def test_canonical_solution_is_plain(values: tuple[int, ...], plain: str):
    text = FORM.canonical_solution(values, 24)
    assert text is not None
    assert (text.count("("), text.count("/"), text.count("-")) == (plain.count("("), plain.count("/"), plain.count("-"))


@pytest.mark.parametrize("code", [code for code in CODES if code != SOLVED])
def test_feedback_says_as_much_as_its_mode_allows(code: str):
    none, neutral, leaking = (FORM.feedback(code, ["(7+5", "9"], mode) for mode in ("none", "neutral", "leaking"))
    assert none == FORM.feedback("format", [], "none")
    assert "(7+5" not in neutral
    assert neutral != none
    assert ("(7+5" in leaking) == (code in ("wrong_number", "unused_number", "wrong_value", "prefix"))
    assert FORM.feedback(code, [], "leaking") == neutral
