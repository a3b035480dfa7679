"""Figures of weight edits by layer and by rank: screened cells, confirmed ones and their controls side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from rlheals.reporting.figures.charts import per_model, seeds_note
from rlheals.reporting.figures.style import MUTED, Look
from rlheals.reporting.repairs import BASE, CONTROLS, END, PEAK, edit_name, layers_of, model_name, window_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rlheals.reporting.repairs import Repairs

REFERENCES = {
    BASE: Look("of the base", "#0072b2", "#005a8e"),
    PEAK: Look("of SFT_MaxOOD", "#d55e00", "#ad4c00", (6, 3), "square"),
    END: Look("of SFT_End", "#009e73", "#00724f", (2, 2), "triangle-up"),
    "rl": Look("of RL", "#cc79a7", "#9c4f7b", (8, 2), "diamond"),
}
CONTROL_LOOKS = {
    "random_rotation": Look(CONTROLS["random_rotation"], "#6e7781", "#57606a", (1, 0), "cross"),
    "noise": Look(CONTROLS["noise"], "#a0a7ae", "#6e7781", (1, 0), "triangle-down"),
    "interpolate": Look(CONTROLS["interpolate"], "#1f2328", "#1f2328", (1, 0), "diamond"),
}
"""Controls are grey, so that what they control stays in front; the plain step back is the darkest."""
CONDITIONS = {"ood": "OOD", "id": "ID"}
PANEL_HEIGHT = 165
SHARE_AXIS = alt.Axis(format="%", tickCount=5, minExtent=44, maxExtent=44)
PERCENT = alt.Axis(format="%", tickCount=5)
NOTE = "hollow: screened on select ({screened}); filled: confirm ({confirmed})"


def layerwise(repairs: Repairs) -> alt.TopLevelMixin:
    """OOD and ID accuracy with directions put back in one block of layers, and in all layers up to one.

    Args:
        repairs: the tables, with at least one edit of some layers (see `has_layers`).
    """
    rows = with_controls(repairs, layer_rows(repairs.edits))
    single, growing = _layer_places(rows)
    titled = [(single, "directions put back in these layers only"), (growing, "… in all layers from the first on")]
    titled = [(places, title) for places, title in titled if places]

    def draw(part: pl.DataFrame, _: str) -> alt.VConcatChart:
        panels = [
            alt.hconcat(
                *[
                    _strip(part, condition, places, title, 320, first=not place, last=place == len(titled) - 1)
                    for place, (places, title) in enumerate(titled)
                ],
                spacing=24,
            )
            for condition in CONDITIONS
        ]
        return _stacked(panels)

    return per_model(rows, draw, "Putting directions back into SFT_End, layer by layer", note(rows))


def rankwise(repairs: Repairs) -> alt.TopLevelMixin:
    """OOD and ID accuracy with the directions of the leading or trailing ranks of all layers put back.

    Args:
        repairs: the tables, with at least one such edit.
    """
    rows = with_controls(repairs, rank_rows(repairs.edits))
    windows = rows.select("rank_from", "rank_to").unique().sort("rank_from", "rank_to").iter_rows()
    places = [_window_place(*window) for window in windows]

    def draw(part: pl.DataFrame, _: str) -> alt.VConcatChart:
        title = "directions put back, by the rank of their singular value"
        return _stacked(
            [_strip(part, condition, places, title, 640, first=True, last=True) for condition in CONDITIONS]
        )

    return per_model(rows, draw, "Putting directions back into SFT_End, rank by rank", note(rows))


def layer_rows(edits: pl.DataFrame) -> pl.DataFrame:
    """Edits of SFT_End that put all directions back in some layers, or in all of them; ``place`` is the layers."""
    rows = _directions(edits).filter((pl.col("rank_from") == 0) & (pl.col("rank_to") == 1))
    return rows.with_columns(pl.col("layers").alias("place"))


def rank_rows(edits: pl.DataFrame) -> pl.DataFrame:
    """Edits of SFT_End that put the directions of some ranks back in all layers; ``place`` is the window."""
    rows = _directions(edits).filter(pl.col("layers") == "all")
    windows = [_window_place(*window) for window in rows.select("rank_from", "rank_to").iter_rows()]
    return rows.with_columns(pl.Series("place", windows, pl.String))


def with_controls(repairs: Repairs, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows and the controls of those that were confirmed, at the same ``place``; ``series`` says which is which."""
    confirmed = rows.filter(pl.col("split") == "confirm")
    where = confirmed.select("model", "seed", pl.col("cell_id").alias("control_of"), "place")
    controls = repairs.controls.filter(pl.col("operator").is_in(list(CONTROL_LOOKS)))
    beside = controls.join(where, on=["model", "seed", "control_of"], maintain_order="left")
    both = pl.concat([rows, beside.select(rows.columns)])
    series = pl.when(pl.col("control_of") != "").then("operator").otherwise("reference")
    names = [edit_name(row) for row in both.to_dicts()]
    return both.with_columns(series.alias("series"), pl.Series("edit", names, pl.String))


def has_layers(repairs: Repairs) -> bool:
    """Whether directions were put back in only some layers."""
    return bool((layer_rows(repairs.edits)["layers"] != "all").any())


def over_seeds(rows: pl.DataFrame) -> pl.DataFrame:
    """One row an edit and split: of several seeds the mean, with the lowest and highest seed in place of interval."""
    if rows["seed"].n_unique() < 2:
        return rows
    keys = ["model", "place", "series", "reference", "split"]
    ends = [
        getattr(pl.col(f"{condition}_accuracy"), extreme)().alias(f"{condition}_{end}")
        for condition in CONDITIONS
        for end, extreme in (("low", "min"), ("high", "max"))
    ]
    means = pl.col("ood_accuracy", "id_accuracy", "recovery", "change_norm").mean()
    return rows.group_by(keys, maintain_order=True).agg(means, *ends, pl.col("edit", "n").first())


def note(rows: pl.DataFrame, seeds: str = "their mean") -> str:
    """Subtitle: which marks are screened, which confirmed, on how many hands; how several seeds are shown."""
    sizes = {}
    for split in ("select", "confirm"):
        found = sorted(set(rows.filter(pl.col("split") == split)["n"]))
        sizes[split] = f"n = {found[0]}" if len(found) == 1 else f"n = {found[0]} to {found[-1]}" if found else "none"
    text = NOTE.format(screened=sizes["select"], confirmed=sizes["confirm"])
    if seeds == "their mean" and rows["seed"].n_unique() > 1:
        return seeds_note(rows, f"{text}; bars: lowest to highest seed", seeds)
    return seeds_note(rows, f"{text}; bars: 95 % intervals", seeds)


def looks(series: Sequence[str]) -> dict[str, Look]:
    """Looks of the series that occur, in the order of figures."""
    known = REFERENCES | CONTROL_LOOKS
    return {name: look for name, look in known.items() if name in set(series)}


def with_offsets(rows: pl.DataFrame, found: Mapping[str, Look], by: Sequence[str]) -> tuple[pl.DataFrame, list[str]]:
    """Rows with their ``label`` and their ``offset`` beside others at one place, and the order of the offsets.

    The controls of an edit come right behind it.
    """
    labels = pl.col("series").replace_strict({name: look.label for name, look in found.items()}).alias("label")
    offsets = pl.concat_str([pl.col(name).cast(pl.String) for name in by], separator=" ").alias("offset")
    table = rows.with_columns(labels, offsets)
    ranks = {"reference": list(REFERENCES), "series": list(found), "split": ["select", "confirm"]}
    keys = table.select("offset", *by).unique().to_dicts()
    keys.sort(key=lambda key: [ranks[name].index(key[name]) if name in ranks else key[name] for name in by])
    return shown(table), [key["offset"] for key in keys]


def tooltips() -> list[alt.Tooltip]:
    """What pointing at a cell shows."""
    return [
        alt.Tooltip("edit:N"),
        alt.Tooltip("split:N", title="hands"),
        alt.Tooltip("n:Q", title="hands a condition"),
        alt.Tooltip("ood_accuracy:Q", title="OOD", format=".1%"),
        alt.Tooltip("id_accuracy:Q", title="ID", format=".1%"),
        alt.Tooltip("recovery:Q", title="recovered", format=".0%"),
        alt.Tooltip("change_norm:Q", title="relative change", format=".3g"),
    ]


def shown(rows: pl.DataFrame) -> pl.DataFrame:
    """The columns that a chart needs, so that its file stays small."""
    wanted = ("model", "seed", "edit", "series", "place", "split", "n", "id_accuracy", "id_low", "id_high", "id_before")
    more = (
        "ood_accuracy",
        "ood_low",
        "ood_high",
        "ood_before",
        "ood_peak",
        "recovery",
        "change_norm",
        "label",
        "offset",
    )
    return rows.select([name for name in (*wanted, *more) if name in rows.columns])


def _directions(edits: pl.DataFrame) -> pl.DataFrame:
    return edits.filter(
        (pl.col("operator") == "directions")
        & (pl.col("basis") == "uv")
        & (pl.col("target") == END)
        & (pl.col("modules") == "all")
        & pl.col("reference").is_in([BASE, PEAK])
    )


def _layer_places(rows: pl.DataFrame) -> tuple[list[str], list[str]]:
    """Blocks, and ranges from the first layer on, each in order; the first block and all layers belong to both."""
    places = {text: layers_of(text) for text in rows["place"].unique().to_list() if text != "all"}
    shortest = min((layers for layers in places.values() if layers[0] == 0), key=len, default=())
    blocks = [text for text, layers in places.items() if layers[0] > 0 or layers == shortest]
    growing = [text for text, layers in places.items() if layers[0] == 0]
    whole = ["all"] * bool((rows["place"] == "all").any())
    blocks.sort(key=lambda text: places[text])
    growing.sort(key=lambda text: len(places[text]))
    return blocks, [*growing, *whole] if len(growing) > 1 else []


def _window_place(rank_from: float, rank_to: float) -> str:
    return window_name(rank_from, rank_to) or "all"


def _strip(
    rows: pl.DataFrame, condition: str, places: Sequence[str], title: str, width: int, *, first: bool, last: bool
) -> alt.LayerChart:
    """Accuracy of one condition at each place, one mark a series, split and seed."""
    own = rows.filter(pl.col("place").is_in(list(places)))
    found = looks(own["series"].to_list())
    table, order = with_offsets(over_seeds(own), found, ("reference", "series", "split"))
    x = alt.X(
        "place:N",
        sort=list(places),
        title=title if condition == "id" else None,
        axis=alt.Axis(labelAngle=0, labels=condition == "id", ticks=False, domain=False, labelPadding=8),
        scale=alt.Scale(domain=list(places), paddingInner=0.12),
    )
    y = alt.Y(
        f"{condition}_accuracy:Q",
        title=f"{CONDITIONS[condition]} accuracy" if first else None,
        axis=SHARE_AXIS,
        scale=alt.Scale(domain=[0, 1]),
    )
    channels = {
        "x": x,
        "xOffset": alt.XOffset("offset:N", sort=order, scale=alt.Scale(domain=order, paddingOuter=0.3)),
        "color": _scale(alt.Color, found, "color"),
    }
    return alt.layer(
        *_before(own, condition, width if last else None), *_marks(table, condition, y, channels, found)
    ).properties(width=width, height=PANEL_HEIGHT)


def _marks(
    table: pl.DataFrame, condition: str, y: alt.Y, channels: dict[str, Any], found: dict[str, Look]
) -> list[alt.Chart]:
    """Intervals and points, hollow on select and filled on confirm."""
    low = y.copy()
    low.shorthand = f"{condition}_low:Q"
    layers = []
    for split, filled, stroke in (("select", False, 1.2), ("confirm", True, 2.4)):
        own = table.filter(pl.col("split") == split)
        if own.is_empty():
            continue
        base = alt.Chart(alt.InlineData(values=own.to_dicts()))
        layers.append(
            base.mark_rule(strokeWidth=stroke, opacity=0.75).encode(low, y2=f"{condition}_high:Q", **channels)
        )
        dots = base.mark_point(size=85 if filled else 42, filled=filled, opacity=1, strokeWidth=1.4)
        layers.append(dots.encode(y, shape=_scale(alt.Shape, found, "shape"), tooltip=tooltips(), **channels))
    return layers


def _before(rows: pl.DataFrame, condition: str, labels_at: int | None) -> list[alt.Chart]:
    """Lines at the accuracy of SFT_End as it was and, out of distribution, of SFT_MaxOOD, one a seed."""
    confirmed = rows.filter(pl.col("split") == "confirm")
    table = confirmed if len(confirmed) else rows
    lines = [(f"{condition}_before", [4, 3], model_name(END))]
    lines += [("ood_peak", [1, 3], model_name(PEAK))] if condition == "ood" else []
    charts = []
    for column, dash, name in lines:
        values = table.group_by("seed", maintain_order=True).agg(pl.col(column).first()).to_dicts()
        chart = alt.Chart(alt.InlineData(values=[row | {"name": name} for row in values]))
        tips = [
            alt.Tooltip("name:N", title="unedited"),
            alt.Tooltip(f"{column}:Q", format=".1%"),
            alt.Tooltip("seed:N"),
        ]
        charts.append(chart.mark_rule(color=MUTED, strokeDash=dash).encode(y=f"{column}:Q", tooltip=tips))
        if labels_at is None:
            continue
        first = alt.Chart(alt.InlineData(values=[{"name": name, column: values[0][column]}]))
        text = first.mark_text(align="left", dx=4, fontSize=11, color=MUTED)
        charts.append(text.encode(x=alt.value(labels_at), y=f"{column}:Q", text="name:N"))
    return charts


def _scale(channel: Any, found: dict[str, Look], attribute: str) -> Any:
    """Colour or shape of the series; one legend above the figure for both."""
    domain = [look.label for look in found.values()]
    values = [getattr(look, attribute) for look in found.values()]
    legend = alt.Legend(title=None, orient="top", offset=6, labelLimit=320, columns=5)
    return channel("label:N", scale=alt.Scale(domain=domain, range=values), legend=legend)


def _stacked(panels: Sequence[Any]) -> alt.VConcatChart:
    return alt.vconcat(*panels, spacing=14)
