"""Figures of whole repairs: what each kind gives and costs, imposed directions, and repairs of other rungs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from rlheals.reporting.figures.charts import column, finish, named_panels, per_model, seeds_note
from rlheals.reporting.figures.restoration import (
    CONTROL_LOOKS,
    PERCENT,
    looks,
    note,
    over_seeds,
    shown,
    tooltips,
    with_controls,
    with_offsets,
)
from rlheals.reporting.figures.style import MUTED, Look
from rlheals.reporting.repairs import CONTROLS, END, RL, edit_name, model_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.reporting.repairs import Repairs

OPERATORS = {
    "directions": Look("directions", "#0072b2", "#005a8e"),
    "rotate": Look("directions, part of the way", "#56b4e9", "#2a7fb0", (1, 0), "square"),
    "values": Look("singular values only", "#d55e00", "#ad4c00", (1, 0), "triangle-up"),
    "interpolate": Look("weights, part of the way", "#009e73", "#00724f", (1, 0), "diamond"),
    "swap": Look("weights", "#e69f00", "#946600", (1, 0), "triangle-down"),
    "reset": Look("whole layers", "#f0e442", "#7a7300", (1, 0), "cross"),
    "remove_outside": Look("drift outside the top block", "#cc79a7", "#9c4f7b", (1, 0), "triangle-left"),
    "remove_inside": Look("drift inside the top block", "#882255", "#882255", (1, 0), "triangle-right"),
}
CONTROL = Look("control", "#8c959f", "#57606a", (1, 0), "cross")
POINTS = "replace(format(datum.value * 100, '~g'), '-', '−')"
"""Axis labels in percentage points."""


def tradeoff(repairs: Repairs, budget: float) -> alt.TopLevelMixin:
    """Share of the lost OOD accuracy recovered against ID accuracy lost: every screened repair of SFT_End a point.

    Args:
        repairs: the tables.
        budget: the largest ID loss of a repair, drawn as a line.
    """
    rows = tradeoff_rows(repairs)

    def draw(part: pl.DataFrame, _: str) -> alt.LayerChart:
        return _front(part, budget)

    title = "What a repair of SFT_End recovers, and what it costs"
    return per_model(rows, draw, title, f"{note(rows, 'one mark each')}; line: the best screened")


def tradeoff_rows(repairs: Repairs) -> pl.DataFrame:
    """All cells on SFT_End that have a recovery: screened and confirmed edits, and controls."""
    ours = (pl.col("target") == END) & (pl.col("reference") != RL)
    edits = repairs.edits.filter(ours)
    controls = repairs.controls.filter(ours & (pl.col("operator") != "round_trip"))
    rows = pl.concat([edits, controls]).filter(pl.col("recovery").is_not_null())
    names = [_tradeoff_name(row) for row in rows.to_dicts()]
    series = pl.when(pl.col("control_of") != "").then(pl.lit("control")).otherwise("operator")
    return rows.with_columns(series.alias("series"), pl.Series("edit", names, pl.String), -pl.col("id_difference"))


def kinds(repairs: Repairs) -> alt.TopLevelMixin:
    """OOD and ID accuracy of every kind of repair of SFT_End that takes all layers: values, sides, weights, parts."""
    rows = with_controls(repairs, confirmed_first(kind_rows(repairs.edits)))
    return _forest(rows, "Other ways back: values, one side, parts of the way, weights", [END])


def kind_rows(edits: pl.DataFrame) -> pl.DataFrame:
    """Edits of SFT_End in all layers other than directions of the leading or trailing ranks."""
    plain = (pl.col("operator") == "directions") & (pl.col("basis") == "uv") & (pl.col("modules") == "all")
    blocks = (pl.col("operator") == "directions") & (pl.col("layers") != "all")
    full = plain & (pl.col("rank_from") == 0) & (pl.col("rank_to") == 1)
    rows = edits.filter((pl.col("target") == END) & (pl.col("reference") != RL) & ~blocks & (~plain | full))
    return _placed(rows)


def impose(repairs: Repairs) -> alt.TopLevelMixin:
    """OOD and ID accuracy of RL with SFT_End's directions or values, and of SFT_End with RL's directions."""
    rows = with_controls(repairs, confirmed_first(impose_rows(repairs.edits)))
    return _forest(rows, "Directions of SFT_End imposed on RL, and the reverse", [END, RL])


def impose_rows(edits: pl.DataFrame) -> pl.DataFrame:
    """Edits between SFT_End and RL."""
    rows = edits.filter(pl.col("reference").is_in([END, RL]) & pl.col("target").is_in([END, RL]))
    return _placed(rows, target=True)


def confirmed_first(rows: pl.DataFrame) -> pl.DataFrame:
    """Of an edit on both splits the confirmed row only."""
    keys = ["model", "seed", "cell_id"]
    return rows.filter((pl.col("split") == "confirm") | ~(pl.col("split") == "confirm").any().over(keys))


def better_in(starts: pl.DataFrame) -> alt.TopLevelMixin:
    """OOD accuracy after the repair against before, one point a rung that RL starts from.

    Args:
        starts: as `rlheals.reporting.claims_restoration.repaired_starts` gives, with columns model and seed.
    """
    split = starts["split"][0]
    other = "confirm" if split == "select" else "select"

    def draw(part: pl.DataFrame, _: str) -> alt.LayerChart:
        return _better_panel(part, split, other)

    text = f"after the repair: {split}, n = {starts['n'][0]} hands; 95 % Wilson intervals"
    return per_model(starts, draw, "Better in, better out?", seeds_note(starts, text, "in colour"))


def _placed(rows: pl.DataFrame, *, target: bool = False) -> pl.DataFrame:
    """Rows with ``place``, the edit in words; the reference is in the colour."""
    names = []
    for row in rows.to_dicts():
        text = edit_name(row, reference=False)
        names.append(f"{text} → {model_name(row['target'])}" if target else text)
    return rows.with_columns(pl.Series("place", names, pl.String))


def _tradeoff_name(row: dict[str, Any]) -> str:
    if not row["control_of"]:
        return edit_name(row)
    return f"{CONTROLS.get(row['operator'], row['operator'])} for {row['control_of'].rsplit('_', 1)[0]}"


def _front(rows: pl.DataFrame, budget: float) -> alt.LayerChart:
    found = {name: look for name, look in (OPERATORS | {"control": CONTROL}).items() if name in set(rows["series"])}
    labels = pl.col("series").replace_strict({name: look.label for name, look in found.items()}).alias("label")
    table = rows.with_columns(labels, _recovered("low"), _recovered("high"))
    # Repairs are told apart near zero, and failures lie far away: the scale is linear there and logarithmic here.
    scale = alt.Scale(type="symlog", constant=0.05)
    axis = alt.Axis(labelExpr=POINTS, values=[-0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1])
    cost = alt.X("id_difference:Q", title="ID accuracy lost (percentage points, log scale)", axis=axis, scale=scale)
    gain = alt.Y("recovery:Q", title="share of the lost OOD accuracy recovered", axis=alt.Axis(format="%"))
    channels = {
        "color": _channel(alt.Color, found, "color"),
        "shape": _channel(alt.Shape, found, "shape"),
        "tooltip": tooltips(),
    }
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0, "all": 1, "budget": budget}]))
    layers: list[Any] = [
        zero.mark_rule(color=MUTED, strokeDash=[2, 3]).encode(y="zero:Q"),
        zero.mark_rule(color=MUTED, strokeDash=[2, 3]).encode(y="all:Q"),
        zero.mark_rule(color="#cf222e", strokeDash=[5, 3], opacity=0.7).encode(x="budget:Q"),
        zero.mark_text(align="left", dx=4, dy=8, fontSize=11, color="#cf222e").encode(
            x="budget:Q", y=alt.value(0), text=alt.value("limit of a repair")
        ),
    ]
    pareto = alt.Chart(alt.InlineData(values=pareto_front(table))).mark_line(
        interpolate="step-after", color=MUTED, strokeWidth=1, opacity=0.8
    )
    layers.append(pareto.encode(cost, gain, detail="seed:N", order="id_difference:Q"))
    for split, filled, size in (("select", False, 45), ("confirm", True, 110)):
        own = table.filter(pl.col("split") == split)
        if own.is_empty():
            continue
        base = alt.Chart(alt.InlineData(values=_columns(own).to_dicts()))
        if filled:
            bars = base.mark_rule(strokeWidth=1.5, opacity=0.55)
            layers.append(bars.encode(cost, alt.Y("recovery_low:Q"), y2="recovery_high:Q", color=channels["color"]))
            layers.append(bars.encode(alt.X("cost_low:Q"), gain, x2="cost_high:Q", color=channels["color"]))
        dots = base.mark_point(filled=filled, size=size, opacity=1 if filled else 0.85, strokeWidth=1.5)
        layers.append(dots.encode(cost, gain, **channels))
    return alt.layer(*layers).properties(width=640, height=430)


def pareto_front(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Screened edits, a list by seed, that no other screened edit of the seed beats in recovery and cost."""
    screened = rows.filter((pl.col("split") == "select") & (pl.col("control_of") == ""))
    front = []
    for own in screened.sort("id_difference", pl.col("recovery").neg()).partition_by("seed", maintain_order=True):
        best = own.with_columns(pl.col("recovery").cum_max().shift(1).alias("before"))
        kept = best.filter(pl.col("before").is_null() | (pl.col("recovery") > pl.col("before")))
        front += kept.select("seed", "id_difference", "recovery").to_dicts()
    return front


def _recovered(end: str) -> pl.Expr:
    """An end of the interval of the OOD change as a share of the loss, which is taken as known."""
    lost = pl.col("ood_peak") - pl.col("ood_before")
    return (pl.col(f"ood_difference_{end}") / lost).alias(f"recovery_{end}")


def _columns(rows: pl.DataFrame) -> pl.DataFrame:
    extra = [
        pl.col("id_difference"),
        pl.col("recovery_low"),
        pl.col("recovery_high"),
        (-pl.col("id_difference_high")).alias("cost_low"),
        (-pl.col("id_difference_low")).alias("cost_high"),
    ]
    return pl.concat([shown(rows), rows.select(extra)], how="horizontal")


def _forest(rows: pl.DataFrame, title: str, unedited: Sequence[str]) -> alt.TopLevelMixin:
    """One line an edit, OOD accuracy left and ID accuracy right, with the unedited models as dashed lines."""
    models = rows["model"].unique(maintain_order=True).to_list()
    panels = []
    for model in models:
        own = rows.filter(pl.col("model") == model)
        edits = own.filter(pl.col("control_of") == "").sort(_ORDER, "rank_from", "rank_to", "basis", "dose")
        order = edits["place"].unique(maintain_order=True).to_list()
        sides = [_forest_panel(own, condition, order, unedited) for condition in ("ood", "id")]
        panels.append(alt.hconcat(*named_panels(sides, ["OOD accuracy", "ID accuracy"], prefix=""), spacing=24))
    subtitle = f"{note(rows)}; vertical lines: {' and '.join(model_name(name) for name in unedited)} unedited"
    if len(models) == 1:
        return finish(panels[0], title, f"model {models[0]}; {subtitle}")
    return finish(column(named_panels(panels, models), 44), title, subtitle)


_ORDER = pl.col("operator").replace_strict({name: rank for rank, name in enumerate(OPERATORS)}, default=len(OPERATORS))
"""Kinds of edits in the order of the legend; the places of controls are those of their edits."""


def _forest_panel(rows: pl.DataFrame, condition: str, order: Sequence[str], unedited: Sequence[str]) -> alt.LayerChart:
    found = looks(rows["series"].to_list())
    table, places = with_offsets(over_seeds(rows), found, ("reference",))
    axis = alt.Axis(labelLimit=290, domain=False, ticks=False, labelPadding=8, labels=condition == "ood", grid=True)
    channels = {
        "y": alt.Y(
            "place:N", sort=list(order), title=None, axis=axis, scale=alt.Scale(domain=list(order), padding=0.2)
        ),
        "yOffset": alt.YOffset("offset:N", sort=places, scale=alt.Scale(domain=places, paddingOuter=0.15)),
        "color": _channel(alt.Color, found, "color"),
    }
    scale = alt.Scale(domain=[0, 1])
    x = alt.X(f"{condition}_accuracy:Q", title="solved (% of hands)", axis=PERCENT, scale=scale)
    low = x.copy()
    low.shorthand = f"{condition}_low:Q"
    layers: list[Any] = [_unedited(rows, condition, unedited)]
    control = pl.col("series").is_in(list(CONTROL_LOOKS))
    screened = ~control & (pl.col("split") == "select")
    for which, filled, size, stroke in (
        (control, True, 34, 0.8),  # first, so that they lie below what they control
        (screened, False, 40, 1.2),
        (~control & ~screened, True, 75, 2.2),
    ):
        own = table.filter(which)
        if own.is_empty():
            continue
        base = alt.Chart(alt.InlineData(values=own.to_dicts()))
        layers.append(
            base.mark_rule(strokeWidth=stroke, opacity=0.75).encode(low, x2=f"{condition}_high:Q", **channels)
        )
        dots = base.mark_point(size=size, filled=filled, opacity=1, strokeWidth=1.4)
        layers.append(dots.encode(x, shape=_channel(alt.Shape, found, "shape"), tooltip=tooltips(), **channels))
    return alt.layer(*layers).properties(width=250, height=alt.Step(14))


def _unedited(rows: pl.DataFrame, condition: str, names: Sequence[str]) -> alt.Chart:
    """Dashed lines at the accuracy of the unedited targets, from the largest set of hands."""
    targets = rows.filter(pl.col("target").is_in(list(names))).sort("n", descending=True)
    values = targets.group_by("target", "seed", maintain_order=True).agg(pl.col(f"{condition}_before").first())
    table = [row | {"name": f"{model_name(row['target'])} unedited"} for row in values.to_dicts()]
    tips = [alt.Tooltip("name:N", title="unedited"), alt.Tooltip(f"{condition}_before:Q", format=".1%")]
    dash = alt.StrokeDash(
        "name:N",
        scale=alt.Scale(
            domain=[f"{model_name(name)} unedited" for name in names], range=[[4, 3], [1, 3]][: len(names)]
        ),
        legend=alt.Legend(title=None, orient="top", offset=6) if len(names) > 1 else None,
    )
    rule = alt.Chart(alt.InlineData(values=table)).mark_rule(color=MUTED, strokeWidth=1.4)
    return rule.encode(x=f"{condition}_before:Q", strokeDash=dash, tooltip=tips)


def _better_panel(rows: pl.DataFrame, split: str, other: str) -> alt.LayerChart:
    scale = alt.Scale(domain=[0, 1])
    x = alt.X("before:Q", title=f"OOD accuracy before ({other} hands)", axis=PERCENT, scale=scale)
    y = alt.Y("after:Q", title=f"OOD accuracy after ({split} hands)", axis=PERCENT, scale=scale)
    diagonal = alt.Chart(alt.InlineData(values=[{"at": 0}, {"at": 1}])).mark_line(color=MUTED, strokeDash=[2, 3])
    base = alt.Chart(alt.InlineData(values=rows.to_dicts()))
    color = alt.Color("seed:N", scale=alt.Scale(range=[look.color for look in OPERATORS.values()]), legend=None)
    if rows["seed"].n_unique() > 1:
        color.legend = alt.Legend(title="seed", orient="right")
    tips = [
        alt.Tooltip("step:Q", title="SFT step"),
        alt.Tooltip("before:Q", format=".1%"),
        alt.Tooltip("after:Q", format=".1%"),
        alt.Tooltip("after_low:Q", title="95 % from", format=".1%"),
        alt.Tooltip("after_high:Q", title="to", format=".1%"),
        alt.Tooltip("n:Q", title="hands"),
        alt.Tooltip("seed:N"),
    ]
    one = rows.filter(pl.col("seed") == rows["seed"].min())
    text = alt.Chart(alt.InlineData(values=one.to_dicts())).mark_text(align="left", dx=9, dy=-9, fontSize=11)
    names = text.encode(x, y, text="step:N", color=alt.value(MUTED))
    return alt.layer(
        diagonal.encode(x="at:Q", y="at:Q"),
        base.mark_rule(strokeWidth=1.8, opacity=0.7).encode(
            x, alt.Y("after_low:Q", scale=scale), y2="after_high:Q", color=color
        ),
        base.mark_point(filled=True, size=80, opacity=1).encode(x, y, color=color, tooltip=tips),
        names,
    ).properties(width=400, height=330)


def _channel(channel: Any, found: dict[str, Look], attribute: str) -> Any:
    domain = [look.label for look in found.values()]
    values = [getattr(look, attribute) for look in found.values()]
    legend = alt.Legend(title=None, orient="top", offset=6, labelLimit=320, columns=5)
    return channel("label:N", scale=alt.Scale(domain=domain, range=values), legend=legend)
