"""Which weights answer: log-probabilities of fixed sentinel prompts, asked of an engine and computed from a model.

Short sentinels are scored token by token. The long one is longer than any block of an engine's prefix cache, and what
is asked is the log-probability of tokens *after* it, on the path that answers take: keys and values left over from
earlier weights then show, which scoring a prompt would not, because engines do that without their cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

SHORT, LENGTH = 2, 8
"""Number of short sentinels, and tokens of each."""
LONG = 48
"""Tokens of the long sentinel where the context has room: more than a block of our engines holds (32, 16 on a GPU)."""
FOLLOWERS = 8
"""Tokens whose log-probabilities are asked for the place after the long sentinel."""
ROUNDING = {"float32": 4e-5, "bfloat16": 0.02}
"""Mean gap that is accepted between an engine and a model, for each nat of the mean log-probability (one at least).

Rounding grows with the logits. Measured on a CPU with 2 to 24 layers and logits of standard deviation 1 to 90: up to
1e-5 and 0.009 a nat.
"""
SURELY_OTHER = {"float32": 1e-5, "bfloat16": 0.01}
"""Mean change in nats of a model's fingerprint that an engine which got the change must show, too."""
FOLLOWED = {"float32": 0.5, "bfloat16": 0.1}
"""The least share of it that the engine must show: in bfloat16 logits are steps apart, and each side rounds its own."""


class Sentinels(NamedTuple):
    """Token ids of the sentinels of one vocabulary and context.

    Attributes:
        short: sequences scored from their second token on.
        long: a prompt.
        followers: tokens scored at the place after ``long``.
    """

    short: list[list[int]]
    long: list[int]
    followers: list[int]


class Proof(NamedTuple):
    """What was said of the sentinels after weights were given to an engine.

    Attributes:
        found: by the engine.
        expected: by the model whose weights it was given.
    """

    found: list[float]
    expected: list[float]


def sentinels(vocabulary: int, context: int) -> Sentinels:
    """The sentinels for a model of ``vocabulary`` tokens that holds ``context`` tokens.

    Tokens are spread over the vocabulary; those of the long one differ from block to block.
    """
    length = min(LENGTH, context)
    short = [
        [(place * 7919 + 13) % vocabulary for place in range(start * length, (start + 1) * length)]
        for start in range(SHORT)
    ]
    long = [(place * place * 31 + place * 7919 + 29) % vocabulary for place in range(max(1, min(LONG, context - 1)))]
    followers = [(place * 104729 + 7) % vocabulary for place in range(FOLLOWERS)]
    return Sentinels(short, long, followers)


def sentinels_of(model: Any) -> Sentinels:
    """The sentinels of a Hugging Face causal language model."""
    return sentinels(model.get_input_embeddings().weight.shape[0], context_of(model.config))


def context_of(config: Any) -> int:
    """Longest conversation in tokens that a model's config allows; 2^30 where it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "max_position_embeddings", 0) or 1 << 30)


def fingerprint(model: Any) -> list[float]:
    """Log-probabilities of the sentinels under a Hugging Face model: SHORT x (LENGTH - 1), then the followers'."""
    import torch

    asked = sentinels_of(model)
    ids = torch.tensor(asked.short, device=model.device)
    long = torch.tensor([asked.long], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        scored = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:, None])
        after = torch.log_softmax(model(input_ids=long, use_cache=False).logits[0, -1].float(), dim=-1)
    return [*scored.flatten().tolist(), *after[asked.followers].tolist()]


def gap(found: Sequence[float], expected: Sequence[float]) -> float:
    """Larger of the mean gaps in nats over the short sentinels and over the followers of the long one.

    Raises:
        UserError: the two fingerprints are not of models with the same vocabulary and context.
    """
    if len(found) != len(expected):
        raise UserError(
            f"two fingerprints hold {len(found)} and {len(expected)} log-probabilities, so they are of models with "
            "other vocabularies or contexts; compare checkpoints of one architecture."
        )
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    parts = [differences[:-FOLLOWERS], differences[-FOLLOWERS:]]
    return max(sum(part) / len(part) for part in parts if part)


def rounding(expected: Sequence[float], dtype: str) -> float:
    """Mean gap in nats that rounding explains between two computations of a fingerprint."""
    return ROUNDING[dtype] * max(1.0, sum(map(abs, expected)) / len(expected))


def check_fingerprint(proof: Proof, where: str, dtype: str = "float32", before: Proof | None = None) -> None:
    """Refuse an engine that does not answer with the weights it was just given.

    Args:
        proof: of these weights.
        where: names them in the message.
        dtype: of the engine's weights; decides how much rounding explains.
        before: of the weights it had until then. An edit may change less than `ROUNDING` accepts; where it changes what
            the model says by `SURELY_OTHER`, what the engine says must have changed with it.

    Raises:
        UserError: the gap exceeds what rounding explains, or the engine still answers as before.
    """
    off = gap(*proof)
    if before is not None:
        moved, followed = gap(before.expected, proof.expected), gap(before.found, proof.found)
        if moved > SURELY_OTHER[dtype] and not followed > FOLLOWED[dtype] * moved:
            raise UserError(
                f"after swapping in {where} the engine still answers as before: its sentinel log-probabilities moved "
                f"by {followed:.3g} on average, the model's by {moved:.3g}; use another engine (inference.engine)."
            )
    if not off < rounding(proof.expected, dtype):
        raise UserError(
            f"after swapping in {where} the engine's sentinel log-probabilities are off by {off:.3g} on average, so it "
            "does not answer with these weights; use another engine (inference.engine)."
        )
