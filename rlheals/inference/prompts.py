"""Prompts every engine refuses in the same words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


LARGER_CONTEXT = (
    "raise inference.max_context if that is what limits it, or use a model with a larger max_position_embeddings"
)
"""What to do where the shorter of both contexts is too short."""


def check_prompts(token_ids: Sequence[Sequence[int]], context: int, vocabulary: int) -> None:
    """Make sure that every prompt has tokens, all of them the model's, and leaves room for an answer.

    Args:
        token_ids: prompts.
        context: longest conversation in tokens.
        vocabulary: rows of the model's embedding.

    Raises:
        UserError: one is not so.
    """
    for row, prompt in enumerate(token_ids):
        if not prompt:
            raise UserError(f"prompt {row} is empty; check the chat template of the tokenizer.")
        if len(prompt) >= context:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens, which leaves no room in the context of {context}; "
                f"shorten it, {LARGER_CONTEXT}."
            )
        if not (min(prompt) >= 0 and max(prompt) < vocabulary):
            raise UserError(
                f"prompt {row} holds token ids outside the model's vocabulary of {vocabulary}; use the tokenizer that "
                "belongs to the model."
            )
