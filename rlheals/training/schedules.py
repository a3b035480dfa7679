"""Learning-rate schedules as factors of the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable

Factor = Callable[[int], float]


def schedule(name: str, warmup_steps: int, steps: int) -> Factor:
    """Factor of the peak learning rate for the optimiser step with 0-based index t.

    - ``constant``: linear warm-up over ``warmup_steps`` steps, then 1.
    - ``cosine``: the same warm-up, then half a cosine that reaches 0 after ``steps`` steps.
    - ``paper_log_warmup``: ln(t + 1) / ln(warmup_steps) up to 1, then 1. This is what the authors' run did: DeepSpeed's
      WarmupLR (logarithmic, 376 steps) replaced the cosine asked for on the command line. The first step has rate 0.

    Raises:
        KeyError: unknown name (params.yaml is validated against the known ones).
    """
    return {"constant": _constant, "cosine": _cosine, "paper_log_warmup": _log_warmup}[name](warmup_steps, steps)


def _constant(warmup_steps: int, steps: int) -> Factor:
    return lambda step: min(1.0, (step + 1) / max(warmup_steps, 1))


def _cosine(warmup_steps: int, steps: int) -> Factor:
    warm = _constant(warmup_steps, steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return warm(step)
        done = min(1.0, (step - warmup_steps) / max(steps - warmup_steps, 1))
        return 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


def _log_warmup(warmup_steps: int, steps: int) -> Factor:
    if warmup_steps < 2:
        return lambda step: 1.0
    return lambda step: min(1.0, math.log(step + 1) / math.log(warmup_steps))
