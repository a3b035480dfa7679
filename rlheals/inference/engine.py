"""The contract every generation back-end meets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 switch the filters off.

    With ``temperature`` > 0, row i of a `generate` call draws from its own stream seeded by ``(seed, i)``, so the
    sample does not depend on how rows are batched.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """One response: token ids without the end token, decoded text, and log-probabilities when asked for.

    ``finished`` is False when the token budget cut the response short. ``logprobs[j]`` is log p(token j), of the
    end token too as last entry when ``finished``.
    """

    token_ids: list[int]
    text: str
    finished: bool
    logprobs: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do beyond `generate`."""

    swap: bool
    logprobs: bool
    seeds: bool


class Engine(Protocol):
    """A live model that answers prompts given as token ids."""

    name: str
    capabilities: Capabilities

    def generate(self, token_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Answer each prompt, in order. Results do not depend on the engine's batch size."""
        ...

    def swap(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace all weights in place; always the full state.

        Raises:
            UserError: a key or shape differs, or the engine cannot swap.
        """
        ...

    def fingerprint(self) -> list[float]:
        """Log-probabilities of fixed sentinel prompts under the current weights, to prove which weights answer."""
        ...
