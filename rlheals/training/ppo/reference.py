"""The frozen model a policy is pulled to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rlheals.errors import UserError
from rlheals.models.checkpoint import load_model
from rlheals.training.ppo.actor_critic import head_logits, hidden_states

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from rlheals.training.ppo.settings import PpoSettings


class Reference:
    """A model in evaluation mode that gets no gradient and is no part of what is trained or saved."""

    def __init__(self, model: Any, temperature: float = 1.0) -> None:
        self.model = model.eval().requires_grad_(False)
        self.temperature = temperature

    @torch.no_grad()
    def logits(self, ids: Tensor, attention_mask: Tensor, response_positions: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) at the response positions; arguments as of `ActorCritic.forward`."""
        hidden = hidden_states(self.model, ids, attention_mask)
        return head_logits(self.model, hidden, response_positions, self.temperature)


def load_reference(
    settings: PpoSettings, policy: Any, base: Path, start: Path, dtype: str = "float32"
) -> Reference | None:
    """Load the model that ``settings.kl_reference`` names, on the device of ``policy``.

    Args:
        settings: a ``kl_coefficient`` of 0 loads nothing.
        policy: the model in training.
        base: folder of the base model.
        start: folder of the rung the branch starts from.
        dtype: type in memory.

    Returns:
        None when the KL term is off.

    Raises:
        UserError: the folder holds no usable model, or one with another vocabulary than the policy's.
    """
    if not settings.kl_coefficient:
        return None
    folder = base if settings.kl_reference == "base" else start
    model = load_model(folder, dtype, str(policy.device))
    sizes = [each.get_output_embeddings().weight.shape[0] for each in (model, policy)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the reference model in {folder} has {sizes[0]} tokens and the policy {sizes[1]}, so their KL is not "
            "defined; set ppo.change.kl_reference to start, or use the base the policy was tuned from."
        )
    return Reference(model, settings.temperature)
