"""Tiny random Llama-3.2-Vision models as folders, under each set of names such a model comes with."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from rlheals.models.checkpoint import quiet_bars
from tests.common import make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 512
CROSSED = (1, 3, 4)
LAYERS = (0, 2, 5)
"""The self-attention layers; the distances between them differ, so that no wrong map looks right."""
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_mllama(*, text_only: bool = False, seed: int = 0, **shape: Any) -> Any:
    """A random Mllama in evaluation mode; its gates are open, so that a cross-attention layer that ran would show."""
    from transformers import MllamaForCausalLM, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "cross_attention_layers": list(CROSSED),
        "rope_parameters": dict(ROPE),
        "rms_norm_eps": 3e-4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # the default spread of 0.02 makes logits so flat that ties are decided by rounding
    }
    text = MllamaTextConfig(**{**sizes, **shape})
    torch.manual_seed(seed)
    if text_only:
        model: Any = MllamaForCausalLM(text)
    else:
        model = MllamaForConditionalGeneration(
            MllamaConfig(
                text_config=text, vision_config=_vision(text, MllamaVisionConfig), image_token_index=VOCABULARY
            )
        )
    for name, tensor in model.named_parameters():
        if tensor.ndim < 2:  # norms are ones and gates zeros when fresh
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def write_mllama(folder: Path, model: Any, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """Write the model as transformers does, with a tokenizer and the files of a processor."""
    with quiet_bars():
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    make_tokenizer("llama", VOCABULARY).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "processor_class": "MllamaProcessor"}))
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "MllamaImageProcessor"}')
    (folder / "LICENSE.txt").write_text("terms")
    return folder


def rename(folder: Path, new_name: Any) -> None:
    """Give every tensor of a folder with one weight file the name that ``new_name`` makes of it; None drops it."""
    state = load_file(folder / "model.safetensors")
    renamed = {name: tensor for old, tensor in state.items() if (name := new_name(old)) is not None}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def in_memory_name(name: str) -> str:
    """The name transformers 5 uses in memory for a tensor it names ``name`` on disk."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def edit_config(folder: Path, change: Any) -> None:
    """Let ``change`` alter the content of ``config.json``."""
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def _vision(text: Any, config: Any) -> Any:
    return config(
        hidden_size=32,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=48,
        vision_output_dim=text.hidden_size,
        image_size=28,
        patch_size=14,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[0],
    )
