"""The terms of the loss, as pure functions of tensors; a test computes each again in NumPy.

Terms are sums over units (turns or tokens) divided by ``total``. A trainer that accumulates micro-batches gives the
count of the whole minibatch, so that the step does not depend on how episodes fall into micro-batches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlheals.training.ppo.settings import Ratio


class Units(NamedTuple):
    """What a probability ratio is taken of: whole responses or single tokens; each field is (units,).

    Attributes:
        log_probs: of each unit.
        turn: turn the unit belongs to, which gives its advantage.
        weight: of the unit in the policy loss.
    """

    log_probs: Tensor
    turn: Tensor
    weight: Tensor


class PolicyLoss(NamedTuple):
    """The clipped surrogate.

    Attributes:
        loss: scalar, to be minimised.
        ratio: (units,) new over old probability, without gradient.
        clipped: (units,) bool, where the clipped term decided, so the unit got no gradient.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def turn_log_probs(token_logp: Tensor, weights: Tensor, turn_index: Tensor, turns: int) -> Tensor:
    """Log-probability of each response, (turns,): the weighted sum over its tokens.

    Args:
        token_logp: (tokens,) log-probabilities of all response tokens of a batch.
        weights: (tokens,) weight of each; 0 masks a token.
        turn_index: (tokens,) turn of each, from 0.
        turns: number of turns; one without tokens has log-probability 0.
    """
    return token_logp.new_zeros(turns).index_add(0, turn_index, token_logp * weights)


def ratio_units(token_logp: Tensor, weights: Tensor, turn_index: Tensor, turns: int, ratio: Ratio) -> Units:
    """Units of the ratio; arguments as of `turn_log_probs`.

    ``turn`` is the paper's: weights act inside the sum and every response weighs 1 in the loss. With ``token`` each
    token is a unit and its weight acts in the loss, so no probabilities are multiplied.
    """
    if ratio == "turn":
        log_probs = turn_log_probs(token_logp, weights, turn_index, turns)
        return Units(log_probs, torch.arange(turns, device=token_logp.device), torch.ones_like(log_probs))
    return Units(token_logp, turn_index, weights)


def policy_loss(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    clip: float | None,
    ratio_limit: float | None = None,
    weights: Tensor | None = None,
    total: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss over units.

    Args:
        new: (units,) log-probabilities under the policy in training.
        old: (units,) log-probabilities under the policy that acted.
        advantages: (units,).
        clip: half-width of the interval around ratio 1; None leaves the ratio free.
        ratio_limit: a unit whose ratio is above it counts by its clipped term alone and gets no gradient (the authors
            do so for a whole minibatch, which is one turn).
        weights: (units,) of the units; 1 when left out.
        total: what the weighted sum is divided by; the sum of the weights when left out.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    log_ratio = new - old.detach()
    if ratio_limit is not None:  # also keeps the gradient finite where exp() overflows
        log_ratio = torch.where(log_ratio > math.log(ratio_limit), log_ratio.detach(), log_ratio)
    ratio = log_ratio.exp()
    free = ratio * advantages
    bounded = free if clip is None else ratio.clamp(1 - clip, 1 + clip) * advantages
    surrogate = torch.minimum(free, bounded)
    if ratio_limit is not None:
        surrogate = torch.where(ratio > ratio_limit, bounded, surrogate)
    weights = torch.ones_like(surrogate) if weights is None else weights
    divisor = float(weights.sum()) if total is None else total
    return PolicyLoss(-(surrogate * weights).sum() / divisor, ratio.detach(), (surrogate != free).detach())


def value_loss(new: Tensor, old: Tensor, returns: Tensor, clip: float | None, total: float | None = None) -> Tensor:
    """Half the squared error of the values, the larger of the plain and the clipped one; a scalar.

    Args:
        new: (turns,) values of the critic in training.
        old: (turns,) values when the turns were played.
        returns: (turns,) targets.
        clip: farthest ``new`` counts as moved from ``old``; None is off.
        total: what the sum is divided by; the number of turns when left out.

    Source: the authors' code, after Schulman's baselines.
    """
    errors = (new - returns) ** 2
    if clip is not None:
        near = old.detach() + (new - old.detach()).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - returns) ** 2)
    return 0.5 * errors.sum() / (len(errors) if total is None else total)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each distribution, (…, vocabulary) to (…)."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def full_kl(policy_logits: Tensor, reference_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Exact KL(policy || reference) in nats at each position, (…, vocabulary) to (…), 0 where ``mask`` is 0."""
    policy = torch.log_softmax(policy_logits.float(), dim=-1)
    reference = torch.log_softmax(reference_logits.detach().float(), dim=-1)
    divergence = (policy.exp() * (policy - reference)).sum(-1)
    return divergence if mask is None else divergence * mask


def sampled_kl(sampled_logp: Tensor, other_logp: Tensor) -> Tensor:
    """Estimate, for each sampled token, of KL(sampler || other): (1/r - 1) + log r with r = p_sampler / p_other.

    Without bias and never negative, so a mean of few tokens is of use. With the old policy as sampler and the new as
    other it is the size of an update.

    Source: Schulman 2020, "Approximating KL divergence", estimator k3.
    """
    gap = other_logp - sampled_logp
    return torch.expm1(gap) - gap


def kl_penalty(token_logp: Tensor, reference_logp: Tensor, turn_index: Tensor, turns: int) -> Tensor:
    """Sampled KL(policy || reference) of each response, (turns,), to be taken off its reward; may be negative.

    The plain log ratio: in the reward it has the gradient of the exact KL in expectation, which `sampled_kl` has not.
    """
    gap = token_logp.detach() - reference_logp.detach()
    return turn_log_probs(gap, torch.ones_like(gap), turn_index, turns)
