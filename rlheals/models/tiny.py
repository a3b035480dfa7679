"""The tiny base model: a real `LlamaForCausalLM` with a word-level `PreTrainedTokenizerFast`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from rlheals.params import Architecture

# Rounding the embedding up to a multiple of 32 keeps matrix kernels on their fast path.
_VOCABULARY_MULTIPLE = 32

# The prompt ends in "->", so a conversation is one flat word sequence: bos, prompt, ->, response, eos, feedback, ->, …
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {{ message['content'] }} {{ eos_token }}"
    "{% else %} {{ message['content'] }} ->{% endif %}"
    "{% endfor %}"
)


def tiny_tokenizer(words: Sequence[str], *, pad: str, bos: str, eos: str, unknown: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word, words separated by white space; ids follow the order of ``words``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(shape: Architecture, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised float32 Llama of the given shape for the tokenizer's vocabulary.

    The head is untied, so that embedding and head can drift apart, and in-place weight swaps stay exact on engines
    that pack the head.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    size = -(-len(tokenizer) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_position_embeddings,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
