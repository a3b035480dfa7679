"""Teacher-forced loss: how likely a model finds given answers, in nats a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from rlheals.evaluation.dialogue import EncodedRow

BATCH_TOKENS = 8192
_CHECKED_TOKENS = 8


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

    Raises:
        UserError: the model does more to its hidden states than apply its output head, see `check_head`.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        check_head(model, rows[0])
        for batch in _batches(sorted(rows, key=_length), batch_tokens):
            losses = _token_losses(model, batch)
            total += float(losses.double().sum())
            count += len(losses)
    model.train(was_training)
    return Loss(total / count, count)


def check_head(model: Any, row: EncodedRow) -> None:
    """Refuse a model whose logits are not plainly head(hidden): a scaled or soft-capped head would give wrong losses.

    Raises:
        UserError: the two differ on the first tokens of ``row`` by more than bfloat16 rounding explains.
    """
    ids = torch.tensor([[*row.prompt, *row.completion][:_CHECKED_TOKENS]], device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
    expected = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    found = model.get_output_embeddings()(hidden).float()
    if not expected.isfinite().all():
        return  # a diverged model has no head to check; its loss says so
    if not torch.allclose(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max())):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head (scaling or soft-capping), which the "
            "teacher-forced loss does not do; use an architecture with a plain head, such as Llama or Qwen2."
        )


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
