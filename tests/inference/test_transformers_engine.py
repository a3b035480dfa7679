from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch

from rlheals.errors import UserError
from rlheals.inference import Answer, Sampling, make_engine
from rlheals.inference.fingerprint import fingerprint
from rlheals.inference.transformers_engine import TransformersEngine
from tests.common import make_folder, make_model, make_params, make_tokenizer

FAMILIES = ("llama", "qwen2", "words")


@cache
def parts(family: str) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(family)
    return make_model(family, tokenizer), tokenizer


def engine(family: str, batch_size: int = 16) -> TransformersEngine:
    model, tokenizer = parts(family)
    built = TransformersEngine(model, tokenizer, batch_size)
    # A random model hardly ever ends a response; a dozen end tokens make rows finish at different times.
    built.stop_tokens |= set(range(30, 42))
    return built


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, 100) for _ in range(draw.randint(3, 17))] for _ in range(count)]


def one_by_one(model: Any, prompt: list[int], stops: set[int], budget: int) -> list[int]:
    """`generate` of the library on a single, unpadded prompt, end token included."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=budget,
        eos_token_id=sorted(stops),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_one_by_one(family: str) -> None:
    built, asked = engine(family), prompts(24)
    answers = built.generate(asked, Sampling(20))
    assert len({answer.finished for answer in answers}) == 2
    for prompt, answer in zip(asked, answers, strict=True):
        expected = one_by_one(built.model, prompt, built.stop_tokens, 20)
        assert answer.finished == (expected[-1] in built.stop_tokens)
        assert answer.token_ids == (expected[:-1] if answer.finished else expected)
        assert answer.text == built.tokenizer.decode(answer.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(16), Sampling(16, temperature=0.9, seed=3), Sampling(16, temperature=1.2, top_p=0.9, top_k=20)],
)
def test_answers_do_not_depend_on_the_batch_size(family: str, sampling: Sampling) -> None:
    asked = prompts(70)
    results = [engine(family, size).generate(asked, sampling) for size in (1, 7, 64)]
    assert results[0] == results[1] == results[2]


def test_sampled_rows_differ_by_seed_and_row() -> None:
    asked = [prompts(1)[0]] * 8
    first, second = (engine("llama").generate(asked, Sampling(12, temperature=1.0, seed=seed)) for seed in (0, 1))
    assert len({tuple(answer.token_ids) for answer in first + second}) > 12


def test_logprobs_are_the_models_own() -> None:
    built, asked = engine("llama"), prompts(12)
    for answer, prompt in zip(built.generate(asked, Sampling(12, temperature=1.5, logprobs=True)), asked, strict=True):
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids) + answer.finished
        whole = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.inference_mode():
            expected = torch.log_softmax(built.model(whole).logits[0], -1)
        for place, (token, value) in enumerate(zip(answer.token_ids, answer.logprobs, strict=False)):
            assert value == pytest.approx(float(expected[len(prompt) + place - 1, token]), abs=1e-4)


def test_a_prompt_near_the_end_of_the_context_gets_what_fits() -> None:
    tokenizer = make_tokenizer("llama")
    built = TransformersEngine(make_model("llama", tokenizer, max_position_embeddings=20), tokenizer, 4)
    short, long = built.generate([[5] * 3, [6] * 17], Sampling(10))
    assert len(short.token_ids) == 10
    assert len(long.token_ids) == 3
    with pytest.raises(UserError, match=r"prompt 1 has 20 tokens, .* context of 20"):
        built.generate([[5], [6] * 20], Sampling(1))
    with pytest.raises(UserError, match="prompt 0 is empty"):
        built.generate([[]], Sampling(1))
    for token in (-1, len(tokenizer)):
        with pytest.raises(UserError, match=r"prompt 1 holds token ids outside the model's vocabulary"):
            built.generate([[5], [5, token]], Sampling(4))
    with pytest.raises(UserError, match="ask for 1 or more"):
        Sampling(0)


def test_no_prompts_no_answers() -> None:
    assert engine("llama").generate([], Sampling(4)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_swap_gives_the_other_models_answers(family: str) -> None:
    _, tokenizer = parts(family)
    first, second = (make_model(family, tokenizer, seed=seed) for seed in (1, 2))
    live, expected = TransformersEngine(first, tokenizer, 8), TransformersEngine(second, tokenizer, 8)
    before = live.fingerprint()
    assert before != expected.fingerprint()
    live.swap(second.state_dict())
    assert live.fingerprint() == fingerprint(second) != before
    assert live.generate(prompts(8), Sampling(8)) == expected.generate(prompts(8), Sampling(8))


def test_swap_takes_a_tied_state_without_its_head() -> None:
    model, tokenizer = parts("qwen2")
    other = make_model("qwen2", tokenizer, seed=5)
    state = {name: tensor for name, tensor in other.state_dict().items() if name != "lm_head.weight"}
    live = TransformersEngine(make_model("qwen2", tokenizer), tokenizer, 8)
    live.swap(state)
    assert live.fingerprint() == fingerprint(other) != fingerprint(model)


def test_swap_refuses_what_does_not_fit_and_changes_nothing() -> None:
    _, tokenizer = parts("llama")
    live = TransformersEngine(make_model("llama", tokenizer), tokenizer, 8)
    before, other = live.fingerprint(), make_model("llama", tokenizer, seed=3).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    for state, message in (
        ({key: value for key, value in other.items() if key != name}, rf"{name} missing"),
        ({**other, "extra": torch.zeros(1)}, "extra unexpected"),
        ({**other, name: torch.zeros(2, 3)}, r"has shape \[2, 3\], not \[64, 128\]"),
    ):
        with pytest.raises(UserError, match=message):
            live.swap(state)
    assert live.fingerprint() == before


def test_sliding_windows_keep_their_own_cache() -> None:
    tokenizer = make_tokenizer("qwen2")
    window = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]}
    built = TransformersEngine(make_model("qwen2", tokenizer, **window), tokenizer, 4)
    asked = prompts(6)
    for prompt, answer in zip(asked, built.generate(asked, Sampling(12)), strict=True):
        expected = one_by_one(built.model, prompt, built.stop_tokens, 12)
        assert answer.token_ids == (expected[:-1] if answer.finished else expected)


def test_special_tokens_are_left_out_of_the_text() -> None:
    built = engine("qwen2")
    _, tokenizer = parts("qwen2")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    built.model = make_constant(built.model, start)
    assert built.generate([[5, 6]], Sampling(3)) == [Answer([start] * 3, "", False)]


def make_constant(model: Any, token: int) -> Any:
    """A stand-in that always prefers ``token``."""

    class Constant:
        config = model.config

        def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            logits = torch.zeros(len(input_ids), 1, model.config.vocab_size)
            logits[:, :, token] = 1
            return type("Output", (), {"logits": logits})

    return Constant()


def test_engine_factory_names_the_known_engines(tmp_path: Any) -> None:
    folder = make_folder(tmp_path / "model")
    assert make_engine(make_params("compute.device=cpu"), folder).name == "transformers"
    with pytest.raises(UserError, match="'vlm', which is not a known engine; use one of: transformers"):
        make_engine(make_params("inference.engine=vlm"), folder)
