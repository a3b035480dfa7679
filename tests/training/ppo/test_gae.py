from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlheals.training.ppo.gae import gae

NUMBERS = st.floats(-10, 10, width=32)
SHARES = st.floats(0, 1, width=32)


def episodes(max_turns: int = 7) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Rewards and values of one episode."""
    return st.integers(1, max_turns).flatmap(
        lambda turns: st.tuples(
            arrays(np.float64, turns, elements=NUMBERS), arrays(np.float64, turns, elements=NUMBERS)
        )
    )


def by_definition(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float, bootstrap: float) -> np.ndarray:
    """The average of n-step estimates with weights (1 - lam) lam^(n-1), the last one taking the rest."""
    turns = len(rewards)
    beyond = [*values, bootstrap]
    advantages = np.zeros(turns)
    for t in range(turns):
        for n in range(1, turns - t + 1):
            estimate = sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * beyond[t + n] - values[t]
            share = lam ** (n - 1) if n == turns - t else (1 - lam) * lam ** (n - 1)
            advantages[t] += share * estimate
    return advantages


@given(episodes(), SHARES, SHARES, NUMBERS)
def test_advantages_are_the_weighted_n_step_estimates(
    episode: tuple[np.ndarray, np.ndarray], gamma: float, lam: float, bootstrap: float
) -> None:
    rewards, values = episode
    advantages, returns = gae(rewards, values, gamma, lam, bootstrap)
    assert advantages.dtype == returns.dtype == np.float64
    expected = by_definition(rewards, values, gamma, lam, bootstrap)
    np.testing.assert_allclose(advantages, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(returns, expected + values, rtol=1e-9, atol=1e-9)


@given(episodes(), SHARES, NUMBERS)
def test_lambda_1_is_the_discounted_return_and_lambda_0_one_step(
    episode: tuple[np.ndarray, np.ndarray], gamma: float, bootstrap: float
) -> None:
    rewards, values = episode
    turns = len(rewards)
    _, returns = gae(rewards, values, gamma, 1.0, bootstrap)
    discounted = [
        sum(gamma ** (k - t) * rewards[k] for k in range(t, turns)) + gamma ** (turns - t) * bootstrap
        for t in range(turns)
    ]
    np.testing.assert_allclose(returns, discounted, rtol=1e-9, atol=1e-9)
    one_step, _ = gae(rewards, values, gamma, 0.0, bootstrap)
    np.testing.assert_allclose(one_step, rewards + gamma * np.append(values[1:], bootstrap) - values, atol=1e-9)


@given(episodes(), episodes(), SHARES, SHARES)
def test_a_flat_buffer_leaks_between_episodes_and_this_does_not(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], gamma: float, lam: float
) -> None:
    """The authors' fault: a truncated episode's last turn bootstraps from the first state of the next episode."""
    apart = np.concatenate([gae(*episode, gamma, lam)[0] for episode in (first, second)])
    flat_rewards, flat_values = (np.concatenate(parts) for parts in zip(first, second, strict=True))
    flat, _ = gae(flat_rewards, flat_values, gamma, lam)
    turns = len(first[0])
    np.testing.assert_allclose(apart[turns:], flat[turns:], atol=1e-12)
    leak = gamma * (second[1][0] + lam * flat[turns])
    shares = (gamma * lam) ** np.arange(turns - 1, -1, -1)
    np.testing.assert_allclose(flat[:turns] - apart[:turns], shares * leak, rtol=1e-6, atol=1e-6)


def test_truncation_bootstraps_its_own_last_value() -> None:
    ended, _ = gae([1.0, 2.0], [0.5, 0.25], 0.9, 0.5)
    np.testing.assert_allclose(ended, [1 + 0.9 * 0.25 - 0.5 + 0.45 * 1.75, 2 - 0.25])
    cut, returns = gae([1.0, 2.0], [0.5, 0.25], 0.9, 0.5, bootstrap=4.0)
    np.testing.assert_allclose(cut - ended, [0.45 * 3.6, 3.6])
    assert returns[1] == pytest.approx(2 + 0.9 * 4)


@given(episodes(), SHARES, SHARES, st.floats(-3, 3, width=32))
def test_values_that_are_right_leave_no_advantage(
    episode: tuple[np.ndarray, np.ndarray], gamma: float, lam: float, bootstrap: float
) -> None:
    rewards, _ = episode
    values, _ = gae(rewards, np.zeros(len(rewards)), gamma, 1.0, bootstrap)
    advantages, returns = gae(rewards, values, gamma, lam, bootstrap)
    np.testing.assert_allclose(advantages, 0, atol=1e-9)
    np.testing.assert_allclose(returns, values, atol=1e-9)


@pytest.mark.parametrize(("rewards", "values"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_an_episode_has_a_value_for_each_reward(rewards: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match="one value for each reward"):
        gae(rewards, values, 1.0, 0.95)
