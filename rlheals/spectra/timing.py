"""How long something takes, whatever else the machine does meanwhile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def timed(call: Callable[[], T], device: str) -> tuple[T, float]:
    """What a call gives, and its seconds: of processor time of all threads on a CPU, else of the clock."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    begin = clock()
    return call(), clock() - begin
