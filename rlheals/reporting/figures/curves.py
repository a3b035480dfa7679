"""Lines against the SFT step with direct labels: the part that several figures share."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log, log1p, log10
from typing import TYPE_CHECKING, Any, Literal

import altair as alt
import polars as pl

from rlheals.reporting.figures.style import CHOICES, HEIGHT, LABEL_GAP, MUTED, WIDTH, Look, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.reporting.tables import Choice


@dataclass(frozen=True, slots=True)
class YAxis:
    """What the vertical axis shows: a share of 0 to 1 drawn in per cent, or a positive number on a log scale."""

    title: str
    kind: Literal["share", "log"]
    value_title: str


@dataclass(frozen=True, slots=True)
class Steps:
    """A symlog axis of training steps that keeps step 0 and the early rungs apart."""

    last: int
    constant: int
    ticks: list[int]
    width: int = WIDTH

    def pixel(self, step: float) -> float:
        """Horizontal position of ``step``."""
        return self.width * log1p(step / self.constant) / log1p(self.last / self.constant)

    def encode(self) -> alt.X:
        """The encoding of the x channel."""
        scale = alt.Scale(type="symlog", constant=self.constant, domain=[0, self.last], nice=False)
        axis = alt.Axis(values=self.ticks, labelOverlap="greedy", labelSeparation=5, grid=False, format="d")
        return alt.X("step:Q", scale=scale, axis=axis, title="SFT step (symlog scale)")


def step_axis(steps: Sequence[int], width: int = WIDTH) -> Steps:
    """An axis for these steps, with a tick at each of up to 24 of them."""
    unique = sorted(set(steps))
    positive = [step for step in unique if step > 0] or [1]
    thinned = unique if len(unique) <= 24 else [0, *_doubling(positive[0], positive[-1])]
    return Steps(last=positive[-1], constant=positive[0], ticks=thinned, width=width)


def curves(
    table: pl.DataFrame,
    looks: dict[str, Look],
    axis: YAxis,
    steps: Steps,
    choices: Sequence[Choice] = (),
    *,
    height: int = HEIGHT,
    mark_minima: bool = False,
) -> alt.LayerChart:
    """Lines of one model, one colour a series.

    Args:
        table: columns series, seed, step, value, and low and high (null where there is no interval); one seed is drawn
            with its band, several as faint lines with an interval at each rung, and their mean.
        looks: how each series is drawn; a series without rows is left out.
        axis: the vertical axis.
        steps: the horizontal axis.
        choices: rungs to mark with vertical lines.
        height: of the plotting area, in pixels.
        mark_minima: put a diamond at the lowest point of each line.
    """
    present = {key: look for key, look in looks.items() if key in set(table["series"])}
    labelled = table.with_columns(
        pl.col("series").replace_strict({k: v.label for k, v in looks.items()}).alias("label")
    )
    means = labelled.group_by("series", "label", "step", maintain_order=True).agg(pl.col("value").mean()).sort("step")
    domain = _domain(table, axis)
    y = alt.Y("value:Q", scale=_y_scale(axis, domain), title=axis.title, axis=_y_axis(axis, domain))
    base = {"x": steps.encode(), "y": y}
    layers: list[Any] = []
    if choices:
        layers += _choice_marks(choices, steps)
    layers += _lines(labelled, means, present, base, axis)
    if mark_minima:
        lowest = means.sort("value").group_by("series", "label", maintain_order=True).first()
        layers.append(_minima(lowest, present, base, axis))
    layers.append(_end_labels(means, present, base, domain, axis, height, 15 if mark_minima else 9))
    return alt.layer(*layers).properties(width=steps.width, height=height)


def _lines(
    table: pl.DataFrame, means: pl.DataFrame, looks: dict[str, Look], base: dict[str, Any], axis: YAxis
) -> list[alt.Chart]:
    """Band and line of a single seed, or faint lines of several seeds and their mean."""
    color, dash, shape = _scales(looks)
    tips = [alt.Tooltip("label:N", title="series"), alt.Tooltip("step:Q", title="SFT step")]
    value = alt.Tooltip("value:Q", title=axis.value_title, format=_format(axis))
    layers = []
    single = table["seed"].n_unique() == 1
    if single and table["low"].is_not_null().any():
        band = alt.Chart(_data(table)).mark_area(opacity=0.16, line=False)
        layers.append(band.encode(base["x"], alt.Y("low:Q", title=axis.title), alt.Y2("high:Q"), color))
        tips += [value, alt.Tooltip("low:Q", title="95 % from", format=_format(axis))]
        tips += [alt.Tooltip("high:Q", title="to", format=_format(axis)), alt.Tooltip("n:Q", title="hands")]
    else:
        tips += [value]
    if not single:
        faint = alt.Chart(_data(table)).mark_line(strokeWidth=1, opacity=0.4)
        layers.append(faint.encode(base["x"], base["y"], color, dash, detail="seed:N"))
        if table["low"].is_not_null().any():
            interval = alt.Chart(_data(table)).mark_rule(strokeWidth=1.2, opacity=0.35)
            layers.append(
                interval.encode(base["x"], alt.Y("low:Q", title=axis.title), alt.Y2("high:Q"), color, detail="seed:N")
            )
    strong = table if single else means
    layers.append(alt.Chart(_data(strong)).mark_line(strokeWidth=2.2).encode(base["x"], base["y"], color, dash))
    if strong["step"].n_unique() <= 40:
        points = alt.Chart(_data(strong)).mark_point(size=38, filled=True, opacity=1)
        layers.append(points.encode(base["x"], base["y"], color, shape, tooltip=tips))
    else:
        points = alt.Chart(_data(strong)).mark_point(size=60, opacity=0)
        layers.append(points.encode(base["x"], base["y"], color, tooltip=tips))
    return layers


def _scales(looks: dict[str, Look]) -> tuple[alt.Color, alt.StrokeDash, alt.Shape]:
    """Colour, dash and shape of the series; all without a legend because lines are labelled directly."""
    names = [look.label for look in looks.values()]
    dashes = [list(look.dash) for look in looks.values()]
    color = alt.Color("label:N", scale=alt.Scale(domain=names, range=[v.color for v in looks.values()]), legend=None)
    dash = alt.StrokeDash("label:N", scale=alt.Scale(domain=names, range=dashes), legend=None)
    shape = alt.Shape("label:N", scale=alt.Scale(domain=names, range=[v.shape for v in looks.values()]), legend=None)
    return color, dash, shape


def _end_labels(
    means: pl.DataFrame,
    looks: dict[str, Look],
    base: dict[str, Any],
    domain: tuple[float, float],
    axis: YAxis,
    height: int,
    distance: int,
) -> alt.LayerChart:
    """Names of the series right of their last points, moved apart where they would overlap."""
    last = means.filter(pl.col("step") == pl.col("step").max().over("series"))
    scaled = [_unit(value, domain, axis) for value in last["value"]]
    moved = spread(scaled, LABEL_GAP / height, floor=0.0)
    placed = last.with_columns(pl.Series("value", [_from_unit(u, domain, axis) for u in moved]))
    layers = []
    for key, look in looks.items():
        rows = placed.filter(pl.col("series") == key)
        text = alt.Chart(_data(rows)).mark_text(align="left", dx=distance, fontSize=13, fontWeight=600, color=look.ink)
        layers.append(text.encode(base["x"], base["y"], text="label:N"))
    return alt.layer(*layers)


def _minima(lowest: pl.DataFrame, looks: dict[str, Look], base: dict[str, Any], axis: YAxis) -> alt.Chart:
    """A diamond at the lowest point of each mean line."""
    color, _, _ = _scales(looks)
    tips = [
        alt.Tooltip("label:N", title="lowest point of"),
        alt.Tooltip("step:Q", title="SFT step"),
        alt.Tooltip("value:Q", title=axis.value_title, format=_format(axis)),
    ]
    mark = alt.Chart(_data(lowest)).mark_point(shape="diamond", size=190, strokeWidth=2.2, fill="white", opacity=1)
    return mark.encode(base["x"], base["y"], color, tooltip=tips)


def _choice_marks(choices: Sequence[Choice], steps: Steps) -> list[alt.Chart]:
    """Vertical lines at SFT_MaxOOD and SFT_End with their names above the plot."""
    at = {key: sorted({getattr(choice, key) for choice in choices}) for key in CHOICES}
    rows = [{"step": step, "rung": CHOICES[key]} for key, found in at.items() for step in found]
    rules = alt.Chart(_rows(rows)).mark_rule(color=MUTED, strokeDash=[2, 3], strokeWidth=1.3)
    layers = [rules.encode(steps.encode(), tooltip=[alt.Tooltip("rung:N"), alt.Tooltip("step:Q", title="SFT step")])]
    close = steps.pixel(at["end"][-1]) - steps.pixel(at["max_ood"][0]) < 260
    for key, lift in (("max_ood", -22 if close else -7), ("end", -7)):
        text = f"{CHOICES[key]} (step{'s' if len(at[key]) > 1 else ''} {', '.join(map(str, at[key]))})"
        place = at[key][0] if key == "max_ood" else at[key][-1]
        pixel = steps.pixel(place)
        align: Any = "left" if pixel < 70 else "right" if pixel > steps.width - 70 else "center"
        mark = alt.Chart(_rows([{"step": place}])).mark_text(
            align=align, dy=lift, baseline="bottom", fontSize=12, color=MUTED
        )
        layers.append(mark.encode(steps.encode(), y=alt.value(0), text=alt.value(text)))
    return layers


def _domain(table: pl.DataFrame, axis: YAxis) -> tuple[float, float]:
    if axis.kind == "share":
        return 0.0, 1.0
    values = [value for value in table["value"] if value > 0] or [1.0]
    return min(values) * 0.75, max(values) * 1.3


def _y_scale(axis: YAxis, domain: tuple[float, float]) -> alt.Scale:
    kind: Any = "linear" if axis.kind == "share" else "log"
    return alt.Scale(type=kind, domain=list(domain), nice=False, clamp=axis.kind == "log")


def _y_axis(axis: YAxis, domain: tuple[float, float]) -> alt.Axis:
    if axis.kind == "share":
        return alt.Axis(format="%", tickCount=5, grid=True)
    return alt.Axis(values=log_ticks(*domain), format="~g", grid=True)


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks 1, 2 and 5 times powers of ten between ``low`` and ``high``; only powers over many decades.

    >>> log_ticks(0.03, 1.5)
    [0.05, 0.1, 0.2, 0.5, 1.0]
    """
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 3e3 else (1,)
    ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _format(axis: YAxis) -> str:
    return ".1%" if axis.kind == "share" else ".4f"


def _unit(value: float, domain: tuple[float, float], axis: YAxis) -> float:
    """Position of a value within the axis, 0 at the bottom and 1 at the top."""
    low, high = domain
    if axis.kind == "share":
        return (value - low) / (high - low)
    return log(max(value, low) / low) / log(high / low)


def _from_unit(unit: float, domain: tuple[float, float], axis: YAxis) -> float:
    low, high = domain
    if axis.kind == "share":
        return low + unit * (high - low)
    return float(low * (high / low) ** unit)


def _doubling(first: int, last: int) -> list[int]:
    steps = [first]
    while steps[-1] * 2 < last:
        steps.append(steps[-1] * 2)
    return [*steps, last]


def _data(table: pl.DataFrame) -> alt.InlineData:
    return _rows(table.to_dicts())


def _rows(rows: list[dict[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=rows)
