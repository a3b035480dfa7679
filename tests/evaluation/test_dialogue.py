from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.evaluation.dialogue import FIXED_DATE, Dialogue
from tests.common import make_tokenizer

FAMILIES = ("llama", "qwen2", "words")


@cache
def dialogue(family: str) -> Dialogue:
    return Dialogue(make_tokenizer(family))


def whole_chat(tokenizer: Any, *turns: str, prompt: bool) -> list[int]:
    messages = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=prompt, date_string=FIXED_DATE, return_dict=False
    )


texts = {
    "words": st.lists(st.sampled_from(["1", "2", "3", "7", "42", "sum", "of", "wrong", "again", "is"]), min_size=1).map(
        " ".join
    ),
    "bpe": st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1).filter(
        lambda text: text == text.strip() != ""
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_appending_gives_the_tokens_of_the_whole_chat(family: str, data: st.DataObject) -> None:
    speak, text = dialogue(family), texts["words" if family == "words" else "bpe"]
    first, answer, feedback = data.draw(text), data.draw(text), data.draw(text)
    row = speak.encode([(first, answer)])[0]
    assert row.prompt == speak.prompt_ids(first)
    assert row.completion[-1] == speak.tokenizer.eos_token_id
    grown = row.prompt + row.completion[:-1] + speak.continuation_ids(feedback)
    assert grown == whole_chat(speak.tokenizer, first, answer, feedback, prompt=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_response_is_ended_by_the_continuation(family: str) -> None:
    speak = dialogue(family)
    assert speak.continuation_ids("again")[0] == speak.tokenizer.eos_token_id


def test_the_completion_stops_at_the_end_token() -> None:
    speak = dialogue("qwen2")
    assert speak.tokenizer.decode(speak.encode([("4 cards", "a formula")])[0].completion) == "a formula<|im_end|>"


def test_the_date_in_a_template_is_fixed() -> None:
    speak = dialogue("llama")
    assert f"Today Date: {FIXED_DATE}" in speak.tokenizer.decode(speak.prompt_ids("4 cards"))


def test_a_response_that_mentions_an_end_token_ends_at_the_last_one() -> None:
    speak = dialogue("words")
    completion = speak.encode([("sum of 1", "3 </s> 4")])[0].completion
    assert speak.tokenizer.decode(completion) == "3 </s> 4 </s>"


REWRITES = "{%- if messages|length > 1 %}{{- 'long ' }}{%- endif %}"
BREAKS_BOUNDARY = (
    "{%- for message in messages %}{{- message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{- '<|im_end|>' }}{%- endif %}{%- endfor %}"
)


def tokenizer_with(template: str) -> Any:
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = template
    return tokenizer


def test_templates_that_rewrite_the_past_are_refused() -> None:
    with pytest.raises(UserError, match=r"chat template of the tokenizer .* does not keep the beginning of a chat"):
        Dialogue(tokenizer_with(REWRITES + make_tokenizer("qwen2").chat_template))


def test_rows_whose_tokens_merge_across_the_boundary_are_refused() -> None:
    speak = Dialogue(tokenizer_with(BREAKS_BOUNDARY))
    with pytest.raises(UserError, match="does not keep the beginning"):
        speak.encode([("the for", "mula")])


def test_a_template_without_the_end_token_is_refused() -> None:
    tokenizer = make_tokenizer("qwen2")
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(UserError, match=r"does not end a response with the tokenizer's end token '<.endoftext.>'"):
        Dialogue(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] ",
        "{{ raise_exception('the system role is not supported') }}",
        "{{ messages | no_such_filter }}",
        "{% if messages | length > 1 %}{{ 1 / 0 }}{% endif %}{{ messages[0]['content'] }}",
    ],
)
def test_templates_that_fail_are_one_sentence(template: str) -> None:
    with pytest.raises(UserError, match=r"cannot write a chat of \d turns .* repair chat_template.jinja"):
        Dialogue(tokenizer_with(template))
