"""What is read of a server's replies: the completions protocol with vLLM's extensions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable


class Card(BaseModel):
    """A model that the server offers; ``parent`` is set for an adapter."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: NonNegativeInt | None = None


class Cards(BaseModel):
    """Reply to ``GET /models``."""

    data: list[Card]


class Logprob(BaseModel):
    """Log-probability of one token."""

    logprob: float


class Logprobs(BaseModel):
    """Log-probabilities of sampled tokens, and of others in their places, under names such as ``token_id:7``."""

    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = []


class Choice(BaseModel):
    """One response; the fields with ``token`` and ``prompt`` in their names are vLLM's."""

    finish_reason: str | None = None
    token_ids: list[NonNegativeInt] | None = None
    prompt_token_ids: list[NonNegativeInt] | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class Completion(BaseModel):
    """Reply to ``POST /completions`` with one prompt."""

    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]


Reply = TypeVar("Reply", bound=BaseModel)


def parse(kind: type[Reply], content: bytes, where: str, clean: Callable[[str], str]) -> Reply:
    """Read a reply.

    Args:
        kind: what it should be.
        content: of the reply.
        where: address of the server.
        clean: makes text of the server fit to be shown.

    Raises:
        UserError: it is something else.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = clean(".".join(map(str, first["loc"]))) or "the whole"
        raise UserError(
            f"{where} answers with something else than the OpenAI protocol has ({place}: {first['msg'].lower()}); "
            "check that inference.engine is the address of an OpenAI-compatible API, usually http://host:8000/v1."
        ) from error


def choose_card(cards: list[Card], folder: str, name: str, where: str, clean: Callable[[str], str]) -> Card:
    """The one base model that is served, or else the one whose id or root is the folder or has its name.

    Args:
        cards: what is served.
        folder: the model's folder on this machine.
        name: last part of that folder's path.
        where: address of the server.
        clean: makes text of the server fit to be shown.

    Raises:
        UserError: none is, or several are.
    """
    base = [card for card in cards if not card.parent]
    if len({card.root or card.id for card in base}) == 1:  # one model may have several names
        return base[0]
    for wanted, part in ((folder, str), (name, _last)):
        found = [card for card in base if wanted in (part(card.id), part(card.root or ""))]
        if len({card.root or card.id for card in found}) == 1:
            return found[0]
    served = clean(", ".join(card.id for card in base)) or "no model"
    raise UserError(
        f"{where} serves {served}, and which of them is {folder} cannot be told; serve that folder alone, or under the "
        f"name {name} (`vllm serve FOLDER --served-model-name {name}`)."
    )


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
