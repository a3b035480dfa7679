"""Generalised advantage estimation over the turns of one episode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def gae(
    rewards: Sequence[float] | NDArray[np.float64],
    values: Sequence[float] | NDArray[np.float64],
    gamma: float,
    lam: float,
    bootstrap: float = 0.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Advantages and returns of the turns of ONE episode, each (turns,) in float64.

    With delta_t = r_t + gamma V_{t+1} - V_t the advantage is sum_k (gamma lam)^k delta_{t+k}, and the return is the
    advantage plus V_t. An episode is a call of its own, so nothing can leak from one into another. Discounted returns
    without a critic are ``gae(rewards, zeros, gamma, 1.0)``.

    Args:
        rewards: of each turn.
        values: of the state before each turn.
        gamma: discount between turns.
        lam: weight of longer estimates.
        bootstrap: value of the state behind the last turn: 0 for an episode that came to its end, the critic's
            estimate for one that was cut off.

    Raises:
        ValueError: rewards and values differ in length, or there are none.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equations 11 to 16.
    """
    r, v = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    if r.shape != v.shape or r.ndim != 1 or not len(r):
        raise ValueError(f"an episode needs one value for each reward; got shapes {r.shape} and {v.shape}")
    deltas = r + gamma * np.append(v[1:], bootstrap) - v
    advantages = np.empty_like(deltas)
    following = 0.0
    for turn in reversed(range(len(deltas))):
        following = deltas[turn] + gamma * lam * following
        advantages[turn] = following
    return advantages, advantages + v
