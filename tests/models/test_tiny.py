from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlheals.models.tiny import tiny_llama, tiny_tokenizer
from rlheals.params import Architecture

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "->", "a", "b"]
SHAPE = Architecture(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=96, max_position_embeddings=64)


def tokenizer():
    return tiny_tokenizer(WORDS, pad="<pad>", bos="<bos>", eos="<eos>", unknown="<unk>")


def test_conversation_is_one_flat_word_sequence():
    chat = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "no-such-word a"},
    ]
    ids = tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer().convert_ids_to_tokens(ids) == [
        "<bos>", "a", "b", "->", "b", "<eos>", "<unk>", "a", "->",
    ]  # fmt: skip


def test_saved_folder_loads_as_an_ordinary_model(tmp_path: Path):
    torch.manual_seed(0)
    model = tiny_llama(SHAPE, tokenizer()).eval()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    inputs = torch.tensor([AutoTokenizer.from_pretrained(tmp_path).encode("a b ->")])
    assert torch.equal(model(inputs).logits, loaded(inputs).logits)
    assert loaded.config.vocab_size == 32
    assert loaded.get_input_embeddings().weight.data_ptr() != loaded.get_output_embeddings().weight.data_ptr()
