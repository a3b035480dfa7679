"""The doctor's checks: a series over the updates of a run, and the limits its worst value must keep.

Limits marked as conventions are those PPO practice settles on; the others follow from what the number means. A rule
reported of the paper's advantage analysis, that 40 to 80 % of the rollouts should be solved, is not among them because
its source is second-hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from numpy.typing import NDArray

OK, NOTE, WARNING, ERROR = LEVELS = ("ok", "note", "warning", "error")
"""A note is a fact to know about a run, not a fault in it."""
CHANGE = "ppo.change."
Series = Callable[[pl.DataFrame], "NDArray[np.float64]"]
"""Values by update (NaN: not judged there) of a branch's rows, which are sorted by update."""


class Finding(NamedTuple):
    """One row of the doctor's table, schema ``doctor`` without the branch's columns.

    Attributes:
        update: where the value was worst.
        check: its name.
        level: one of `LEVELS`.
        value: the worst one.
        limit: the limit that was crossed; of an ok row the first one that could be.
        cause: what brings such a value about; empty in ok rows.
        parameter: what to change; empty in ok rows.
    """

    update: int
    check: str
    level: str
    value: float
    limit: float
    cause: str
    parameter: str


@dataclass(frozen=True)
class Check:
    """A series over updates and the limits its worst value must keep.

    Attributes:
        name: name of the check.
        series: what is judged.
        above: True when large values are bad.
        warning: limit of the level warning.
        error: limit of the level error; None when this number alone never breaks a run.
        cause: what brings such values about, as a sentence without its full stop.
        parameter: what to change.
    """

    name: str
    series: Series
    above: bool
    warning: float
    error: float | None
    cause: str
    parameter: str

    def judge(self, rows: pl.DataFrame) -> Finding | None:
        """The worst update and its level; None when no value is there to judge."""
        values = self.series(rows)
        values = np.where(np.isfinite(values), values, np.nan)
        if np.isnan(values).all():
            return None
        place = int(np.nanargmax(values) if self.above else np.nanargmin(values))
        value, update = float(values[place]), int(rows["update"][place])
        if self.error is not None and self._crossed(value, self.error):
            return Finding(update, self.name, ERROR, value, self.error, self.cause, self.parameter)
        if self._crossed(value, self.warning):
            return Finding(update, self.name, WARNING, value, self.warning, self.cause, self.parameter)
        return Finding(update, self.name, OK, value, self.warning, "", "")

    def _crossed(self, value: float, limit: float) -> bool:
        return value > limit if self.above else value < limit


def column(name: str) -> Series:
    """A column as it is; null becomes NaN."""
    return lambda rows: rows[name].cast(pl.Float64).fill_null(math.nan).to_numpy()


def _size(name: str) -> Series:
    return lambda rows: np.abs(column(name)(rows))


def _first(name: str, positive: bool = False) -> Series:
    """The column at its first known (and, if asked, positive) value only."""

    def series(rows: pl.DataFrame) -> NDArray[np.float64]:
        values = column(name)(rows)
        places = np.flatnonzero(values > 0 if positive else np.isfinite(values))
        kept = np.full_like(values, math.nan)
        kept[places[:1]] = values[places[:1]]
        return kept

    return series


def _summary(reduce: Callable[[NDArray[np.float64]], float], name: str) -> Series:
    """One number for the whole run, told at its last update."""

    def series(rows: pl.DataFrame) -> NDArray[np.float64]:
        values = column(name)(rows)
        told = np.full_like(values, math.nan)
        known = values[np.isfinite(values)]
        told[-1] = reduce(known) if known.size else math.nan
        return told

    return series


def third(values: NDArray[np.float64], last: bool) -> float:
    """Mean of the first or last third, at least one value."""
    size = max(1, len(values) // 3)
    return float(np.mean(values[-size:] if last else values[:size]))


def _end(values: NDArray[np.float64]) -> float:
    return third(values, last=True)


def _rise(values: NDArray[np.float64]) -> float:
    return third(values, last=True) - float(values[0])


def _end_share(values: NDArray[np.float64]) -> float:
    """The end relative to the first update; NaN when there was nothing to lose."""
    return third(values, last=True) / float(values[0]) if values[0] > 0 else math.nan


CHECKS: tuple[Check, ...] = (
    Check(
        "first_ratio",
        column("ratio_max_deviation_first"),
        above=True,
        warning=1e-3,
        error=0.1,
        cause="before any step the policy disagrees with the log-probabilities scored after the rollout: rounding of "
        "bfloat16, dropout, or another temperature in scoring than in training",
        parameter="model.<name>.dtype",
    ),
    Check(
        "engine_ratio",
        column("engine_ratio_deviation"),
        above=True,
        warning=0.3,
        error=2.0,
        cause="the engine that plays gives its tokens other probabilities than the trainer does: bfloat16 at one end, "
        "or weights that did not arrive",
        parameter="ppo.rollouts",
    ),
    Check(
        "first_kl",
        _first("kl_old", positive=True),
        above=True,
        warning=0.05,
        error=0.2,
        cause="the first update carries the policy far from its start, led by a critic that knows nothing yet",
        parameter=CHANGE + "critic_warmup_updates",
    ),
    Check(
        "update_kl",  # a convention: 0.01 to 0.05 is a usual target of KL(old || new) per update
        column("kl_old"),
        above=True,
        warning=0.1,
        error=1.0,
        cause="one update moves the policy further than clipping is meant to allow",
        parameter=CHANGE + "learning_rate",
    ),
    Check(
        "policy_still",
        _summary(lambda values: float(np.max(values)), "kl_old"),
        above=False,
        warning=1e-7,
        error=None,
        cause="the policy does not move: the steps are too small, or warm-up of the critic fills the run",
        parameter=CHANGE + "learning_rate",
    ),
    Check(
        "clip_fraction",  # a convention: 0.1 to 0.3 is usual
        column("clip_fraction"),
        above=True,
        warning=0.3,
        error=0.6,
        cause="most turns hit the clip, so later epochs train on few of them",
        parameter=CHANGE + "learning_rate",
    ),
    Check(
        "explained_variance",
        _summary(_end, "explained_variance"),
        above=False,
        warning=0.0,
        error=-1.0,
        cause="at the end the critic predicts returns worse than their mean does, so it adds noise to the advantages",
        parameter=CHANGE + "critic_learning_rate",
    ),
    Check(
        "entropy_collapse",
        _summary(_end_share, "entropy"),
        above=False,
        warning=0.2,
        error=0.02,
        cause="the entropy fell to a small share of its start: answers no longer vary, so nothing new is tried",
        parameter=CHANGE + "entropy_coefficient",
    ),
    Check(
        "entropy_growth",
        _summary(_end_share, "entropy"),
        above=True,
        warning=3.0,
        error=10.0,
        cause="the entropy grew to a multiple of its start: the policy is losing what it knew",
        parameter=CHANGE + "kl_coefficient",
    ),
    Check(
        "reward_balance_low",
        _summary(lambda values: float(np.mean(values)), "solved_rate"),
        above=False,
        warning=0.1,
        error=0.005,
        cause="hardly any episode is solved, so there is no success to reinforce: the branch starts too early",
        parameter="ppo.starts",
    ),
    Check(
        "reward_balance_high",
        _summary(lambda values: float(np.mean(values)), "solved_rate"),
        above=True,
        warning=0.95,
        error=None,
        cause="nearly every episode is solved, so the reward tells little apart",
        parameter=CHANGE + "temperature",
    ),
    Check(
        "reward_spread",
        column("reward_std"),
        above=False,
        warning=0.05,
        error=1e-6,
        cause="all episodes of an update have the same reward, so every advantage is noise of the critic",
        parameter=CHANGE + "temperature",
    ),
    Check(
        "advantage_skew",
        _size("advantage_skew"),
        above=True,
        warning=2.0,
        error=None,
        cause="a few turns carry most of the gradient on one side; the paper saw such shapes where RL did not heal",
        parameter="ppo.starts",
    ),
    Check(
        "advantage_kurtosis",
        column("advantage_kurtosis"),
        above=True,
        warning=7.0,
        error=None,
        cause="most advantages are near zero and a few are far out, so an update follows a handful of turns",
        parameter="ppo.episodes",
    ),
    Check(
        "advantage_balance",
        lambda rows: np.abs(column("advantage_positive_share")(rows) - 0.5),
        above=True,
        warning=0.45,
        error=None,
        cause="nearly all advantages have the same sign (value: distance of the positive share from one half)",
        parameter="ppo.starts",
    ),
    Check(
        "format_start",
        _first("format_error_rate"),
        above=True,
        warning=0.5,
        error=0.95,
        cause="the start cannot write the answer format yet, so the reward grades little else: it starts too early",
        parameter="ppo.starts",
    ),
    Check(
        "format_collapse",
        _summary(_rise, "format_error_rate"),
        above=True,
        warning=0.1,
        error=0.4,
        cause="the policy forgets the answer format: the pull to the base outweighs the reward, or steps are too large",
        parameter=CHANGE + "kl_coefficient",
    ),
)
