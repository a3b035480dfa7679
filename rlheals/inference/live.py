"""Make an engine answer with the weights of a model, and prove that it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError
from rlheals.inference.fingerprint import Proof, check_fingerprint, fingerprint, gap, rounding

if TYPE_CHECKING:
    from rlheals.inference.engine import Engine


def serve(engine: Engine, model: Any, where: str, dtype: str = "float32", before: Proof | None = None) -> Proof:
    """Swap the weights of ``model`` in where the engine can, and compare what both say about the sentinels.

    Args:
        engine: the live engine.
        model: Hugging Face model with the weights; it must not change before the next swap.
        where: names them in messages.
        dtype: of the engine's weights.
        before: what `serve` returned for the weights the engine has; then even a small change must show.

    Returns:
        What both say now.

    Raises:
        UserError: the engine does not answer with these weights, or the state does not fit it.
    """
    if not engine.capabilities.swap:
        return _check_served(engine, model, where, dtype)
    engine.swap(model.state_dict())
    return prove(engine, model, where, dtype, before)


def prove(engine: Engine, model: Any, where: str, dtype: str = "float32", before: Proof | None = None) -> Proof:
    """Compare what an engine that was given the weights of ``model`` and the model say about the sentinels.

    Arguments and result are those of `serve`.

    Raises:
        UserError: the engine does not answer with these weights.
    """
    proof = Proof(engine.fingerprint(), fingerprint(model))
    check_fingerprint(proof, where, dtype, before)
    return proof


def _check_served(engine: Engine, model: Any, where: str, dtype: str) -> Proof:
    """Whether an engine whose weights cannot be changed holds those of ``model``."""
    proof = Proof(engine.fingerprint(), fingerprint(model))
    off = gap(*proof)
    if not off < rounding(proof.expected, dtype):
        raise UserError(
            f"{engine.name} serves other weights than {where} (sentinel log-probabilities differ by {off:.3g} on "
            f"average), and its weights cannot be swapped; serve this folder in {dtype}, or use an engine that can "
            "swap (inference.engine: vllm or transformers)."
        )
    return proof
