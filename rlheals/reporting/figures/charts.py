"""The figures against the training step: each is a function from tables to a chart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from rlheals.reporting.figures.curves import YAxis, curves, log_ticks, step_axis
from rlheals.reporting.figures.style import CONDITIONS, LOSSES, config
from rlheals.stats import wilson

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rlheals.reporting.tables import Choice

ACCURACY = YAxis("solved at the first try (% of hands)", "share", "accuracy")
NLL = YAxis("loss (nats per answer token, log scale)", "log", "nats per token")
SUBTITLE = 100
"""Characters in a line of a subtitle, where its statements are no longer."""


def ladder_accuracy(summary: pl.DataFrame, choices: Sequence[Choice]) -> alt.TopLevelMixin:
    """First-try accuracy on ``confirm`` against the SFT step, per condition, with 95 % Wilson bands.

    Args:
        summary: the "probe_summary" table.
        choices: SFT_MaxOOD and SFT_End of each run, drawn as vertical lines.
    """
    rows = first_tries(summary)
    table = _points(rows, "condition", "accuracy")

    def draw(part: pl.DataFrame, model: str) -> alt.LayerChart:
        own = [choice for choice in choices if choice.model == model]
        return curves(part, CONDITIONS, ACCURACY, step_axis(part["step"].to_list()), own)

    return per_model(table, draw, "Accuracy along the SFT ladder", _hands(rows))


def losses(table: pl.DataFrame, choices: Sequence[Choice]) -> alt.TopLevelMixin:
    """Teacher-forced loss of the three sets against the SFT step; diamonds mark each line's minimum.

    Args:
        table: the "losses" table.
        choices: as in `ladder_accuracy`.
    """
    points = table.select(
        "model",
        "seed",
        "step",
        "series",
        pl.col("nll_per_token").alias("value"),
        pl.lit(None, pl.Float64).alias("low"),
        pl.lit(None, pl.Float64).alias("high"),
        pl.lit(None, pl.Int64).alias("n"),
    ).sort("step")

    def draw(part: pl.DataFrame, model: str) -> alt.LayerChart:
        own = [choice for choice in choices if choice.model == model]
        return curves(part, LOSSES, NLL, step_axis(part["step"].to_list()), own, mark_minima=True)

    return per_model(points, draw, "Teacher-forced losses along SFT", seeds_note(points, "diamonds: lowest point"))


def format_errors(summary: pl.DataFrame, choices: Sequence[Choice]) -> alt.TopLevelMixin:
    """Share of first answers on ``confirm`` that cannot be read as an answer, against the SFT step."""
    rows = first_tries(summary)
    table = _points(rows, "condition", "format_error_rate")
    axis = YAxis("unreadable first answers (% of hands)", "share", "format errors")

    def draw(part: pl.DataFrame, model: str) -> alt.LayerChart:
        own = [choice for choice in choices if choice.model == model]
        return curves(part, CONDITIONS, axis, step_axis(part["step"].to_list()), own, height=260)

    return per_model(table, draw, "Format errors along the SFT ladder", _hands(rows))


def shortcut(summary: pl.DataFrame, choices: Sequence[Choice]) -> alt.TopLevelMixin:
    """Does the model still read the rule? Two panels against the SFT step, from first answers on ``confirm``.

    Top: share of OOD prompts answered as if the training rule held. Bottom: share with the card values copied right
    under the rule of the prompt.
    """
    rows = first_tries(summary)
    old_rule = YAxis("right under the training rule (%)", "share", "right under the training rule")
    fields = YAxis("card values right (%)", "share", "card values right")
    out = rows.filter(pl.col("condition").is_in(["ood", "ood_heldout"]))
    top, bottom = _points(out, "condition", "training_rule_rate"), _points(rows, "condition", "fields_ok_rate")

    def draw(_: pl.DataFrame, model: str) -> alt.VConcatChart:
        own = [choice for choice in choices if choice.model == model]
        panels = []
        for part, axis in ((top, old_rule), (bottom, fields)):
            mine = part.filter((pl.col("model") == model) & pl.col("value").is_not_null())
            if len(mine):
                panels.append(
                    curves(mine, CONDITIONS, axis, step_axis(rows["checkpoint_step"].to_list()), own, height=210)
                )
        return column(panels, 34)

    return per_model(top, draw, "Which rule the answers follow", _hands(rows))


def base_training(table: pl.DataFrame) -> alt.TopLevelMixin:
    """Pretraining loss of the tiny base against the optimiser step, one line a seed.

    Args:
        table: the "training" table of the ``base`` stage, with at least one row.
    """
    rows = table.filter(pl.col("loss").is_not_null())
    positive = rows.filter(pl.col("loss") > 0)["loss"].to_list() or [1.0]
    axis = alt.Axis(values=log_ticks(min(positive), max(positive)), format="~g")

    def draw(part: pl.DataFrame, _: str) -> alt.LayerChart:
        data = alt.InlineData(values=part.select("seed", "step", "loss", "learning_rate").to_dicts())
        line = alt.Chart(data).mark_line(strokeWidth=1.4, color="#0072b2", opacity=0.8)
        line = line.encode(
            alt.X("step:Q", title="optimiser step", axis=alt.Axis(grid=False, format="d")),
            alt.Y(
                "loss:Q", scale=alt.Scale(type="log", nice=False), axis=axis, title="loss (nats per token, log scale)"
            ),
            detail="seed:N",
            tooltip=[
                alt.Tooltip("step:Q", title="optimiser step"),
                alt.Tooltip("loss:Q", format=".4f"),
                alt.Tooltip("learning_rate:Q", title="learning rate", format=".2e"),
                alt.Tooltip("seed:N"),
            ],
        )
        return alt.layer(line).properties(width=620, height=240)

    return per_model(rows, draw, "Pretraining loss of the base model", seeds_note(rows, lines="one line each"))


def first_tries(summary: pl.DataFrame) -> pl.DataFrame:
    """Rows of the probe summary that every ladder figure shows: ``confirm``, one attempt, in order of steps."""
    rows = summary.filter((pl.col("split") == "confirm") & (pl.col("attempts") == 1))
    return rows.sort("checkpoint_step", maintain_order=True)


def finish(chart: Any, title: str, subtitle: str) -> alt.TopLevelMixin:
    """Put title, subtitle and the shared look on a chart."""
    # Vega neither breaks a long line nor makes room for it in every font.
    titled = chart.properties(title=alt.TitleParams(text=title, subtitle=lines(subtitle)))
    configured: alt.TopLevelMixin = titled.configure(**config())
    return configured


def lines(text: str, longest: int = SUBTITLE) -> list[str]:
    """Lines of up to ``longest`` characters that end with whole statements.

    >>> lines("seed 0; bars: 95 % intervals; line: best", 30)
    ['seed 0; bars: 95 % intervals;', 'line: best']
    """
    found: list[str] = []
    for statement in text.split("; "):
        if found and len(found[-1]) + len(statement) + 2 <= longest:
            found[-1] += f"; {statement}"
        else:
            found.append(statement)
    return [*(f"{line};" for line in found[:-1]), found[-1]]


def named_panels(panels: Sequence[Any], names: Sequence[str], prefix: str = "model ") -> list[Any]:
    """Panels with small titles, for a figure of several."""
    titles = [alt.TitleParams(f"{prefix}{name}", fontSize=14, offset=12) for name in names]
    return [panel.properties(title=title) for panel, title in zip(panels, titles, strict=True)]


def column(panels: Sequence[Any], spacing: int) -> alt.VConcatChart:
    """Panels below each other, each with its own colours and axes."""
    stacked = alt.vconcat(*panels, spacing=spacing)
    return stacked.resolve_scale(color="independent", strokeDash="independent", shape="independent")


def per_model(
    table: pl.DataFrame, draw: Callable[[pl.DataFrame, str], Any], title: str, subtitle: str
) -> alt.TopLevelMixin:
    """One panel a model, below each other, under one title."""
    models = table["model"].unique(maintain_order=True).to_list()
    panels = [draw(table.filter(pl.col("model") == model), model) for model in models]
    if len(models) == 1:
        return finish(panels[0], title, f"model {models[0]}; {subtitle}")
    return finish(column(named_panels(panels, models), 44), title, subtitle)


def _points(rows: pl.DataFrame, series: str, share: str) -> pl.DataFrame:
    """Columns that `curves` draws: a share of n hands with its 95 % Wilson interval (null where the share is)."""
    pairs = rows.select(share, "n").iter_rows()
    bounds = [(None, None) if value is None else wilson(round(value * n), n) for value, n in pairs]
    return rows.select(
        "model",
        "seed",
        pl.col("checkpoint_step").alias("step"),
        pl.col(series).alias("series"),
        pl.col(share).alias("value"),
        pl.Series("low", [low for low, _ in bounds], pl.Float64),
        pl.Series("high", [high for _, high in bounds], pl.Float64),
        "n",
    )


def _hands(rows: pl.DataFrame) -> str:
    """Subtitle: which hands, how many, which seeds."""
    counts = sorted(set(rows["n"]))
    hands = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return seeds_note(rows, f"confirm split, n = {hands} hands a condition; 95 % Wilson intervals")


def seeds_note(rows: pl.DataFrame, text: str = "", lines: str = "faint, and their mean") -> str:
    """Which seeds a figure shows, and how, before ``text``."""
    seeds = sorted(set(rows["seed"]))
    seen = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({lines})"
    return f"{seen}; {text}" if text else seen
