"""The row of one update, from per-episode facts of all processes and the losses on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlheals.training.ppo.batches import tokens_of
from rlheals.training.ppo.doctor import shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.training.ppo.batches import Scored


class Facts(NamedTuple):
    """What the metrics need of one episode; plain numbers, so that processes can exchange them."""

    reward: float
    solved: bool
    format_errors: list[bool]
    tokens: int
    entropy: float
    kl: float | None
    values: list[float]
    advantages: list[float]
    returns: list[float]
    engine_deviation: float = math.nan


def facts_of(episode: Scored) -> Facts:
    """The facts of one scored episode; entropy and KL are sums over its tokens."""
    record = episode.record
    return Facts(
        reward=record.total_reward,
        solved=record.solved,
        format_errors=[turn.format_error for turn in record.turns],
        tokens=tokens_of(record),
        entropy=float(episode.entropy.double().sum()),
        kl=None if episode.kl is None else float(episode.kl.double().sum()),
        values=[float(value) for value in episode.values],
        advantages=[float(value) for value in episode.advantages],
        returns=[float(value) for value in episode.returns],
        engine_deviation=episode.engine_deviation,
    )


def advantages_of(facts: Sequence[Facts]) -> list[float]:
    """Of all turns."""
    return [value for episode in facts for value in episode.advantages]


def rollout_columns(facts: Sequence[Facts], critic: bool, advantages: bool) -> dict[str, Any]:
    """Columns of ``rl_training`` that describe the policy before the update.

    Args:
        facts: every episode of the update.
        critic: whether the arm learns values; without it their explained variance is null.
        advantages: whether the arm uses advantages; without it their shape is null.
    """
    rewards = np.array([episode.reward for episode in facts])
    errors = [error for episode in facts for error in episode.format_errors]
    tokens = sum(episode.tokens for episode in facts)
    kl = [episode.kl for episode in facts if episode.kl is not None]
    found = shape(advantages_of(facts)) if advantages else None
    return {
        "episodes": len(facts),
        "turns": len(errors),
        "tokens": tokens,
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "solved_rate": float(np.mean([episode.solved for episode in facts])),
        "format_error_rate": float(np.mean(errors)),
        "kl_reference": sum(kl) / max(tokens, 1) if kl else None,
        "entropy": sum(episode.entropy for episode in facts) / max(tokens, 1),
        "explained_variance": _explained_variance(facts) if critic else None,
        "advantage_mean": found.mean if found else None,
        "advantage_std": found.std if found else None,
        "advantage_skew": found.skew if found else None,
        "advantage_kurtosis": found.kurtosis if found else None,
        "advantage_positive_share": found.positive_share if found else None,
        "response_tokens_mean": tokens / len(errors),
        "engine_ratio_deviation": _engine_deviation(facts),
        "flat_groups": None,
    }


def _engine_deviation(facts: Sequence[Facts]) -> float | None:
    """Largest of the episodes; null where trainer and engine are one model."""
    known = [episode.engine_deviation for episode in facts if not math.isnan(episode.engine_deviation)]
    return max(known) if known else None


def _explained_variance(facts: Sequence[Facts]) -> float | None:
    """Share of the variance of the returns that the values explain; null where returns do not vary."""
    returns = np.array([value for episode in facts for value in episode.returns])
    values = np.array([value for episode in facts for value in episode.values])
    variance = float(returns.var())
    return 1 - float((returns - values).var()) / variance if variance > 0 else None


@dataclass
class Losses:
    """Sums over the micro-batches of one process in one update.

    Attributes:
        policy: of the policy term, each already a share of its minibatch.
        value: of the value term.
        clipped: units whose clipped term decided.
        units: units seen.
        kl_old: sampled KL(old || new) over the tokens of the last epoch.
        kl_tokens: their number.
        first_deviation: largest distance of a ratio from 1 before the first step.
        gradient_norms: of the steps.
        minibatches: steps taken.
    """

    policy: float = 0.0
    value: float = 0.0
    clipped: int = 0
    units: int = 0
    kl_old: float = 0.0
    kl_tokens: int = 0
    first_deviation: float = 0.0
    gradient_norms: list[float] = field(default_factory=list)
    minibatches: int = 0


def loss_columns(parts: Sequence[Losses], reward: bool, critic: bool) -> dict[str, Any]:
    """Columns of ``rl_training`` that describe the update.

    Args:
        parts: of every process; each process's losses are its own shares of global minibatches.
        reward: whether there is a policy term.
        critic: whether there is a value term.
    """
    steps = max(parts[0].minibatches, 1)
    trained = parts[0].minibatches > 0
    moved = trained and sum(part.kl_tokens for part in parts) > 0
    tokens = max(sum(part.kl_tokens for part in parts), 1)
    units = sum(part.units for part in parts)
    norms = [norm for norm in parts[0].gradient_norms if math.isfinite(norm)]
    return {
        "kl_old": sum(part.kl_old for part in parts) / tokens if moved else 0.0,
        "clip_fraction": sum(part.clipped for part in parts) / units if reward and units else None,
        "policy_loss": sum(part.policy for part in parts) / steps if reward and units else None,
        "value_loss": sum(part.value for part in parts) / steps if critic and trained else None,
        "grad_norm": float(np.mean(norms)) if norms else None,
        "grad_norm_low": min(norms, default=None),
        "grad_norm_high": max(norms, default=None),
        "ratio_max_deviation_first": max(part.first_deviation for part in parts) if moved else None,
    }
