"""What a `VllmEngine` does when vLLM dies at the worst moments; vLLM itself is not needed."""

from __future__ import annotations

from typing import Any

import pytest

from rlheals.errors import UserError
from rlheals.inference.vllm.engine import VllmEngine


class Scripted(VllmEngine):
    """An engine without vLLM, whose pushes fail as they are told to."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.restarts = self.stopped = 0
        self._state: Any = {}
        self._known = None
        self._start()

    def _start(self) -> None:
        self._llm, self._stop = object(), self.count

    def count(self) -> None:
        self.stopped += 1

    def _push(self, state_dict: Any) -> None:
        if self.failures:
            raise self.failures.pop(0)


def die() -> None:
    raise RuntimeError("a worker was killed")


def test_one_that_dies_again_while_it_gets_its_weights_is_told_and_never_answers_without_them() -> None:
    engine = Scripted(RuntimeError("out of memory"))
    with pytest.raises(UserError, match="died twice, the second time of: out of memory"):
        engine._alive(die)
    assert engine.stopped == 2
    with pytest.raises(UserError, match="is closed"):
        engine._alive(lambda: 1)


def test_one_that_comes_back_with_other_weights_is_closed() -> None:
    engine = Scripted(UserError("does not answer with these weights"))
    with pytest.raises(UserError, match=r"^does not answer with these weights"):
        engine._alive(die)
    with pytest.raises(UserError, match="is closed"):
        engine._alive(lambda: 1)


def test_bad_input_is_no_death() -> None:
    engine = Scripted()

    def refuse() -> None:
        raise UserError("a prompt is empty")

    with pytest.raises(UserError, match="a prompt is empty"):
        engine._alive(refuse)
    assert (engine.restarts, engine.stopped) == (0, 0)
    assert engine._alive(lambda: 1) == 1
