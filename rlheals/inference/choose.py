"""How the next token is chosen from logits, and where its randomness comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from rlheals.inference.engine import Sampling


def uniform_streams(seed: int, rows: Sequence[int], length: int) -> Tensor:
    """Uniform numbers in [0, 1), float64, shape (rows, length); row i depends on ``(seed, rows[i])`` only.

    Each row is a Philox generator keyed by the pair, so a row draws the same numbers whatever shares its batch.
    """
    streams = np.empty((len(rows), length))
    for place, row in enumerate(rows):
        streams[place] = np.random.Generator(np.random.Philox(key=np.array([seed, row], dtype=np.uint64))).random(
            length
        )
    return torch.from_numpy(streams)


def choose_tokens(logits: Tensor, sampling: Sampling, uniforms: Tensor | None) -> Tensor:
    """Next token of each row: the likeliest when greedy, else by inverting the cumulative distribution.

    Args:
        logits: (rows, vocabulary).
        sampling: temperature first, then top-k, then top-p, as in Hugging Face.
        uniforms: (rows,) in [0, 1), float64; unused when greedy.

    Returns:
        (rows,) token ids.
    """
    if sampling.temperature == 0 or uniforms is None:
        return logits.argmax(dim=-1)
    # float64, so that the cumulative sum ends within 1e-12 of 1 for any vocabulary size.
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    if not 0 < sampling.top_k < logits.shape[-1] and sampling.top_p >= 1:
        return _invert(probabilities, uniforms)
    probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    if 0 < sampling.top_k < logits.shape[-1]:
        probabilities[:, sampling.top_k :] = 0
    if sampling.top_p < 1:
        mass = probabilities.sum(dim=-1, keepdim=True)
        # A token stays when the mass before it is below top_p, so the likeliest one always stays.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = torch.where(before < sampling.top_p * mass, probabilities, 0.0)
        probabilities[:, 0] = probabilities[:, 0].clamp_min(torch.finfo(torch.float64).tiny)
    return tokens.gather(-1, _invert(probabilities, uniforms)[:, None])[:, 0]


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Index of the first token whose cumulative mass exceeds ``uniform x total mass``; (rows,)."""
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1]
    # Rounding may lift the product to the total itself, and the search would then run past the last possible token.
    target = torch.minimum(uniforms.to(total.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits with those of tokens that were seen made less likely: positive ones divided, negative ones multiplied.

    Args:
        logits: (rows, vocabulary).
        seen: (rows, vocabulary) bool, tokens of the prompt and of the response so far.
        penalty: above 1 against repetition; Keskar et al. 2019, "CTRL", section 4.1, as in Hugging Face and vLLM.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
