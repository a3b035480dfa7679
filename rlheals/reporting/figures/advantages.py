"""How the advantages of an RL branch are distributed, update by update."""

from __future__ import annotations

import altair as alt
import polars as pl

from rlheals.reporting.figures.charts import per_model
from rlheals.reporting.figures.style import ARMS, MUTED

SHAPE = ["advantage_mean", "advantage_std", "advantage_skew", "advantage_kurtosis", "advantage_positive_share"]


def rl_advantages(advantages: pl.DataFrame, training: pl.DataFrame, arm: str, seed: int) -> alt.TopLevelMixin:
    """Histogram of the advantages of every update, one panel a start, with the mean drawn over it.

    The statistics of shape (mean, standard deviation, skewness, excess kurtosis, share above 0) are in the tooltips.

    Args:
        advantages: the "advantages" table; empty bins are not drawn.
        training: the "rl_training" table, which holds the statistics.
        arm: the arm to draw.
        seed: the run to draw.
    """
    mine = (pl.col("arm") == arm) & (pl.col("seed") == seed)
    keys = ["model", "checkpoint_step", "update"]
    shape = training.filter(mine).select(*keys, *SHAPE)
    share = (pl.col("count") / pl.col("count").sum().over(keys)).alias("share")
    bins = advantages.filter(mine).with_columns(share).filter(pl.col("count") > 0).join(shape, on=keys, how="left")
    cells = bins.with_columns(from_update=pl.col("update") - 0.5, to_update=pl.col("update") + 0.5)

    def draw(part: pl.DataFrame, _: str) -> alt.HConcatChart:
        starts = part["checkpoint_step"].unique().sort().to_list()
        width = max(90, 660 // len(starts) - 22)
        panels = [_panel(part.filter(pl.col("checkpoint_step") == step), step, width) for step in starts]
        return alt.hconcat(*panels, spacing=16).resolve_scale(y="shared", color="shared")

    title = "Advantages of the episodes, update by update"
    return per_model(cells, draw, title, f"arm {ARMS[arm].label}, seed {seed}; line: mean; before normalisation")


def _panel(part: pl.DataFrame, step: int, width: int) -> alt.LayerChart:
    """Rectangles of one start: a column an update, darker where more episodes fall."""
    names = ["from_update", "to_update", "update", "bin_left", "bin_right", "count", "share", *SHAPE]
    cells = alt.Chart(alt.InlineData(values=part.select(names).to_dicts()))
    axis = alt.Axis(grid=False, format="d", tickMinStep=1, tickCount=5)
    tips = [alt.Tooltip("update:Q"), alt.Tooltip("count:Q", title="episodes in the bin")]
    tips += [alt.Tooltip(f"{name}:Q", title=name.removeprefix("advantage_"), format=".2f") for name in SHAPE]
    legend = alt.Legend(title=["share of", "episodes"], format=".0%", orient="right", gradientLength=110)
    rects = cells.mark_rect().encode(
        alt.X("from_update:Q", title="update", axis=axis, scale=alt.Scale(zero=False, nice=False)),
        alt.Y("bin_left:Q", title="advantage", axis=alt.Axis(tickCount=6)),
        alt.Color("share:Q", scale=alt.Scale(scheme="blues", domain=[0, 1]), legend=legend),
        x2="to_update:Q",
        y2="bin_right:Q",
        tooltip=tips,
    )
    means = part.select("update", "advantage_mean").unique("update").sort("update").to_dicts()
    line = alt.Chart(alt.InlineData(values=means)).mark_line(color="#d55e00", strokeWidth=1.6)
    line = line.encode(alt.X("update:Q"), alt.Y("advantage_mean:Q"))
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=MUTED, strokeDash=[2, 3]).encode(y="zero:Q")
    name = alt.TitleParams(f"RL from step {step}", fontSize=12, fontWeight="normal", offset=6)
    return alt.layer(rects, zero, line).properties(width=width, height=180, title=name)
