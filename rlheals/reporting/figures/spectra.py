"""Figures of singular values and principal angles, each beside what chance would give."""

from __future__ import annotations

from math import pi
from typing import TYPE_CHECKING, Any, Literal

import altair as alt
import polars as pl

from rlheals.reporting.drift import angles, drops_zeros, pair_label
from rlheals.reporting.figures.charts import finish, per_model, seeds_note
from rlheals.reporting.figures.style import MUTED, Look

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rlheals.reporting.drift import Drift

FIRST = ("q_proj", "k_proj", "v_proj")
"""Modules whose curves are drawn where they were analysed: those of the paper's figure."""
LOOKS = (
    Look("first", "#d55e00", "#ad4c00"),
    Look("second", "#0072b2", "#005a8e", (6, 3), "square"),
    Look("third", "#009e73", "#00724f", (2, 2), "triangle-up"),
    Look("fourth", "#cc79a7", "#9c4f7b", (8, 2), "diamond"),
    Look("fifth", "#e69f00", "#946600", (4, 2), "cross"),
    Look("sixth", "#56b4e9", "#2a7fb0", (1, 3), "triangle-down"),
)
NOISE, RANDOM = "#57606a", "#b8a27a"
PANEL = 186


def singular_values(drift: Drift, matrices: Sequence[tuple[int, str]] | None = None) -> alt.TopLevelMixin:
    """Singular values before and after, and below them their change with its noise band, one column a matrix.

    Args:
        drift: the tables.
        matrices: layer and module of the columns; by default q, k and v of the first layer.
    """
    chosen = matrices or default_matrices(drift)
    names = ["sigma_before", "sigma_after", "sigma_change"]
    rows = _of(drift.spectra, chosen).filter(pl.col("quantity").is_in(names) & pl.col("pair").is_in(drift.shown))

    def draw(part: pl.DataFrame, _: str) -> alt.VConcatChart:
        stacked = []
        for pair, look in zip(drift.shown, LOOKS, strict=False):
            own = part.filter(pl.col("pair") == pair)
            columns = [_sigma_column(_of(own, [matrix]), matrix, look, pair) for matrix in chosen]
            stacked.append(alt.hconcat(*columns, spacing=22))
        return alt.vconcat(*stacked, spacing=30)

    note = "grey: before, coloured dashes: after; below, the change and (grey band) that of noise of the same norm"
    return titled(rows, draw, "Singular values before and after", note, "one line each")


def angle_curves(drift: Drift, matrices: Sequence[tuple[int, str]] | None = None) -> alt.TopLevelMixin:
    """Principal angles of the top subspaces with both null bands, one column a matrix, one row a side.

    Angles that are zero for any two subspaces of this size, because 2k exceeds the dimension, are left out, and so are
    subspaces that span the whole space.

    Args:
        drift: the tables.
        matrices: layer and module of the columns; by default q, k and v of the first layer.
    """
    chosen = matrices or default_matrices(drift)
    rows = drops_zeros(angles(drift, "angle", drift.shown))
    rows = _of(rows, chosen).with_columns(
        [(pl.col(c) * 180 / pi) for c in ("value", "random_low", "random_high", "noise_low", "noise_high")]
    )

    def draw(part: pl.DataFrame, _: str) -> alt.VConcatChart:
        sides = [
            alt.hconcat(
                *[
                    _angle_panel(_of(part, [matrix]).filter(pl.col("side") == side), matrix, side, drift.shown)
                    for matrix in chosen
                ],
                spacing=22,
            )
            for side in ("left", "right")
            if (part["side"] == side).any()
        ]
        return alt.vconcat(*sides, spacing=26)

    note = "sand: independent random subspaces; coloured bands: noise of the same norm (both 95 %)"
    return titled(rows, draw, "Principal angles of the top singular subspaces", note, "one line each")


def has_angle_curves(drift: Drift) -> bool:
    """Whether any angle curve is more than a definition: some k below the dimension was measured."""
    return len(_of(drops_zeros(angles(drift, "angle", drift.shown)), default_matrices(drift))) > 0


def default_matrices(drift: Drift) -> list[tuple[int, str]]:
    """Layer and module of q, k and v of the first analysed layer, or of its first three modules without them."""
    blocks = drift.verdicts.filter(pl.col("layer") >= 0)
    table = blocks if len(blocks) else drift.verdicts
    layer = table["layer"].min()
    present = table.filter(pl.col("layer") == layer)["module"].unique(maintain_order=True).to_list()
    return [(layer, module) for module in ([m for m in FIRST if m in present] or present[:3])]  # type: ignore[misc]


def titled(
    table: pl.DataFrame, draw: Callable[[pl.DataFrame, str], Any], title: str, note: str, lines: str
) -> alt.TopLevelMixin:
    """One panel a model; tables of ``rlheals diagnose`` have neither model nor seed, and the title names none.

    Args:
        table: rows with columns model and seed.
        draw: makes the panel of one model.
        title: heading.
        note: second line.
        lines: how several seeds are shown.
    """
    if set(table["model"]) == {""}:
        return finish(draw(table, ""), title, note)
    return per_model(table, draw, title, seeds_note(table, note, lines))


def inline(rows: pl.DataFrame) -> alt.InlineData:
    """Rows as the data of a chart."""
    return alt.InlineData(values=rows.to_dicts())


def band(rows: pl.DataFrame, low: str, high: str, color: str, x: alt.X, y: alt.Y, opacity: float = 0.2) -> alt.Chart:
    """An area from the lowest ``low`` to the highest ``high`` over the seeds at each ``index``.

    Its outline keeps a band visible that is narrower than a pixel.
    """
    spread = rows.group_by("index", maintain_order=True).agg(pl.col(low).min(), pl.col(high).max())
    area = alt.Chart(inline(spread.drop_nulls().sort("index"))).mark_area(
        fill=color, fillOpacity=opacity, stroke=color, strokeOpacity=min(1, 2 * opacity), strokeWidth=0.7
    )
    lower = y.copy()
    lower.shorthand = f"{low}:Q"
    return area.encode(x, lower, alt.Y2(f"{high}:Q"))


def pair_color(pairs: Sequence[str]) -> dict[str, Any]:
    """Colour and dash channels for pairs, with a legend above when there are several."""
    legend = None
    if len(pairs) > 1:
        legend = alt.Legend(title=None, orient="top", offset=4, padding=5, labelLimit=320, columns=3)
    return {
        "color": alt.Color("pair_label:N", scale=pair_scale(pairs), legend=legend),
        "strokeDash": alt.StrokeDash("pair_label:N", scale=pair_scale(pairs, "dash"), legend=legend),
    }


def pair_scale(pairs: Sequence[str], channel: Literal["color", "dash"] = "color") -> alt.Scale:
    """Colours or dashes of the pairs, by their labels."""
    looks = LOOKS[: len(pairs)]
    marks = [look.color if channel == "color" else list(look.dash) for look in looks]
    return alt.Scale(domain=[pair_label(pair) for pair in pairs[: len(looks)]], range=marks)


def matrix_title(matrix: tuple[int, str]) -> str:
    """Name of a panel."""
    layer, module = matrix
    return module if layer < 0 else f"layer {layer}, {module}"


def _of(rows: pl.DataFrame, matrices: Sequence[tuple[int, str]]) -> pl.DataFrame:
    keep = [(pl.col("layer") == layer) & (pl.col("module") == module) for layer, module in matrices]
    return rows.filter(pl.any_horizontal(keep))


def _sigma_column(rows: pl.DataFrame, matrix: tuple[int, str], look: Look, pair: str) -> alt.VConcatChart:
    """Values on top, their change below."""
    ordered = rows.sort("index").with_columns(pl.col("index") + 1)
    x = alt.X("index:Q", title=None, axis=alt.Axis(grid=False, tickCount=4, format="d"))
    values = alt.Chart().encode(x, alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=_short_axis()))
    layers = []
    for quantity, color, dash in (("sigma_before", "#8c959f", [1, 0]), ("sigma_after", look.color, [5, 3])):
        part = ordered.filter(pl.col("quantity") == quantity)
        line = values.mark_line(color=color, strokeDash=dash, strokeWidth=1.8)
        line.data = inline(part.select("index", "value", "seed"))
        layers.append(line.encode(detail="seed:N", tooltip=_tips("singular value")))
    title = alt.TitleParams(
        [pair_label(pair), f"{matrix_title(matrix)}: singular values"], fontSize=12, fontWeight="normal", offset=6
    )
    upper = alt.layer(*layers).properties(width=PANEL, height=110, title=title)
    return alt.vconcat(upper, _change_panel(ordered.filter(pl.col("quantity") == "sigma_change"), look), spacing=4)


def _change_panel(rows: pl.DataFrame, look: Look) -> alt.LayerChart:
    x = alt.X("index:Q", title="rank", axis=alt.Axis(grid=False, tickCount=4, format="d"))
    y = alt.Y("value:Q", title=None, axis=_short_axis())
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=MUTED, strokeDash=[2, 3]).encode(y="zero:Q")
    line = alt.Chart(inline(rows.select("index", "value", "seed"))).mark_line(color=look.color, strokeWidth=1.3)
    drawn = line.encode(x, y, detail="seed:N", tooltip=_tips("change"))
    layers: list[Any] = [zero, band(rows, "noise_low", "noise_high", NOISE, x, y, 0.28), drawn]
    title = alt.TitleParams("change of the singular values", fontSize=12, fontWeight="normal", offset=4, color=MUTED)
    return alt.layer(*layers).properties(width=PANEL, height=80, title=title)


def _angle_panel(rows: pl.DataFrame, matrix: tuple[int, str], side: str, pairs: Sequence[str]) -> alt.LayerChart:
    """Angles of one side of one matrix for all pairs."""
    ordered = rows.sort("index").with_columns(pl.col("index") + 1, _labels())
    x = alt.X("index:Q", title="number of the angle", axis=alt.Axis(grid=False, tickCount=4, format="d"))
    # Small angles and their noise stay visible on a square-root scale, and zero has a place.
    scale = alt.Scale(type="sqrt", domain=[0, 90], clamp=True)
    y = alt.Y("value:Q", title="degrees (root scale)", scale=scale, axis=alt.Axis(values=[0, 1, 5, 15, 30, 60, 90]))
    layers: list[Any] = [band(ordered, "random_low", "random_high", RANDOM, x, y, 0.55)]
    for pair, look in zip(pairs, LOOKS, strict=False):
        layers.append(band(ordered.filter(pl.col("pair") == pair), "noise_low", "noise_high", look.color, x, y, 0.22))
    columns = ordered.select("index", "value", "seed", "pair_label", "noise_low", "noise_high")
    line = alt.Chart(inline(columns)).mark_line(strokeWidth=1.8)
    tips = [
        alt.Tooltip("pair_label:N", title="pair"),
        alt.Tooltip("index:Q", title="angle"),
        alt.Tooltip("value:Q", title="degrees", format=".2f"),
        alt.Tooltip("noise_low:Q", title="noise from", format=".2f"),
        alt.Tooltip("noise_high:Q", title="to", format=".2f"),
        alt.Tooltip("seed:N"),
    ]
    layers.append(line.encode(x, y, **pair_color(pairs), detail="seed:N", tooltip=tips))
    sizes = sorted(set(ordered["k"]))
    space = f"{sizes[0]} of {ordered['dimension'][0]} {side} vectors" if sizes else "k spans the whole space"
    title = alt.TitleParams([matrix_title(matrix), space], fontSize=12, fontWeight="normal", offset=6)
    return alt.layer(*layers).properties(width=PANEL, height=150, title=title)


def _labels() -> pl.Expr:
    pairs = pl.col("pair").map_elements(pair_label, return_dtype=pl.String)
    return pairs.alias("pair_label")


def _short_axis() -> alt.Axis:
    return alt.Axis(tickCount=4, format="~g", minExtent=44, maxExtent=44)


def _tips(what: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("index:Q", title="rank"),
        alt.Tooltip("value:Q", title=what, format=".5g"),
        alt.Tooltip("seed:N"),
    ]
