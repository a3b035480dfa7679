"""Which branches may stand for RL, on made-up training curves."""

from __future__ import annotations

import polars as pl
import pytest

from rlheals.reporting.premises import FLAT, FULL, UNKNOWN, WORSE, premise_of

UPDATES = 24


def branch(rates, warm=2, **key):
    columns = {"profile": "mini", "model": "tiny", "seed": 0, "arm": "ppo", "checkpoint_step": 40} | key
    rows = [
        {"update": update, "episodes": 128, "solved_rate": rate, "reward_mean": 6 * rate - 1, "reward_std": 2.0}
        | {"learning_rate": 0.0 if update <= warm else 2e-4, "kl_old": 0.0, **columns}
        for update, rate in enumerate(rates, 1)
    ]
    return pl.DataFrame(rows)


def steps(before, after):
    """Rates that change where the moved policy first plays: in update 4, after two of warm-up and the first step."""
    return [before if update < 4 else after for update in range(1, UPDATES + 1)]


# Standard error around one half: root of (.25 / 386 + .25 / 642), which is .032.
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (0.5, 0.6, ""),
        (0.5, 0.57, ""),
        (0.5, 0.56, FLAT),
        (0.5, 0.5, FLAT),
        (0.5, 0.49, WORSE),
        (0.5, 0.2, WORSE),
        (0.96, 0.97, FULL),
        (0.96, 0.95, WORSE),
        (0.96, 1.0, ""),
    ],
)
def test_the_reward_has_to_rise_beyond_chance(before, after, expected):
    assert premise_of(branch(steps(before, after)))("tiny", 0, "ppo", 40) == expected


def test_an_early_fall_counts_though_the_last_third_is_above_the_first():
    rates = [0.9] * 3 + [0.3] * 10 + [0.6] * 11
    assert sum(rates[-8:]) > sum(rates[:8])
    assert premise_of(branch(rates))("tiny", 0, "ppo", 40) == WORSE


def test_a_branch_that_cannot_be_judged_is_no_test():
    assert premise_of(branch([0.5], warm=0))("tiny", 0, "ppo", 40) == UNKNOWN


def test_branches_are_told_apart_and_rows_may_come_in_any_order():
    good, bad = branch(steps(0.2, 0.8), seed=1), branch(steps(0.8, 0.2), arm="grpo")
    premise = premise_of(pl.concat([bad, good.reverse()]))
    assert premise("tiny", 1, "ppo", 40) == ""
    assert premise("tiny", 0, "grpo", 40) == WORSE
