"""Hand all weights of a model to a live vLLM.

The full state always: of a fused layer (q, k and v; gate and up) vLLM takes a part without an error and goes on with
the old layer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from rlheals.inference.vllm.settings import VllmSettings

SHARED_MEMORY = Path("/dev/shm")
"""Where weights wait for the engine's worker processes; the folder for temporary files where it is missing."""


def push_weights(llm: Any, state_dict: Mapping[str, Tensor], config: Any, settings: VllmSettings) -> None:
    """Make ``llm`` answer with ``state_dict``, which holds every weight of its model."""
    if settings.in_process:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(state_dict.items())})
    else:
        _push_by_file(llm, state_dict)
    if settings.device == "cpu" and settings.in_process and config.get_text_config().tie_word_embeddings:
        # The CPU build packs the head's weights once and would go on with those packed before.
        llm.apply_model(_pack_head)


def _push_by_file(llm: Any, state_dict: Mapping[str, Tensor]) -> None:
    """Tensors cannot be handed to the worker processes of an engine, the path of a file can."""
    from safetensors.torch import save_file

    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="rlheals-weights-", dir=place) as folder:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
        save_file(tensors, Path(folder) / "model.safetensors")
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})


def _pack_head(model: Any) -> None:
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
