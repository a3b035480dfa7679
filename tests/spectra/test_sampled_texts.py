"""Texts sampled with a cache: the tokens of the plain loop, at the cost of one forward a token, for every class."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GenerationConfig,
    GPT2Config,
    MambaConfig,
    Qwen3NextConfig,
    RwkvConfig,
)

from rlheals.models.checkpoint import load_model
from rlheals.spectra import sampled_texts
from rlheals.spectra.function_question import prompts_of
from rlheals.spectra.results import ResultCache
from rlheals.spectra.sampled_texts import TEXTS, TOKENS, first_token, sample, sample_texts, start_of
from rlheals.spectra.settings import DiagnoseSettings
from tests.common import make_folder, make_model, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


def by_hand(model: Any, first: int, seed: int, texts: int = TEXTS, tokens: int = TOKENS) -> list[list[int]]:
    """Every text run anew for each token, all logits of all places."""
    ids, generator = torch.full((texts, 1), first), torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        while ids.shape[1] < tokens:
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    rows: list[list[int]] = ids.tolist()
    return rows


@pytest.fixture
def llama() -> Any:
    return make_model("llama", make_tokenizer("llama"))


class Counter:
    """Counts the tokens that a model is run on, and the logits that it makes."""

    def __init__(self, model: Any) -> None:
        self.tokens = self.largest = 0
        model.register_forward_hook(self.count, with_kwargs=True)

    def count(self, _: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else None)
        self.tokens += ids.numel()
        self.largest = max(self.largest, output.logits.numel())


def test_the_tokens_are_those_of_the_plain_loop_at_one_forward_each(llama: Any) -> None:
    expected = by_hand(llama, 5, seed=3)
    counter = Counter(llama)
    assert sample(llama, 5, seed=3) == expected
    assert counter.tokens == TEXTS * (TOKENS - 1) + sampled_texts.CHECKED * TOKENS
    vocabulary = llama.config.vocab_size
    assert counter.largest <= max(TEXTS, sampled_texts.CHECKED * TOKENS) * vocabulary
    assert sample(llama, 5, seed=4) != expected
    assert {row[0] for row in expected} == {5}


def test_what_a_folder_says_of_sampling_does_not_shape_the_texts(llama: Any) -> None:
    expected = by_hand(llama, 5, seed=3)
    llama.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, repetition_penalty=3.0, eos_token_id=expected[0][3], max_length=9
    )
    state = torch.random.get_rng_state()
    assert sample(llama, 5, seed=3) == expected
    assert torch.equal(torch.random.get_rng_state(), state)


CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=64),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4),
    "rwkv": RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, attention_hidden_size=32, context_length=64),
    "linear attention": Qwen3NextConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        layer_types=["linear_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=16,
    ),
}
"""Other positions, recurrent states, and a cache that the library's decoder cannot ask for its length."""


@pytest.mark.parametrize("kind", CONFIGS)
def test_classes_of_other_kinds_write_texts_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_texts, "TEXTS", 3)
    monkeypatch.setattr(sampled_texts, "TOKENS", 10)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    assert sample(model, 1, seed=2) == by_hand(model, 1, 2, texts=3, tokens=10)


def test_a_cache_that_changes_the_numbers_is_not_used(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_hand(llama, 5, seed=3)
    original = llama.prepare_inputs_for_generation

    def forgetful(input_ids: Any, *arguments: Any, **options: Any) -> Any:
        return original(input_ids, *arguments, **options) | {"past_key_values": None, "position_ids": None}

    monkeypatch.setattr(llama, "prepare_inputs_for_generation", forgetful)
    assert sample(llama, 5, seed=3) == expected


def test_a_short_context_bounds_the_texts(llama: Any) -> None:
    for context, length in ((7, 7), (1, 1), (-1, TOKENS)):
        llama.config.max_position_embeddings = context
        assert {len(row) for row in sample(llama, 5, seed=0)} == {length}


def test_a_folder_without_a_tokenizer_writes_texts(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    model = load_model(folder)
    assert start_of(folder) == model.config.bos_token_id
    assert sample_texts(folder, start_of(folder), 0, "cpu") == by_hand(model, model.config.bos_token_id, seed=0)


def test_texts_are_sampled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, settings = make_folder(tmp_path / "m"), DiagnoseSettings(nulls=0)
    first = prompts_of(folder, None, settings, ResultCache(tmp_path))
    again = ResultCache(tmp_path)
    monkeypatch.setattr(sampled_texts, "sample_texts", lambda *_: pytest.fail("sampled again"))
    assert prompts_of(folder, None, settings, again) == first
    assert (again.computed, again.hits) == (0, 1)
    monkeypatch.setattr(sampled_texts, "sample_texts", lambda *_: [[1]])
    assert prompts_of(folder, None, replace(settings, seed=1), again) == {"sampled from base": [[1]]}
    monkeypatch.setattr(sampled_texts, "start_of", lambda _: 7)
    assert prompts_of(folder, None, settings, again) == {"sampled from base": [[1]]}


class Talker:
    """A tokenizer of words, with a template that writes ``opening`` before and ``end`` after each message."""

    def __init__(self, opening: str, end: str, **tokens: int) -> None:
        self.opening, self.end, self.chat_template = opening, end, "a template"
        self.unk_token_id, self.pad_token_id = tokens.get("unk"), tokens.get("pad")

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return "<s> " + " ".join(f"{self.opening} {m['content']} {self.end}" for m in messages)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        known = {"<s>": 1, "<|im_start|>": 2, "<|im_end|>": 3, "<|endoftext|>": 4}
        return {"input_ids": [known.get(word, 9) for word in text.split()]}


def config(**tokens: object) -> Any:
    found = SimpleNamespace(vocab_size=10, **{f"{name}_token_id": token for name, token in tokens.items()})
    found.get_text_config = lambda: found
    return found


def test_texts_start_where_a_text_starts_and_not_with_a_chat_marker() -> None:
    chat = ("<|im_start|>", "<|im_end|>")
    assert first_token(config(bos=2, eos=3, pad=3)) == 2, "nothing tells that it is a marker"
    assert first_token(config(bos=2, eos=3, pad=3), Talker(*chat, unk=4)) == 4
    assert first_token(config(bos=2, eos=3, pad=4), Talker(*chat)) == 4
    assert first_token(config(bos=2, eos=3, pad=None), Talker(*chat)) == 0
    assert first_token(config(bos=1, eos=3), Talker(*chat)) == 1, "the template writes it once"
    assert first_token(config(bos=None, eos=[4, 3]), Talker(*chat)) == 4
    assert first_token(config(bos=None, eos=None)) == 0
    assert first_token(config(bos=-1, eos=10, pad=True)) == 0, "no tokens of this vocabulary"


def test_a_template_that_raises_tells_no_marker() -> None:
    talker = Talker("<|im_start|>", "<|im_end|>")
    talker.apply_chat_template = None  # type: ignore[assignment,method-assign]
    assert first_token(config(bos=2, eos=3), talker) == 2


def test_the_first_token_of_real_templates() -> None:
    for family, wanted in (("llama", "<|begin_of_text|>"), ("qwen2", "<|endoftext|>"), ("words", "<s>")):
        tokenizer = make_tokenizer(family)
        ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", wanted)}
        begin = ids["<|im_start|>"] if family == "qwen2" else tokenizer.bos_token_id
        names = SimpleNamespace(vocab_size=len(tokenizer), bos_token_id=begin, eos_token_id=tokenizer.eos_token_id)
        names.pad_token_id, names.get_text_config = tokenizer.pad_token_id, lambda names=names: names
        assert first_token(names, tokenizer) == ids[wanted], family
