"""Edits on an engine whose model cannot be reached, such as vLLM: made in a copy of the model, then pushed.

Every push is the full state and is proved by the sentinels, which the copy scores with the same edit. Taking an edit
back restores the copy at once, checked bit for bit; the engine gets the target together with the next edit, or when the
target itself is asked for. So a cell costs one push, not two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlheals.inference.live import serve
from rlheals.restoration.live import Editable, LiveModel, not_reverted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from rlheals.inference import Engine


class Held:
    """A model that has the target's weights already, for `LiveModel`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def swap(self, state_dict: Mapping[str, Tensor]) -> None:
        """Nothing to do; `LiveModel.revert` compares with the state it was told."""


class ServedModel(Editable):
    """One target behind an engine, and at most one edit of it at a time; the twin of `LiveModel`."""

    def __init__(self, engine: Engine, target: Mapping[str, Tensor], model: Any, dtype: str = "float32") -> None:
        """Give the engine the target's weights.

        Args:
            engine: any engine that can swap.
            target: full state of the target by name, for checksums.
            model: the copy: a Hugging Face model with the target's weights.
            dtype: of the engine's weights.

        Raises:
            UserError: the state does not fit the engine's model, or does not reach it.
        """
        self._engine, self._model, self._dtype = engine, model, dtype
        self._copy = LiveModel(Held(model), target)
        self._proof = serve(engine, model, "the unedited target", dtype)
        self._unedited = self._proof
        self._behind = False

    def apply(self, changes: Mapping[str, Tensor]) -> int:
        """Make these tensors live and return how many bytes of weights they are.

        Raises:
            UserError: see `LiveModel.apply`, or the engine does not answer with the edit.
        """
        size = self._copy.apply(changes)
        self._behind = True
        self._push("an edited model")
        return size

    def revert(self) -> None:
        """Take the edit back; the engine follows with the next `apply` or `settle`.

        Raises:
            UserError: the copy is not the target any more, bit for bit.
        """
        self._copy.revert()

    def settle(self) -> None:
        """Make the engine answer with the target.

        Raises:
            UserError: the sentinels do not get the very numbers they had before the first edit.
        """
        if self._behind:
            self._push("the unedited target")
            self._behind = False
            if self._proof != self._unedited:
                raise not_reverted("its sentinel log-probabilities differ from those before the edit")

    def _push(self, where: str) -> None:
        self._proof = serve(self._engine, self._model, where, self._dtype, before=self._proof)
