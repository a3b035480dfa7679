"""Edits on a live model: the tensors of a cell go in, the target's own come back, nothing is loaded or written.

A parameter is pointed to the edited tensor and later back to its own memory, which has not been written to: no weight
is copied either way. What is live afterwards is read once and compared with a checksum of the target's file. Engines
whose model cannot be reached are edited by `rlheals.restoration.served`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rlheals.errors import UserError
from rlheals.restoration.checksum import checksum

if TYPE_CHECKING:
    from torch import Tensor

    from rlheals.spectra.reader import Weights


class FileState(Mapping[str, "Tensor"]):
    """The full state of a model folder, read tensor by tensor as it is asked for."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._weights.shapes:
            raise KeyError(name)
        return self._weights.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.shapes)

    def __len__(self) -> int:
        return len(self._weights.shapes)


class Holder(Protocol):
    """What has a model in this process: an engine around one, or `rlheals.restoration.served.Held`."""

    model: Any

    def swap(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take all weights."""
        ...


class Editable(ABC):
    """A target that is live, and at most one edit of it at a time."""

    @abstractmethod
    def apply(self, changes: Mapping[str, Tensor]) -> int:
        """Make these tensors live and return how many bytes of weights they are."""

    @abstractmethod
    def revert(self) -> None:
        """Take the edit back."""

    @abstractmethod
    def settle(self) -> None:
        """Make sure that the target answers."""

    @contextmanager
    def edited(self, changes: Mapping[str, Tensor]) -> Iterator[int]:
        """`apply` for the length of a ``with`` block, and `revert` at its end, come what may.

        Raises:
            UserError: see `apply` and `revert`.
        """
        try:
            yield self.apply(changes)
        finally:
            self.revert()


class LiveModel(Editable):
    """One target in a live model, and at most one edit of it at a time.

    The model holds the target's weights whenever no edit is applied.
    """

    def __init__(self, engine: Holder, target: Mapping[str, Tensor]) -> None:
        """Give the model the target's weights.

        Args:
            engine: what holds the model.
            target: full state of the target by name; read again, tensor by tensor, for checksums.

        Raises:
            UserError: the state does not fit the model.
        """
        self._target = target
        self._checksums: dict[str, bytes] = {}
        self._kept: dict[str, Tensor] = {}
        self._edited = False
        engine.swap(target)
        self._parameters: dict[str, Any] = dict(engine.model.named_parameters(remove_duplicate=False))

    def apply(self, changes: Mapping[str, Tensor]) -> int:
        """Make these tensors live and return how many bytes of weights they are; the caller must not write to them.

        Names of tied weights stand for one tensor, which changes under both.

        Raises:
            UserError: an edit is applied already, or a tensor is unknown or has another shape.
        """
        if self._edited:
            raise UserError("an edit is live already; revert it before the next one is applied.")
        for name, tensor in changes.items():
            self._check(name, tensor)
        self._edited = True
        size, seen = 0, set()
        for name, tensor in changes.items():
            parameter = self._parameters[name]
            if id(parameter) in seen:  # another name of a tied tensor
                continue
            seen.add(id(parameter))
            self._checksum_of_target(name)
            self._kept[name] = parameter.data
            parameter.data = tensor.to(parameter).contiguous()
            size += parameter.nbytes
        return size

    def revert(self) -> None:
        """Make the target live again.

        Raises:
            UserError: what is live then is not the target, bit for bit; the engine must not be used any more.
        """
        if not self._edited:
            return
        self._edited = False
        kept, self._kept = self._kept, {}
        for name, data in kept.items():
            self._parameters[name].data = data
        for name in kept:
            if checksum(self._parameters[name]) != self._checksums[name]:
                raise not_reverted(f"tensor {name} is not the target's")

    def settle(self) -> None:
        """Nothing: after `revert` the target answers."""

    def _check(self, name: str, tensor: Tensor) -> None:
        known = self._parameters
        if name not in known:
            raise UserError(f"the live model has no tensor {name}; edit a model of the same architecture.")
        if known[name].shape != tensor.shape:
            raise UserError(
                f"tensor {name} is {list(known[name].shape)} in the live model, its edit is {list(tensor.shape)}; "
                "edit a model of the same architecture."
            )

    def _checksum_of_target(self, name: str) -> bytes:
        """Checksum of the target's tensor with the live model's type; where its file ties it away, of the live one."""
        if name not in self._checksums:
            live = self._parameters[name]
            stored = self._target[name].to(live.dtype) if name in self._target else live.data
            self._checksums[name] = checksum(stored)
        return self._checksums[name]


def not_reverted(reason: str) -> UserError:
    """The error to raise for an engine that did not return to its target."""
    return UserError(
        f"after the edit was taken back the engine does not hold the target's weights: {reason}. Its answers cannot be "
        "trusted; run again, and choose another engine (inference.engine) if it happens again."
    )
