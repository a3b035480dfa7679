from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.evaluation.dialogue import Dialogue
from rlheals.evaluation.episodes import run_episodes
from rlheals.inference import Answer, Sampling
from rlheals.inference.fingerprint import fingerprint
from rlheals.inference.seeds import counter_seed
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.training.ppo.rollout import (
    EpisodeRecord,
    collect,
    draw_hands,
    synchronise,
    thought_tokens,
)
from tests.common import make_model, make_tokenizer
from tests.training.ppo.branches import CONTEXT, ToyTask, prompts, toy_rollout

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENIZER = make_tokenizer("words")
SPEAK = Dialogue(TOKENIZER)
END = TOKENIZER.eos_token_id


class Scripted:
    """Answers turn t of the conversation that began with row i by ``script[i][t]``: (text, finished)."""

    name = "scripted"

    def __init__(self, script: Sequence[Sequence[tuple[str, bool]]]) -> None:
        self.script = [list(turns) for turns in script]
        self.calls: list[list[list[int]]] = []
        self.samplings: list[Sampling] = []
        self.firsts: list[list[int]] = []

    def generate(self, token_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        self.calls.append([list(ids) for ids in token_ids])
        self.samplings.append(sampling)
        if not self.firsts:
            self.firsts = self.calls[0]
        answers = []
        for ids in token_ids:
            place = next(i for i, first in enumerate(self.firsts) if list(ids[: len(first)]) == first)
            text, finished = self.script[place].pop(0)
            answers.append(Answer(TOKENIZER(text, add_special_tokens=False)["input_ids"], text, finished))
        return answers


def play(script: Sequence[Sequence[tuple[str, bool]]], task: Any = None, **changes: Any) -> list[EpisodeRecord]:
    return collect(Scripted(script), SPEAK, task or ToyTask(), prompts()[: len(script)], toy_rollout(**changes), 0)


def loss_tokens(record: EpisodeRecord) -> list[str]:
    return [TOKENIZER.decode(record.token_ids[turn.start : turn.stop]) for turn in record.turns]


def test_a_turn_carries_loss_on_what_the_model_chose_and_on_nothing_else() -> None:
    first, second = play([[("60 61", True), ("70 71 72", False)], [("20", True)]])
    assert loss_tokens(first) == ["60 61 </s>", "70 71 72"]
    assert loss_tokens(second) == ["20 </s>"]
    assert [turn.reward for turn in first.turns] == [-1.0, -1.0]
    assert (first.solved, second.solved, first.truncated, second.truncated) == (False, True, False, False)
    # A response cut by the budget is ended in the sequence without loss.
    assert first.token_ids[-1] == END
    assert first.turns[1].stop == len(first.token_ids) - 1


def test_a_state_is_the_last_token_before_its_response() -> None:
    script = [[("60", True), ("70", False)], [("60 61", False), ("20", True)]]
    engine = Scripted(script)
    records = collect(engine, SPEAK, ToyTask(), prompts()[:2], toy_rollout(), 0)
    for turn in range(2):
        for record, seen in zip(records, engine.calls[turn], strict=True):
            span = record.turns[turn]
            assert record.token_ids[: span.start] == seen
            assert span.state_position == span.start - 1


def test_the_environment_is_that_of_the_probes() -> None:
    engine = TransformersEngine(make_model("words", TOKENIZER, seed=2), TOKENIZER, batch_size=8)
    sampling = Sampling(max_new_tokens=3)
    items = prompts(24)
    task = ToyTask()
    probed = run_episodes(
        engine, SPEAK, [task.episode(item, "toy", 3, "neutral") for _, item in items], sampling, CONTEXT
    )
    played = collect(engine, SPEAK, task, items, toy_rollout(attempts=3, sampling=sampling), 0)
    for attempts, record in zip(probed, played, strict=True):
        assert [a.turn.verdict for a in attempts] == [turn.verdict for turn in record.turns]
        texts = [TOKENIZER.decode(record.token_ids[t.start : t.stop], skip_special_tokens=True) for t in record.turns]
        assert [a.response for a in attempts] == texts


def test_random_numbers_depend_on_the_counters_only() -> None:
    def seeds(update: int, **changes: Any) -> list[int]:
        engine = Scripted([[("60", True), ("61", True)]])
        collect(engine, SPEAK, ToyTask(), prompts()[:1], toy_rollout(**changes), update)
        return [sampling.seed for sampling in engine.samplings]

    assert seeds(3) == seeds(3)
    different = [*seeds(3), *seeds(4), *seeds(3, rank=1), *seeds(3, seed=6)]
    assert len(set(different)) == len(different) == 8
    assert seeds(3)[1] == counter_seed(5, 3, 0, 1)


def test_answers_do_not_depend_on_the_engines_batches() -> None:
    def records(batch_size: int) -> list[EpisodeRecord]:
        engine = TransformersEngine(make_model("words", TOKENIZER, seed=2), TOKENIZER, batch_size)
        return collect(engine, SPEAK, ToyTask(), prompts(12), toy_rollout(), 0)

    assert records(3) == records(12)


def test_failing_to_the_end_costs_the_limit_reward_once() -> None:
    task = ToyTask(limit_reward=-0.25)
    failed, solved = play([[("60", True), ("70", True)], [("60", True), ("20", True)]], task)
    assert [turn.reward for turn in failed.turns] == [-1.0, -1.25]
    assert [turn.reward for turn in solved.turns] == [-1.0, 1.0]


def test_an_episode_without_room_ends_with_the_prompt_that_could_not_be_answered() -> None:
    prompt = len(SPEAK.prompt_ids(prompts()[0][1]))
    after = prompt + 1 + len(SPEAK.continuation_ids("wrong again"))
    script = [[("60", True), ("20", True)]]
    (whole,) = play(script, context=after + 3)
    (cut,) = play(script, context=after + 2)
    (hard,) = play(script, context=after - 1)
    assert (len(whole.turns), whole.truncated) == (2, False)
    assert (len(cut.turns), cut.truncated, len(cut.token_ids)) == (1, True, after)
    assert cut.token_ids == whole.token_ids[:after]
    # Where not even the prompt fits there is nothing to take a value of.
    assert (len(hard.turns), hard.truncated, len(hard.token_ids)) == (1, False, prompt + 2)
    with pytest.raises(UserError, match=r"do not fit into the context of .* raise inference\.max_context"):
        play(script, context=prompt + 2)


def test_the_answer_begins_at_its_field() -> None:
    (record,) = play([[("60 is 61", True), ("20", True)]], answer_field="is")
    first, second = record.turns
    assert first.answer - first.start == 1
    assert second.answer == second.stop - 1  # the field is missing: all but the end token is thought


@given(st.lists(st.sampled_from(["1", "23", "is", "of", "sum"]), max_size=12), st.sampled_from(["is", "sum", "again"]))
def test_thought_tokens_are_those_before_the_field(words: list[str], target: str) -> None:
    text = " ".join(words)
    answer = Answer(TOKENIZER(text, add_special_tokens=False)["input_ids"], text, True)
    expected = words.index(target) if target in words else len(words)
    assert thought_tokens(answer, TOKENIZER, target) == expected


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_thought_tokens_with_pieces_of_words(family: str) -> None:
    tokenizer = make_tokenizer(family)
    text = '{\n "cards": [3, 4],\n "number": [3, 4],\n "formula": "3*4=12",\n}'
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = thought_tokens(Answer(tokens, text, True), tokenizer, '"formula"')
    assert '"formula"' not in tokenizer.decode(tokens[:count])
    assert '"formula"' in tokenizer.decode(tokens[count:]) or '"formula"' in tokenizer.decode(tokens[count - 1 :])
    assert tokenizer.decode(tokens[: count + 1]).startswith(text[: text.index('"formula"') + 1])


def test_hands_are_dealt_out_before_one_comes_again() -> None:
    dealt = [row for update in range(5) for row in draw_hands(20, 8, seed=1, update=update)]
    assert sorted(dealt[:20]) == sorted(dealt[20:]) == list(range(20))
    assert dealt[:20] != dealt[20:]
    assert draw_hands(20, 8, seed=1, update=3) == dealt[24:32]
    assert draw_hands(20, 8, seed=2, update=3) != dealt[24:32]
    with pytest.raises(UserError, match="has no rows"):
        draw_hands(0, 8, seed=1, update=0)


class Deaf(TransformersEngine):
    def swap(self, state_dict: Any) -> None:
        pass


def test_an_engine_with_a_copy_gets_the_weights_and_is_checked() -> None:
    policy = make_model("words", TOKENIZER, seed=2)
    copy = TransformersEngine(make_model("words", TOKENIZER, seed=3), TOKENIZER, 8)
    assert copy.fingerprint() != fingerprint(policy)
    synchronise(copy, policy)
    assert copy.fingerprint() == fingerprint(policy)
    with pytest.raises(UserError, match=r"after swapping in the trained policy .* does not answer with these weights"):
        synchronise(Deaf(make_model("words", TOKENIZER, seed=3), TOKENIZER, 8), policy)
    proof = synchronise(copy, policy)
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(1 + 4e-5)  # about one update: within what rounding explains
    deaf = Deaf(make_model("words", TOKENIZER, seed=2), TOKENIZER, 8)
    synchronise(deaf, policy)
    with pytest.raises(UserError, match="still answers as before"):
        synchronise(deaf, policy, before=proof)
    assert synchronise(copy, policy, before=proof) != proof
    synchronise(Deaf(policy, TOKENIZER, 8), policy)  # around the live module there is nothing to do
