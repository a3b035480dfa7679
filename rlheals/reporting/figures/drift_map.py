"""Where the weights moved (layer by module), and when (along the SFT ladder), beside noise of the same norm."""

from __future__ import annotations

from math import log10, pi
from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from rlheals.reporting.drift import against_noise, angles, nearest_k, pair_label
from rlheals.reporting.figures.curves import step_axis
from rlheals.reporting.figures.spectra import NOISE, inline, titled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.reporting.drift import Drift
    from rlheals.reporting.figures.curves import Steps

MARKS = {
    "unchanged": "=",
    "indistinguishable from same-norm noise": "·",
    "structured rotation": "S",
    "magnitude change": "M",
}
"""Letter of a verdict in the map."""
MIXED = "?"
PAIRS = 6
"""Most pairs one map shows; of a longer ladder, the last ones."""
LADDER = {
    "angle": "mean angle of the top subspaces to the base (degrees)",
    "sigma_change_norm": "change of the singular values, as a share of the norm of the weight change",
}


def drift_map(drift: Drift) -> alt.TopLevelMixin:
    """Layer by module: how much each matrix moved with its verdict, and its angle against what noise would give."""
    pairs = drift.pairs[-PAIRS:]
    verdicts = drift.verdicts.filter(pl.col("pair").is_in(pairs))
    ratios = _angle_ratios(drift, pairs)

    def draw(part: pl.DataFrame, model: str) -> alt.HConcatChart:
        own = ratios.filter(pl.col("model") == model)
        changes, limit = _changes(part), _limit(own)
        domain = _log_domain(changes["relative_change"].to_list())
        left = [_change_map(changes.filter(pl.col("pair") == p), domain, p, p == pairs[0]) for p in pairs]
        right = [_ratio_map(own.filter(pl.col("pair") == p), limit, p, p == pairs[0]) for p in pairs]
        sides = [alt.vconcat(*column, spacing=16) for column in (left, right if len(own) else []) if column]
        return alt.hconcat(*sides, spacing=40).resolve_scale(color="independent")

    marks = "S structured change, M magnitude change, · like noise, = unchanged"
    note = f"{marks}{', ? seeds differ' if verdicts['seed'].n_unique() > 1 else ''}; ▲▼ outside the noise band"
    return titled(verdicts, draw, "Where the weights moved", note, "mean")


def drift_ladder(drift: Drift, quantity: str) -> alt.TopLevelMixin:
    """Drift from the base against the SFT step or the checkpoint, a panel a module, a line a layer, the noise band.

    Args:
        drift: the tables; the ladder must have rows of ``quantity``.
        quantity: "angle" (mean angle of the top subspaces, both sides) or "sigma_change_norm".
    """
    rows = ladder_rows(drift, quantity)
    modules = rows["module"].unique(maintain_order=True).to_list()
    along, name = ("the checkpoints", "checkpoint") if set(rows["model"]) == {""} else ("SFT", "SFT step")

    def draw(part: pl.DataFrame, _: str) -> alt.VConcatChart:
        x = step_axis(part["checkpoint_step"].to_list(), width=178)
        panels = [_ladder_panel(part.filter(pl.col("module") == m), m, x, rows, quantity, name) for m in modules]
        lines = [alt.hconcat(*panels[i : i + 3], spacing=22) for i in range(0, len(panels), 3)]
        return alt.vconcat(*lines, spacing=26)

    return titled(rows, draw, f"Along {along}: {LADDER[quantity]}", "grey: noise of the same norm", "one line each")


def ladder_rows(drift: Drift, quantity: str) -> pl.DataFrame:
    """Rows of the ladder after step 0 for one of `LADDER`; angles are the mean of both sides, in degrees."""
    rows = drift.ladder.filter((pl.col("checkpoint_step") > 0) & pl.col("value").is_not_null())
    numbers = ["value", "noise_low", "noise_high"]
    keys = ["model", "seed", "layer", "module", "checkpoint_step"]
    if quantity == "angle":
        shapes = drift.verdicts.select(
            "model", "seed", "layer", "module", "rows", "columns", pl.min_horizontal("rows", "columns").alias("rank")
        ).unique()
        found = rows.filter((pl.col("quantity") == "angle_mean") & (pl.col("part") == "top")).join(
            shapes, on=["model", "seed", "layer", "module"], how="inner", maintain_order="left"
        )
        space = pl.when(pl.col("side") == "left").then("rows").otherwise("columns")
        found = nearest_k(found.filter(pl.col("k") < space), ["model", "seed", "layer", "module", "side"])
        rows = found.with_columns([pl.col(c) * 180 / pi for c in numbers])
    else:
        rows = rows.filter(pl.col("quantity") == quantity)
    return rows.group_by(keys, maintain_order=True).agg([pl.col(c).mean() for c in numbers])


def _changes(verdicts: pl.DataFrame) -> pl.DataFrame:
    """Mean relative change over seeds and the verdict's mark, by pair and matrix."""
    keys = ["pair", "layer", "module"]
    mark = pl.when(pl.col("verdict").n_unique() == 1).then(pl.col("verdict").first()).otherwise(pl.lit(""))
    table = verdicts.group_by(keys, maintain_order=True).agg(
        pl.col("relative_change").mean(), mark.alias("verdict"), pl.col("p_holm").max()
    )
    return table.with_columns(pl.col("verdict").replace_strict(MARKS, default=MIXED).alias("mark"))


def _angle_ratios(drift: Drift, pairs: Sequence[str]) -> pl.DataFrame:
    """Angle over the middle of its noise band, mean of sides and seeds, with a mark where it leaves the band."""
    rows = against_noise(angles(drift, "angle_mean", pairs))
    above = (pl.col("value") > pl.col("noise_high")).all()
    below = (pl.col("value") < pl.col("noise_low")).all()
    return rows.group_by("model", "pair", "layer", "module", maintain_order=True).agg(
        pl.col("ratio").log(2).mean().alias("log_ratio"),
        pl.when(above).then(pl.lit("▲")).when(below).then(pl.lit("▼")).otherwise(pl.lit("")).alias("mark"),
        (pl.col("value").mean() * 180 / pi).alias("degrees"),
    )


def _limit(ratios: pl.DataFrame) -> float:
    """Half width of the colour scale of the ratios, in doublings; never below a quarter of one."""
    return max([0.25, *[abs(float(value)) for value in ratios["log_ratio"]]])


def _log_domain(values: Sequence[float]) -> tuple[float, float]:
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    return (low, high) if high > 1.05 * low else (low / 1.5, high * 1.5)


def _change_map(changes: pl.DataFrame, domain: tuple[float, float], pair: str, legend: bool) -> alt.LayerChart:
    """Relative change and verdict of one pair; pairs share the colours, so only the first shows the legend."""
    middle = (log10(domain[0]) + log10(domain[1])) / 2
    shaded = changes.with_columns(
        pl.when(pl.col("relative_change") > 0).then("relative_change").alias("shade"),
        (pl.col("relative_change") > 10**middle).alias("dark"),
    )
    bar = alt.Legend(title="‖ΔW‖/‖W‖", format=".1~%", gradientLength=90, tickCount=3) if legend else None
    scale = alt.Scale(type="log", domain=list(domain), scheme="blues", nice=False)
    cells = _cells(shaded, alt.Color("shade:Q", scale=scale, legend=bar), _change_tips())
    return cells.properties(title=_title(f"{pair_label(pair)}: relative change and verdict"))


def _ratio_map(ratios: pl.DataFrame, limit: float, pair: str, legend: bool) -> alt.LayerChart:
    """Angle of one pair against the middle of its noise band, in doublings."""
    times = "format(pow(2, datum.value), '.2~f') + '×'"
    bar = alt.Legend(title="angle / noise's", labelExpr=times, gradientLength=90) if legend else None
    scale = alt.Scale(domain=[-limit, limit], scheme="purpleorange", reverse=True)
    dark = ratios.with_columns((pl.col("log_ratio").abs() > 0.7 * limit).alias("dark"))
    cells = _cells(dark, alt.Color("log_ratio:Q", scale=scale, legend=bar), _ratio_tips())
    return cells.properties(title=_title(f"{pair_label(pair)}: angle against that of same-norm noise"))


def _cells(rows: pl.DataFrame, color: alt.Color, tips: list[alt.Tooltip]) -> alt.LayerChart:
    modules = list(dict.fromkeys(rows["module"]))
    layers = rows["layer"].n_unique()
    size = 48 if layers <= 5 else 30 if layers <= 9 else 20 if layers <= 14 else 9
    place = pl.when(pl.col("layer") < 0).then(pl.lit("–")).otherwise(pl.format("layer {}", "layer")).alias("place")
    if size < 48:
        place = place.str.replace("layer ", "")
    axis = alt.Axis(labelAngle=0, ticks=False, domain=False, labelOverlap=True)
    x = alt.X("place:O", sort=None, title=None if size == 48 else "layer", axis=axis)
    y = alt.Y("module:N", sort=modules, title=None, axis=alt.Axis(ticks=False, domain=False))
    base = alt.Chart(inline(rows.sort("layer", maintain_order=True).with_columns(place))).encode(x, y)
    cells = base.mark_rect(stroke="white", strokeWidth=1).encode(color=color, tooltip=tips)
    ink = alt.condition("datum.dark", alt.value("white"), alt.value("#1f2328"))
    text = base.mark_text(fontSize=11 if size > 9 else 7, fontWeight=600).encode(text="mark:N", color=ink)
    return alt.layer(cells, text).properties(width=alt.Step(size), height=alt.Step(17))


def _change_tips() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("layer:Q"),
        alt.Tooltip("module:N"),
        alt.Tooltip("relative_change:Q", title="relative change", format=".3%"),
        alt.Tooltip("verdict:N"),
        alt.Tooltip("p_holm:Q", title="p (Holm)", format=".2g"),
    ]


def _ratio_tips() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("layer:Q"),
        alt.Tooltip("module:N"),
        alt.Tooltip("degrees:Q", title="mean angle (degrees)", format=".2f"),
        alt.Tooltip("log_ratio:Q", title="log2 of angle over noise's", format="+.2f"),
    ]


def _title(text: str) -> alt.TitleParams:
    return alt.TitleParams(text, fontSize=12, fontWeight="normal", offset=8)


def _ladder_panel(
    rows: pl.DataFrame, module: str, axis: Steps, table: pl.DataFrame, quantity: str, name: str
) -> alt.LayerChart:
    """One module: a line a layer and seed over the hull of their noise bands."""
    x = axis.encode()
    x.title = name
    x.axis = alt.Axis(
        values=axis.ticks if len(axis.ticks) <= 5 else axis.ticks[::-2], labelFlush=6, grid=False, format="d"
    )
    top = max(v for c in ("value", "noise_high") for v in table[c].to_list() if v is not None)
    y = alt.Y("value:Q", title=None, scale=alt.Scale(domain=[0, top * 1.04]), axis=alt.Axis(tickCount=4, format=".3~g"))
    hull = rows.group_by("checkpoint_step").agg(pl.col("noise_low").min(), pl.col("noise_high").max())
    hull = hull.drop_nulls().sort("checkpoint_step").rename({"checkpoint_step": "step"})
    area = alt.Chart(inline(hull)).mark_area(
        fill=NOISE, fillOpacity=0.28, stroke=NOISE, strokeOpacity=0.5, strokeWidth=1
    )
    lower = y.copy()
    lower.shorthand = "noise_low:Q"
    layers: list[Any] = [area.encode(x, lower, alt.Y2("noise_high:Q"))]
    numbers = sorted(set(table["layer"]))
    color = alt.Color(
        "layer:O" if len(numbers) <= 8 else "layer:Q",
        scale=alt.Scale(scheme="viridis", domain=numbers if len(numbers) <= 8 else [numbers[0], numbers[-1]]),
        legend=alt.Legend(title="layer", labelExpr="datum.value < 0 ? '–' : datum.label") if len(numbers) > 1 else None,
    )
    line = alt.Chart(inline(rows.sort("checkpoint_step").rename({"checkpoint_step": "step"})))
    tips = [
        alt.Tooltip("step:Q", title=name),
        alt.Tooltip("layer:Q"),
        alt.Tooltip("value:Q", title=LADDER[quantity].partition(",")[0], format=".4g"),
        alt.Tooltip("noise_low:Q", title="noise from", format=".4g"),
        alt.Tooltip("noise_high:Q", title="to", format=".4g"),
        alt.Tooltip("seed:N"),
    ]
    drawn = line.mark_line(point=alt.OverlayMarkDef(size=22), strokeWidth=1.5, opacity=0.9)
    layers.append(drawn.encode(x, y, color, detail=["seed:N", "layer:N"], tooltip=tips))
    title = alt.TitleParams(module, fontSize=12, fontWeight="normal", offset=6)
    return alt.layer(*layers).properties(width=178, height=130, title=title)
