"""Tiny random models with trained tokenizers and the chat templates of real model families, made on the spot."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.params import Params

CHATML = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# As Llama 3.2 does, today's date goes into the prompt unless the caller fixes one.
LLAMA3 = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
SPECIAL = {
    "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def corpus(rows: int = 300, seed: int = 0) -> list[str]:
    """Texts that look like the prompts and answers of a card game in JSON."""
    draw = random.Random(seed)
    ranks = ["A", *map(str, range(2, 11)), "J", "Q", "K"]
    texts = []
    for _ in range(rows):
        cards = [draw.choice(ranks) for _ in range(4)]
        numbers = [draw.randint(1, 13) for _ in range(4)]
        formula = f"{numbers[0]}*{numbers[1]}-{numbers[2]}+{numbers[3]}=24"
        texts.append(
            "You are an expert 24 points card game player. You will observe four cards. 'J', 'Q', and 'K' count as "
            f"'10'.\n[Cards]: {cards}\nThe response should be a json object:\n{{\n \"cards\": {cards},\n "
            f'"number": {numbers},\n "formula": "{formula}",\n}}\nYou failed this trial because your formula is wrong.'
        )
    return texts


WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "->",
    *map(str, range(100)),
    "sum",
    "of",
    "rule",
    "mod",
    "wrong",
    "again",
    "is",
]


def make_tokenizer(family: str, vocabulary: int = 512) -> Any:
    """A byte-level BPE trained on `corpus` with the family's special tokens and template, or the word-level one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from rlheals.models.tiny import tiny_tokenizer

    if family == "words":
        return tiny_tokenizer(WORDS, pad="<pad>", bos="<s>", eos="</s>", unknown="<unk>")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL[family]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    pad, *_, end = SPECIAL[family]
    bos = pad if family == "llama" else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=end, pad_token=pad)
    tokenizer.chat_template = CHATML if family == "qwen2" else LLAMA3
    return tokenizer


def make_model(family: str, tokenizer: Any, seed: int = 0, **shape: Any) -> Any:
    """A random Llama (for ``llama`` and ``words``) or Qwen2 with a few hundred thousand parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 1024,
        # The default spread of 0.02 makes logits so flat that ties are decided by rounding.
        "initializer_range": 0.2,
        "tie_word_embeddings": family == "qwen2",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **shape,
    }
    torch.manual_seed(seed)
    return (
        Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
        if family == "qwen2"
        else LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    )


def make_folder(path: Path, family: str = "llama", seed: int = 0, **shape: Any) -> Path:
    """Write a tiny random model with its tokenizer as a Hugging Face folder."""
    from rlheals.models.checkpoint import save_model

    tokenizer = make_tokenizer(family)
    save_model(make_model(family, tokenizer, seed, **shape), tokenizer, path)
    return path


def make_params(*overrides: str, preset: str = "mini") -> Params:
    """The params of a preset with ``key=value`` overrides, as `python -m rlheals.profile` would write them."""
    from ruamel.yaml import YAML

    from rlheals.params import parse_params
    from rlheals.profile import render

    return parse_params(YAML(typ="safe").load(render(preset, overrides).text))
