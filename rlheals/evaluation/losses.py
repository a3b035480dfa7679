"""Teacher-forced loss: how likely a model finds given answers, in nats a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from rlheals.evaluation.dialogue import EncodedRow

BATCH_TOKENS = 8192


class Loss(NamedTuple):
    """Mean negative log-likelihood of a set of completions and the number of tokens it is a mean over."""

    nll_per_token: float
    tokens: int


def teacher_forced_loss(model: Any, rows: Sequence[EncodedRow], batch_tokens: int = BATCH_TOKENS) -> Loss:
    """Token-weighted mean of -log p over all completion tokens (response and end token) of ``rows``.

    Every token counts once, so long answers weigh more than in a mean of batch means. The model's mode is restored.

    Args:
        model: a Hugging Face causal language model.
        rows: token ids of prompts and completions.
        batch_tokens: padded tokens of a batch.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in _batches(sorted(rows, key=_length), batch_tokens):
            losses = _token_losses(model, batch)
            total += float(losses.double().sum())
            count += len(losses)
    model.train(was_training)
    return Loss(total / count, count)


def _length(row: EncodedRow) -> int:
    return len(row.prompt) + len(row.completion)


def _batches(rows: Sequence[EncodedRow], batch_tokens: int) -> list[list[EncodedRow]]:
    """Cut rows sorted by length into batches of at most ``batch_tokens`` padded tokens (one row at least)."""
    batches: list[list[EncodedRow]] = [[]]
    for row in rows:
        if batches[-1] and (len(batches[-1]) + 1) * _length(row) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _token_losses(model: Any, rows: Sequence[EncodedRow]) -> Tensor:
    """-log p of every completion token of a right-padded batch, flat.

    The head runs on the positions that predict a completion token only; a full (rows, length, vocabulary) array
    would be gigabytes for a real vocabulary.
    """
    width = max(map(_length, rows))
    ids = torch.tensor([[*row.prompt, *row.completion] + [0] * (width - _length(row)) for row in rows])
    starts = torch.tensor([len(row.prompt) for row in rows])[:, None]
    ends = torch.tensor([_length(row) for row in rows])[:, None]
    places = torch.arange(width)[None]
    predicting = (places >= starts - 1) & (places < ends - 1)
    targets = ids.roll(-1, dims=1)[predicting].to(model.device)
    mask = (places < ends).long().to(model.device)
    hidden = model.base_model(input_ids=ids.to(model.device), attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[predicting.to(model.device)]).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
