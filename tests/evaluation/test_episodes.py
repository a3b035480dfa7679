from __future__ import annotations

import re

import pytest

from rlheals.errors import UserError
from rlheals.evaluation.dialogue import Dialogue
from rlheals.evaluation.episodes import run_episodes
from rlheals.inference import Sampling
from tests.common import make_tokenizer
from tests.evaluation.games import ScriptedEngine, SumEpisode

SPEAK = Dialogue(make_tokenizer("words"))


def numbers(chat: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", chat)]


def right_at_third_try(chat: str) -> str:
    first, second, *said = numbers(chat)
    return str(first + second) if len(said) == 2 else "0"


def play(reply, attempts=5, context=1000, budget=4, pairs=((1, 2), (3, 4)), **sampling):
    engine = ScriptedEngine(SPEAK.tokenizer, reply)
    ended: list[int] = []
    episodes = [SumEpisode(*pair, attempts) for pair in pairs]
    records = run_episodes(engine, SPEAK, episodes, Sampling(budget, **sampling), context, ended.append)
    assert sum(ended) == len(pairs)
    return engine, records


def test_attempts_are_graded_in_turn() -> None:
    engine, records = play(right_at_third_try)
    assert [[record.turn.verdict for record in row] for row in records] == [["wrong", "wrong", "solved"]] * 2
    assert [[record.attempt for record in row] for row in records] == [[1, 2, 3]] * 2
    assert [record.response for record in records[1]] == ["0", "0", "7"]
    assert {record.tokens for row in records for record in row} == {1}
    assert [len(call) for call in engine.calls] == [2, 2, 2]


def test_the_conversation_grows_by_the_tokens_that_were_sampled() -> None:
    engine, _ = play(right_at_third_try, pairs=[(1, 2)])
    assert [SPEAK.tokenizer.decode(call[0]) for call in engine.calls] == [
        "<s> sum of 1 2 ->",
        "<s> sum of 1 2 -> 0 </s> wrong again ->",
        "<s> sum of 1 2 -> 0 </s> wrong again -> 0 </s> wrong again ->",
    ]


def test_only_the_unsolved_go_on() -> None:
    engine, records = play(lambda chat: "3", attempts=3)
    assert [len(call) for call in engine.calls] == [2, 1, 1]
    assert [len(row) for row in records] == [1, 3]
    assert not records[1][-1].turn.solved
    assert records[1][-1].turn.done


def test_unreadable_answers_are_format_errors() -> None:
    _, records = play(lambda chat: "again is", attempts=1)
    assert all(row[0].turn.format_error for row in records)


def test_a_full_context_ends_the_episode_unsolved() -> None:
    # prompt 6 tokens, each failed round adds answer, </s>, wrong, again, ->: 11 then 16 tokens; 4 more must fit
    engine, records = play(lambda chat: "0", context=17)
    assert [record.turn.verdict for record in records[0]] == ["wrong", "wrong", "context_full"]
    last = records[0][-1]
    assert (last.attempt, last.response, last.tokens) == (3, "", 0)
    assert last.turn.done
    assert not last.turn.solved
    assert len(engine.calls[2]) == 0


def test_a_first_prompt_that_does_not_fit_is_an_error() -> None:
    told = (
        r"first prompt of 6 tokens and a response of up to 4 do not fit into the context of 9; "
        r"raise inference\.max_context if .*, or use a model with a larger max_position_embeddings"
    )
    with pytest.raises(UserError, match=told):
        play(lambda chat: "0", context=9)


def test_every_turn_has_its_own_seed_and_no_seed_is_shared_between_runs() -> None:
    first, _ = play(lambda chat: "0", seed=0, temperature=1.0)
    second, _ = play(lambda chat: "0", seed=1, temperature=1.0)
    assert len(set(first.seeds + second.seeds)) == 10


def test_no_episodes() -> None:
    assert play(lambda chat: "0", pairs=[])[1] == []
