"""Figures of the RL branches: what they give back against where they start, and how they trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from rlheals.reporting.figures.charts import (
    ACCURACY,
    NLL,
    column,
    finish,
    first_tries,
    named_panels,
    per_model,
    seeds_note,
)
from rlheals.reporting.figures.curves import curves, step_axis
from rlheals.reporting.figures.style import ARMS, BEFORE, METRICS, MUTED, Look
from rlheals.reporting.registered import ALPHA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.reporting.tables import Choice

SIDES = {
    "ood before": Look("OOD, before RL", "#57606a", "#424a53"),
    "ood after": Look("OOD, after RL", "#d55e00", "#ad4c00", (6, 3), "square"),
    "test_id before": Look("test (ID), before RL", "#8c959f", "#57606a", (2, 2)),
    "test_id after": Look("test (ID), after RL", "#0072b2", "#005a8e", (4, 2), "square"),
}

BAND = alt.Scale(paddingInner=0.08, paddingOuter=0.08)


def recovery_curve(
    final: pl.DataFrame, windows: pl.DataFrame, summary: pl.DataFrame, choices: Sequence[Choice]
) -> alt.TopLevelMixin:
    """OOD accuracy of the SFT ladder, and after RL from each start, one line an arm, with 95 % Wilson intervals.

    Args:
        final: the "recovery" table after the last update.
        windows: the "recovery_window" rows to draw as bars at the top; those without a significant gain are left out.
        summary: the "probe_summary" table of the ladder.
        choices: SFT_MaxOOD and SFT_End of each run.
    """
    ladder = first_tries(summary).filter(pl.col("condition") == "ood")
    before = _points(ladder, pl.lit(BEFORE), "accuracy", "wilson_low", "wilson_high")
    ood = final.filter(pl.col("condition") == "ood")
    after = _points(ood, pl.col("arm"), "after", "after_low", "after_high")
    table = pl.concat([before, after.sort("step")])

    def draw(part: pl.DataFrame, model: str) -> alt.LayerChart:
        own = [choice for choice in choices if choice.model == model]
        steps = step_axis(part["step"].to_list())
        lines = curves(part, ARMS, ACCURACY, steps, own)
        bars = _window_bars(windows.filter(pl.col("model") == model), steps.encode())
        return alt.layer(*bars, lines)

    hands = ood["n"].to_list()
    note = f"confirm split, n = {hands[0]} hands; 95 % Wilson intervals"
    if _shown(windows):
        note += "; bar at the top: recovery window with its bootstrap interval"
    return per_model(table, draw, "OOD accuracy before and after RL, by the step RL starts from", seeds_note(ood, note))


def recovery_gain(final: pl.DataFrame) -> alt.TopLevelMixin:
    """Change of OOD accuracy by each branch, and beside it the change of ID accuracy, with paired 95 % intervals.

    Args:
        final: the "recovery" table after the last update.
    """
    rows = final.with_columns(
        pl.col("arm").replace_strict({key: look.label for key, look in ARMS.items()}).alias("label"),
        pl.format("step {}", "checkpoint_step").alias("start"),
        pl.format("{} {}", "arm", "seed").alias("place"),
    )
    arms = [key for key in ARMS if key in set(rows["arm"])]
    places = [f"{arm} {seed}" for arm in arms for seed in sorted(set(rows["seed"]))]
    models = rows["model"].unique(maintain_order=True).to_list()
    panels = [_gain_panels(rows.filter(pl.col("model") == model), arms, places) for model in models]
    note = f"paired on n = {rows['n'][0]} confirm hands; bars: 95 % intervals"
    title, subtitle = (
        "What RL gains out of distribution and costs in distribution",
        seeds_note(rows, note, "one bar each"),
    )
    if len(models) == 1:
        return finish(panels[0], title, f"model {models[0]}; {subtitle}")
    return finish(column(named_panels(panels, models), 44), title, subtitle)


def rl_losses(losses: pl.DataFrame, last: int, arm: str) -> alt.TopLevelMixin:
    """Teacher-forced OOD and test loss before and after RL against the step RL starts from.

    Args:
        losses: the "rl_losses" table.
        last: the update that counts as after.
        arm: the arm to draw.
    """
    sides = pl.when(pl.col("update") == 0).then(pl.lit("before")).otherwise(pl.lit("after"))
    rows = losses.filter(
        (pl.col("arm") == arm)
        & pl.col("update").is_in([0, last])
        & pl.col("series").is_in(["ood", "test_id"])
        & pl.col("nll_per_token").is_finite()
    ).with_columns(pl.format("{} {}", "series", sides).alias("side"), pl.lit(None, pl.Int64).alias("n"))
    nothing = pl.lit(None, pl.Float64)
    table = rows.select(
        "model",
        "seed",
        pl.col("checkpoint_step").alias("step"),
        pl.col("side").alias("series"),
        pl.col("nll_per_token").alias("value"),
        nothing.alias("low"),
        nothing.alias("high"),
        "n",
    ).sort("step")

    def draw(part: pl.DataFrame, _: str) -> alt.LayerChart:
        return curves(part, SIDES, NLL, step_axis(part["step"].to_list()), height=260)

    note = seeds_note(table, f"arm {ARMS[arm].label}, {last} updates")
    return per_model(table, draw, "Teacher-forced losses before and after RL, by the step RL starts from", note)


def rl_training(training: pl.DataFrame) -> alt.TopLevelMixin:
    """Training curves of every branch: one row of panels a metric, one column an arm, one colour a start.

    Args:
        training: the "rl_training" table.
    """
    arms = [key for key in ARMS if key in set(training["arm"])]

    def draw(part: pl.DataFrame, _: str) -> alt.VConcatChart:
        width = max(130, 640 // len(arms) - 20)
        rows = [
            alt.hconcat(*[_metric(part.filter(pl.col("arm") == arm), metric, width, arm) for arm in arms], spacing=18)
            for metric in METRICS
            if part[metric].is_not_null().any()
        ]
        return alt.vconcat(*rows, spacing=16)

    note = seeds_note(training, lines="one line each")
    return per_model(training, draw, "Training curves of the RL branches", note)


def _points(rows: pl.DataFrame, series: pl.Expr, value: str, low: str, high: str) -> pl.DataFrame:
    """The columns that `curves` draws."""
    return rows.select(
        "model",
        "seed",
        pl.col("checkpoint_step").alias("step"),
        series.alias("series"),
        pl.col(value).alias("value"),
        pl.col(low).alias("low"),
        pl.col(high).alias("high"),
        "n",
    )


def _shown(windows: pl.DataFrame) -> list[dict[str, Any]]:
    """Windows whose best gain is significant."""
    return windows.filter(pl.col("opens").is_not_null() & (pl.col("best_p_holm") < ALPHA)).sort("seed").to_dicts()


def _window_bars(windows: pl.DataFrame, x: alt.X) -> list[alt.Chart]:
    """One horizontal bar a seed at the top of the plot, with a thin line over the bootstrap interval of its edges."""
    layers = []
    for place, row in enumerate(_shown(windows)):
        height = alt.value(8 + 9 * place)
        data = alt.InlineData(
            values=[
                {"step": row["opens"], "end": row["closes"], "low": row["opens_low"], "high": row["closes_high"]}
                | {"seed": row["seed"]}
            ]
        )
        tips = [
            alt.Tooltip("step:Q", title="window from SFT step", format=".0f"),
            alt.Tooltip("end:Q", title="to", format=".0f"),
            alt.Tooltip("low:Q", title="95 % from", format=".0f"),
            alt.Tooltip("high:Q", title="95 % to", format=".0f"),
            alt.Tooltip("seed:N"),
        ]
        thin = alt.Chart(data).mark_rule(color=MUTED, strokeWidth=1.2)
        layers.append(thin.encode(_position(x, "low"), x2="high:Q", y=height, tooltip=tips))
        thick = alt.Chart(data).mark_rule(color=ARMS["ppo"].color, strokeWidth=5, opacity=0.75)
        layers.append(thick.encode(_position(x, "step"), x2="end:Q", y=height, tooltip=tips))
    return layers


def _position(x: alt.X, field: str) -> alt.X:
    """The shared x channel, of another field."""
    moved = x.copy()
    moved.shorthand = f"{field}:Q"
    return moved


def _gain_panels(rows: pl.DataFrame, arms: Sequence[str], places: Sequence[str]) -> alt.HConcatChart:
    """Two panels side by side, OOD and ID, with one line a start."""
    starts = [f"step {step}" for step in sorted(set(rows["checkpoint_step"]))]
    names = {"ood": "OOD accuracy: RL minus its start", "id": "ID accuracy: RL minus its start"}
    panels = [
        _gain_panel(rows.filter(pl.col("condition") == condition), arms, places, starts, condition == "ood")
        for condition in names
    ]
    beside = alt.hconcat(*named_panels(panels, list(names.values()), prefix=""), spacing=26)
    return beside.resolve_scale(x="shared")  # a cost drawn on another scale than the gain would mislead


def _gain_panel(
    rows: pl.DataFrame, arms: Sequence[str], places: Sequence[str], starts: Sequence[str], first: bool
) -> alt.LayerChart:
    axis = alt.Axis(domain=False, ticks=False, labelPadding=8, labels=first, grid=True)
    y = alt.Y("start:N", sort=list(starts), title="RL starts from" if first else None, axis=axis, scale=BAND)
    scale = alt.Scale(paddingOuter=0.4)
    offset = alt.YOffset("place:N", sort=list(places), scale=scale)
    looks = [ARMS[arm] for arm in arms]
    domain = [look.label for look in looks]
    legend = alt.Legend(title=None, orient="top", offset=8, columns=3) if len(arms) > 1 else None
    color = alt.Color("label:N", scale=alt.Scale(domain=domain, range=[look.color for look in looks]), legend=legend)
    shape = alt.Shape("label:N", scale=alt.Scale(domain=domain, range=[look.shape for look in looks]), legend=legend)
    tips = [
        alt.Tooltip("start:N", title="RL starts from"),
        alt.Tooltip("label:N", title="arm"),
        alt.Tooltip("before:Q", format=".1%"),
        alt.Tooltip("after:Q", format=".1%"),
        alt.Tooltip("difference:Q", format="+.1%"),
        alt.Tooltip("difference_low:Q", title="95 % from", format="+.1%"),
        alt.Tooltip("difference_high:Q", title="to", format="+.1%"),
        alt.Tooltip("p_value:Q", title="McNemar p", format=".2g"),
        alt.Tooltip("seed:N"),
    ]
    points = alt.Axis(format=".0%", labelExpr="datum.value ? format(datum.value * 100, '+~g') : '0'", tickCount=6)
    base = alt.Chart(alt.InlineData(values=rows.to_dicts())).encode(y=y, yOffset=offset)
    bars = base.mark_rule(strokeWidth=2).encode(
        alt.X("difference_low:Q", title="percentage points", axis=points), color=color, x2="difference_high:Q"
    )
    dots = base.mark_point(size=60, filled=True, opacity=1)
    dots = dots.encode(alt.X("difference:Q"), color=color, shape=shape, tooltip=tips)
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=MUTED, strokeDash=[2, 3]).encode(x="zero:Q")
    height = alt.Step(12 if len(places) > 1 else 30)
    return alt.layer(zero, bars, dots).properties(width=300, height=height)


def _metric(rows: pl.DataFrame, metric: str, width: int, arm: str) -> alt.Chart:
    """One training curve of one arm, a line a start and seed."""
    shown = rows.filter(pl.col(metric).is_finite()).sort("update")
    title = alt.TitleParams([ARMS[arm].label, METRICS[metric]], fontSize=12, fontWeight="normal", offset=6)
    if shown.is_empty():  # no reference, say; axes of nothing would be drawn as NaN
        none = alt.Chart(alt.InlineData(values=[{}])).mark_text(color=MUTED).encode(text=alt.value("not in this arm"))
        return none.properties(width=width, height=120, title=title)
    data = alt.InlineData(values=shown.select("update", "seed", "checkpoint_step", metric).to_dicts())
    starts = sorted(set(rows["checkpoint_step"]))
    color = alt.Color(
        "checkpoint_step:O",
        scale=alt.Scale(domain=starts, scheme="viridis"),
        legend=alt.Legend(title="RL starts from step", orient="right"),
    )
    line = alt.Chart(data).mark_line(strokeWidth=1.6, opacity=0.85)
    return line.encode(
        alt.X("update:Q", title="update", axis=alt.Axis(grid=False, format="d", tickMinStep=1)),
        alt.Y(
            f"{metric}:Q",
            title=None,
            axis=alt.Axis(tickCount=4, minExtent=38),
            scale=alt.Scale(zero=metric != "entropy"),
        ),
        color,
        detail="seed:N",
        tooltip=[
            alt.Tooltip("checkpoint_step:Q", title="start"),
            alt.Tooltip("update:Q"),
            alt.Tooltip(f"{metric}:Q", title=METRICS[metric], format=".4f"),
            alt.Tooltip("seed:N"),
        ],
    ).properties(width=width, height=120, title=title)
