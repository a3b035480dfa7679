"""Generation back-ends behind one contract, `Engine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError
from rlheals.inference.engine import (
    Answer as Answer,
)
from rlheals.inference.engine import (
    Capabilities as Capabilities,
)
from rlheals.inference.engine import (
    Engine as Engine,
)
from rlheals.inference.engine import (
    Sampling as Sampling,
)

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.params import Params

Factory = Callable[["Params", "Path", str], Engine]
SERVER = ("http://", "https://")
"""What ``inference.engine`` begins with when it is the address of a server."""


def _transformers(params: Params, model_dir: Path, dtype: str) -> Engine:
    from rlheals.inference.transformers_engine import TransformersEngine
    from rlheals.models.checkpoint import load_model, load_tokenizer
    from rlheals.stages.common import resolve_device

    device = resolve_device(params.compute.device)
    model, tokenizer = load_model(model_dir, dtype, device), load_tokenizer(model_dir)
    return TransformersEngine(model, tokenizer, params.inference.batch_size, device)


def _vllm(params: Params, model_dir: Path, dtype: str) -> Engine:
    from rlheals.inference.vllm import VllmSettings
    from rlheals.inference.vllm.engine import VllmEngine
    from rlheals.models.checkpoint import load_tokenizer
    from rlheals.stages.common import resolve_device

    inference = params.inference
    settings = VllmSettings(
        dtype=dtype,
        device=resolve_device(params.compute.device),
        max_context=inference.max_context,
        max_sequences=inference.max_sequences,
        tensor_parallel=inference.tensor_parallel,
        memory_fraction=inference.memory_fraction,
    )
    return VllmEngine(model_dir, load_tokenizer(model_dir), settings)


def _server(params: Params, model_dir: Path, dtype: str) -> Engine:
    from rlheals.inference.server import ServerEngine
    from rlheals.models.checkpoint import load_tokenizer

    return ServerEngine(params.inference.engine, model_dir, load_tokenizer(model_dir), params.inference.max_sequences)


ENGINES: dict[str, Factory] = {"transformers": _transformers, "vllm": _vllm}


def factory_of(name: str) -> Factory | None:
    """What starts the engine ``name``, a key of `ENGINES` or the address of a server; None for anything else."""
    return _server if name.startswith(SERVER) else ENGINES.get(name)


def known_engines() -> str:
    """The values ``inference.engine`` may have, for messages."""
    return f"{', '.join(sorted(ENGINES))}, or the address of a server such as http://localhost:8000/v1"


def make_engine(params: Params, model_dir: Path, dtype: str = "float32", **changes: Any) -> Engine:
    """The back-end named by ``inference.engine``, serving the model in ``model_dir`` with weights of ``dtype``.

    Args:
        params: the whole of params.yaml.
        model_dir: Hugging Face folder.
        dtype: ``float32`` or ``bfloat16``.
        changes: keys of the block ``inference`` that are to be other than in params.

    Raises:
        UserError: no such back-end, it cannot serve the model, or the folder does not load.
    """
    params = params.model_copy(update={"inference": params.inference.model_copy(update=changes)})
    factory = factory_of(params.inference.engine)
    if factory is None:
        raise UserError(
            f"inference.engine is {params.inference.engine!r}, which is not a known engine; use one of: "
            f"{known_engines()}."
        )
    return factory(params, model_dir, dtype)
