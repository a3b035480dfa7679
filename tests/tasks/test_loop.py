from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.tasks.general_points.compact import CompactFormat
from rlheals.tasks.general_points.loop import GeneralPointsEpisode
from rlheals.tasks.general_points.paper_format import PaperFormat
from rlheals.tasks.general_points.rules import Rule

if TYPE_CHECKING:
    from rlheals.tasks.core import Episode

ID, OOD = Rule.faces_as_10(24), Rule.faces_as_11_12_13(24)
CARDS = ("A", "2", "J", "Q")
FORMATS = {"compact": CompactFormat(), "paper": PaperFormat()}


def episode(form: str = "paper", rule: Rule = OOD, **options: object) -> GeneralPointsEpisode:
    return GeneralPointsEpisode(CARDS, rule, ID, FORMATS[form], **options)  # type: ignore[arg-type]


def answer(formula: str) -> str:
    return f'{{"formula": "{formula}"}}'


def test_first_prompt_is_the_format_s():
    assert episode().prompt == PaperFormat().prompt(CARDS, OOD)


def test_success_ends_the_episode():
    played: Episode = episode()
    turn = played.step(answer("1*2*(12-11)"))
    assert (turn.verdict, turn.solved, turn.done) == ("wrong_value", False, False)
    turn = played.step(answer("11*2+12/1"))
    assert not turn.done
    turn = played.step(answer("2*(1+11)*12"))
    assert not turn.done
    turn = played.step(answer("12*2*(12-11)"))
    assert turn.verdict == "wrong_number"
    turn = played.step(answer("12+11+2-1"))
    assert (turn.verdict, turn.reward, turn.solved, turn.done, turn.feedback) == ("solved", 5, True, True, None)
    with pytest.raises(RuntimeError, match="done"):
        played.step("")


@pytest.mark.parametrize("attempts", [1, 3, 5])
def test_last_failed_attempt_ends_the_episode_without_feedback(attempts: int):
    played = episode(attempts=attempts)
    turns = [played.step("") for _ in range(attempts)]
    assert [turn.done for turn in turns] == [False] * (attempts - 1) + [True]
    assert [turn.feedback is None for turn in turns] == [turn.done for turn in turns]
    assert all(turn.reward == -3 and turn.format_error for turn in turns)
    with pytest.raises(RuntimeError, match="done"):
        played.step("")


def test_limit_reward_is_the_released_one_only_under_official_fidelity():
    assert episode(fidelity="official").limit_reward == -1
    assert episode().limit_reward == 0


def test_solved_under_the_training_rule_is_judged_on_the_same_cards():
    turn = episode().step(answer("10+10+2*(1+1)"))
    assert not turn.solved_under_training_rule
    rule_ten = Rule.faces_as_10(23)
    shortcut = GeneralPointsEpisode(CARDS, Rule.faces_as_11_12_13(23), rule_ten, FORMATS["paper"])
    turn = shortcut.step(answer("10+10+2+1"))
    assert (turn.verdict, turn.solved, turn.solved_under_training_rule) == ("wrong_number", False, True)
    plain = GeneralPointsEpisode(CARDS, rule_ten, rule_ten, FORMATS["paper"]).step(answer("10+10+2+1"))
    assert plain.solved
    assert plain.solved_under_training_rule


@pytest.mark.parametrize(
    ("form", "response", "leaked"),
    [
        ("paper", answer("10+10+2+1"), "10"),
        ("paper", answer("11+12"), "1, 2"),
        ("paper", answer("11+12-1-2"), "11+12-1"),
        (
            "compact",
            '{ "cards" A 2 J Q "number" 1 2 11 12 "formula" 11 + 2 = 13 , 13 - 1 = 12 , 12 - 12 = 0 }',
            "11 + 2 13 13 - 1 12",
        ),
        (
            "compact",
            '{ "cards" A 2 J Q "number" 1 2 10 10 "formula" 10 + 10 = 20 , 20 + 2 = 22 , 22 + 1 = 23 }',
            "10 10",
        ),
    ],
)
def test_only_leaking_feedback_names_numbers_and_right_beginnings(form: str, response: str, leaked: str):
    told = {mode: episode(form, feedback=mode).step(response).feedback for mode in ("leaking", "neutral", "none")}
    assert leaked in str(told["leaking"])
    assert leaked not in str(told["neutral"])
    assert len({str(text) for text in told.values()}) == 3


def test_a_wrong_start_leaks_nothing():
    response = '{ "cards" A 2 J Q "number" 1 2 11 12 "formula" 11 * 12 = 132 , 132 * 2 = 264 , 264 * 1 = 264 }'
    assert episode("compact", feedback="leaking").step(response).feedback == "no wrong_value"


def test_truncated_answers_are_told_as_unreadable():
    turn = episode("compact").step('{ "cards" A 2 J Q "number"')
    assert (turn.verdict, turn.feedback) == ("truncated", "no format")


@given(st.text(), st.sampled_from(["compact", "paper"]), st.sampled_from(["leaking", "none"]))
def test_never_raises_on_text(text: str, form: str, feedback: str):
    played = episode(form, attempts=2, feedback=feedback, fidelity="official")
    assert isinstance(played.step(text).feedback, str | None)


@pytest.mark.parametrize(
    ("options", "sentence"), [({"feedback": "loud"}, "task.feedback"), ({"attempts": 0}, "0 attempts")]
)
def test_bad_options_are_named(options: dict[str, object], sentence: str):
    with pytest.raises(UserError, match=sentence):
        episode(**options)


def test_a_card_without_value_is_named():
    with pytest.raises(UserError, match="card 'X'"):
        GeneralPointsEpisode(["X"], ID, ID, FORMATS["paper"])
