"""Graded conversations for policy updates, each kept as one token sequence with the spans that are trained on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rlheals.errors import UserError
from rlheals.inference.prompts import LARGER_CONTEXT
from rlheals.inference.seeds import counter_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.evaluation.dialogue import Dialogue
    from rlheals.inference import Answer, Engine, Sampling
    from rlheals.inference.fingerprint import Proof
    from rlheals.tasks import Task
    from rlheals.tasks.core import Episode, Turn


@dataclass(frozen=True, slots=True)
class TurnSpan:
    """One turn: the state it answers, the tokens that carry loss, and its grade.

    Attributes:
        state_position: place of the last token before the response; the critic looks from there.
        start: place of the first response token.
        answer: first place that counts in full; tokens before it are thoughts (see ``thought_weight``).
        stop: place behind the last token with loss: the end token if the model gave it, else the last one sampled.
        reward: of this turn; that of the last one includes what the task gives for failing to the end.
        solved: the response is right.
        format_error: it could not be read.
        verdict: the task's reason code.
        engine_logp: log-probability of each token with loss as the engine that sampled it reports it (temperature 1, no
            filter); None where it was not asked.
    """

    state_position: int
    start: int
    answer: int
    stop: int
    reward: float
    solved: bool
    format_error: bool
    verdict: str
    engine_logp: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """One episode.

    Attributes:
        hand_id: the item played.
        token_ids: the whole conversation.
        turns: its turns, in order.
        truncated: the context had no room for another turn. The sequence then ends with the prompt of that turn, so
            its last token is the state whose value stands for what would have followed. Failing the last attempt
            allowed is an end of the game, not a truncation.
    """

    hand_id: str
    token_ids: list[int]
    turns: list[TurnSpan]
    truncated: bool

    @property
    def solved(self) -> bool:
        """Whether any turn solved it."""
        return any(turn.solved for turn in self.turns)

    @property
    def total_reward(self) -> float:
        """Undiscounted sum of the turns' rewards."""
        return sum(turn.reward for turn in self.turns)


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How episodes are played.

    Attributes:
        prompt_format: name of the task's prompt format.
        attempts: turns allowed.
        sampling: token budget, temperature and filters of a response; its seed is replaced by the counters'.
        context: tokens the model can hold.
        seed: of the run; equal for all branches, so that they draw the same random numbers.
        rank: of this process.
        answer_field: text from which on a response is its answer; what precedes it is thought.
    """

    prompt_format: str
    attempts: int
    sampling: Sampling
    context: int
    seed: int
    rank: int = 0
    answer_field: str = '"formula"'


def draw_hands(rows: int, episodes: int, seed: int, update: int) -> list[int]:
    """Row numbers of update ``update`` (from 0): a shuffled table is dealt out, then shuffled anew.

    A pure function of its arguments, so a resumed run and every branch of the same seed play the same hands.

    Raises:
        UserError: there are no rows.
    """
    if rows < 1:
        raise UserError("the table of RL prompts has no rows; raise dataset.rl_prompts in params.yaml.")
    places = range(update * episodes, (update + 1) * episodes)
    orders = {
        deal: np.random.default_rng(counter_seed(seed, "hands", deal)).permutation(rows)
        for deal in range(places.start // rows, places[-1] // rows + 1)
    }
    return [int(orders[place // rows][place % rows]) for place in places]


@dataclass
class _Game:
    """An episode in play."""

    hand_id: str
    episode: Episode
    tokens: list[int]
    turns: list[TurnSpan] = field(default_factory=list)
    truncated: bool = False

    def record(self) -> EpisodeRecord:
        return EpisodeRecord(self.hand_id, self.tokens, self.turns, self.truncated)


def collect(
    engine: Engine,
    dialogue: Dialogue,
    task: Task,
    items: Sequence[tuple[str, str]],
    settings: RolloutSettings,
    update: int,
) -> list[EpisodeRecord]:
    """Play one episode on each of ``items`` and return them in order.

    The environment is that of the probes: turn t of all conversations shares one engine call and every response is
    appended as sampled. Random numbers depend on (seed, update, rank, turn, place in the call) only.

    Args:
        engine: answers with the current policy.
        dialogue: turns text into tokens.
        task: grades.
        items: (hand_id, item) of the table ``rl_prompts``.
        settings: how to play.
        update: counts policy updates from 0.

    Raises:
        UserError: a first prompt leaves no room for a response.
    """
    games = [_start(dialogue, task, hand_id, item, settings) for hand_id, item in items]
    _check_first_turn(games, settings)
    active, turn = games, 0
    while active:
        seed = counter_seed(settings.seed, update, settings.rank, turn)
        sampling = dataclasses.replace(settings.sampling, seed=seed)
        answers = engine.generate([game.tokens for game in active], sampling)
        going_on = []
        for game, answer in zip(active, answers, strict=True):
            if _play(game, answer, dialogue, settings):
                going_on.append(game)
        active, turn = going_on, turn + 1
    return [game.record() for game in games]


def _start(dialogue: Dialogue, task: Task, hand_id: str, item: str, settings: RolloutSettings) -> _Game:
    episode = task.episode(item, settings.prompt_format, settings.attempts, task.spec.feedback)
    return _Game(hand_id, episode, dialogue.prompt_ids(episode.prompt))


def _check_first_turn(games: Sequence[_Game], settings: RolloutSettings) -> None:
    longest = max((len(game.tokens) for game in games), default=0)
    if longest + settings.sampling.max_new_tokens > settings.context:
        raise UserError(
            f"a first prompt of {longest} tokens and a response of up to {settings.sampling.max_new_tokens} do not fit "
            f"into the context of {settings.context}; {LARGER_CONTEXT}."
        )


def _play(game: _Game, answer: Answer, dialogue: Dialogue, settings: RolloutSettings) -> bool:
    """Grade one answer and append it; whether the game goes on."""
    end = dialogue.tokenizer.eos_token_id
    grade = game.episode.step(answer.text)
    start = len(game.tokens)
    following = [end] if grade.done else dialogue.continuation_ids(grade.feedback or "")
    # A cut response is ended by the same token, which the model did not choose; it carries no loss. Nor does one that
    # a template puts behind something else than the response itself.
    chosen = answer.finished and following[0] == end
    stop = start + len(answer.token_ids) + int(chosen)
    split = start + thought_tokens(answer, dialogue.tokenizer, settings.answer_field)
    game.turns.append(_span(start, min(split, stop), stop, grade, game.episode, answer.logprobs))
    game.tokens += [*answer.token_ids, *following]
    if grade.done:
        return False
    game.truncated = len(game.tokens) + settings.sampling.max_new_tokens > settings.context
    if len(game.tokens) > settings.context:
        # Not even the next prompt fits, so nothing can be said about its value: the episode ends where it is.
        game.truncated = False
        del game.tokens[start + len(answer.token_ids) + 1 :]
        return False
    return not game.truncated


def _span(
    start: int, answer: int, stop: int, grade: Turn, episode: Episode, logprobs: Sequence[float] | None
) -> TurnSpan:
    failed = grade.done and not grade.solved
    return TurnSpan(
        state_position=start - 1,
        start=start,
        answer=answer,
        stop=stop,
        reward=float(grade.reward) + (float(getattr(episode, "limit_reward", 0.0)) if failed else 0.0),
        solved=grade.solved,
        format_error=grade.format_error,
        verdict=grade.verdict,
        engine_logp=None if logprobs is None else tuple(logprobs[: stop - start]),
    )


def thought_tokens(answer: Answer, tokenizer: Any, answer_field: str) -> int:
    """Number of tokens before the one in which ``answer_field`` begins; all of them where it is missing."""
    tokens = answer.token_ids
    place = answer.text.find(answer_field)
    if place < 0:
        return len(tokens)
    low, high = 0, len(tokens)  # the text of `low` tokens ends at or before the field, that of `high` + 1 behind it
    while low < high:
        middle = (low + high) // 2
        text = tokenizer.decode(tokens[: middle + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        low, high = (low, middle) if len(text) > place else (middle + 1, high)
    return low


def plays_itself(engine: Engine, policy: Any) -> bool:
    """Whether the engine is around the live module, so that it always has the trained weights."""
    return getattr(engine, "model", None) is policy


def synchronise(engine: Engine, policy: Any, dtype: str = "float32", before: Proof | None = None) -> Proof | None:
    """Make ``engine`` answer with the weights of ``policy``: nothing to do around the live module, else a checked swap.

    Args:
        engine: plays the episodes.
        policy: the trained model.
        dtype: of the engine's weights.
        before: what the last call returned: an update moves weights too little for rounding to tell it from none.

    Raises:
        UserError: the engine cannot swap, or does not answer with the weights it was given.
    """
    if plays_itself(engine, policy):
        return None
    from rlheals.inference.live import serve

    return serve(engine, policy, "the trained policy", dtype, before)
