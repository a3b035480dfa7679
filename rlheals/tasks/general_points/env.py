"""GeneralPoints as a Gymnasium environment over text, for RL code outside this project.

>>> import gymnasium
>>> env = gymnasium.make("rlheals.tasks.general_points.env:rlheals/GeneralPoints-v0")
>>> prompt, info = env.reset(seed=0)
>>> sorted(info)
['cards', 'target', 'values']
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium
from gymnasium import spaces

from rlheals.errors import UserError
from rlheals.tasks.general_points.hands import Draw, draw_solvable, symbols_of
from rlheals.tasks.general_points.rewards import MAX_CHARS
from rlheals.tasks.general_points.spec import GeneralPointsSpec
from rlheals.tasks.general_points.task import GeneralPoints

if TYPE_CHECKING:
    from rlheals.tasks.general_points.loop import GeneralPointsEpisode

ENVIRONMENT_ID = "rlheals/GeneralPoints-v0"
_DRAWS = 1024
_TRIES = 64


class GeneralPointsEnv(gymnasium.Env[str, str]):  # type: ignore[misc]  # gymnasium is not followed by the checker
    """One hand an episode; an action is an answer, an observation the text of the next user turn.

    A solved hand terminates the episode, the last failed attempt truncates it (and, under official fidelity, adds
    `GeneralPointsEpisode.limit_reward`). The observation after the last turn is empty.

    Args:
        spec: the game; the paper's by default.
        prompt_format: ``paper`` or ``compact``.
        condition: ``id`` or ``ood``, which fixes both the rule and how hands are drawn.

    Raises:
        UserError: unknown format or condition, or a game without solvable hands.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        spec: GeneralPointsSpec | None = None,
        prompt_format: str = "paper",
        condition: str = "id",
        render_mode: str | None = None,
    ) -> None:
        if condition not in ("id", "ood"):
            raise UserError(f"condition {condition!r} is unknown; use id or ood.")
        self.render_mode = render_mode
        self._task = GeneralPoints(spec or GeneralPointsSpec.paper())
        self._condition = condition
        self._format = self._task.format(prompt_format)
        text = spaces.Text(max_length=MAX_CHARS, min_length=0, charset=string.printable)
        self.action_space = text
        self.observation_space = spaces.Text(max_length=MAX_CHARS, min_length=0, charset=string.printable)
        self._transcript: list[str] = []
        self._episode: GeneralPointsEpisode | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Deal a solvable hand, or the one in ``options["cards"]``; returns the prompt and the hand."""
        super().reset(seed=seed)
        cards = (options or {}).get("cards") or self._deal()
        self._episode = self._task.play(cards, self._condition, self._format)
        self._transcript = [self._episode.prompt]
        rule = self._episode.rule
        return self._episode.prompt, {"cards": list(cards), "values": list(self._episode.values), "target": rule.target}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Grade an answer; see `gymnasium.Env.step`."""
        if self._episode is None:
            raise RuntimeError("call reset before step")
        turn = self._episode.step(action)
        observation = turn.feedback or ""
        self._transcript += [action, observation]
        truncated = turn.done and not turn.solved
        reward = turn.reward + (self._episode.limit_reward if truncated else 0.0)
        info = {"verdict": turn.verdict, "solved_under_training_rule": turn.solved_under_training_rule}
        return observation, reward, turn.solved, truncated, info

    def render(self) -> str | None:
        """The conversation so far, turns separated by blank lines, in mode ``ansi``."""
        return "\n\n".join(self._transcript) if self.render_mode == "ansi" else None

    def _deal(self) -> tuple[str, ...]:
        spec = self._task.spec
        draw = Draw(spec.cards, spec.deck, spec.replacement, faces=self._condition == "ood")
        for count in [1] * 16 + [_DRAWS] * _TRIES:
            hands = draw_solvable(self.np_random, count, draw, spec.rule(self._condition))
            if len(hands):
                return symbols_of(hands[:1], draw)[0]
        raise UserError(f"no hand that reaches task.target {spec.target} was drawn; choose another target.")


gymnasium.register(id=ENVIRONMENT_ID, entry_point="rlheals.tasks.general_points.env:GeneralPointsEnv")
