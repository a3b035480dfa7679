"""What a task is to the rest of the project: prompts, graded episodes, and the tables a study needs.

A second task is a new folder under ``rlheals/tasks`` that calls `register`; nothing else names a task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import polars as pl
    from pydantic import BaseModel

CONDITIONS = ("id", "id_heldout", "ood", "ood_heldout")
SPLITS = ("select", "confirm")


@dataclass(frozen=True, slots=True)
class Turn:
    """The grade of one response.

    Attributes:
        verdict: reason code, ``"solved"`` on success.
        reward: reward of this turn in the task's own units.
        solved: the response is right under the rule stated in the prompt.
        solved_under_training_rule: the response would be right had the prompt stated the training rule.
        format_error: the response could not be read as an answer at all.
        fields_ok: the echoed fields (for cards: ``number``) agree with the prompt; None when the format has none.
        done: the episode is over, by success or because no attempt is left.
        feedback: text of the next user turn; None when ``done``.
    """

    verdict: str
    reward: float
    solved: bool
    solved_under_training_rule: bool
    format_error: bool
    fields_ok: bool | None
    done: bool
    feedback: str | None


class Episode(Protocol):
    """One multi-turn game: a first prompt, then `step` after each response until ``Turn.done``."""

    @property
    def prompt(self) -> str:
        """Text of the first user turn."""
        ...

    def step(self, response: str) -> Turn:
        """Grade ``response``; never raises on any text. Raises `RuntimeError` once the episode is done."""
        ...


class PromptFormat(Protocol):
    """How an item becomes text. One per audience: the paper's wording for real models, a compact one for tiny ones."""

    name: str
    max_response_tokens: int
    """Upper bound used as the generation budget of one response (tokens of a tokenizer trained on the format)."""

    def prompt(self, cards: Sequence[str], rule: Any) -> str:
        """Text of the first user turn for one hand under ``rule`` (a ``rules.Rule`` for card games)."""
        ...

    def response(self, cards: Sequence[str], rule: Any, solution: Any) -> str:
        """The target answer, ``solution`` as returned by `canonical_solution`."""
        ...

    def canonical_solution(self, values: Sequence[int], target: int) -> Any | None:
        """The one solution used in all corpora for this multiset; None when the format cannot express any."""
        ...

    def feedback(self, turn_code: str, detail: Sequence[str], mode: str) -> str:
        """Text of the user turn after a failed attempt; ``mode`` is leaking, neutral or none."""
        ...


@dataclass(frozen=True, slots=True)
class DatasetSizes:
    """How many rows `Task.build` writes; probe sizes are per condition."""

    sft_rows: int
    rl_prompts: int
    select: int
    confirm: int
    loss_rows: int


@dataclass(frozen=True, slots=True)
class TaskData:
    """Tables of the ``dataset`` stage; see ``rlheals.reporting.schemas`` for their columns."""

    hands: pl.DataFrame
    sft: pl.DataFrame
    rl_prompts: pl.DataFrame
    probes: pl.DataFrame
    loss_sets: pl.DataFrame
    leakage: dict[str, Any]


@runtime_checkable
class Task(Protocol):
    """A verifiable task with an in-distribution and an out-of-distribution condition."""

    name: str
    spec: Any

    def format(self, name: str) -> PromptFormat:
        """The prompt format called ``name``; raises `UserError` naming the known ones."""
        ...

    def build(self, prompt_format: str, sizes: DatasetSizes, seed: int) -> TaskData:
        """All tables of the study; a pure function of its arguments and ``spec``.

        Raises:
            UserError: impossible task (no solvable item), or a leak of held-out items into training rows.
        """
        ...

    def episode(self, item: str, prompt_format: str, attempts: int, feedback: str) -> Episode:
        """A graded episode for ``item``, the JSON payload stored in the probe and RL tables."""
        ...

    def vocabulary(self) -> list[str]:
        """Every word of the compact format, special tokens first; tasks without one raise `UserError`."""
        ...

    def special_words(self) -> dict[str, str]:
        """The vocabulary's special words by role: ``pad``, ``bos``, ``eos``, ``unknown``."""
        ...

    def pretraining_rows(self, mixture: Mapping[str, float], rng: Any, count: int) -> list[list[tuple[str, bool]]]:
        """``count`` rows of the tiny base's synthetic mixture, each a list of (text, trained) segments.

        Segments are words of `vocabulary` separated by spaces, special tokens included; only trained ones carry loss.
        """
        ...


_TASKS: dict[str, tuple[type[BaseModel], Callable[[Any], Task]]] = {}


def register(name: str, spec_model: type[BaseModel], factory: Callable[[Any], Task]) -> None:
    """Make a task known under ``name``: its parameter schema and the factory taking a validated spec."""
    _TASKS[name] = (spec_model, factory)


def task_names() -> Iterator[str]:
    """Names of all registered tasks, sorted."""
    yield from sorted(_TASKS)


def task_spec_model(name: str) -> type[BaseModel]:
    """The parameter schema of the task called ``name``.

    Raises:
        UserError: no such task.
    """
    if name not in _TASKS:
        raise UserError(f"task.name is {name!r}, which is not a known task; use one of: {', '.join(task_names())}.")
    return _TASKS[name][0]


def make_task(spec: Any) -> Task:
    """Build the task a validated spec (which carries its ``name``) describes."""
    return _TASKS[spec.name][1](spec)
