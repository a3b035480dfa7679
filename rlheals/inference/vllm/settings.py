"""How a vLLM engine is started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

CPU_BLOCK = 32
"""Tokens of a cache block on a CPU, the smallest its kernels take: short prompts share their beginnings, too."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """What is asked of the engine.

    Attributes:
        dtype: of weights and activations. Always given: left alone, vLLM serves a float32 checkpoint in bfloat16.
        device: ``cpu`` or ``cuda``; must be what the installed build is for.
        max_context: longest conversation in tokens; the model's own context where that is shorter.
        max_sequences: conversations in work at a time; more wait their turn.
        tensor_parallel: GPUs the weights are spread over.
        memory_fraction: share of the device's memory for weights and cache; on a CPU the most the cache may take.
    """

    dtype: str = "float32"
    device: str = "cpu"
    max_context: int = 8192
    max_sequences: int = 256
    tensor_parallel: int = 1
    memory_fraction: float = 0.85

    @property
    def in_process(self) -> bool:
        """Whether the engine lives in this process, so that weights are handed over without a file."""
        return self.tensor_parallel == 1


def environment(settings: VllmSettings) -> dict[str, str]:
    """Variables that must be set before vLLM is imported."""
    variables = {
        # A process of its own costs 10 s of start-up and a copy of every weight that is swapped in.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # At other levels an error prints the whole batch.
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if settings.device == "cpu":
        # Log-probabilities would go through torch.compile, which needs a C++ compiler on the machine; and threads
        # bound to the first cores would meet those of the stage beside this one.
        variables |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    else:
        # Where the card has batch-invariant kernels, answers do not depend on what shares their batch.
        variables["VLLM_BATCH_INVARIANT"] = os.environ.get("VLLM_BATCH_INVARIANT", str(int(_has_invariant_kernels())))
    return variables


def _has_invariant_kernels() -> bool:
    """Whether the first GPU is of compute capability 8.0 or higher, as "Batch Invariance" in vLLM's docs asks."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def arguments(settings: VllmSettings, config: Any, context: int) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``.

    Args:
        settings: what is asked.
        config: the model's Hugging Face config.
        context: longest conversation in tokens.
    """
    common: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": context,
        "max_num_seqs": settings.max_sequences,
        "tensor_parallel_size": settings.tensor_parallel,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
        "generation_config": "vllm",  # no sampling default that we did not choose
        "seed": 0,
    }
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Beside a training of several processes: an engine in each, which must not look for the others.
        common["distributed_executor_backend"] = "external_launcher"
    if settings.device != "cpu":
        return common | {"gpu_memory_utilization": settings.memory_fraction}
    return common | {
        "enforce_eager": True,
        # A seeded request that is split over two prefills kills the CPU engine, so none may be split.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context, 16384),
        "block_size": CPU_BLOCK,
        "kv_cache_memory_bytes": _cache_bytes(settings, config, context),
    }


def _cache_bytes(settings: VllmSettings, config: Any, context: int) -> int:
    """Room for every sequence at its longest, within the share of memory that is allowed, and for one at least."""
    one = cache_bytes_of_one(config, context, 4 if settings.dtype == "float32" else 2)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # One block more than needed: the engine keeps one for itself.
    return max(min((settings.max_sequences + 1) * one, int(settings.memory_fraction * memory)), 2 * one)


def cache_bytes_of_one(config: Any, context: int, element: int) -> int:
    """Bytes of keys and values of one conversation of ``context`` tokens, in whole blocks."""
    text = config.get_text_config()
    blocks = -(-context // CPU_BLOCK)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads  # older configs have one number
    width = int(heads) * head_size(text)
    return 2 * int(text.num_hidden_layers) * width * element * blocks * CPU_BLOCK


def head_size(text: Any) -> int:
    """Width of an attention head of a text model's config; 0 where it has none."""
    heads = getattr(text, "num_attention_heads", None)
    return int(getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0))
