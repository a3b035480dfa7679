"""Texts that a model writes by itself, for comparing what models compute where nobody gives texts.

One token of each text is run at a time over the key-value cache (or the recurrent state) that the library keeps for
the model's class, and only the logits of the last place are made: n tokens of a text cost n token forwards, and the
largest thing in memory besides the model is one row of the vocabulary for each text, a few times over. Two of the texts
are then run without a cache: where their tokens have other probabilities, or the library's decoder does not know the
class, all texts are made without one, at the cost of running each text anew for each of its tokens.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from rlheals.errors import UserError
from rlheals.inference.fingerprint import context_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

TEXTS, TOKENS = 64, 48
CHECKED = 2
"""Texts that are run without a cache, too."""
TOLERANCE = 1e-3
"""Largest difference of log-probabilities with and without a cache; rounding makes about 1e-5."""
_TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
"""A conversation in which every token that opens or closes a message occurs more than once."""


def start_of(base: Path) -> int:
    """The `first_token` of the model in folder ``base``.

    Raises:
        UserError: its config describes no model that can be built.
    """
    from rlheals.models.checkpoint import skeleton

    return first_token(skeleton(base).config, _tokenizer(base))


def sample_texts(base: Path, first: int, seed: int, device: str) -> list[list[int]]:
    """Texts that ``base`` writes from a token on, at temperature 1; the same for the same seed and machine.

    Raises:
        UserError: the folder does not load as a causal language model.
    """
    from rlheals.models.checkpoint import load_model

    return sample(load_model(base, "float32", device), first, seed)


def sample(model: Any, first: int, seed: int, texts: int | None = None, tokens: int | None = None) -> list[list[int]]:
    """Texts of so many tokens each (fewer where the context is shorter), ``first`` included.

    Args:
        model: a causal language model in evaluation mode; its generation config is replaced.
        first: token that all of them start with.
        seed: of the draws.
        texts: how many; `TEXTS` where None.
        tokens: of each; `TOKENS` where None.
    """
    start = torch.full((texts or TEXTS, 1), first, dtype=torch.long, device=model.device)
    context = context_of(model.config)
    length = tokens or TOKENS
    new = (min(length, context) if context > 0 else length) - 1  # a config may say -1 for no end
    if new < 1:
        return [[first]] * len(start)
    with torch.inference_mode():
        written = _with_cache(model, start, new, seed)
        if written is None:
            written = _without_cache(model, start, new, seed)
    return [[int(token) for token in row] for row in written.tolist()]


def _with_cache(model: Any, start: Tensor, new: int, seed: int) -> Tensor | None:
    """The texts (texts, 1 + new) by the library's decoder; None where it cannot, or its cache changes the numbers."""
    from transformers import GenerationConfig, LogitsProcessorList

    # What the folder says of sampling and of the end of a response is not to shape the texts.
    model.generation_config = GenerationConfig()
    how = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, disable_compile=True
    )
    draw = _Draw(seed)
    try:
        texts: Tensor = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            generation_config=how,
            logits_processor=LogitsProcessorList([draw]),
        )
    except Exception:  # classes lack one thing or another that the decoder needs, and raise many types
        return None
    if texts.shape != (len(start), 1 + new):
        return None
    checked = texts[:CHECKED]
    logits = model(input_ids=checked, use_cache=False).logits[:, :-1].float().cpu()
    expected = logits.log_softmax(-1).gather(-1, checked[:, 1:, None].cpu())[..., 0]
    found = torch.stack(draw.told, dim=1)[:CHECKED]
    return texts if torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE) else None


def _without_cache(model: Any, start: Tensor, new: int, seed: int) -> Tensor:
    """The same, every text run anew for each of its tokens."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    draw, ids = _Draw(seed), start
    for _ in range(new):
        logits = model(input_ids=ids, use_cache=False, **last_only).logits[:, -1]
        ids = torch.cat([ids, draw(ids, logits).argmax(-1, keepdim=True)], dim=1)
    return ids


class _Draw:
    """Draws each next token with a generator of its own, and leaves the decoder no other choice.

    The library's own sampling draws from the process's global state.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.told: list[Tensor] = []
        """Log-probability of each drawn token, (texts,) for each step."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (texts, vocabulary) that are 0 for the drawn token and -inf for all others."""
        del input_ids
        probabilities = scores.float().cpu().softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=self.generator)
        self.told.append(probabilities.gather(-1, drawn)[:, 0].log())
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn.to(scores.device), 0.0)


def first_token(config: Any, tokenizer: Any = None) -> int:
    """The token that a text of this model starts with: the first of begin, end, padding and unknown that is no marker.

    A chat model's config may name the token that opens each message (``<|im_start|>``) as its begin; a text from there
    on is the model's idea of a chat template, not of a text. Such markers are known by the chat template, which writes
    them more than once into a conversation. Where every candidate is one, or there is none, it is token 0.

    Args:
        config: of the model.
        tokenizer: of the model; None where there is none, so that no token is known as a marker.
    """
    text = config.get_text_config()
    named = [getattr(each, f"{name}_token_id", None) for name in ("bos", "eos", "pad") for each in (text, config)]
    named += [getattr(tokenizer, f"{name}_token_id", None) for name in ("unk", "pad")]
    tokens = [each[0] if isinstance(each, list) and each else each for each in named]
    candidates = [token for token in tokens if type(token) is int and 0 <= token < text.vocab_size]
    markers = _markers(tokenizer)
    return next((token for token in candidates if token not in markers), 0)


def _markers(tokenizer: Any) -> set[int]:
    """Special tokens that the chat template writes more than once into a conversation."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    try:
        ids = tokenizer(tokenizer.apply_chat_template(_TALK, tokenize=False), add_special_tokens=False)["input_ids"]
    except Exception:  # a template may raise anything, and one that cannot write this conversation tells no marker
        return set()
    return {token for token in ids if ids.count(token) > 1}


def _tokenizer(base: Path) -> Any:
    from rlheals.models.checkpoint import load_tokenizer

    try:
        return load_tokenizer(base)
    except UserError:  # the texts need none
        return None
