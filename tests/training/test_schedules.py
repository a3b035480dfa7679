from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlheals.training.schedules import schedule

NAMES = st.sampled_from(["constant", "cosine", "paper_log_warmup"])


@given(NAMES, st.integers(0, 50), st.integers(1, 300))
def test_factors_are_shares_of_the_peak(name: str, warmup: int, steps: int) -> None:
    factors = [schedule(name, warmup, steps)(step) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    rising = factors[: min(warmup, steps)]
    assert rising == sorted(rising)


def test_paper_schedule_is_the_logged_one() -> None:
    """lr x ln t / ln 376 for the t-th step (from 1) up to 376, then constant."""
    factor = schedule("paper_log_warmup", 376, 1100)
    for t in (1, 2, 10, 200, 376):
        assert factor(t - 1) == pytest.approx(math.log(t) / math.log(376))
    assert factor(376) == factor(1099) == 1.0


def test_constant_and_cosine() -> None:
    assert [schedule("constant", 4, 9)(step) for step in (0, 1, 3, 4, 8)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = schedule("cosine", 4, 14)
    assert [cosine(step) for step in (0, 3, 4)] == [0.25, 1.0, 1.0]
    assert cosine(9) == pytest.approx(0.5)
    assert 0 < cosine(13) < 0.03


@pytest.mark.parametrize("name", ["constant", "cosine", "paper_log_warmup"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_without_warm_up_the_first_step_has_the_peak(name: str, warmup: int) -> None:
    assert schedule(name, warmup, 100)(0) == 1.0


def test_a_scheduler_object_follows_the_factor() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("paper_log_warmup", 5, 20))
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5 * min(1, math.log(t) / math.log(5)) for t in range(1, 8)])
