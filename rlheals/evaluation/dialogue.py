"""The one place where conversations become tokens, for training, losses and generation alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from rlheals.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

# Some templates (Llama 3.2's) print today's date when none is given, which would make runs differ from day to day.
FIXED_DATE = "26 Jul 2024"
_USER, _ASSISTANT, _FEEDBACK = "4", "5", "6"


class EncodedRow(NamedTuple):
    """One supervised example: token ids of the prompt, and of the response with its end token."""

    prompt: list[int]
    completion: list[int]


class Dialogue:
    """Speaks to a model through its tokenizer's chat template.

    A conversation only ever grows: a response's tokens are kept as sampled and the next user turn is appended, so the
    text is never tokenised a second time and log-probabilities of earlier turns stay what they were.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Check the template on a dummy chat.

        Raises:
            UserError: a longer chat does not begin with the tokens of the shorter one, or the template does not end
                a response with the tokenizer's end token.
        """
        self.tokenizer = tokenizer
        lead, suffix = self._around_response(_FEEDBACK)
        pieces = [self._render(_USER), lead + _ASSISTANT, suffix]
        whole = self._ids([self._render(_USER, _ASSISTANT, _FEEDBACK)])[0]
        if [token for piece in self._ids(pieces) for token in piece] != whole:
            raise self._not_prefix_preserving()
        self.encode([(_USER, _ASSISTANT)])

    def prompt_ids(self, user_text: str) -> list[int]:
        """Tokens of a first user turn, up to and including the generation prompt."""
        return self._ids([self._render(user_text)])[0]

    def continuation_ids(self, feedback: str) -> list[int]:
        """Tokens to append after a response without its end token: the end of the turn, then the next user turn.

        The last token is that of the next generation prompt. A response that the token budget cut short is ended by
        the same tokens.
        """
        return self._ids([self._around_response(feedback)[1]])[0]

    def encode(self, rows: Sequence[tuple[str, str]]) -> list[EncodedRow]:
        """Token ids of (prompt text, completion text) rows for teacher forcing.

        The completion ends with the end token; what a template prints behind it (a newline, say) is never generated
        and stays out of the loss.

        Raises:
            UserError: the tokens of the prompt alone are not a prefix of those of the whole row.
        """
        prompts = self._ids([self._render(prompt) for prompt, _ in rows])
        wholes = self._ids([self._render(prompt, completion) for prompt, completion in rows])
        return [self._split(prompt, whole) for prompt, whole in zip(prompts, wholes, strict=True)]

    def _split(self, prompt: list[int], whole: list[int]) -> EncodedRow:
        if whole[: len(prompt)] != prompt:
            raise self._not_prefix_preserving()
        completion = whole[len(prompt) :]
        end = self.tokenizer.eos_token_id
        if end not in completion:
            raise UserError(
                f"{self._where()} does not end a response with the tokenizer's end token "
                f"{self.tokenizer.eos_token!r}, so a model would never learn to stop; set eos_token in "
                "tokenizer_config.json to the token that ends a turn."
            )
        return EncodedRow(prompt, completion[: len(completion) - completion[::-1].index(end)])

    def _around_response(self, feedback: str) -> tuple[str, str]:
        """Template text before (white space at most) and after the response in a chat that goes on with feedback."""
        opening, chat = self._render(_USER), self._render(_USER, _ASSISTANT, feedback)
        rest = chat.removeprefix(opening)
        lead = rest[: len(rest) - len(rest.lstrip())]
        if rest == chat or not rest.lstrip().startswith(_ASSISTANT):
            raise self._not_prefix_preserving()
        return lead, rest.lstrip().removeprefix(_ASSISTANT)

    def _render(self, *turns: str) -> str:
        """Text of a chat that starts with the user and alternates; it ends with the generation prompt if due."""
        roles = ("user", "assistant")
        messages = [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(turns)]
        due = len(turns) % 2 == 1
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=due, date_string=FIXED_DATE
                )
            )
        except Exception as error:  # templates are programs: they raise what they like
            raise UserError(
                f"{self._where()} cannot write a chat of {len(turns)} turns that the user begins "
                f"({type(error).__name__}: {first_line(error)}); repair chat_template.jinja, or take that of the base."
            ) from error

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def _where(self) -> str:
        return f"the chat template of the tokenizer {self.tokenizer.name_or_path or '(unnamed)'}"

    def _not_prefix_preserving(self) -> UserError:
        return UserError(
            f"{self._where()} does not keep the beginning of a chat when turns are added, so multi-turn episodes "
            "and completion-only training would see other tokens than generation; use a template that only appends."
        )
