"""Tiny random models of the causal language models of the installed transformers, whatever their family."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

LARGEST = 12_000_000
"""Parameters of the largest model that is built."""
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_head_dim", "head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    "vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
}
_LARGE = "its other parts have sizes of their own, with more parameters than a test should build"
_COMPOSITE = "it needs the configs of its parts"
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(("blt", "gemma3", "gemma4", "gemma4_text", "git", "got_ocr2", "longcat_flash"), _LARGE),
    **dict.fromkeys(("phi4_multimodal", "roc_bert", "xlm"), _LARGE),
    **dict.fromkeys(("musicgen", "musicgen_melody", "gemma4_assistant", "gemma4_unified_assistant"), _COMPOSITE),
    **dict.fromkeys(("cohere_compass_text", "gemma3n_text", "olmo_hybrid"), "two layers are fewer than its pattern"),
    "dbrx": "its default config lacks a rotary base",
    "gemma3n": "its vision part needs the package timm",
    "lfm2_moe": "its default config has no kinds of layers",
    "mamba2": "its width has to be heads times head size",
    "reformer": "its default config is no decoder",
}
"""Model types that this release cannot build as a tiny model from sizes alone, with the reason."""
NOT_LOADED: dict[str, str] = {
    **dict.fromkeys(("emu3", "mllama"), "what is saved is the text model, whose type has no causal language model"),
    "gemma4_unified": "its saved config is refused by its own class when there are only two layers",
}
"""Model types whose saved folder transformers itself does not load, with the reason."""


def kinds() -> dict[str, str]:
    """Every model type that transformers loads as a causal language model, with the class it builds."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str) -> Any:
    """The family's own config with small sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    make = CONFIG_MAPPING[kind]
    whole = make()
    text = whole.get_text_config()
    sizes = {key: value for key, value in _SIZES.items() if key in text.to_dict()} | _SPECIAL.get(kind, {})
    layers = getattr(text, "layer_types", None)
    if text is whole:
        try:
            return make(**sizes | ({} if layers is None else {"layer_types": layers[:2]}))
        except AttributeError:  # a family that derives the kinds of its layers
            return make(**sizes)
    for key, value in sizes.items():
        setattr(text, key, value)
    if layers is not None:
        text.layer_types = layers[:2]
    return whole


def tiny_model(kind: str, seed: int = 0) -> Any:
    """A random model of the family.

    Raises:
        ValueError: it would be larger than `LARGEST`; families raise many other types where small sizes do not fit.
    """
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tiny_config(kind)
        with torch.device("meta"):
            size = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{size / 1e6:.0f} M parameters")
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def builds(kind: str) -> bool:
    """Whether `tiny_model` can build a kind; families raise whatever they like where they cannot."""
    try:
        tiny_model(kind)
    except Exception:
        return False
    return True


def write_tiny(kind: str, folder: Path, seed: int = 0) -> Path:
    """A folder that `tiny_model` saved."""
    from rlheals.models.checkpoint import quiet_library

    with quiet_library():
        tiny_model(kind, seed).save_pretrained(folder)
    return folder


def tuned(base: Path, folder: Path, only: Callable[[str], bool] = lambda _: True, seed: int = 1) -> Path:
    """A copy of a folder whose tensors moved by a fifth of their norm: by rank 4 where they are matrices."""
    folder.mkdir(parents=True)
    for file in base.iterdir():
        if file.suffix == ".safetensors":
            state = {name: _moved(name, t, seed) if only(name) else t for name, t in load_file(file).items()}
            save_file(state, folder / file.name, metadata={"format": "pt"})
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _moved(name: str, tensor: Tensor, seed: int) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    if tensor.ndim < 2:
        change = torch.randn(tensor.shape, generator=generator)
    else:
        left = torch.randn(*tensor.shape[:-1], 4, generator=generator)
        right = torch.randn(*tensor.shape[:-2], 4, tensor.shape[-1], generator=generator)
        change = left @ right
    # Each matrix of a stack by itself, so that every one of them has moved by exactly a fifth.
    axes = tuple(range(max(0, tensor.ndim - 2), tensor.ndim))
    size = tensor.double().norm(dim=axes, keepdim=True) / change.double().norm(dim=axes, keepdim=True)
    return (tensor.double() + 0.2 * size * change.double()).to(tensor.dtype)
