"""Policy and critic on one backbone: log-probabilities of response tokens and values of states in one forward pass."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from rlheals.evaluation.dialogue import EncodedRow
from rlheals.evaluation.losses import check_head
from rlheals.training.ppo.losses import entropy, full_kl

if TYPE_CHECKING:
    from torch import Tensor

    from rlheals.training.ppo.settings import PpoSettings


class Evaluation(NamedTuple):
    """What one forward pass says about a batch of episodes; float32.

    Attributes:
        token_logp: (tokens,) log-probability of each response token.
        entropy: (tokens,) of the distribution the token was drawn from, in nats.
        values: (states,) of the critic.
        kl: (tokens,) exact KL(policy || reference); None without reference logits.
        logits: (tokens, vocabulary) at the temperature.
    """

    token_logp: Tensor
    entropy: Tensor
    values: Tensor
    kl: Tensor | None
    logits: Tensor


class ActorCritic(nn.Module):
    """A causal language model and a value head beside it, so that either can be saved without the other.

    Args:
        policy: Hugging Face causal language model.
        value_head: from the hidden state of the last prompt token to a value, see `make_value_head`.
        temperature: logits are divided by it.
        detach_value: values send no gradient into the backbone.
        entropy_gradient: entropies send one; without it their intermediate tensors are not kept.
    """

    def __init__(
        self,
        policy: Any,
        value_head: nn.Module,
        temperature: float = 1.0,
        detach_value: bool = False,
        entropy_gradient: bool = True,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = value_head
        self.temperature = temperature
        self.detach_value = detach_value
        self.entropy_gradient = entropy_gradient
        self.config = policy.config.get_text_config()  # DeepSpeed asks for its hidden_size

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        response_positions: Tensor,
        state_positions: Tensor,
        reference_logits: Tensor | None = None,
    ) -> Evaluation:
        """Evaluate a batch; the output head runs at response positions only.

        A wrapper of the module (data-parallel, autocast) acts on this call, so a trainer calls the wrapped module.

        Args:
            ids: (episodes, length) token ids, padded on either side.
            attention_mask: (episodes, length), 0 on padding.
            response_positions: (tokens, 2) row and column of each response token; what predicts it is one column left.
            state_positions: (states, 2) row and column of the last token before each response.
            reference_logits: (tokens, vocabulary) from `Reference.logits`.
        """
        hidden = hidden_states(self.policy, ids, attention_mask)
        logits = head_logits(self.policy, hidden, response_positions, self.temperature)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.entropy_gradient):
            entropies = entropy(logits)
        rows, columns = state_positions.unbind(1)
        states = hidden[rows, columns].float()
        values = self.value_head(states.detach() if self.detach_value else states)[:, 0]
        kl = None if reference_logits is None else full_kl(logits, reference_logits)
        tokens = ids[response_positions[:, 0], response_positions[:, 1]]
        return Evaluation(token_log_probs(logits, tokens), entropies, values, kl, logits)

    def evaluate(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        response_positions: Tensor,
        state_positions: Tensor,
        reference_logits: Tensor | None = None,
    ) -> Evaluation:
        """`forward` with its types."""
        result: Evaluation = self(ids, attention_mask, response_positions, state_positions, reference_logits)
        return result


def make_actor_critic(policy: Any, settings: PpoSettings) -> ActorCritic:
    """The trainable pair for ``policy``, with a fresh critic that is the same for equal sizes and ``critic_seed``.

    Raises:
        UserError: the policy changes its logits after the output head, see `check_head`.
    """
    with torch.no_grad():
        check_head(policy, EncodedRow(list(range(1, 5)), []))
    head = make_value_head(int(policy.config.get_text_config().hidden_size), settings.critic_seed).to(policy.device)
    return ActorCritic(
        policy,
        head,
        temperature=settings.temperature,
        detach_value=settings.detach_value,
        entropy_gradient=settings.entropy_coefficient > 0,
    )


def make_value_head(hidden: int, seed: int) -> nn.Sequential:
    """MLP hidden → hidden/4 → hidden/8 → 1 with ReLU, float32, whose first weights are a function of ``seed`` alone.

    Torch's own initial ranges, from a generator of our own: the global one is neither read nor moved.

    Source: the authors' code.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((hidden, max(hidden // 4, 1), max(hidden // 8, 1), 1)):
        linear = nn.Linear(inputs, outputs, device="meta", dtype=torch.float32).to_empty(device="cpu")
        with torch.no_grad():
            for part in (linear.weight, linear.bias):
                part.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def hidden_states(policy: Any, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last-layer hidden states, (episodes, length, hidden); padding may stand on either side."""
    places = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    outputs = policy.base_model(input_ids=ids, attention_mask=attention_mask, position_ids=places, use_cache=False)
    hidden: Tensor = outputs.last_hidden_state
    return hidden


def head_logits(policy: Any, hidden: Tensor, response_positions: Tensor, temperature: float) -> Tensor:
    """Float32 logits (tokens, vocabulary) that predict the tokens at ``response_positions``.

    Positions are picked before the output head: logits of a whole batch are gigabytes for a real vocabulary.
    """
    rows, columns = response_positions.unbind(1)
    logits: Tensor = policy.get_output_embeddings()(hidden[rows, columns - 1])
    return logits.float() / temperature


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each of ``tokens`` (tokens,) under ``logits`` (tokens, vocabulary)."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
