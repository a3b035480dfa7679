"""Every term against NumPy in float64, written from the formulas and without the code under test."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlheals.training.ppo.losses import (
    entropy,
    full_kl,
    kl_penalty,
    policy_loss,
    ratio_units,
    sampled_kl,
    turn_log_probs,
    value_loss,
)

SEEDS = st.integers(0, 2**32 - 1)
CLIPS = st.sampled_from([None, 0.1, 0.2, 0.5])
CLOSE: dict[str, float] = {"rtol": 1e-9, "atol": 1e-11}


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(array) for array in arrays]


def numpy_policy_loss(
    new: np.ndarray, old: np.ndarray, advantages: np.ndarray, clip: float | None, limit: float | None
) -> float:
    terms = []
    for n, o, advantage in zip(new, old, advantages, strict=True):
        ratio = math.exp(n - o)
        low, high = (ratio, ratio) if clip is None else (1 - clip, 1 + clip)
        bounded = min(max(ratio, low), high) * advantage
        terms.append(bounded if limit is not None and ratio > limit else min(ratio * advantage, bounded))
    return -sum(terms) / len(terms)


def numpy_value_loss(new: np.ndarray, old: np.ndarray, returns: np.ndarray, clip: float | None) -> float:
    terms = []
    for n, o, target in zip(new, old, returns, strict=True):
        errors = [(n - target) ** 2]
        if clip is not None:
            errors.append((min(max(n, o - clip), o + clip) - target) ** 2)
        terms.append(max(errors))
    return 0.5 * sum(terms) / len(terms)


def numpy_softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@given(SEEDS, st.integers(1, 20), CLIPS, st.sampled_from([None, 2.0, 10.0]))
def test_policy_loss(seed: int, units: int, clip: float | None, limit: float | None) -> None:
    draw = np.random.default_rng(seed)
    old, advantages = draw.normal(-5, 2, units), draw.normal(size=units)
    new = old + draw.normal(0, draw.choice([0.1, 1.0, 3.0]), units)
    found = policy_loss(*tensors(new, old, advantages), clip, limit)
    assert found.loss.item() == pytest.approx(numpy_policy_loss(new, old, advantages, clip, limit), rel=1e-9)
    np.testing.assert_allclose(found.ratio.numpy(), np.exp(new - old), **CLOSE)


@given(SEEDS, CLIPS, st.sampled_from([None, 2.0]))
def test_gradient_of_the_policy_loss(seed: int, clip: float | None, limit: float | None) -> None:
    """-A r / n where neither clip nor limit decides and 0 elsewhere; the units that got 0 are those called clipped."""
    draw = np.random.default_rng(seed)
    units = 12
    old, advantages = draw.normal(-5, 2, units), draw.normal(size=units)
    difference = draw.normal(0, 0.6, units)
    new = torch.tensor(old + difference, requires_grad=True)
    found = policy_loss(new, *tensors(old, advantages), clip, limit)
    found.loss.backward()
    ratio = np.exp(difference)
    stopped = np.zeros(units, bool)
    if clip is not None:
        stopped |= ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))
    clipped = stopped | ((ratio > limit) if limit is not None and clip is not None else False)
    stopped |= (ratio > limit) if limit is not None else False
    np.testing.assert_allclose(new.grad.numpy(), np.where(stopped, 0, -advantages * ratio / units), **CLOSE)
    np.testing.assert_array_equal(found.clipped.numpy(), clipped)


def test_first_step_is_the_plain_policy_gradient() -> None:
    new = torch.tensor([-3.0, -1.0], requires_grad=True)
    found = policy_loss(new, new.detach().clone(), torch.tensor([2.0, -1.0]), 0.2)
    found.loss.backward()
    assert found.ratio.tolist() == [1.0, 1.0]
    assert found.loss.item() == -0.5
    assert new.grad.tolist() == [-1.0, 0.5]
    assert not found.clipped.any()


def test_ratio_limit_keeps_an_exploded_ratio_finite() -> None:
    new = torch.tensor([300.0, 0.1], requires_grad=True)
    found = policy_loss(new, torch.zeros(2), torch.tensor([-1.0, -1.0]), 0.1, 10.0)
    found.loss.backward()
    assert found.loss.item() == pytest.approx((1.1 + math.exp(0.1)) / 2)
    assert new.grad.tolist() == [0.0, pytest.approx(math.exp(0.1) / 2)]
    assert policy_loss(new.detach(), torch.zeros(2), torch.tensor([-1.0, -1.0]), 0.1).loss.isinf()


@given(SEEDS, CLIPS)
def test_value_loss(seed: int, clip: float | None) -> None:
    draw = np.random.default_rng(seed)
    new, old, returns = draw.normal(size=(3, 9))
    found = value_loss(*tensors(new, old, returns), clip)
    assert found.item() == pytest.approx(numpy_value_loss(new, old, returns, clip), rel=1e-9)
    values = torch.tensor(new, requires_grad=True)
    value_loss(values, *tensors(old, returns), None).backward()
    np.testing.assert_allclose(values.grad.numpy(), (new - returns) / 9, **CLOSE)


def test_value_clip_stops_a_value_that_has_moved_far_enough() -> None:
    new = torch.tensor([1.0], requires_grad=True)  # on the way from 0 to 3, and past the clip
    value_loss(new, torch.zeros(1), torch.tensor([3.0]), 0.2).backward()
    assert new.grad.item() == 0.0


@given(SEEDS, st.integers(1, 6), st.integers(2, 11))
def test_entropy_and_kl(seed: int, positions: int, vocabulary: int) -> None:
    draw = np.random.default_rng(seed)
    logits, other = draw.normal(0, 3, (2, positions, vocabulary)).astype(np.float32)
    p, q = numpy_softmax(logits.astype(np.float64)), numpy_softmax(other.astype(np.float64))
    mask = draw.integers(0, 2, positions)
    np.testing.assert_allclose(entropy(torch.tensor(logits)), -(p * np.log(p)).sum(-1), rtol=1e-4, atol=1e-5)
    expected = (p * np.log(p / q)).sum(-1)
    found = full_kl(*tensors(logits, other))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(full_kl(*tensors(logits, other, mask)), expected * mask, rtol=1e-4, atol=1e-5)


def test_kl_of_a_model_to_itself_is_0_with_gradient_0() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = full_kl(logits, logits)
    assert found.tolist() == [0.0] * 5
    found.sum().backward()
    assert logits.grad.abs().max() < 1e-7


def test_kl_pulls_the_policy_and_not_the_reference() -> None:
    """d KL / d logits = p (log p/q - KL)."""
    draw = np.random.default_rng(2)
    logits, other = draw.normal(size=(2, 4, 6)).astype(np.float32)
    policy, reference = (torch.tensor(part, requires_grad=True) for part in (logits, other))
    full_kl(policy, reference).sum().backward()
    p, q = numpy_softmax(logits), numpy_softmax(other)
    gap = np.log(p / q)
    np.testing.assert_allclose(policy.grad, p * (gap - (p * gap).sum(-1, keepdims=True)), atol=1e-6)
    assert reference.grad is None


def test_entropy_reaches_the_loss_and_rises_with_it() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    (-entropy(logits).sum()).backward()
    stepped = logits.detach() - 0.1 * logits.grad
    assert entropy(stepped).item() > entropy(logits).item()
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))


@given(SEEDS, st.integers(1, 4))
def test_sampled_kl_is_unbiased_and_not_negative(seed: int, positions: int) -> None:
    """Its mean over the whole vocabulary, weighted by the sampler's probabilities, is the exact KL."""
    draw = np.random.default_rng(seed)
    logits, other = draw.normal(0, 2, (2, positions, 6))
    p, q = numpy_softmax(logits), numpy_softmax(other)
    each = sampled_kl(*tensors(np.log(p), np.log(q))).numpy()
    assert (each >= -1e-12).all()
    np.testing.assert_allclose((p * each).sum(-1), (p * np.log(p / q)).sum(-1), rtol=1e-7, atol=1e-9)


def batch(draw: np.random.Generator, turns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities, weights and turn of the tokens of ``turns`` responses of 1 to 5 tokens."""
    turn_index = np.repeat(np.arange(turns), draw.integers(1, 6, turns))
    logp = np.log(draw.uniform(0.05, 1, len(turn_index)))
    return logp, draw.choice([0.0, 0.5, 1.0], len(turn_index)), turn_index


@given(SEEDS, st.integers(1, 5))
def test_turn_log_probs_are_weighted_sums(seed: int, turns: int) -> None:
    draw = np.random.default_rng(seed)
    logp, weights, turn_index = batch(draw, turns)
    order = draw.permutation(len(logp))
    expected = [(logp * weights)[turn_index == turn].sum() for turn in range(turns)]
    parts = tensors(logp[order], weights[order], turn_index[order])
    np.testing.assert_allclose(turn_log_probs(*parts, turns), expected, **CLOSE)
    assert turn_log_probs(*parts, turns + 1)[-1] == 0


@given(SEEDS, st.integers(1, 5))
def test_turn_ratio_multiplies_the_probabilities_of_a_response_and_token_ratio_does_not(seed: int, turns: int) -> None:
    draw = np.random.default_rng(seed)
    old, weights, turn_index = batch(draw, turns)
    new = np.log(draw.uniform(0.05, 1, len(old)))
    advantages = draw.normal(size=turns)

    def ratios(kind: Any) -> tuple[np.ndarray, Any, Any]:
        after, before = (ratio_units(*tensors(logp, weights, turn_index), turns, kind) for logp in (new, old))
        gains = torch.tensor(advantages)[after.turn]
        total = float(after.weight.sum()) or 1.0
        found = policy_loss(after.log_probs, before.log_probs, gains, 0.2, weights=after.weight, total=total)
        return found.ratio.numpy(), after, found.loss.item()

    probability_ratios = np.exp(new) / np.exp(old)
    per_turn, units, loss = ratios("turn")
    products = [np.prod((probability_ratios**weights)[turn_index == turn]) for turn in range(turns)]
    np.testing.assert_allclose(per_turn, products, rtol=1e-9)
    assert units.turn.tolist() == list(range(turns))
    assert units.weight.tolist() == [1.0] * turns
    assert loss == pytest.approx(numpy_policy_loss(np.log(products), np.zeros(turns), advantages, 0.2, None))
    per_token, units, loss = ratios("token")
    np.testing.assert_allclose(per_token, probability_ratios, rtol=1e-9)
    assert units.turn.tolist() == turn_index.tolist()
    each = [
        weight * numpy_policy_loss(np.array([n]), np.array([o]), advantages[[turn]], 0.2, None)
        for n, o, weight, turn in zip(new, old, weights, turn_index, strict=True)
    ]
    assert loss == pytest.approx(sum(each) / (weights.sum() or 1.0), abs=1e-9)


def test_one_token_of_a_response_changes_the_turn_ratio_of_all_of_it() -> None:
    """Three tokens twice as likely each: a turn ratio of 8 is clipped as one, token ratios of 2 one by one."""
    old, index = torch.tensor([-2.0, -2.0, -2.0]), torch.zeros(3, dtype=torch.long)
    new, ones = old + math.log(2), torch.ones(3)
    turn = [ratio_units(logp, ones, index, 1, "turn").log_probs for logp in (new, old)]
    token = [ratio_units(logp, ones, index, 1, "token").log_probs for logp in (new, old)]
    assert policy_loss(*turn, torch.ones(1), 3.0).ratio.tolist() == [pytest.approx(8.0)]
    assert policy_loss(*turn, torch.ones(1), 3.0).clipped.tolist() == [True]
    assert policy_loss(*token, torch.ones(3), 3.0).ratio.tolist() == [pytest.approx(2.0)] * 3
    assert not policy_loss(*token, torch.ones(3), 3.0).clipped.any()
    halved = [ratio_units(logp, 0.5 * ones, index, 1, "turn").log_probs for logp in (new, old)]
    assert policy_loss(*halved, torch.ones(1), 3.0).ratio.tolist() == [pytest.approx(2**1.5)]


@given(SEEDS, st.integers(1, 8))
def test_micro_batches_with_a_common_total_add_up_to_the_whole(seed: int, cut: int) -> None:
    draw = np.random.default_rng(seed)
    new, old, advantages = tensors(*draw.normal(size=(3, 9)))
    weights = torch.tensor(draw.uniform(0, 1, 9))
    total = float(weights.sum())
    parts = [slice(0, cut), slice(cut, 9)]
    pieces = [policy_loss(new[p], old[p], advantages[p], 0.2, None, weights[p], total).loss for p in parts]
    whole = policy_loss(new, old, advantages, 0.2, weights=weights).loss
    assert sum(pieces).item() == pytest.approx(whole.item(), abs=1e-12)
    halves = [value_loss(new[p], old[p], advantages[p], 0.3, 9) for p in parts]
    assert sum(halves).item() == pytest.approx(value_loss(new, old, advantages, 0.3).item(), abs=1e-12)


def test_kl_penalty_is_the_log_ratio_of_each_response() -> None:
    policy = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    found = kl_penalty(policy, torch.tensor([-1.5, -1.0, -0.25]), torch.tensor([0, 0, 1]), 2)
    assert found.tolist() == [-0.5, -0.25]
    assert not found.requires_grad
