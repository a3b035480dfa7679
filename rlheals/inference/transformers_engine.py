"""Generation with any Hugging Face causal language model: one batched decode loop over a key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rlheals.inference.cache import make_cache
from rlheals.inference.choose import choose_tokens, penalise, uniform_streams
from rlheals.inference.engine import Capabilities
from rlheals.inference.fingerprint import context_of, fingerprint
from rlheals.inference.prompts import check_prompts
from rlheals.inference.stops import just_stopped, make_answers, stop_tokens
from rlheals.models.checkpoint import check_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from rlheals.inference.engine import Answer, Sampling

KEEP_SHARE = 0.8
"""The batch is cut down to its running rows once they are fewer than this share of it; cutting copies the cache."""


class TransformersEngine:
    """The engine of the machine at hand: greedy and sampled decoding in float32 or bfloat16, on CPU or GPU.

    Answers do not depend on ``batch_size``: rows are padded on the left behind an explicit mask, and sampled rows
    have a random stream each. What remains is the rounding of matrix products, about 1e-6 of a logit in float32,
    which decides only between tokens that are tied to that precision.
    """

    name = "transformers"
    capabilities = Capabilities(swap=True, logprobs=True, seeds=True)

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, device: str = "cpu") -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.context = context_of(model.config)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.stop_tokens = stop_tokens(model.generation_config, tokenizer)

    def generate(self, token_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Answer each prompt, in order.

        A prompt within ``sampling.max_new_tokens`` of the context's end gets the tokens that still fit.

        Raises:
            UserError: a prompt is empty or leaves no room in the model's context.
        """
        check_prompts(token_ids, self.context, self._vocabulary)
        order = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            with torch.inference_mode():
                answers.update(zip(rows, self._answer(rows, token_ids, sampling), strict=True))
        return [answers[row] for row in range(len(token_ids))]

    def swap(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace all weights in place; nothing changes when the state does not fit.

        Raises:
            UserError: a key is missing or unexpected, or a shape differs.
        """
        check_state(
            {name: tuple(tensor.shape) for name, tensor in state_dict.items()}, self.model, "the state to swap in"
        )
        with torch.no_grad():
            own = self.model.state_dict()
            for name, tensor in state_dict.items():
                own[name].copy_(tensor)

    def fingerprint(self) -> list[float]:
        """Log-probabilities of fixed sentinel prompts under the current weights."""
        return fingerprint(self.model)

    def close(self) -> None:
        """Nothing to stop: the model belongs to whoever gave it."""

    def _answer(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Decode one batch and turn its tokens into answers."""
        tokens, lengths, scores = self._decode([token_ids[row] for row in rows], rows, sampling)
        sequences = [sequence[:length] for sequence, length in zip(tokens, lengths, strict=True)]
        return make_answers(self.tokenizer, sequences, scores, self.stop_tokens, sampling.stop)

    def _decode(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int], sampling: Sampling
    ) -> tuple[list[list[int]], list[int], list[list[float]] | None]:
        """Tokens of every row (garbage behind its length), lengths with the end token, and log-probs when asked."""
        device = self.device
        width = max(map(len, prompts))
        room = torch.tensor([min(sampling.max_new_tokens, self.context - len(prompt)) for prompt in prompts])
        steps = int(room.max())
        room = room.to(device)
        stops = torch.tensor(sorted(self.stop_tokens), device=device)
        uniforms = uniform_streams(sampling.seed, rows, steps).to(device) if sampling.temperature > 0 else None
        inputs, mask, positions = (part.to(device) for part in pad_left(prompts, width + steps))
        padded = not bool(mask.all())
        cache = make_cache(self.model.config, width + steps)
        out = torch.zeros(len(prompts), steps, dtype=torch.long, device=device)
        scores = torch.zeros(len(prompts), steps, device=device) if sampling.logprobs else None
        lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
        alive = torch.arange(len(prompts), device=device)  # original place of each row still in the batch
        running = torch.ones(len(prompts), dtype=torch.bool, device=device)
        seen = self._seen(prompts) if sampling.repetition_penalty != 1 else None
        for step in range(steps):
            logits = self.model(
                input_ids=inputs,
                attention_mask=mask[:, : width + step] if padded else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            allowed = logits if seen is None else penalise(logits, seen[alive], sampling.repetition_penalty)
            chosen = choose_tokens(allowed, sampling, uniforms[alive, step] if uniforms is not None else None)
            out[alive, step] = chosen
            if seen is not None:
                seen[alive, chosen] = True
            if scores is not None:
                scores[alive, step] = torch.log_softmax(logits.float(), -1).gather(-1, chosen[:, None])[:, 0]
            lengths[alive] += running
            running = running & ~torch.isin(chosen, stops) & (room[alive] > step + 1)
            if sampling.stop:
                running = running & ~self._stopped(out[alive, : step + 1], sampling.stop)
            left = int(running.sum())
            if not left:
                break
            inputs, positions = chosen[:, None], positions[:, -1:] + 1
            if left < KEEP_SHARE * len(alive):
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                inputs, positions, mask = inputs[keep], positions[keep], mask[keep]
                alive, running = alive[keep], running[keep]
        return out.tolist(), lengths.tolist(), scores.tolist() if scores is not None else None

    def _seen(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(rows, vocabulary) bool: the tokens of each prompt."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=self.device)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(prompt, device=self.device)] = True
        return seen

    def _stopped(self, tokens: Tensor, stop: Sequence[str]) -> Tensor:
        """(rows,) bool: the response holds a stop string since its last token."""
        return torch.tensor([just_stopped(self.tokenizer, row, stop) for row in tokens.tolist()], device=self.device)


def pad_left(prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded ids (rows, width), a mask (rows, capacity) that is 0 on padding only, positions (rows, width).

    The mask covers the tokens still to come, so that each step only takes a longer slice of it.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    padding = torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
    mask = (torch.arange(capacity)[None] >= padding).long()
    positions = (torch.arange(width)[None] - padding).clamp_min(0)
    return ids, mask, positions
