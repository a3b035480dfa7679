"""The manipulation check of an RL branch: did it raise its own reward?

A branch that does not raise what it is rewarded for says nothing about what RL does to anything else, so claims about
RL may only be read where this check passes. It compares the share of solved episodes, on the branch's own hands under
the rule it trains on, in the last updates with that in the updates the unmoved policy played. Thirds of a run are the
wrong windows: steps that are too large cost most of the reward in the first few, and the first third already holds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from rlheals.training.ppo.checks import ERROR, OK, WARNING

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = ("profile", "model", "seed", "checkpoint_step", "arm")
NO_REWARD_ARM = "kl_only"
GROUPED_ARM = "grpo"
GROUP = 8
"""Episodes `GROUPED_ARM` plays on one hand; TRL's default."""
LAST_UPDATES = 5
STANDARD_ERRORS = 2.0
"""Changes up to this many standard errors are taken for chance."""
SATURATED = 0.95
"""A start that solves more than this has little left to raise, so it need not rise."""


@dataclass(frozen=True)
class Change:
    """Means of a series in two groups of updates.

    Attributes:
        before: mean over the episodes the unmoved policy played.
        after: mean over the episodes of the later group.
        standard_error: of ``after - before``.
    """

    before: float
    after: float
    standard_error: float

    @property
    def change(self) -> float:
        """``after - before``."""
        return self.after - self.before

    @property
    def rises(self) -> bool:
        """Whether the change is above `STANDARD_ERRORS` standard errors."""
        return self.change > STANDARD_ERRORS * self.standard_error

    @property
    def falls(self) -> bool:
        """Whether the change is below minus `STANDARD_ERRORS` standard errors."""
        return self.change < -STANDARD_ERRORS * self.standard_error


@dataclass(frozen=True)
class RewardChange:
    """What a branch did to its own reward.

    Attributes:
        solved: share of solved episodes, which the check judges.
        reward: mean reward of an episode, told beside it; NaN where the table has none.
        first_moving_update: the first update, counted from 1, whose steps move the policy. Its own episodes were played
            before them, so it is the last one of the group before.
        updates_before: updates in the group before.
        updates_after: updates in the group after, `LAST_UPDATES` or fewer.
        last_update: number of the last update.
    """

    solved: Change
    reward: Change
    first_moving_update: int
    updates_before: int
    updates_after: int
    last_update: int

    @property
    def before(self) -> float:
        """Share of solved episodes before the policy moves."""
        return self.solved.before

    @property
    def after(self) -> float:
        """Share of solved episodes in the last updates."""
        return self.solved.after

    @property
    def change(self) -> float:
        """``after - before``."""
        return self.solved.change

    @property
    def standard_error(self) -> float:
        """Of `change`."""
        return self.solved.standard_error

    @property
    def level(self) -> str:
        """Error when the share falls; warning when it does not rise although the start leaves room; else ok."""
        if self.solved.falls:
            return ERROR
        return OK if self.solved.rises or self.before > SATURATED else WARNING

    @property
    def verdict(self) -> str:
        """The level in words a report can print."""
        if self.level == OK and not self.solved.rises:
            return "had little left to raise"
        words = {OK: "raised its reward", WARNING: "did not raise its reward", ERROR: "made its reward worse"}
        return words[self.level]


def reward_change(rows: pl.DataFrame) -> RewardChange | None:
    """Did this branch raise its own reward?

    Args:
        rows: rows of schema ``rl_training`` of one branch, in any order.

    Returns:
        None where there is nothing to judge: an arm without reward, a policy that never moves, no update after the
        first one that moves it (its effect is then never played), or no known share of solved episodes.
    """
    windows = windows_of(rows)
    if windows is None or rows["arm"][0] == NO_REWARD_ARM:
        return None
    before, after = windows[0], windows[1].tail(LAST_UPDATES)
    return RewardChange(
        solved=solved_change(before, after),
        reward=_mean_change(before, after),
        first_moving_update=first_moving_update(rows) or 0,
        updates_before=before.height,
        updates_after=after.height,
        last_update=int(after["update"][-1]),
    )


def reward_changes(training: pl.DataFrame) -> Iterator[tuple[dict[str, str | int], RewardChange]]:
    """Key (`KEYS`) and `reward_change` of every branch in ``training`` that can be judged, in order of appearance."""
    for rows in training.partition_by(KEYS, maintain_order=True):
        found = reward_change(rows)
        if found is not None:
            yield rows.select(KEYS).row(0, named=True), found


def windows_of(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame] | None:
    """Updates the unmoved policy played and those behind them, each sorted; None when either has no row.

    An update plays before it takes its steps, so the first one that moves the policy belongs to the former. Updates
    whose share of solved episodes is unknown are left out.
    """
    first = first_moving_update(rows)
    if first is None:
        return None
    ordered = rows.filter(pl.col("solved_rate").is_finite()).sort("update")
    before, after = ordered.filter(pl.col("update") <= first), ordered.filter(pl.col("update") > first)
    return None if before.is_empty() or after.is_empty() else (before, after)


def first_moving_update(rows: pl.DataFrame) -> int | None:
    """The first update with a learning rate above zero; None when there is none.

    A table without learning rates is read by its ``kl_old``, which is zero until the policy moves.
    """
    known = "learning_rate" if rows["learning_rate"].null_count() < rows.height else "kl_old"
    moving = rows.filter(pl.col(known) > 0)["update"].to_list()
    return min(moving, default=None)


def solved_change(before: pl.DataFrame, after: pl.DataFrame) -> Change:
    """Change of the share of solved episodes between two groups of updates.

    The standard error is binomial, from shares to which one solved and one unsolved observation were added (Agresti
    and Caffo 2000), so that a group that solves all or none is not taken for certain. An observation is a hand: the
    episodes of one hand stand or fall together.
    """
    variance = 0.0
    for part in (before, after):
        count, share = float(observations(part).sum()), _mean(part, "solved_rate")
        adjusted = (share * count + 1) / (count + 2)
        variance += adjusted * (1 - adjusted) / (count + 2)
    return Change(_mean(before, "solved_rate"), _mean(after, "solved_rate"), math.sqrt(variance))


def _mean_change(before: pl.DataFrame, after: pl.DataFrame) -> Change:
    """Change of the mean reward; the variance inside an update is ``reward_std`` squared."""
    variance = 0.0
    for part in (before, after):
        counts = observations(part)
        variance += float((part["reward_std"].fill_null(math.nan) ** 2 * counts).sum()) / float(counts.sum()) ** 2
    return Change(_mean(before, "reward_mean"), _mean(after, "reward_mean"), math.sqrt(variance))


def observations(rows: pl.DataFrame) -> pl.Series:
    """Independent observations of each update: its hands."""
    size = GROUP if rows["arm"][0] == GROUPED_ARM else 1
    return rows["episodes"] / size


def _mean(rows: pl.DataFrame, name: str) -> float:
    """Of all episodes in ``rows``; NaN when an update lacks it."""
    return float((rows[name].fill_null(math.nan) * rows["episodes"]).sum()) / float(rows["episodes"].sum())
