"""What went wrong in an RL run, read from its tables: every finding names a cause and a parameter to change.

The shape statistics are those of the paper's advantage analysis (arXiv 2509.12235: histograms of the advantages by
starting rung, with measures of their distance from a Gaussian).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from rlheals.errors import UserError
from rlheals.reporting.schemas import SCHEMAS
from rlheals.training.ppo.checks import CHANGE, CHECKS, Finding
from rlheals.training.ppo.checks import ERROR as ERROR
from rlheals.training.ppo.checks import OK as OK
from rlheals.training.ppo.checks import WARNING as WARNING
from rlheals.training.ppo.curve_checks import GRADIENT_CHECKS, REWARD_CURVE_CHECKS
from rlheals.training.ppo.manipulation import KEYS, NO_REWARD_ARM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

REWARD_CHECKS = frozenset({"reward_balance_low", "reward_balance_high", "reward_spread"})
"""Checks that mean nothing in an arm that does not use the reward."""


def diagnose(training: pl.DataFrame) -> pl.DataFrame:
    """Findings of every branch in ``training``.

    Args:
        training: rows of schema ``rl_training``, of one branch or several. Null columns are not judged.

    Returns:
        Schema ``doctor``: one row for each check of each branch: whether the reward rose first, then `CHECKS`, then the
        gradients. Checks without a value to judge have no row.

    Raises:
        UserError: the table has no rows.
    """
    if training.is_empty():
        raise UserError("the table rl_training has no rows, so there is nothing to examine; run the stage ppo first.")
    tables = []
    for branch in training.partition_by(KEYS, maintain_order=True):
        rows = branch.sort("update")
        branch_columns = {key: rows[key][0] for key in KEYS}
        records = [{**branch_columns, **finding._asdict()} for finding in _findings(rows)]
        tables.append(pl.DataFrame(records, schema=SCHEMAS["doctor"]))
    return pl.concat(tables)


def _findings(rows: pl.DataFrame) -> list[Finding]:
    if rows["arm"][0] == NO_REWARD_ARM:
        found = [check.judge(rows) for check in CHECKS if check.name not in REWARD_CHECKS]
    else:
        found = [check(rows) for check in REWARD_CURVE_CHECKS]
        found += [check.judge(rows) for check in CHECKS]
    found += [check(rows) for check in GRADIENT_CHECKS]
    return [finding for finding in (*found, _non_finite(rows)) if finding is not None]


def _non_finite(rows: pl.DataFrame) -> Finding:
    """NaN or infinite cells, at the first update that has one."""
    numbers = rows.select(pl.selectors.float().is_finite().not_().fill_null(value=False))
    counts = numbers.sum_horizontal() if numbers.width else pl.Series([0] * rows.height)
    total = float(counts.sum())
    if not total:
        return Finding(int(rows["update"][-1]), "finite", OK, 0.0, 0.0, "", "")
    place = int((counts > 0).arg_max() or 0)
    cause = "the optimisation diverged: a loss or a statistic is not finite"
    return Finding(int(rows["update"][place]), "finite", ERROR, total, 0.0, cause, CHANGE + "learning_rate")


class Shape(NamedTuple):
    """Shape of a distribution of advantages (the paper's advantage analysis).

    Attributes:
        mean: of the values.
        std: population standard deviation.
        skew: third standardised moment; 0 for a symmetric shape.
        kurtosis: fourth standardised moment minus 3; 0 for a Gaussian.
        positive_share: share of values above 0.
    """

    mean: float
    std: float
    skew: float
    kurtosis: float
    positive_share: float


def shape(values: Sequence[float] | NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> Shape:
    """Shape statistics of ``values`` (n,), optionally with ``weights`` (n,); all zero where nothing varies."""
    data = np.asarray(values, dtype=np.float64)
    share = np.full(len(data), 1 / len(data)) if weights is None else weights / weights.sum()
    mean = float(share @ data)
    centred = data - mean
    std = math.sqrt(float(share @ centred**2))
    scaled = centred / std if std > 0 else np.zeros_like(centred)
    kurtosis = float(share @ scaled**4) - 3 if std > 0 else 0.0
    return Shape(mean, std, float(share @ scaled**3), kurtosis, float(share @ (data > 0)))


def histogram(values: Sequence[float] | NDArray[np.float64], update: int, bins: int = 40) -> list[dict[str, float]]:
    """Rows of the table ``advantages`` for one update: equal bins from the smallest value to the largest."""
    counts, edges = np.histogram(np.asarray(values, dtype=np.float64), bins=bins)
    return [
        {"update": update, "bin_left": float(left), "bin_right": float(right), "count": int(count)}
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def advantage_shapes(advantages: pl.DataFrame) -> pl.DataFrame:
    """Shape statistics per branch and update from a table of schema ``advantages``.

    Returns:
        `KEYS`, update, n, the fields of `Shape` (values taken at the middle of their bins), ``entropy`` (nats, of the
        shares of the bins), ``gaussian_distance`` (Kolmogorov-Smirnov distance at the bin edges from the Gaussian with
        the same mean and standard deviation; 0 when nothing varies) and ``histogram`` (the counts, by bin).
    """
    parts = advantages.sort(*KEYS, "update", "bin_left").partition_by(*KEYS, "update", maintain_order=True)
    keys = {key: advantages.schema[key] for key in (*KEYS, "update")}
    numbers = dict.fromkeys((*Shape._fields, "entropy", "gaussian_distance"), pl.Float64)
    rows = [{**{key: part[key][0] for key in keys}, **_shape_row(part)} for part in parts if part["count"].sum()]
    return pl.DataFrame(rows, schema={**keys, "n": pl.Int64, **numbers, "histogram": pl.List(pl.Int64)})


def _shape_row(part: pl.DataFrame) -> dict[str, Any]:
    left, right, count = (part[name].to_numpy().astype(np.float64) for name in ("bin_left", "bin_right", "count"))
    found = shape((left + right) / 2, count)
    shares = count[count > 0] / count.sum()
    return {
        "n": int(count.sum()),
        **found._asdict(),
        "entropy": -float(shares @ np.log(shares)),
        "gaussian_distance": _gaussian_distance(right, np.cumsum(count) / count.sum(), found),
        "histogram": part["count"].to_list(),
    }


def _gaussian_distance(edges: NDArray[np.float64], shares: NDArray[np.float64], found: Shape) -> float:
    if found.std == 0:
        return 0.0
    normal = [0.5 * (1 + math.erf((edge - found.mean) / (found.std * math.sqrt(2)))) for edge in edges]
    return float(np.max(np.abs(shares - np.array(normal))))
