"""Generation back-ends behind one contract, `Engine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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


def _transformers(params: Params, model_dir: Path, dtype: str) -> Engine:
    from rlheals.inference.transformers_engine import TransformersEngine
    from rlheals.models.checkpoint import load_model, load_tokenizer
    from rlheals.stages.common import resolve_device

    device = resolve_device(params.compute.device)
    model, tokenizer = load_model(model_dir, dtype, device), load_tokenizer(model_dir)
    return TransformersEngine(model, tokenizer, params.inference.batch_size, device)


ENGINES: dict[str, Factory] = {"transformers": _transformers}


def make_engine(params: Params, model_dir: Path, dtype: str = "float32") -> Engine:
    """The back-end named by ``inference.engine``, serving the model in ``model_dir`` with weights of ``dtype``.

    Raises:
        UserError: no such back-end, or the folder does not load.
    """
    name = params.inference.engine
    if name not in ENGINES:
        raise UserError(
            f"inference.engine is {name!r}, which is not a known engine; use one of: {', '.join(sorted(ENGINES))}."
        )
    return ENGINES[name](params, model_dir, dtype)
