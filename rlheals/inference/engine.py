"""The contract every generation back-end meets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0
"""Of sampling, for every engine: vLLM raises what is lower to that, in silence, and refuses what is higher."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 switch the filters off.

    With ``temperature`` > 0, row i of a `generate` call draws from its own stream seeded by ``(seed, i)``, so the
    sample does not depend on how rows are batched.

    Attributes:
        max_new_tokens: token budget of a response.
        temperature: divides the logits.
        top_p: nucleus sampling.
        top_k: keep the k likeliest tokens.
        seed: of the random numbers.
        logprobs: report the log-probability of every token, by the model's own distribution (before penalty,
            temperature and filters).
        repetition_penalty: logits of tokens that stand in the prompt or the response are divided (positive) or
            multiplied (negative) by it, as in Hugging Face; 1 switches it off.
        stop: a response ends where its text first holds one of these strings.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logprobs: bool = False
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what engines would not all do.

        Raises:
            UserError: the temperature is one that some change, or no token is asked for.
        """
        if self.max_new_tokens < 1:
            raise UserError(f"{self.max_new_tokens} new tokens are asked for; ask for 1 or more.")
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature <= HIGHEST_TEMPERATURE:
            raise UserError(
                f"the sampling temperature is {self.temperature:g}, which not every engine takes as it is; set "
                "inference.temperature, or ppo.change.temperature, to 0, which is greedy, or from "
                f"{LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}."
            )


@dataclass(frozen=True, slots=True)
class Answer:
    """One response: token ids without the end token, decoded text, and log-probabilities when asked for.

    ``finished`` says that the model gave an end token; it is False when the token budget or a stop string cut the
    response short. ``logprobs[j]`` is log p(token j), of the end token too as last entry when ``finished``. After a
    stop string, ``token_ids`` reach to the token that completes it, and ``text`` to where it begins.
    """

    token_ids: list[int]
    text: str
    finished: bool
    logprobs: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do beyond `generate`.

    Attributes:
        swap: take other weights.
        logprobs: report log-probabilities.
        seeds: repeat a sample exactly from its seed.
    """

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
        """Log-probabilities of fixed sentinel prompts under the current weights, to prove which weights answer.

        `rlheals.inference.fingerprint.fingerprint` computes what they must be.
        """
        ...

    def close(self) -> None:
        """Stop what was started for the engine; it cannot be asked any more then."""
        ...
