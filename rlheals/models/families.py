"""What the families of decoders call their parts: the tables by which `rlheals.models.topology` reads a checkpoint.

A decoder keeps its layers as ``<stem>.<number>.<path>``, and a two-dimensional ``weight`` in a layer is a linear map.
So one rule reads most families, and the tables here hold only what names and shapes do not say: which part of the
network a block is, which tables lie outside the layers, which tensors are stacks of matrices, and which are stored
with their inputs as rows. They were read off the model classes of transformers 5.17.
"""

from __future__ import annotations

from typing import Any

KEYS: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "embedding_dim"),
}
"""The names that one setting has in the configs of different families, the commonest first."""

BLOCKS: dict[str, str] = {
    **dict.fromkeys(("self_attn", "attn", "attention", "self_attention", "multi_head_attention"), "self_attention"),
    **dict.fromkeys(("linear_attn", "rel_attn", "mlstm_layer", "temporal_block"), "self_attention"),
    **dict.fromkeys(("mamba", "mixer", "conv", "short_conv"), "mixer"),
    **dict.fromkeys(("cross_attn", "encoder_attn", "crossattention"), "cross_attention"),
    **dict.fromkeys(("mlp", "ffn", "feed_forward", "mlp_block", "block_sparse_moe", "shared_mlp", "ff"), "mlp"),
    **dict.fromkeys(("fc1", "fc2", "intermediate", "output"), "mlp"),
}
"""Kind of the part that a block's name stands for; the first name of a path that is here decides."""
EXPERTS = "experts"
"""The name under which mixtures of experts keep their experts, as modules of their own or stacked."""
EXPERT = "expert"

EMBEDDINGS: dict[str, str] = {
    **dict.fromkeys(("embed_tokens", "wte", "word_embeddings", "word_embedding", "embed_in"), "embedding"),
    **dict.fromkeys(("tok_embeddings", "tokens_embed", "embeddings"), "embedding"),
    **dict.fromkeys(("embed_positions", "wpe", "position_embeddings", "positions_embed"), "positions"),
    "token_type_embeddings": "positions",
    **dict.fromkeys(("lm_head", "embed_out", "head"), "head"),
}
"""Kind of a table outside the layers, by its module's name."""
OUTSIDE = ("embedding", "positions", "head")
"""Kinds that lie outside the layers: they have no layer, and a selection by layers does not concern them."""

_STACKED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "input_linear", "output_linear", "fc1", "fc2")
_INPUTS_FIRST_STACKS = {"aria", "aria_text", "gpt_oss", "llama4", "llama4_text"}
_INPUTS_FIRST = {"gpt2", "gpt-sw3", "openai-gpt", "decision_transformer"}

GAUGED = frozenset({
    "cohere", "cohere2", "cwm", "emu3", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "granite", "helium", "hunyuan_v1_dense", "hyperclovax", "llama", "ministral", "ministral3", "mistral", "mllama",
    "mllama_text_model", "olmo", "olmo2", "olmo3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "vaultgemma",
})  # fmt: skip
"""Families whose attention and gated MLP are Llama's, so that it is known which changes of them do nothing."""
PLAIN_ATTENTION = frozenset({"llama", "mistral", "mllama", "mllama_text_model", "qwen2", "qwen3"})
"""Families whose q, k and v projections hold exactly heads × head size rows, so that a wrong config can be told."""
NEIGHBOURS = frozenset({"cohere", "cohere2", "ernie4_5", "glm", "glm4", "helium"})
"""Families that rotate neighbouring dimensions (2i, 2i + 1) together; all others pair i with i + half."""


def setting(config: dict[str, Any], key: str) -> Any:
    """The value of ``key`` under the first of its names that ``config`` has and that is not null, else None."""
    return next((config[name] for name in KEYS.get(key, (key,)) if config.get(name) is not None), None)


def block_kind(path: list[str]) -> str | None:
    """What part of a layer a module is, from its path within the layer; None where no name is known.

    >>> block_kind(["block_sparse_moe", "experts", "w1"]), block_kind(["attn", "c_proj"]), block_kind(["norm"])
    ('expert', 'self_attention', None)
    """
    kind = next((BLOCKS[name] for name in path if name in BLOCKS), None)
    return EXPERT if EXPERTS in path and kind in (None, "mlp") else kind


def is_stack(path: list[str], shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds one matrix an expert below each other, (experts, rows, columns)."""
    names = path[:-1] if path[-1] == "weight" else path
    inside = any(name in (EXPERTS, "shared_experts", "block_sparse_moe", "mlp") for name in names[:-1])
    return len(shape) == 3 and min(shape[1:]) > 1 and inside and names[-1] in _STACKED


def inputs_first(family: str, *, stacked: bool) -> bool:
    """Whether a family stores a layer's matrices as (inputs, outputs) where others have (outputs, inputs)."""
    return family in (_INPUTS_FIRST_STACKS if stacked else _INPUTS_FIRST)
