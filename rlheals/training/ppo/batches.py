"""Episodes as tensors: padded sequences, where their responses and states are, and what was scored about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from rlheals.training.ppo.gae import gae

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from rlheals.training.ppo.rollout import EpisodeRecord
    from rlheals.training.ppo.settings import PpoSettings


class Batch(NamedTuple):
    """Some episodes, padded on the right; turns and tokens are numbered in the order of the episodes.

    Attributes:
        ids: (episodes, length) token ids, 0 on padding.
        attention_mask: (episodes, length).
        response_positions: (tokens, 2) row and column of every token with loss.
        state_positions: (states, 2) row and column of every state to value.
        weights: (tokens,) of each token's log-probability.
        turn_index: (tokens,) turn of each token.
    """

    ids: Tensor
    attention_mask: Tensor
    response_positions: Tensor
    state_positions: Tensor
    weights: Tensor
    turn_index: Tensor

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What both the policy and the reference take."""
        return self.ids, self.attention_mask, self.response_positions


def make_batch(
    records: Sequence[EpisodeRecord], thought_weight: float, device: torch.device | str, bootstrap: bool = False
) -> Batch:
    """Pad ``records``; with ``bootstrap`` a truncated episode's last token is one more state behind its turns'."""
    width = max(len(record.token_ids) for record in records)
    ids = torch.zeros(len(records), width, dtype=torch.long)
    mask = torch.zeros(len(records), width, dtype=torch.long)
    responses: list[tuple[int, int]] = []
    states: list[tuple[int, int]] = []
    weights: list[float] = []
    turn_index: list[int] = []
    turns = 0
    for row, record in enumerate(records):
        ids[row, : len(record.token_ids)] = torch.tensor(record.token_ids)
        mask[row, : len(record.token_ids)] = 1
        for turn in record.turns:
            responses += [(row, column) for column in range(turn.start, turn.stop)]
            weights += [thought_weight] * (turn.answer - turn.start) + [1.0] * (turn.stop - turn.answer)
            turn_index += [turns] * (turn.stop - turn.start)
            states.append((row, turn.state_position))
            turns += 1
        if bootstrap and record.truncated:
            states.append((row, len(record.token_ids) - 1))
    return Batch(
        ids.to(device),
        mask.to(device),
        torch.tensor(responses, dtype=torch.long).reshape(-1, 2).to(device),
        torch.tensor(states, dtype=torch.long).to(device),
        torch.tensor(weights, dtype=torch.float32).to(device),
        torch.tensor(turn_index, dtype=torch.long).to(device),
    )


@dataclass
class Scored:
    """One episode with what the training model said about it right after the rollout.

    Attributes:
        record: the episode.
        logp: (tokens,) log-probabilities of its response tokens.
        entropy: (tokens,) of the distributions they were drawn from.
        values: (turns,) of its states.
        bootstrap: value of what would have followed a truncated episode; 0 for one that ended.
        kl: (tokens,) KL(policy || reference); None without a reference.
        penalty: (turns,) taken off the rewards.
        reference: (tokens, vocabulary) logits of the reference; None where they are not kept.
        advantages: (turns,), float64.
        returns: (turns,), float64.
        engine_deviation: largest |ratio - 1| of a token between trainer and the engine that sampled it; NaN where the
            engine is the trainer's own model or does not say.
    """

    record: EpisodeRecord
    logp: Tensor
    entropy: Tensor
    values: NDArray[np.float64]
    bootstrap: float
    kl: Tensor | None
    penalty: NDArray[np.float64]
    reference: Tensor | None
    advantages: NDArray[np.float64]
    returns: NDArray[np.float64]
    engine_deviation: float = float("nan")


def tokens_of(record: EpisodeRecord) -> int:
    """Number of tokens with loss."""
    return sum(turn.stop - turn.start for turn in record.turns)


def tokens_weight(record: EpisodeRecord, thought_weight: float) -> float:
    """Sum of the weights of the tokens with loss."""
    return sum((turn.answer - turn.start) * thought_weight + turn.stop - turn.answer for turn in record.turns)


def estimate_advantages(episodes: Sequence[Scored], settings: PpoSettings) -> None:
    """Fill advantages and returns, one episode at a time; without a critic returns are those of the rewards alone."""
    for episode in episodes:
        rewards = np.array([turn.reward for turn in episode.record.turns]) - episode.penalty
        if settings.has_critic:
            found = gae(rewards, episode.values, settings.gamma, settings.lam, episode.bootstrap)
        else:
            found = gae(rewards, np.zeros(len(rewards)), settings.gamma, 1.0)
        episode.advantages, episode.returns = found


def minibatches(episodes: Sequence[Scored], size: int, micro: int, seed: int) -> Iterator[list[list[Scored]]]:
    """Shuffled minibatches of ``size`` episodes, each cut into micro-batches of ``micro`` of similar length.

    A step does not depend on the order within its minibatch, so sorting there saves padding for nothing.
    """
    order = np.random.default_rng(seed).permutation(len(episodes))
    for start in range(0, len(order), size):
        chosen = [episodes[place] for place in order[start : start + size]]
        chosen.sort(key=lambda episode: len(episode.record.token_ids))
        yield [chosen[place : place + micro] for place in range(0, size, micro)]
