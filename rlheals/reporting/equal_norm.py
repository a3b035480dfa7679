"""Directions beside a plain step of the same norm: what each gives out of distribution, and what it costs in it.

Equal norm is not an equal dose. An edit of some directions moves partly across the way back, a plain step moves along
it, so at the same norm the step gets farther. Whoever compares only OOD accuracy compares two points of one trade-off.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.reporting.repairs import BASE, CONTROL, END
from rlheals.stats import seed_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

STEP = "interpolate"
FAR = 0.2
"""Two doses further apart than this in OOD accuracy say nothing about the doses between them."""
_KEYS = ["model", "seed", "cell_id"]


def steps(cells: pl.DataFrame) -> pl.DataFrame:
    """Every confirmed edit beside the plain steps of its norm.

    Args:
        cells: schema ``cells``, or the published part of it.

    Returns:
        Columns model, seed, cell_id, draw, share_of_way (norm of the edit over the norm of the whole way from the
        target to its reference; null where a swap of the same scope was not run), id_edit, id_step, ood_edit, ood_step,
        id_cost (accuracy that the step costs more than the edit), ood_gain (accuracy that it gives more).
    """
    confirm = cells.filter(pl.col("split") == "confirm")
    edits = confirm.filter((pl.col("group") != CONTROL) & (pl.col("control_of") == ""))
    controls = confirm.filter((pl.col("operator") == STEP) & (pl.col("control_of") != "")).select(
        "model",
        "seed",
        pl.col("control_of").alias("cell_id"),
        "draw",
        pl.col("id_accuracy").alias("id_step"),
        pl.col("ood_accuracy").alias("ood_step"),
    )
    ways = _ways(confirm)
    joined = edits.join(controls, on=_KEYS).join(ways, on=["model", "seed", "reference", "target"], how="left")
    whole = (pl.col("layers") == "all") & (pl.col("modules") == "all")
    return joined.select(
        *_KEYS,
        pl.col("draw_right").alias("draw"),
        pl.when(whole).then(pl.col("change_norm") / pl.col("way")).alias("share_of_way"),
        pl.col("id_accuracy").alias("id_edit"),
        "id_step",
        pl.col("ood_accuracy").alias("ood_edit"),
        "ood_step",
        (pl.col("id_accuracy") - pl.col("id_step")).alias("id_cost"),
        (pl.col("ood_step") - pl.col("ood_accuracy")).alias("ood_gain"),
    ).sort("model", "seed", "cell_id", "draw")


def _ways(confirm: pl.DataFrame) -> pl.DataFrame:
    """Norm of the whole way from a target to a reference, where the swap of all matrices was confirmed."""
    swaps = confirm.filter((pl.col("operator") == "swap") & (pl.col("layers") == "all") & (pl.col("modules") == "all"))
    return swaps.select("model", "seed", "reference", "target", pl.col("change_norm").alias("way"))


def step_curve(cells: pl.DataFrame, model: str, seed: int) -> list[tuple[float, float, float]]:
    """Every confirmed plain step from SFT_End towards the base as (norm, ID, OOD), from no step to the whole way."""
    rows = cells.filter(
        (pl.col("model") == model)
        & (pl.col("seed") == seed)
        & (pl.col("split") == "confirm")
        & (pl.col("reference") == BASE)
        & (pl.col("target") == END)
        & (pl.col("layers") == "all")
        & (pl.col("modules") == "all")
        & pl.col("operator").is_in([STEP, "swap"])
    ).select("change_norm", "id_accuracy", "ood_accuracy", "id_difference", "ood_difference")
    if rows.is_empty():
        return []
    _, accuracy_id, accuracy_ood, change_id, change_ood = rows.row(0)
    start = (0.0, accuracy_id - change_id, accuracy_ood - change_ood)
    return sorted([start, *rows.select("change_norm", "id_accuracy", "ood_accuracy").iter_rows()])


def at_equal_id(curve: Sequence[tuple[float, float, float]], id_edit: float, ood_edit: float) -> float | None:
    """OOD accuracy of an edit minus that of the plain step with the same ID accuracy, on the measured curve.

    The curve is linear between neighbouring doses, so the number describes and tests nothing. None where no two
    neighbours lie around the edit, or where they lie more than `FAR` apart in OOD accuracy.
    """
    for (_, id_near, ood_near), (_, id_far, ood_far) in pairwise(curve):
        if id_far <= id_edit <= id_near and id_far < id_near:
            if abs(ood_far - ood_near) > FAR:
                return None
            share = (id_near - id_edit) / (id_near - id_far)
            return ood_edit - (ood_near + share * (ood_far - ood_near))
    return None


def trade_off(rows: pl.DataFrame) -> str:
    """Why these edits and steps cannot be told apart at equal norm, in words; empty where one of them wins in both.

    Args:
        rows: of `steps`, one edit in several seeds.
    """
    if rows.is_empty():
        return ""
    gain, cost = (seed_mean(rows[name].to_list()).estimate for name in ("ood_gain", "id_cost"))
    if gain * cost <= 0:
        return ""
    more, less = ("the step", "the edit") if gain > 0 else ("the edit", "the step")
    return (
        f"at equal ID: {more} gives {100 * abs(gain):.1f} points more OOD and costs {100 * abs(cost):.1f} points more "
        f"ID than {less}, so the two are different points of one trade-off"
    )


def leading(cells: pl.DataFrame, model: str) -> list[dict[str, Any]]:
    """`steps` of the base's leading directions put into all layers of SFT_End, one row a seed and draw.

    Returns:
        The columns of `steps` and at_equal_id, the OOD accuracy of the edit minus that of a plain step with its ID
        accuracy; None where no such dose was measured.
    """
    chosen = cells.filter(
        (pl.col("model") == model)
        & (pl.col("split") == "confirm")
        & pl.col("contrast")
        & (pl.col("operator") == "directions")
        & (pl.col("reference") == BASE)
        & (pl.col("target") == END)
        & (pl.col("layers") == "all")
        & (pl.col("rank_from") == 0)
        & (pl.col("rank_to") < 1)
    )
    rows = steps(cells).join(chosen, on=_KEYS, how="semi").to_dicts()
    for row in rows:
        curve = step_curve(cells, row["model"], row["seed"])
        row["at_equal_id"] = at_equal_id(curve, row["id_edit"], row["ood_edit"])
    return rows
