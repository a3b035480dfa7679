"""Figures of estimates with intervals: regret of the selection criteria, and what retries bring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from rlheals.reporting.figures.charts import column, finish, named_panels
from rlheals.reporting.figures.style import CHOICES, CONDITIONS, CRITERIA, MUTED
from rlheals.stats import wilson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.reporting.tables import Choice

TRIES = {"first try": "#8c6bb1", "within {k}": "#00724f"}


def regret(selection: pl.DataFrame) -> alt.TopLevelMixin:
    """OOD accuracy given up by each selection criterion against SFT_MaxOOD, with its paired 95 % interval.

    Args:
        selection: the "selection" table.
    """
    labelled = selection.with_columns(
        pl.col("criterion").replace_strict(CRITERIA, default=pl.col("criterion")).alias("label"),
        pl.format("step {}", "checkpoint_step").alias("pick"),
    )
    models = labelled["model"].unique(maintain_order=True).to_list()
    panels = [_regret_panel(labelled.filter(pl.col("model") == model)) for model in models]
    hands = sorted(set(selection["n"]))
    seeds = selection["seed"].n_unique()
    subtitle = f"confirm split, n = {hands[0]} paired hands; bars: 95 % intervals; number: the rung picked"
    if seeds > 1:
        subtitle += f"; {seeds} seeds, top to bottom"
    return _stack(panels, models, "OOD accuracy given up by each way to pick a rung", subtitle)


def retries(summary: pl.DataFrame, choices: Sequence[Choice]) -> alt.TopLevelMixin | None:
    """First-try accuracy and accuracy within all attempts at SFT_MaxOOD and SFT_End, on ``confirm``.

    Args:
        summary: the "probe_summary" table.
        choices: the two rungs of each run.

    Returns:
        None when no rung was probed with more than one attempt.
    """
    table = retry_table(summary, choices)
    if table.is_empty():
        return None
    models = table["model"].unique(maintain_order=True).to_list()
    panels = [_retry_panels(table.filter(pl.col("model") == model)) for model in models]
    most = int(table["attempts"].max())  # type: ignore[arg-type]
    subtitle = "confirm split; bars: 95 % Wilson intervals; right: share of first failures solved by a later attempt"
    return _stack(panels, models, f"First try and within {most} attempts", subtitle)


def retry_table(summary: pl.DataFrame, choices: Sequence[Choice]) -> pl.DataFrame:
    """First-try and final results of the chosen rungs, with the share of first failures solved later.

    Returns:
        Columns model, seed, rung, checkpoint_step, condition, attempts, n, solved_first, solved_within, failed_first,
        solved_later, later_rate (null when nothing failed), later_low, later_high; one row a run, rung and condition.
    """
    rows = []
    confirm = summary.filter(pl.col("split") == "confirm")
    for choice in choices:
        for rung in CHOICES:
            step = getattr(choice, rung)
            own = confirm.filter(
                (pl.col("model") == choice.model)
                & (pl.col("seed") == choice.seed)
                & (pl.col("checkpoint_step") == step)
            )
            rows += [
                {"model": choice.model, "seed": choice.seed, "rung": rung, "checkpoint_step": step, **row}
                for row in _later(own)
            ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _later(rung: pl.DataFrame) -> list[dict[str, Any]]:
    """One row a condition that was probed with several attempts."""
    rows = []
    for several in rung.filter(pl.col("attempts") > 1).to_dicts():
        once = rung.filter((pl.col("attempts") == 1) & (pl.col("condition") == several["condition"])).row(0, named=True)
        failed, later = several["n"] - once["solved"], several["solved"] - once["solved"]
        low, high = wilson(later, failed)
        rows.append(
            {"condition": several["condition"], "attempts": several["attempts"], "n": several["n"]}
            | {"solved_first": once["solved"], "solved_within": several["solved"], "failed_first": failed}
            | {"solved_later": later, "later_rate": later / failed if failed else None}
            | {"later_low": low, "later_high": high}
        )
    return rows


def _regret_panel(table: pl.DataFrame) -> alt.LayerChart:
    order = [label for label in CRITERIA.values() if label in set(table["label"])]
    several = table["seed"].n_unique() > 1
    y = alt.Y(
        "label:N", sort=order, title=None, axis=alt.Axis(labelLimit=260, domain=False, ticks=False, labelPadding=8)
    )
    offset = {"yOffset": alt.YOffset("seed:N")} if several else {}
    tips = [
        alt.Tooltip("label:N", title="criterion"),
        alt.Tooltip("checkpoint_step:Q", title="picked SFT step"),
        alt.Tooltip("regret:Q", format=".1%"),
        alt.Tooltip("regret_low:Q", title="95 % from", format=".1%"),
        alt.Tooltip("regret_high:Q", title="to", format=".1%"),
        alt.Tooltip("p_value:Q", title="McNemar p", format=".2g"),
        alt.Tooltip("seed:N"),
    ]
    title = "OOD accuracy of SFT_MaxOOD minus that of the pick (percentage points)"
    base = alt.Chart(alt.InlineData(values=table.to_dicts())).encode(y=y, **offset)
    points = alt.Axis(format=".0%", labelExpr="format(datum.value * 100, '~g')", tickCount=7)
    bars = base.mark_rule(strokeWidth=2.2, color="#0072b2").encode(
        alt.X("regret_low:Q", title=title, axis=points), x2="regret_high:Q"
    )
    dots = base.mark_point(size=80, filled=True, color="#0072b2", opacity=1).encode(alt.X("regret:Q"), tooltip=tips)
    text = base.mark_text(align="left", dx=10, fontSize=12, color=MUTED).encode(alt.X("regret_high:Q"), text="pick:N")
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=MUTED, strokeDash=[2, 3]).encode(x="zero:Q")
    return alt.layer(zero, bars, dots, text).properties(width=470, height=alt.Step(18 if several else 40))


def _retry_panels(table: pl.DataFrame) -> alt.VConcatChart:
    panels = []
    for rung, name in CHOICES.items():
        rows = table.filter(pl.col("rung") == rung)
        found = sorted(set(rows["checkpoint_step"]))
        steps = f"step{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"
        panels += named_panels([_retry_panel(rows)], [f"{name} ({steps})"], prefix="")
    return alt.vconcat(*panels, spacing=22)


def _retry_panel(table: pl.DataFrame) -> alt.LayerChart:
    most = table["attempts"].max()
    names = [name.format(k=most) for name in TRIES]
    rows = [
        {
            "condition": CONDITIONS[row["condition"]].label,
            "seed": row["seed"],
            "tries": name,
            "solved": solved,
            "accuracy": solved / row["n"],
            "low": wilson(solved, row["n"]).low,
            "high": wilson(solved, row["n"]).high,
            "n": row["n"],
        }
        for row in table.to_dicts()
        for name, solved in zip(names, (row["solved_first"], row["solved_within"]), strict=True)
    ]
    order = [look.label for key, look in CONDITIONS.items() if key in set(table["condition"])]
    y = alt.Y(
        "condition:N", sort=order, title=None, axis=alt.Axis(domain=False, ticks=False, labelPadding=8, labelLimit=260)
    )
    color = alt.Color(
        "tries:N",
        scale=alt.Scale(domain=names, range=list(TRIES.values())),
        legend=alt.Legend(title=None, orient="top", offset=10),
    )
    x_axis = alt.Axis(format="%", tickCount=5)
    scale = alt.Scale(domain=[0, 1])
    offset = alt.YOffset("tries:N", sort=names, scale=alt.Scale(paddingOuter=0.35))
    base = alt.Chart(alt.InlineData(values=rows)).encode(y=y, yOffset=offset, color=color)
    bars = base.mark_rule(strokeWidth=2).encode(
        alt.X("low:Q", title="solved (% of hands)", axis=x_axis, scale=scale), x2="high:Q"
    )
    tips = [
        alt.Tooltip("condition:N"),
        alt.Tooltip("tries:N"),
        alt.Tooltip("accuracy:Q", format=".1%"),
        alt.Tooltip("low:Q", title="95 % from", format=".1%"),
        alt.Tooltip("high:Q", title="to", format=".1%"),
        alt.Tooltip("n:Q", title="hands"),
        alt.Tooltip("seed:N"),
    ]
    dots = base.mark_point(size=70, filled=True, opacity=0.9).encode(alt.X("accuracy:Q"), tooltip=tips)
    return alt.layer(bars, dots, _later_text(table, y)).properties(width=430, height=alt.Step(17))


def _later_text(table: pl.DataFrame, y: alt.Y) -> alt.Chart:
    """Right of the plot: how many first failures a later attempt solved, all seeds together."""
    pooled = table.group_by("condition", maintain_order=True).agg(pl.col("failed_first", "solved_later").sum())
    rows = [
        {
            "condition": CONDITIONS[row["condition"]].label,
            "text": f"{100 * row['solved_later'] / row['failed_first']:.1f} % of {row['failed_first']}"
            if row["failed_first"]
            else "no failures",
        }
        for row in pooled.to_dicts()
    ]
    text = alt.Chart(alt.InlineData(values=rows)).mark_text(align="left", dx=14, fontSize=13)
    return text.encode(y=y, x=alt.value(430), text="text:N")


def _stack(panels: list[Any], models: list[str], title: str, subtitle: str) -> alt.TopLevelMixin:
    if len(models) == 1:
        return finish(panels[0], title, f"model {models[0]}; {subtitle}")
    return finish(column(named_panels(panels, models), 44), title, subtitle)
