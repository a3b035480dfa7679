"""Where a response ends, by one rule for every engine: end tokens of the model, and stop strings in its text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlheals.errors import UserError
from rlheals.inference.engine import Answer

if TYPE_CHECKING:
    from collections.abc import Sequence


def stop_tokens(generation_config: Any, tokenizer: Any) -> set[int]:
    """End tokens of the tokenizer and of the model's generation config (chat models list several).

    Raises:
        UserError: there is none.
    """
    declared = getattr(generation_config, "eos_token_id", None)
    found = set(declared if isinstance(declared, list) else [declared]) | {tokenizer.eos_token_id}
    stops = {int(token) for token in found if token is not None}
    if not stops:
        raise UserError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json.")
    return stops


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Text of responses, special tokens left out."""
    texts: list[str] = tokenizer.batch_decode(
        list(map(list, rows)), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop string in ``text`` begins; None where there is none.

    >>> first_stop("a } b ;", [";", "}"]), first_stop("a", ["}"])
    (2, None)
    """
    places = [place for each in stop if (place := text.find(each)) >= 0]
    return min(places, default=None)


def holds_stop(tokenizer: Any, token_ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether the text of a response holds a stop string."""
    return first_stop(decode(tokenizer, [token_ids])[0], stop) is not None


def just_stopped(tokenizer: Any, token_ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether a response whose last token is new now holds a stop string; cheap while it does not.

    Only the end of the text can hold a new one. It is decoded from as many tokens as the longest string can be spread
    over, at up to four bytes a character, and the whole text only to confirm it.
    """
    tail = token_ids[-4 * max(map(len, stop)) - 1 :]
    return holds_stop(tokenizer, tail, stop) and holds_stop(tokenizer, token_ids, stop)


def make_answers(
    tokenizer: Any,
    sequences: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]] | None,
    stop_tokens: set[int],
    stop: Sequence[str],
) -> list[Answer]:
    """Answers of sampled tokens.

    Args:
        tokenizer: decodes them.
        sequences: tokens of each response, with the end token where the model gave one.
        scores: log-probability of each of these tokens, where they were asked for.
        stop_tokens: end tokens.
        stop: stop strings. A response ends with the token that completes the first, and its text before it, however
            far an engine went on.
    """
    ended = [bool(tokens) and tokens[-1] in stop_tokens for tokens in sequences]
    kept = [list(tokens[: len(tokens) - end]) for tokens, end in zip(sequences, ended, strict=True)]
    answers = []
    for row, text in enumerate(decode(tokenizer, kept)):
        tokens, finished, shown = kept[row], ended[row], text
        if stop and first_stop(text, stop) is not None:
            tokens, shown = _cut(tokenizer, tokens, stop)
            finished = False
        count = len(tokens) + finished
        answers.append(Answer(tokens, shown, finished, list(scores[row][:count]) if scores is not None else None))
    return answers


def _cut(tokenizer: Any, token_ids: list[int], stop: Sequence[str]) -> tuple[list[int], str]:
    """The shortest beginning whose text holds a stop string, and that text up to the string."""
    low, high = 1, len(token_ids)  # every beginning longer than the shortest holds it too
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds_stop(tokenizer, token_ids[:middle], stop) else (middle + 1, high)
    text = decode(tokenizer, [token_ids[:low]])[0]
    return token_ids[:low], text[: first_stop(text, stop)]
