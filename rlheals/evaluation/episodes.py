"""Multi-turn graded conversations, played in lock step so that every model call is a full batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlheals.errors import UserError
from rlheals.inference.prompts import LARGER_CONTEXT
from rlheals.tasks.core import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rlheals.evaluation.dialogue import Dialogue
    from rlheals.inference import Engine, Sampling
    from rlheals.tasks.core import Episode

CONTEXT_FULL = Turn(
    verdict="context_full",
    reward=0.0,
    solved=False,
    solved_under_training_rule=False,
    format_error=False,
    fields_ok=None,
    done=True,
    feedback=None,
)


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One graded response.

    Attributes:
        attempt: 1-based.
        response: decoded text; empty when the context had no room for one.
        tokens: number of response tokens, without the end token.
        turn: the grade.
    """

    attempt: int
    response: str
    tokens: int
    turn: Turn


def run_episodes(
    engine: Engine,
    dialogue: Dialogue,
    episodes: Sequence[Episode],
    sampling: Sampling,
    context: int,
    on_finished: Callable[[int], None] = lambda count: None,
) -> list[list[AttemptRecord]]:
    """Play every episode to its end and return its attempts, in the order of ``episodes``.

    A conversation whose next response of ``sampling.max_new_tokens`` tokens might not fit into ``context`` tokens
    ends unsolved with verdict ``context_full``. Turn t of all conversations shares one engine call; sampled turns use
    a seed of their own, derived from ``sampling.seed`` and t.

    Args:
        engine: answers prompts given as token ids.
        dialogue: turns text into tokens.
        episodes: fresh episodes; each is stepped until done.
        sampling: token budget and randomness of a response.
        context: tokens the model can hold, prompt and response together.
        on_finished: called after each turn with the number of episodes it ended.

    Raises:
        UserError: not even a first response fits.
    """
    records: list[list[AttemptRecord]] = [[] for _ in episodes]
    chats = [dialogue.prompt_ids(episode.prompt) for episode in episodes]
    _check_first_turn(chats, sampling, context)
    active, turn = list(range(len(episodes))), 0
    while active:
        turn += 1
        fits = [place for place in active if len(chats[place]) + sampling.max_new_tokens <= context]
        for place in set(active) - set(fits):
            records[place].append(AttemptRecord(turn, "", 0, CONTEXT_FULL))
        answers = engine.generate([chats[place] for place in fits], _turn_sampling(sampling, turn))
        going_on = []
        for place, answer in zip(fits, answers, strict=True):
            grade = episodes[place].step(answer.text)
            records[place].append(AttemptRecord(turn, answer.text, len(answer.token_ids), grade))
            if not grade.done:
                chats[place] += [*answer.token_ids, *dialogue.continuation_ids(grade.feedback or "")]
                going_on.append(place)
        on_finished(len(active) - len(going_on))
        active = going_on
    return records


def _check_first_turn(chats: Sequence[Sequence[int]], sampling: Sampling, context: int) -> None:
    longest = max(map(len, chats), default=0)
    if longest + sampling.max_new_tokens > context:
        raise UserError(
            f"a first prompt of {longest} tokens and a response of up to {sampling.max_new_tokens} do not fit into the "
            f"context of {context}; {LARGER_CONTEXT}."
        )


def _turn_sampling(sampling: Sampling, turn: int) -> Sampling:
    """The same settings with a stream of random numbers of its own for each turn."""
    return dataclasses.replace(sampling, seed=sampling.seed * 1009 + turn - 1)
