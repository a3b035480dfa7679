"""The optimisation of one update: epochs of minibatches over scored episodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from rlheals.errors import UserError
from rlheals.inference.seeds import counter_seed
from rlheals.training.ppo.batches import Scored, make_batch, minibatches, tokens_of, tokens_weight
from rlheals.training.ppo.losses import Units, policy_loss, ratio_units, sampled_kl, value_loss
from rlheals.training.ppo.metrics import Losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from rlheals.training.ppo.actor_critic import ActorCritic, Evaluation
    from rlheals.training.ppo.batches import Batch
    from rlheals.training.ppo.reference import Reference
    from rlheals.training.ppo.settings import PpoSettings


class Total(NamedTuple):
    """What the terms of a minibatch's loss are divided by, over all processes."""

    turns: float
    tokens: float
    weights: float


def make_optimizer(model: ActorCritic, settings: PpoSettings) -> torch.optim.AdamW:
    """AdamW with one group for the policy and, where there is a critic, one for its head."""
    groups: list[dict[str, Any]] = [{"params": list(model.policy.parameters()), "lr": settings.learning_rate}]
    if settings.has_critic:
        groups.append({"params": list(model.value_head.parameters()), "lr": settings.critic_learning_rate})
    return torch.optim.AdamW(
        groups, betas=settings.adam_betas, eps=settings.adam_epsilon, weight_decay=settings.weight_decay
    )


@dataclass(frozen=True)
class Learner:
    """What an update moves.

    Attributes:
        accelerator: has prepared ``model`` and ``optimizer``, and accumulates over the micro-batches of a process.
        model: the wrapped `ActorCritic`.
        optimizer: the wrapped optimiser of `make_optimizer`.
        actor_critic: the module itself.
        reference: what the KL term pulls to; None when it is off.
        settings: constants of the arm.
        updates: of the whole branch, for the learning rate.
        seed: of the run, for the order of the episodes.
        label: of the branch, for messages.
    """

    accelerator: Any
    model: Any
    optimizer: Any
    actor_critic: ActorCritic
    reference: Reference | None
    settings: PpoSettings
    updates: int
    seed: int
    label: str

    def train(self, episodes: Sequence[Scored], index: int) -> Losses:
        """All epochs of update ``index`` (from 0) on this process's scored episodes.

        While the critic warms up only its head learns; an arm without one then stands still.

        Raises:
            UserError: the loss or the gradient is not finite.
        """
        losses, settings = Losses(), self.settings
        warm_up = index < settings.critic_warmup_updates
        if warm_up and not settings.has_critic:
            return losses
        for group, rate in zip(self.optimizer.param_groups, self.rates(index), strict=True):
            group["lr"] = rate
        self.actor_critic.policy.requires_grad_(not warm_up)
        epochs = self._epochs(episodes, index)
        totals = self._totals([part for parts in epochs for part in parts])
        for epoch, parts in enumerate(epochs):
            for part in parts:
                total = totals[losses.minibatches]
                for chosen in part:
                    with self.accelerator.accumulate(self.model):
                        loss = self._loss(chosen, total, losses, warm_up, last=epoch == settings.epochs - 1)
                        self._step(loss, losses, index)
                losses.minibatches += 1
        self.actor_critic.policy.requires_grad_(True)
        return losses

    def rates(self, index: int) -> list[float]:
        """Learning rate of each parameter group; the policy stands still while the critic warms up."""
        settings = self.settings
        factor = settings.rate_factor(index, self.updates)
        policy = 0.0 if index < settings.critic_warmup_updates else settings.learning_rate * factor
        return [policy, settings.critic_learning_rate * factor][: len(self.optimizer.param_groups)]

    def _epochs(self, episodes: Sequence[Scored], index: int) -> list[list[list[list[Scored]]]]:
        """Micro-batches of every minibatch of every epoch, in a new order each."""
        size = self.settings.minibatch // self.accelerator.num_processes
        rank = self.accelerator.process_index
        seeds = [counter_seed(self.seed, "order", index, rank, epoch) for epoch in range(self.settings.epochs)]
        return [list(minibatches(episodes, size, self.settings.micro_batch, seed)) for seed in seeds]

    def _totals(self, parts: list[list[list[Scored]]]) -> list[Total]:
        """Of every minibatch, added up over all processes in one exchange."""
        weight = self.settings.thought_weight
        counts = []
        for part in parts:
            records = [episode.record for micro in part for episode in micro]
            tokens, weights = sum(map(tokens_of, records)), sum(tokens_weight(record, weight) for record in records)
            counts.append([sum(len(record.turns) for record in records), tokens, weights])
        summed = self.accelerator.reduce(torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device))
        # A minibatch of nothing but empty responses divides its zero sums by one.
        return [Total(*(max(count, 1.0) for count in row)) for row in summed.tolist()]

    def _loss(self, chosen: Sequence[Scored], total: Total, losses: Losses, warm_up: bool, last: bool) -> Tensor:
        """This micro-batch's share of the loss of its minibatch."""
        settings = self.settings
        records = [episode.record for episode in chosen]
        batch = make_batch(records, settings.thought_weight, self.accelerator.device)
        logits = None if warm_up else self._reference_logits(batch, chosen)
        seen: Evaluation = self.model(*batch.inputs(), batch.state_positions, logits)
        loss = seen.values.new_zeros(())
        if settings.has_critic:
            loss = loss + settings.value_coefficient * self._value_term(chosen, seen, total, losses)
        if warm_up:
            return loss
        turns = sum(len(record.turns) for record in records)
        old = torch.cat([episode.logp for episode in chosen])
        fresh, past = (
            ratio_units(logp, batch.weights, batch.turn_index, turns, settings.ratio) for logp in (seen.token_logp, old)
        )
        _note_change(fresh, past, losses)
        if last:
            losses.kl_old += float(sampled_kl(old, seen.token_logp.detach()).double().sum())
            losses.kl_tokens += len(old)
        if settings.reward == "task":
            loss = loss + self._policy_term(chosen, fresh, past, total, losses)
            loss = loss - settings.entropy_coefficient * seen.entropy.sum() / total.tokens
        if seen.kl is not None:
            # Per unit of the policy term, or the coefficient would mean less the longer the responses are.
            loss = loss + settings.kl_coefficient * seen.kl.sum() / self._divisor(total)
        return loss

    def _value_term(self, chosen: Sequence[Scored], seen: Evaluation, total: Total, losses: Losses) -> Tensor:
        values = self._tensor([episode.values for episode in chosen])
        returns = self._tensor([episode.returns for episode in chosen])
        term = value_loss(seen.values, values, returns, self.settings.value_clip, total.turns)
        losses.value += float(term.detach())
        return term

    def _policy_term(self, chosen: Sequence[Scored], fresh: Units, past: Units, total: Total, losses: Losses) -> Tensor:
        settings = self.settings
        advantages = self._tensor([episode.advantages for episode in chosen])[fresh.turn]
        result = policy_loss(
            fresh.log_probs,
            past.log_probs,
            advantages,
            settings.clip,
            settings.ratio_limit,
            fresh.weight,
            self._divisor(total),
        )
        losses.policy += float(result.loss.detach())
        losses.clipped += int(result.clipped.sum())
        losses.units += len(result.clipped)
        return result.loss

    def _divisor(self, total: Total) -> float:
        """What makes the policy term a mean: turns, or tokens by their weights."""
        return total.turns if self.settings.ratio == "turn" else total.weights

    def _reference_logits(self, batch: Batch, chosen: Sequence[Scored]) -> Tensor | None:
        """Those kept from scoring, or computed again; None where the loss has no KL term."""
        if self.reference is None or self.settings.kl_where != "loss":
            return None
        kept = [episode.reference for episode in chosen if episode.reference is not None]
        return torch.cat(kept) if len(kept) == len(chosen) else self.reference.logits(*batch.inputs())

    def _tensor(self, parts: Sequence[Any]) -> Tensor:
        """(turns,) float32 on the device, joined from arrays of the episodes."""
        return torch.tensor(np.concatenate(parts), dtype=torch.float32, device=self.accelerator.device)

    def _step(self, loss: Tensor, losses: Losses, index: int) -> None:
        """Backward pass; with the last micro-batch of a minibatch also the optimiser step."""
        self._check_finite("the loss", loss.detach(), index)
        # accelerate averages over processes and divides by the number of micro-batches; each is a share already.
        processes, micro_batches = self.accelerator.num_processes, self.accelerator.gradient_accumulation_steps
        self.accelerator.backward(loss * processes * micro_batches)
        if self.accelerator.sync_gradients:
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            norm = self.accelerator.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf)
            if norm is not None:  # DeepSpeed clips by itself and tells it only after the step
                self._check_finite("the gradient's norm", norm, index)
                losses.gradient_norms.append(float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _check_finite(self, what: str, value: Tensor, index: int) -> None:
        if not math.isfinite(float(value)):
            raise UserError(
                f"{what} is {float(value)} in update {index + 1} of {self.label}; lower ppo.change.learning_rate in "
                "params.yaml (the last saved state is intact)."
            )


def _note_change(fresh: Units, past: Units, losses: Losses) -> None:
    """Before the first step nothing has changed, so how far ratios are from 1 tells the rounding of the two passes."""
    if losses.minibatches == 0 and len(past.log_probs):
        deviation = (fresh.log_probs.detach() - past.log_probs).expm1().abs().max()
        losses.first_deviation = max(losses.first_deviation, float(deviation))
