"""The doctor's checks of whole curves: did the reward rise, did it fall at once, and what did the gradients do?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from rlheals.training.ppo.checks import CHANGE, ERROR, NOTE, OK, WARNING, Finding
from rlheals.training.ppo.manipulation import (
    GROUP,
    LAST_UPDATES,
    STANDARD_ERRORS,
    reward_change,
    solved_change,
    windows_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    CurveCheck = Callable[[pl.DataFrame], Finding | None]

LEARNING_RATE = CHANGE + "learning_rate"
CERTAIN = 4.0
"""A fall by more than this many standard errors in the first update that the moved policy plays is no chance."""
SPREAD = 1e3
"""Largest over smallest norm of a gradient from which on Adam's steps are far from equal."""
INFORMATIVE = 16
"""Hands with different rewards an update, below which a step follows a handful of them."""


def reward_rises(rows: pl.DataFrame) -> Finding | None:
    """The check of the manipulation, see `rlheals.training.ppo.manipulation`."""
    found = reward_change(rows)
    if found is None:
        return None
    limit = STANDARD_ERRORS * found.standard_error
    told = (
        f"{100 * found.before:.1f} % of the episodes were solved before the policy moved and {100 * found.after:.1f} %"
    )
    causes = {
        OK: "",
        WARNING: f"{told} at the end, no more than chance explains: a branch that does not raise its own reward cannot "
        "say what RL does elsewhere; there were too few updates, or the steps are too small or too large",
        ERROR: f"{told} at the end: the branch made its own reward worse, so it cannot say what RL does elsewhere; the "
        "steps are too large for the gradient's noise",
    }
    parameter = "" if found.level == OK else LEARNING_RATE
    signed = -limit if found.level == ERROR else limit
    return Finding(found.last_update, "reward_rises", found.level, found.change, signed, causes[found.level], parameter)


def drop_after_first_step(rows: pl.DataFrame) -> Finding | None:
    """Whether the first update that the moved policy plays solves less than the unmoved policy did."""
    windows = windows_of(rows)
    if windows is None:
        return None
    before, after = windows[0], windows[1].head(1)
    found = solved_change(before, after)
    sizes = found.change / found.standard_error if found.standard_error else 0.0
    level = ERROR if sizes < -CERTAIN else WARNING if found.falls else OK
    cause = "" if level == OK else "one update cost this much of the reward at once: its steps are too large"
    limit = -(CERTAIN if level == ERROR else STANDARD_ERRORS) * found.standard_error
    parameter = LEARNING_RATE if cause else ""
    return Finding(int(after["update"][0]), "drop_after_first_step", level, found.change, limit, cause, parameter)


def reward_hacking(rows: pl.DataFrame) -> Finding | None:
    """Whether the reward rose while the share of solved episodes did not, from before the policy moved to the end.

    Both changes are compared with their standard errors: the reward must rise by over three, the share by at most one.
    """
    found = reward_change(rows)
    if found is None or not math.isfinite(found.reward.change):
        return None
    gain, limit = found.reward.change, 3 * found.reward.standard_error
    if gain <= limit or found.change > found.standard_error:
        return Finding(found.last_update, "reward_hacking", OK, gain, limit, "", "")
    windows = windows_of(rows)
    assert windows is not None
    first, last = (_mean(part["format_error_rate"]) for part in (windows[0], windows[1].tail(LAST_UPDATES)))
    cause = (
        "the reward rises because fewer answers are unreadable, not because more are right"
        if last < first
        else "the reward rises while the share of solved episodes does not: the policy collects the partial rewards"
    )
    level = WARNING if last < first else ERROR
    return Finding(found.last_update, "reward_hacking", level, gain, limit, cause, CHANGE + "kl_coefficient")


def groups_without_spread(rows: pl.DataFrame) -> Finding | None:
    """Hands an update, on average, whose episodes differ in reward: the others have advantage 0 and teach nothing."""
    known = rows.filter(pl.col("flat_groups").is_finite())
    if known.is_empty():
        return None
    hands = (1 - known["flat_groups"]) * known["episodes"] / GROUP
    mean, update = _mean(hands), int(known["update"][-1])
    if mean >= INFORMATIVE:
        return Finding(update, "groups_without_spread", OK, mean, INFORMATIVE, "", "")
    flat = 100 * _mean(known["flat_groups"])
    cause = (
        f"in {flat:.0f} % of the groups all episodes have the same reward and so no advantage: a step follows the few "
        "hands (value) that are left"
    )
    return Finding(update, "groups_without_spread", WARNING, mean, INFORMATIVE, cause, "ppo.episodes")


def always_clipped(rows: pl.DataFrame) -> Finding | None:
    """The smallest gradient norm of a moving update in multiples of the limit: above 1, clipping only normalises."""
    moving = rows.filter((pl.col("learning_rate") > 0) & (pl.col("grad_norm_limit") > 0))
    norms = moving.select(pl.coalesce("grad_norm_low", "grad_norm") / pl.col("grad_norm_limit")).to_series()
    if norms.is_empty() or norms.null_count() == len(norms):
        return None
    least, update = float(np.nanmin(norms.to_numpy())), int(moving["update"][norms.arg_min() or 0])
    if least <= 1:
        return Finding(update, "always_clipped", OK, least, 1.0, "", "")
    cause = (
        "every gradient was longer than the limit it is clipped to, so the limit sets the length of all steps and is "
        "no safety net"
    )
    return Finding(update, "always_clipped", NOTE, least, 1.0, cause, CHANGE + "max_grad_norm")


def gradient_spread(rows: pl.DataFrame) -> Finding | None:
    """Largest over smallest norm of a gradient while the policy moves."""
    moving = rows.filter(pl.col("learning_rate") > 0)
    low = moving.select(pl.coalesce("grad_norm_low", "grad_norm")).to_series().drop_nulls()
    high = moving.select(pl.coalesce("grad_norm_high", "grad_norm")).to_series().drop_nulls()
    low = low.filter(low > 0)
    if low.is_empty():
        return None
    spread, update = float(high.to_numpy().max() / low.to_numpy().min()), int(moving["update"][-1])
    if spread <= SPREAD:
        return Finding(update, "gradient_spread", OK, spread, SPREAD, "", "")
    cause = (
        "gradients differ by orders of magnitude, and Adam answers a large one after small ones with steps of several "
        "times the rate"
    )
    return Finding(update, "gradient_spread", WARNING, spread, SPREAD, cause, LEARNING_RATE)


def _mean(values: pl.Series) -> float:
    return float(values.to_numpy().mean())


REWARD_CURVE_CHECKS: tuple[CurveCheck, ...] = (
    reward_rises,
    drop_after_first_step,
    reward_hacking,
    groups_without_spread,
)
"""Checks of the reward's curve; they mean nothing in an arm without reward."""
GRADIENT_CHECKS: tuple[CurveCheck, ...] = (always_clipped, gradient_spread)
