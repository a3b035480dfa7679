"""The manipulation check against SciPy, by hand, and on the study's own committed curves."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from rlheals.reporting.schemas import SCHEMAS
from rlheals.training.ppo.checks import ERROR, OK, WARNING
from rlheals.training.ppo.manipulation import reward_change, reward_changes

COMMITTED = Path(__file__).parents[3] / "reports" / "mini-confirm" / "tables" / "rl_training.parquet"
BRANCH = {"profile": "mini", "model": "tiny", "seed": 0, "checkpoint_step": 40, "arm": "ppo"}


def curve(solved: list[float], warm_up: int = 2, episodes: int = 128, **columns: Any) -> pl.DataFrame:
    """A run whose policy stands still in its first ``warm_up`` updates; its reward is 5 a solved episode, else -1."""
    rows = [
        {
            **BRANCH,
            "update": place + 1,
            "episodes": episodes,
            "solved_rate": share,
            "reward_mean": 6 * share - 1,
            "reward_std": 6 * math.sqrt(share * (1 - share)),
            "learning_rate": 0.0 if place < warm_up else 2e-4,
            **columns,
        }
        for place, share in enumerate(solved)
    ]
    return pl.DataFrame(rows, schema=SCHEMAS["rl_training"])


@pytest.mark.parametrize(
    ("solved", "level", "verdict"),
    [
        ([0.8] * 3 + list(np.linspace(0.8, 0.95, 21)), OK, "raised its reward"),
        ([0.8] * 3 + [0.6] * 21, ERROR, "made its reward worse"),  # at once: thirds compare .69 with .6
        ([0.8] * 3 + [0.85] * 15 + [0.6] * 6, ERROR, "made its reward worse"),  # late, after a rise
        ([0.8] * 24, WARNING, "did not raise its reward"),
        ([0.96] * 24, OK, "had little left to raise"),
        ([1.0] * 24, OK, "had little left to raise"),
        ([0.97] * 3 + [1.0] * 21, OK, "raised its reward"),
        ([0.97] * 3 + [0.9] * 21, ERROR, "made its reward worse"),
        ([0.0] * 24, WARNING, "did not raise its reward"),
    ],
)
def test_level_of_a_curve(solved: list[float], level: str, verdict: str) -> None:
    found = reward_change(curve(solved))
    assert found is not None
    assert (found.level, found.verdict) == (level, verdict)


def test_windows_are_the_unmoved_policys_updates_and_the_last_five() -> None:
    """Update 3 takes the first step, after its episodes were played: it still belongs to the group before."""
    solved = [0.5, 0.6, 0.7, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    found = reward_change(curve(solved).sample(fraction=1, shuffle=True, seed=0))
    assert found is not None
    assert (found.first_moving_update, found.updates_before, found.updates_after, found.last_update) == (3, 3, 5, 10)
    assert found.before == pytest.approx(0.6)
    assert found.after == pytest.approx(0.4)
    assert found.reward.change == pytest.approx(-1.2)


def test_standard_errors_by_hand() -> None:
    """0.5 of 256 and 0.25 of 128, one success and one failure added to each; the reward's is the plain one."""
    found = reward_change(curve([0.5, 0.5, 0.25], warm_up=1))
    assert found is not None
    first, second = 129 / 258, 33 / 130
    expected = math.sqrt(first * (1 - first) / 258 + second * (1 - second) / 130)
    assert found.standard_error == pytest.approx(expected, rel=1e-12)
    plain = math.sqrt(36 * 0.25 / 256 + 36 * 0.1875 / 128)
    assert found.reward.standard_error == pytest.approx(plain, rel=1e-12)


def test_standard_error_matches_a_simulation() -> None:
    """The spread of the change over 4,000 simulated runs is what one run says of itself."""
    draws = np.random.default_rng(0)
    before, after = draws.binomial(384, 0.84, 4000) / 384, draws.binomial(640, 0.88, 4000) / 640
    found = reward_change(curve([0.84] * 3 + [0.88] * 5))
    assert found is not None
    assert found.standard_error == pytest.approx(float(np.std(after - before)), rel=0.05)


def test_false_alarms_are_as_rare_as_two_standard_errors_say() -> None:
    """A flat run: 2.3 % fall by chance (of 400 runs 9, over 17 once in 200 trials), also where nearly all is solved."""
    draws = np.random.default_rng(1)
    for share in (0.5, 0.84, 0.98):
        counts = draws.binomial(64, share, (400, 8)) / 64
        levels = Counter(found.level for found in map(reward_change, map(_rows, counts)) if found)
        assert levels[ERROR] <= 17, share


def _rows(solved: Any) -> pl.DataFrame:
    return curve(list(solved), episodes=64)


def test_an_episode_of_a_group_is_no_observation_of_its_own() -> None:
    """GRPO plays 8 episodes on a hand: 128 episodes are 16 hands, so .87 -> .80 may be chance."""
    solved = [0.87] * 3 + [0.8] * 5
    single, grouped = reward_change(curve(solved)), reward_change(curve(solved, arm="grpo"))
    assert single is not None
    assert grouped is not None
    assert (single.level, grouped.level) == (ERROR, WARNING)
    assert grouped.reward.standard_error == pytest.approx(single.reward.standard_error * math.sqrt(8), rel=1e-12)


@pytest.mark.parametrize(
    "rows",
    [
        curve([0.8], warm_up=0),  # its step is never played
        curve([0.8, 0.7, 0.6], warm_up=3),  # never moves
        curve([0.8] * 10, arm="kl_only"),
        curve([0.8] * 10).with_columns(solved_rate=pl.lit(None, pl.Float64)),
        curve([math.nan] * 10),
        curve([0.8] * 10).with_columns(learning_rate=pl.lit(None, pl.Float64)),
    ],
)
def test_nothing_is_judged_where_nothing_can_be(rows: pl.DataFrame) -> None:
    assert reward_change(rows) is None


def test_two_updates_are_enough() -> None:
    found = reward_change(curve([0.9, 0.3], warm_up=0))
    assert found is not None
    assert (found.updates_before, found.updates_after, found.level) == (1, 1, ERROR)


def test_a_table_without_learning_rates_is_read_by_its_divergence() -> None:
    rows = curve([0.5, 0.5, 0.5, 0.9, 0.9]).with_columns(
        learning_rate=pl.lit(None, pl.Float64), kl_old=pl.Series([0.0, 0.0, 0.01, 0.01, 0.01])
    )
    found = reward_change(rows)
    assert found is not None
    assert (found.first_moving_update, found.level) == (3, OK)


def test_an_unknown_reward_does_not_hide_the_share() -> None:
    found = reward_change(curve([0.9] * 3 + [0.3] * 5).with_columns(reward_mean=pl.lit(None, pl.Float64)))
    assert found is not None
    assert math.isnan(found.reward.change)
    assert found.level == ERROR


def test_the_committed_branches() -> None:
    """None of the 36 branches with a reward from step 40 or later raised it; from 10 and 12 most learn the format."""
    found = list(reward_changes(pl.read_parquet(COMMITTED)))
    late = [(key["arm"], change) for key, change in found if int(key["checkpoint_step"]) >= 40]
    early = [(key["arm"], change) for key, change in found if int(key["checkpoint_step"]) < 40]
    assert len(late) == 36
    assert all(change.change < 0 for _, change in late)
    assert np.mean([change.change for _, change in late]) == pytest.approx(-0.111, abs=5e-4)
    assert max(change.change for _, change in late) == pytest.approx(-0.002, abs=5e-4)
    assert not any(change.solved.rises or change.reward.rises for _, change in late)
    assert {change.first_moving_update for _, change in late} == {3}
    falls = Counter(arm for arm, change in late if change.reward.falls)
    assert falls == {"ppo": 6, "reinforce": 6, "reward_only": 8, "grpo": 9}
    assert Counter(arm for arm, change in late if change.level == ERROR) == {
        "ppo": 6,
        "reinforce": 5,
        "reward_only": 8,
        "grpo": 9,
    }
    rises = Counter(arm for arm, change in early if change.reward.rises)
    assert rises == {"ppo": 5, "reinforce": 6, "reward_only": 5, "grpo": 1}
