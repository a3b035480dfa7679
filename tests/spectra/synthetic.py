"""Synthetic checkpoint folders of any size: a config, safetensors shards and their index, written shard by shard."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

VOCABULARY = 64
HEADS = 4
KV_HEADS = 2


def write_checkpoint(
    directory: Path,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    seed: int,
    shard_bytes: int,
    dtype: str = "float32",
    change: Callable[[str, Tensor], Tensor] | None = None,
    vocabulary: int = VOCABULARY,
    tied: bool = False,
) -> Path:
    """Write a Llama folder (no tokenizer) and return it; transformers loads it, and no more than a shard is in memory.

    Args:
        directory: made if it is not there.
        layers: decoder layers.
        hidden: width; a multiple of 8, shared by 4 heads, 2 of keys and values.
        intermediate: width of the gated MLP.
        seed: every tensor is drawn from the seed and its own name, so equal seeds give equal tensors whatever the
            other arguments that leave the shape alone.
        shard_bytes: a shard is closed before it would grow past this (a larger tensor has a shard of its own).
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        change: applied to each float32 tensor before it is stored: ``change(name, tensor) -> tensor``; this makes
            the fine-tuned partner of a base of the same seed.
        vocabulary: rows of the embedding and of the head.
        tied: leave the head out and say so in the config.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shapes = llama_shapes(layers, hidden, intermediate, vocabulary, tied)
    stored = getattr(torch, dtype)
    shards = list(_shards(shapes, shard_bytes, stored.itemsize))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensor = trained_like(name, shapes[name], seed)
            tensors[name] = (tensor if change is None else change(name, tensor)).to(stored).contiguous()
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps(_config(layers, hidden, intermediate, vocabulary, tied, dtype)))
    return directory


def llama_shapes(
    layers: int, hidden: int, intermediate: int, vocabulary: int = VOCABULARY, tied: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of such a Llama, in the order of the file."""
    keys = hidden // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        shapes |= {
            f"{stem}.input_layernorm.weight": (hidden,),
            f"{stem}.self_attn.q_proj.weight": (hidden, hidden),
            f"{stem}.self_attn.k_proj.weight": (keys, hidden),
            f"{stem}.self_attn.v_proj.weight": (keys, hidden),
            f"{stem}.self_attn.o_proj.weight": (hidden, hidden),
            f"{stem}.post_attention_layernorm.weight": (hidden,),
            f"{stem}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{stem}.mlp.up_proj.weight": (intermediate, hidden),
            f"{stem}.mlp.down_proj.weight": (hidden, intermediate),
        }
    shapes["model.norm.weight"] = (hidden,)
    return shapes if tied else shapes | {"lm_head.weight": (vocabulary, hidden)}


def trained_like(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Weights whose spectrum decays as a trained model's does, unlike a fresh initialiser's; ones for a norm."""
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    scale = torch.linspace(1.5, 0.1, shape[0])[:, None] * 0.02
    return torch.randn(shape, generator=generator).mul_(scale)


def _shards(shapes: dict[str, tuple[int, ...]], limit: int, itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        bytes_ = torch.Size(shape).numel() * itemsize
        if names and size + bytes_ > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    yield names


def _config(layers: int, hidden: int, intermediate: int, vocabulary: int, tied: bool, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": dtype,
    }
