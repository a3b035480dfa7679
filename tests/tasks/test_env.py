from __future__ import annotations

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from rlheals.errors import UserError
from rlheals.tasks.general_points.env import ENVIRONMENT_ID, GeneralPointsEnv
from rlheals.tasks.general_points.paper_format import PaperFormat
from rlheals.tasks.general_points.rules import FACES
from rlheals.tasks.general_points.spec import GeneralPointsSpec


@pytest.mark.parametrize("condition", ["id", "ood"])
@pytest.mark.parametrize("prompt_format", ["paper", "compact"])
def test_the_checker_finds_nothing(prompt_format: str, condition: str):
    environment = gymnasium.make(ENVIRONMENT_ID, prompt_format=prompt_format, condition=condition)
    check_env(environment.unwrapped)


def test_render_shows_the_conversation():
    environment = gymnasium.make(ENVIRONMENT_ID, render_mode="ansi").unwrapped
    prompt, _ = environment.reset(seed=0)
    feedback, *_ = environment.step("hello")
    assert environment.render() == f"{prompt}\n\nhello\n\n{feedback}"


def test_hands_follow_the_seed():
    def hands(seed: int) -> list[list[str]]:
        environment = GeneralPointsEnv()
        first = environment.reset(seed=seed)[1]["cards"]
        return [first, *(environment.reset()[1]["cards"] for _ in range(5))]

    assert hands(1) == hands(1)
    assert hands(1) != hands(2)


def test_a_solution_terminates_and_the_last_failure_truncates():
    environment = GeneralPointsEnv(condition="ood")
    _, info = environment.reset(seed=3)
    assert any(card in FACES for card in info["cards"])
    solution = PaperFormat().canonical_solution(info["values"], info["target"])
    observation, reward, terminated, truncated, _ = environment.step(f'{{"formula": "{solution}"}}')
    assert (observation, reward, terminated, truncated) == ("", 5, True, False)
    environment.reset()
    outcomes = [environment.step("")[1:4] for _ in range(5)]
    assert outcomes == [(-3, False, False)] * 4 + [(-3, False, True)]


def test_official_fidelity_adds_the_reward_of_the_limit():
    spec = GeneralPointsSpec.paper().model_copy(update={"fidelity": "official", "attempts": 1})
    environment = GeneralPointsEnv(spec)
    environment.reset(seed=0)
    assert environment.step("")[1] == -4


def test_a_given_hand_is_played():
    environment = GeneralPointsEnv(prompt_format="compact")
    prompt, info = environment.reset(options={"cards": ["3", "3", "8", "8"]})
    assert prompt.endswith(": 3 3 8 8")
    assert info["values"] == [3, 3, 8, 8]


def test_step_before_reset_is_an_error():
    with pytest.raises(RuntimeError, match="reset"):
        GeneralPointsEnv().step("")


def test_bad_games_are_named():
    with pytest.raises(UserError, match="condition 'test'"):
        GeneralPointsEnv(condition="test")
    with pytest.raises(UserError, match="prompt_format 'poem'"):
        GeneralPointsEnv(prompt_format="poem")
    with pytest.raises(UserError, match=r"task\.target"):
        GeneralPointsEnv(GeneralPointsSpec.paper().model_copy(update={"target": 10**6})).reset(seed=0)
