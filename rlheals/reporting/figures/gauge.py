"""Drift that the function can see: weights against invariant products, and weights against the model's outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from rlheals.reporting.drift import pair_label
from rlheals.reporting.figures.spectra import NOISE, inline, pair_color, pair_scale, titled
from rlheals.reporting.figures.style import CONDITIONS, Look

if TYPE_CHECKING:
    from rlheals.reporting.drift import Drift

KINDS = {
    "raw_change": Look("weights as stored", "#d55e00", "#ad4c00"),
    "aligned_change": Look("after alignment", "#0072b2", "#005a8e", (6, 3), "square"),
    "product_change": Look("invariant product", "#009e73", "#00724f", (2, 2), "diamond"),
}
BLOCKS = {"value_output": "value and output", "query_key": "query and key", "mlp": "gated MLP"}
PER_LAYER = {"cka": "1 − CKA of the hidden states", "pca_shift": "shift of the hidden states' mean (sd)"}

SIDE_BY_SIDE = 8
"""Most layers for which the blocks stand beside each other."""


def gauge_drift(drift: Drift) -> alt.TopLevelMixin:
    """Relative change of the weights as stored, after alignment, and of what the function sees, by layer and block."""
    rows = drift.gauge.filter(pl.col("quantity").is_in(list(KINDS)) & pl.col("pair").is_in(drift.shown))
    keys = ["model", "seed", "pair", "layer", "block", "quantity"]
    # Heads of a layer are averaged, and so are seeds: the table has them one by one.
    mean = [pl.col(name).mean() for name in ("value", "noise_low", "noise_high")]
    table = rows.group_by(keys, maintain_order=True).agg(mean)

    def draw(part: pl.DataFrame, _: str) -> alt.VConcatChart:
        own = part.group_by([k for k in keys if k != "seed"], maintain_order=True).agg(mean)
        lines = []
        for pair in [p for p in drift.shown if (own["pair"] == p).any()]:
            panels = [_gauge_panel(own.filter(pl.col("pair") == pair), block) for block in _blocks(own)]
            title = alt.TitleParams(pair_label(pair), fontSize=13, offset=10)
            many = own["layer"].n_unique() > SIDE_BY_SIDE
            row = alt.vconcat(*panels, spacing=20) if many else alt.hconcat(*panels, spacing=20)
            lines.append(row.properties(title=title))
        return alt.vconcat(*lines, spacing=26)

    note = "mean over heads; bars: 95 % band of noise of the same norm, measured the same way"
    return titled(table, draw, "Change that alignment removes and change that it does not", note, "mean")


def function_drift(drift: Drift) -> alt.TopLevelMixin:
    """What the outputs and hidden states did, beside what the weights did, layer by layer."""
    rows = drift.function.filter(pl.col("pair").is_in(drift.shown))

    def draw(part: pl.DataFrame, model: str) -> alt.VConcatChart:
        weights = drift.verdicts.filter((pl.col("model") == model) & pl.col("pair").is_in(drift.shown))
        conditions = part["condition"].unique(maintain_order=True).to_list()
        panels: list[Any] = [_distribution_panel(part, drift.shown, conditions), _weight_panel(weights, drift.shown)]
        lines = [alt.hconcat(*panels, spacing=34)]
        for condition in conditions:
            own = part.filter(pl.col("condition") == condition)
            drawn = [_layer_panel(own, name, drift.shown, condition) for name in _present(own)]
            lines += [alt.hconcat(*drawn, spacing=34)] if drawn else []
        return alt.vconcat(*lines, spacing=26)

    note = "coloured bands: noise of the same norm in the weights"
    return titled(rows, draw, "What the function did, beside the weights", note, "one line each")


def _blocks(rows: pl.DataFrame) -> list[str]:
    return [block for block in BLOCKS if (rows["block"] == block).any()]


def _present(rows: pl.DataFrame) -> list[str]:
    return [name for name in PER_LAYER if ((rows["quantity"] == name) & (rows["layer"] >= 0)).any()]


def _gauge_panel(rows: pl.DataFrame, block: str) -> alt.LayerChart:
    """One block of one pair: three points a layer, each with the band of noise."""
    own = rows.filter(pl.col("block") == block).with_columns(
        pl.col("quantity").replace_strict({key: look.label for key, look in KINDS.items()}).alias("kind")
    )
    looks = list(KINDS.values())
    names = [look.label for look in looks]
    legend = alt.Legend(title=None, orient="top", offset=6) if block == _blocks(rows)[0] else None
    color = alt.Color("kind:N", scale=alt.Scale(domain=names, range=[look.color for look in looks]), legend=legend)
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=names, range=[look.shape for look in looks]), legend=legend)
    base = alt.Chart(inline(own)).encode(
        alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, ticks=False, labelOverlap=True)),
        xOffset=alt.XOffset("kind:N", sort=names, scale=alt.Scale(paddingOuter=0.5)),
    )
    layers = own["layer"].n_unique()
    width = min(220, max(150, 46 * layers)) if layers <= SIDE_BY_SIDE else 640
    # Bars are wider than points, so that a short band shows on both sides of its point.
    bar = min(11.0, 0.27 * width / layers)
    bars = base.mark_bar(color=NOISE, opacity=0.4, width=bar).encode(
        alt.Y("noise_low:Q", title=None, axis=alt.Axis(format="~%", tickCount=5)), alt.Y2("noise_high:Q")
    )
    tips = [
        alt.Tooltip("layer:Q"),
        alt.Tooltip("kind:N", title="of"),
        alt.Tooltip("value:Q", title="relative change", format=".3%"),
        alt.Tooltip("noise_low:Q", title="noise from", format=".3%"),
        alt.Tooltip("noise_high:Q", title="to", format=".3%"),
    ]
    points = base.mark_point(filled=True, size=min(34, bar**2 / 2), opacity=1)
    dots = points.encode(y="value:Q", color=color, shape=shape, tooltip=tips)
    title = alt.TitleParams(f"{BLOCKS[block]}: relative change", fontSize=12, fontWeight="normal", offset=8)
    return alt.layer(bars, dots).properties(width=width, height=150, title=title)


def _distribution_panel(rows: pl.DataFrame, pairs: list[str], conditions: list[str]) -> alt.LayerChart:
    """KL of the next-token distributions, one point a pair and condition."""
    own = rows.filter((pl.col("layer") == -1) & (pl.col("quantity") == "kl_base_tuned"))
    words = {key: CONDITIONS[key].label if key in CONDITIONS else key or "prompts" for key in conditions}
    keys = ["pair", "condition"]
    mean = [pl.col(name).mean() for name in ("value", "noise_low", "noise_high")]
    table = own.group_by(keys, maintain_order=True).agg(mean)
    table = table.with_columns(_label(), pl.col("condition").replace_strict(words).alias("word"))
    base = alt.Chart(inline(table)).encode(
        alt.X("word:N", sort=list(words.values()), title=None, axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("pair_label:N", sort=[pair_label(p) for p in pairs], scale=alt.Scale(paddingOuter=0.5)),
    )
    bars = base.mark_bar(color=NOISE, opacity=0.3, width=12).encode(
        alt.Y("noise_low:Q", title=None, axis=alt.Axis(tickCount=5, format="~g")), alt.Y2("noise_high:Q")
    )
    tips = [
        alt.Tooltip("pair_label:N", title="pair"),
        alt.Tooltip("word:N", title="prompts"),
        alt.Tooltip("value:Q", title="nats a token", format=".4g"),
        alt.Tooltip("noise_low:Q", title="noise from", format=".4g"),
        alt.Tooltip("noise_high:Q", title="to", format=".4g"),
    ]
    color = pair_color(pairs)["color"]
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(y="value:Q", color=color, tooltip=tips)
    return alt.layer(bars, dots).properties(width=260, height=150, title=_small("KL to the reference (nats a token)"))


def _weight_panel(verdicts: pl.DataFrame, pairs: list[str]) -> alt.LayerChart:
    """Root mean square of the relative change of the matrices of each layer."""
    rows = verdicts.filter(pl.col("layer") >= 0)
    root = (pl.col("relative_change") ** 2).mean().sqrt().alias("value")
    table = rows.group_by("pair", "layer", "seed", maintain_order=True).agg(root)
    x = alt.X("layer:Q", title="block", axis=_whole(table["layer"]))
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5, format="~%"))
    return _lines(table, x, y, pairs, ".2%").properties(width=260, height=150, title=_small("relative weight change"))


def _layer_panel(rows: pl.DataFrame, quantity: str, pairs: list[str], condition: str) -> alt.LayerChart:
    """One per-layer number; hidden state 0 is the embedding, so that state i is the output of block i - 1."""
    own = rows.filter((pl.col("quantity") == quantity) & (pl.col("layer") >= 0))
    if quantity == "cka":
        # An upper end of the similarity is a lower end of the distance.
        own = own.with_columns(
            (1 - pl.col("value")).alias("value"),
            (1 - pl.col("noise_high")).alias("noise_low"),
            (1 - pl.col("noise_low")).alias("noise_high"),
        )
    x = alt.X("layer:Q", title="hidden state (0: embedding)", axis=_whole(own["layer"]))
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5, format="~g"))
    word = CONDITIONS[condition].label if condition in CONDITIONS else condition or "prompts"

    drawn = _lines(own, x, y, pairs, ".4g", bands=True)
    return drawn.properties(width=260, height=150, title=_small(f"{word}: {PER_LAYER[quantity]}"))


def _lines(
    rows: pl.DataFrame, x: alt.X, y: alt.Y, pairs: list[str], number: str, bands: bool = False
) -> alt.LayerChart:
    """A line a pair and seed over the bands of noise."""
    channels = pair_color(pairs)
    layers: list[Any] = []
    if bands:
        hull = rows.group_by("pair", "layer", maintain_order=True).agg(
            pl.col("noise_low").min(), pl.col("noise_high").max()
        )
        lower = y.copy()
        lower.shorthand = "noise_low:Q"
        area = alt.Chart(inline(hull.drop_nulls().with_columns(_label()).sort("layer"))).mark_area(
            fillOpacity=0.2, strokeOpacity=0.4, strokeWidth=1
        )
        fill = alt.Fill("pair_label:N", scale=pair_scale(pairs), legend=None)
        stroke = alt.Stroke("pair_label:N", scale=pair_scale(pairs), legend=None)
        layers.append(area.encode(x, lower, alt.Y2("noise_high:Q"), fill, stroke))
    tips = [
        alt.Tooltip("pair_label:N", title="pair"),
        alt.Tooltip("layer:Q"),
        alt.Tooltip("value:Q", format=number),
        alt.Tooltip("seed:N"),
    ]
    line = alt.Chart(inline(rows.with_columns(_label()).sort("layer"))).mark_line(
        point=alt.OverlayMarkDef(size=26), strokeWidth=1.7
    )
    layers.append(line.encode(x, y, **channels, detail="seed:N", tooltip=tips))
    return alt.layer(*layers)


def _whole(numbers: pl.Series) -> alt.Axis:
    """Ticks at whole numbers only, at every one of few."""
    found = sorted(set(numbers))
    return alt.Axis(grid=False, format="d", values=found[:: max(1, len(found) // 12)])


def _label() -> pl.Expr:
    return pl.col("pair").map_elements(pair_label, return_dtype=pl.String).alias("pair_label")


def _small(text: str) -> alt.TitleParams:
    return alt.TitleParams(text, fontSize=12, fontWeight="normal", offset=8)
