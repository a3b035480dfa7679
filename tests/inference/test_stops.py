from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig, RepetitionPenaltyLogitsProcessor

from rlheals.errors import UserError
from rlheals.inference import Sampling, make_engine
from rlheals.inference.choose import penalise
from rlheals.inference.server import ServerEngine
from rlheals.inference.stops import decode, first_stop, just_stopped, make_answers, stop_tokens
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.models import checkpoint
from rlheals.models.checkpoint import generation_config, load_model
from tests.common import make_folder, make_model, make_params, make_tokenizer
from tests.fake_server import running


@cache
def tokenizer(family: str) -> Any:
    return make_tokenizer(family)


@given(st.lists(st.integers(5, 398), min_size=1, max_size=24), st.lists(st.sampled_from("abc]\"' 1\n,{"), max_size=3))
@settings(deadline=None)
def test_a_response_ends_with_the_first_token_that_completes_a_stop_string(ids: list[int], stop: list[str]) -> None:
    speak = tokenizer("llama")
    (answer,) = make_answers(speak, [ids], [[-1.0] * len(ids)], {0}, stop)
    for length in range(1, len(ids) + 1):  # token by token, as an engine would see it
        text = decode(speak, [ids[:length]])[0]
        if any(each in text for each in stop):
            place = first_stop(text, stop)
            assert (answer.token_ids, answer.text, answer.finished) == (ids[:length], text[:place], False)
            assert len(answer.logprobs or []) == length
            return
    assert (answer.token_ids, answer.text) == (ids, decode(speak, [ids])[0])


@given(st.lists(st.integers(5, 398), min_size=1, max_size=30), st.lists(st.text("abc]' 1", min_size=1), min_size=1))
@settings(deadline=None)
def test_the_cheap_check_sees_a_stop_string_when_it_is_new(ids: list[int], stop: list[str]) -> None:
    speak = tokenizer("llama")
    held = [any(each in decode(speak, [ids[:n]])[0] for each in stop) for n in range(len(ids) + 1)]
    for length in range(1, len(ids) + 1):
        if held[length] and not held[length - 1]:
            assert just_stopped(speak, ids[:length], stop)
        if not held[length]:
            assert not just_stopped(speak, ids[:length], stop)


def test_the_end_token_and_its_log_probability_go_together() -> None:
    speak = tokenizer("words")
    seven, end = speak.convert_tokens_to_ids("7"), speak.eos_token_id
    done, cut, stopped = make_answers(
        speak, [[seven, end], [seven, seven], [seven, end]], [[-1.0, -2.0]] * 3, {end}, ()
    )
    assert (done.token_ids, done.finished, done.logprobs) == ([seven], True, [-1.0, -2.0])
    assert (cut.token_ids, cut.finished, cut.logprobs) == ([seven, seven], False, [-1.0, -2.0])
    assert stopped == done
    (stopped,) = make_answers(speak, [[seven, end]], [[-1.0, -2.0]], {end}, ["7"])
    assert (stopped.token_ids, stopped.text, stopped.finished, stopped.logprobs) == ([seven], "", False, [-1.0])


@pytest.mark.parametrize("family", ["llama", "words"])
def test_the_engine_stops_where_the_rule_says(family: str) -> None:
    speak = tokenizer(family)
    engine = TransformersEngine(make_model(family, speak), speak, 8)
    draw = random.Random(0)
    prompts = [[draw.randrange(5, 100) for _ in range(draw.randint(3, 17))] for _ in range(24)]
    whole = engine.generate(prompts, Sampling(24, logprobs=True))
    stop = ("7", "sum", "e")
    stopped = engine.generate(prompts, Sampling(24, logprobs=True, stop=stop))
    ids = [[*answer.token_ids, *([speak.eos_token_id] if answer.finished else [])] for answer in whole]
    expected = make_answers(speak, ids, [answer.logprobs or [] for answer in whole], engine.stop_tokens, stop)
    assert [(a.token_ids, a.text, a.finished) for a in stopped] == [(a.token_ids, a.text, a.finished) for a in expected]
    assert sum(a.token_ids != b.token_ids for a, b in zip(whole, stopped, strict=True)) > 3


def test_the_penalty_is_that_of_hugging_face() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(5, 40), torch.randint(40, (5, 12))
    seen = torch.zeros(5, 40, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    assert torch.equal(penalise(logits, seen, 1.7), expected)
    assert torch.equal(penalise(logits, seen, 1.0), logits)


def test_the_engine_penalises_prompt_and_response() -> None:
    speak = tokenizer("llama")
    model = make_model("llama", speak)
    draw = random.Random(1)
    prompts = [[draw.randrange(5, 100) for _ in range(draw.randint(3, 17))] for _ in range(12)]
    answers = TransformersEngine(model, speak, 5).generate(prompts, Sampling(16, repetition_penalty=1.3))
    plain = TransformersEngine(model, speak, 5).generate(prompts, Sampling(16))
    for prompt, answer in zip(prompts, answers, strict=True):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            repetition_penalty=1.3,
            max_new_tokens=16,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert answer.token_ids == [token for token in out if token not in stop_tokens(model.generation_config, speak)]
    assert [a.token_ids for a in answers] != [a.token_ids for a in plain]


def test_end_tokens_come_from_the_folder_too(tmp_path: Any) -> None:
    folder = make_folder(tmp_path / "m")
    assert stop_tokens(generation_config(folder), tokenizer("llama")) == {tokenizer("llama").eos_token_id}
    GenerationConfig(eos_token_id=[7, 8]).save_pretrained(folder)
    assert stop_tokens(generation_config(folder), tokenizer("llama")) == {7, 8, tokenizer("llama").eos_token_id}


@pytest.mark.parametrize("written", [{}, {"eos_token_id": [3, 9]}, {"eos_token_id": None}, {"do_sample": True}])
def test_without_a_generation_config_the_config_counts_as_for_hugging_face(tmp_path: Any, written: Any) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | written))
    expected = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).generation_config
    assert generation_config(folder) == expected == load_model(folder).generation_config
    assert generation_config(folder).eos_token_id == written.get("eos_token_id", 3)
    del config["eos_token_id"]  # of the config class there is a default, which is not the model's
    (folder / "config.json").write_text(json.dumps(config))
    assert stop_tokens(generation_config(folder), tokenizer("llama")) == {tokenizer("llama").eos_token_id}


def test_all_engines_end_responses_with_the_same_tokens(tmp_path: Any) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [3, 9]}))
    with running() as start:
        server = make_engine(make_params(f"inference.engine={start().url}"), folder)
    here = make_engine(make_params(), folder)
    assert isinstance(server, ServerEngine)
    assert isinstance(here, TransformersEngine)
    # vLLM's engine asks the same function.
    assert here.stop_tokens == server.stop_tokens == stop_tokens(generation_config(folder), here.tokenizer) == {3, 9}


def test_a_loaded_model_has_the_generation_config_that_is_told(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = GenerationConfig(eos_token_id=[5, 6])
    monkeypatch.setattr(checkpoint, "generation_config", lambda path: told)
    assert load_model(make_folder(tmp_path / "m")).generation_config is told


def test_a_composite_config_may_name_end_tokens_for_its_text_model(tmp_path: Any) -> None:
    text = {"model_type": "mllama_text_model", "eos_token_id": [5, 6]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllama", "text_config": text}))
    assert generation_config(tmp_path).eos_token_id == [5, 6]


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("{oops", "generation_config.json is not valid JSON; copy it again"),
        ("[1]", "generation_config.json must hold a JSON object"),
        ('{"eos_token_id": "x"}', "generation_config.json: eos_token_id is 'x', which is no token id"),
        ('{"eos_token_id": [3, true]}', r"eos_token_id is \[3, True\], which is no token id"),
        ('{"eos_token_id": -1}', "eos_token_id is -1, which is no token id"),
        ('{"max_new_tokens": 0}', "generation_config.json holds no readable generation settings .*max_new_tokens"),
    ],
)
def test_a_bad_generation_config_is_told_by_every_engine(tmp_path: Any, written: str, told: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "generation_config.json").write_text(written)
    with pytest.raises(UserError, match=told):
        generation_config(folder)
    for engine in ("transformers", "http://127.0.0.1:9"):
        with pytest.raises(UserError, match=told):
            make_engine(make_params(f"inference.engine={engine}"), folder)
