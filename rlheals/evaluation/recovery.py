"""What RL gives back: every RL checkpoint against the rung it started from, on the same hands."""

from __future__ import annotations

from math import expm1, log1p, nan
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from rlheals.errors import UserError
from rlheals.reporting.schemas import SCHEMAS, check
from rlheals.stats import holm, paired_difference, wilson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

STAGE = "rl"
_RUN = ["profile", "model", "seed"]
_PERCENTILES = (0.025, 0.975)
Checkpoint = tuple[int, str, str]
"""Step, cell and condition: what names one set of hands of one run."""


def cell_id(arm: str, update: int) -> str:
    """Name of an RL checkpoint in the column ``cell_id`` of a table of answers."""
    return f"{arm}/{update}"


def arm_and_update(cell: str) -> tuple[str, int]:
    """The inverse of `cell_id`.

    >>> arm_and_update("kl_only/24")
    ('kl_only', 24)
    """
    arm, _, update = cell.rpartition("/")
    return arm, int(update)


def recovery_table(after: pl.DataFrame, before: pl.DataFrame, max_ood: int) -> pl.DataFrame:
    """Accuracy before and after RL, paired on the ``confirm`` hands, first tries only.

    Args:
        after: schema ``answers`` of one run's RL checkpoints (``checkpoint_step`` is the start, see `cell_id`).
        before: schema ``answers`` of the same run's ladder.
        max_ood: the rung SFT_MaxOOD, to which recovery is compared.

    Returns:
        Schema ``recovery``, in the order of ``after``.

    Raises:
        UserError: a start or SFT_MaxOOD was not asked the same hands as an RL checkpoint.
    """
    rungs = _first_tries(before)
    records = []
    for (start, cell, condition), own in _first_tries(after).items():
        at_start, at_peak = (_same_hands(rungs, step, condition, own) for step in (start, max_ood))
        arm, update = arm_and_update(cell)
        run = own.select(_RUN).row(0, named=True)
        names = {"checkpoint_step": start, "arm": arm, "update": update, "condition": condition}
        records.append({**run, **names, **_comparison(own, at_start, at_peak)})
    return check(pl.DataFrame(records, schema=SCHEMAS["recovery"]), "recovery", "the recovery table")


def recovery_windows(
    after: pl.DataFrame, before: pl.DataFrame, repeats: int, seed: int, condition: str = "ood"
) -> pl.DataFrame:
    """The range of starting steps from which RL raises accuracy, for each arm and kept update.

    The interval is a percentile bootstrap over hands: a hand brings its outcomes at all starts along, so what the
    starts have in common does not widen it. It holds the branches fixed; other seeds of RL are another matter. A window
    can always be drawn around a lucky start, so ``best_p_holm`` tells whether its best gain is more than luck.

    Args:
        after: as in `recovery_table`.
        before: as in `recovery_table`.
        repeats: resamples.
        seed: of the resampling.
        condition: the hands to judge by.

    Returns:
        Schema ``recovery_window``; the interval of an edge is over the resamples that have a window.

    Raises:
        UserError: as in `recovery_table`; or two starts were asked different hands.
    """
    rungs = _first_tries(before)
    cells: dict[str, dict[int, pl.DataFrame]] = {}
    for (start, cell, asked), own in _first_tries(after).items():
        if asked == condition:
            cells.setdefault(cell, {})[start] = own
    records = []
    for cell, branches in cells.items():
        steps = sorted(branches)
        starts = [_same_hands(rungs, step, condition, branches[step]) for step in steps]
        for step, other in zip(steps, starts, strict=True):
            _check_hands(other, starts[0], f"starts {steps[0]} and {step}")
        outcomes = [branches[step]["solved"].to_numpy() for step in steps]
        changes = np.stack(outcomes, axis=1).astype(int) - np.stack([s["solved"].to_numpy() for s in starts], axis=1)
        arm, update = arm_and_update(cell)
        names = {"arm": arm, "update": update, "condition": condition}
        p_values = holm([paired_difference(o, s["solved"]).p_value for o, s in zip(outcomes, starts, strict=True)])
        run = branches[steps[0]].select(_RUN).row(0, named=True)
        records.append({**run, **names, **_window_row(steps, changes, p_values, repeats, seed)})
    return check(pl.DataFrame(records, schema=SCHEMAS["recovery_window"]), "recovery_window", "the recovery windows")


class Window(NamedTuple):
    """The first and last SFT step between which RL gains; both NaN when it gains nowhere."""

    opens: float
    closes: float


def find_window(steps: Sequence[int], gains: Sequence[float] | NDArray[np.float64]) -> Window:
    """The unbroken range of positive gains around the largest one.

    An edge between two starts is where the straight line between their gains crosses zero, over log(1 + step), the
    scale of the figures. An edge beyond the first or last start is unknown and told as that start.

    Args:
        steps: starting steps, ascending.
        gains: change of accuracy by RL from each of them.

    >>> [round(edge, 2) for edge in find_window([5, 40, 480], [-0.1, 0.2, 0.1])]
    [10.39, 480.0]
    """
    best = int(np.argmax(gains))
    if gains[best] <= 0:
        return Window(nan, nan)
    left, right = best, best
    while left > 0 and gains[left - 1] > 0:
        left -= 1
    while right < len(steps) - 1 and gains[right + 1] > 0:
        right += 1
    opens = float(steps[0]) if left == 0 else _crossing(steps, gains, left - 1)
    closes = float(steps[-1]) if right == len(steps) - 1 else _crossing(steps, gains, right)
    return Window(opens, closes)


def _crossing(steps: Sequence[int], gains: Sequence[float] | NDArray[np.float64], place: int) -> float:
    """Where the gain changes its sign between a start and the next."""
    a, b = log1p(steps[place]), log1p(steps[place + 1])
    first, second = float(gains[place]), float(gains[place + 1])
    if 0 in (first, second):  # exactly that start, without the rounding of logarithms
        return float(steps[place if first == 0 else place + 1])
    return expm1(a + (b - a) * first / (first - second))


def _window_row(
    steps: Sequence[int], changes: NDArray[np.int64], p_values: Sequence[float], repeats: int, seed: int
) -> dict[str, Any]:
    """The window of ``changes``, shape (hands, starts) of -1, 0 or 1, with its bootstrap."""
    hands = len(changes)
    gains = changes.mean(axis=0)
    found = find_window(steps, gains)
    drawn = np.random.default_rng(seed).multinomial(hands, np.full(hands, 1 / hands), size=repeats)
    resampled = drawn.astype(np.float64) @ changes.astype(np.float64) / hands
    edges = np.array([find_window(steps, row) for row in resampled])
    edges = edges[~np.isnan(edges[:, 0])]
    ends = np.quantile(edges, _PERCENTILES, axis=0).tolist() if len(edges) else [[None, None], [None, None]]
    exists = found.opens == found.opens
    best = int(np.argmax(gains))
    return {
        "n": hands,
        "starts": len(steps),
        "best_step": steps[best],
        "best_difference": float(gains[best]),
        "best_p_holm": p_values[best],
        "opens": found.opens if exists else None,
        "opens_low": ends[0][0] if exists else None,
        "opens_high": ends[1][0] if exists else None,
        "opens_before_first": exists and bool(gains[0] > 0) and found.opens == steps[0],
        "closes": found.closes if exists else None,
        "closes_low": ends[0][1] if exists else None,
        "closes_high": ends[1][1] if exists else None,
        "closes_after_last": exists and bool(gains[-1] > 0) and found.closes == steps[-1],
        "found_share": len(edges) / repeats,
        "resamples": repeats,
    }


def _comparison(after: pl.DataFrame, start: pl.DataFrame, peak: pl.DataFrame) -> dict[str, Any]:
    """The columns of ``recovery`` from ``n`` on; the three tables hold the same hands in the same order."""
    result = paired_difference(after["solved"], start["solved"])
    counts = result.counts
    lost = float(peak["solved"].mean()) - counts.second / counts.n  # type: ignore[arg-type]
    return {
        "n": counts.n,
        **_share("before", counts.second, counts.n),
        **_share("after", counts.first, counts.n),
        "only_after": counts.only_first,
        "only_before": counts.only_second,
        "difference": result.estimate,
        "difference_low": result.low,
        "difference_high": result.high,
        "p_value": result.p_value,
        "peak": peak["solved"].mean(),
        "recovered": result.estimate / lost if lost > 0 else None,
        "format_error_before": start["format_error"].mean(),
        "format_error_after": after["format_error"].mean(),
    }


def _share(name: str, solved: int, hands: int) -> dict[str, float]:
    low, high = wilson(solved, hands)
    return {name: solved / hands, f"{name}_low": low, f"{name}_high": high}


def _first_tries(answers: pl.DataFrame) -> dict[Checkpoint, pl.DataFrame]:
    """First answers on ``confirm`` of each checkpoint and condition, sorted by hand."""
    rows = answers.filter((pl.col("split") == "confirm") & (pl.col("attempt") == 1))
    groups = rows.partition_by("checkpoint_step", "cell_id", "condition", as_dict=True, maintain_order=True)
    return {(int(key[0]), str(key[1]), str(key[2])): group.sort("hand_id") for key, group in groups.items()}


def _same_hands(rungs: dict[Checkpoint, pl.DataFrame], step: int, condition: str, own: pl.DataFrame) -> pl.DataFrame:
    """First answers of a rung, checked to be about the hands of ``own``."""
    found = rungs.get((step, "", condition))
    if found is None:
        raise UserError(f"probe_sft asked rung {step} no {condition} hands of split confirm; run `dvc repro`.")
    return _check_hands(found, own, f"rung {step} and the RL branches")


def _check_hands(table: pl.DataFrame, other: pl.DataFrame, who: str) -> pl.DataFrame:
    if table["hand_id"].to_list() != other["hand_id"].to_list():
        raise UserError(f"{who} were not asked the same confirm hands, so they cannot be paired; run `dvc repro`.")
    return table
