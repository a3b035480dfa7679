"""A guessing game and a scripted engine, to test the evaluation code without a real task or model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.inference import Answer, Capabilities, Sampling
from rlheals.reporting.schemas import SCHEMAS
from rlheals.tasks.core import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class SumEpisode:
    """Say the sum of two numbers; under the training rule the sum of both minus one was right."""

    def __init__(self, first: int, second: int, attempts: int) -> None:
        self.target, self.left = first + second, attempts
        self.prompt = f"sum of {first} {second}"

    def step(self, response: str) -> Turn:
        if not self.left:
            raise RuntimeError("the episode is done")
        self.left -= 1
        readable = response.strip().isdigit()
        solved = readable and int(response) == self.target
        done = solved or not self.left
        return Turn(
            verdict="solved" if solved else "wrong" if readable else "format",
            reward=1.0 if solved else -1.0,
            solved=solved,
            solved_under_training_rule=readable and int(response) == self.target - 1,
            format_error=not readable,
            fields_ok=readable or None,
            done=done,
            feedback=None if done else "wrong again",
        )


class SumTask:
    """The part of `Task` that probes use."""

    name = "sum"
    spec = type("Spec", (), {"feedback": "neutral"})()

    def episode(self, item: str, prompt_format: str, attempts: int, feedback: str) -> SumEpisode:
        return SumEpisode(*json.loads(item), attempts)


@dataclass
class ScriptedEngine:
    """Answers by a function of the decoded conversation; remembers every call."""

    tokenizer: Any
    reply: Callable[[str], str]
    calls: list[list[list[int]]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    name: str = "scripted"
    capabilities: Capabilities = field(default_factory=lambda: Capabilities(False, False, False))

    def generate(self, token_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        self.calls.append([list(row) for row in token_ids])
        self.seeds.append(sampling.seed)
        texts = [self.reply(self.tokenizer.decode(row)) for row in token_ids]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return [Answer(row, text, True) for row, text in zip(ids, texts, strict=True)]

    def swap(self, state_dict: Mapping[str, Any]) -> None:
        raise AssertionError("not asked for")

    def fingerprint(self) -> list[float]:
        return []

    def close(self) -> None:
        pass


def probe_rows(pairs: Sequence[tuple[int, int]], condition: str = "ood", split: str = "select") -> pl.DataFrame:
    """Probe rows of the game, schema ``probes``."""
    rows = [(condition, split, f"{a} {b}", f"{a},{b}", f"sum of {a} {b}", json.dumps([a, b])) for a, b in pairs]
    return pl.DataFrame(rows, schema=SCHEMAS["probes"], orient="row")
