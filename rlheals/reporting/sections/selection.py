"""Losses along training, and what picking a rung by them costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from rlheals.reporting.figures import losses, regret
from rlheals.reporting.figures.style import CRITERIA, LOSSES
from rlheals.reporting.sections.core import Content, Figure, RunMetrics, Section
from rlheals.reporting.words import points

if TYPE_CHECKING:
    from rlheals.reporting.tables import Study


def build(study: Study) -> Content:
    """Loss curves, and the regret of each selection criterion."""
    selection = study.selection
    figures = {
        "losses": Figure(
            losses(study.losses, study.choices),
            "Mean negative log-likelihood of the right answer's tokens, given the right answer so far. The OOD series "
            "uses the OOD rule in prompt and answer.",
        ),
        "regret": Figure(
            regret(selection),
            "What each way to pick a rung gives up in OOD accuracy against SFT_MaxOOD, on the same confirm hands. "
            "Right of zero means a worse pick.",
        ),
    }
    return Content(
        figures=figures,
        context={"rows": selection.to_dicts(), "names": CRITERIA, "many": len(study.runs) > 1},
        findings=[_finding(selection)],
        tables={
            "losses.csv": _plot_table(study.losses),
            "losses.parquet": study.losses,
            "selection.parquet": selection,
        },
        metrics=_metrics(study),
    )


def _finding(selection: pl.DataFrame) -> str:
    parts = []
    for criterion, name in CRITERIA.items():
        own = selection.filter(pl.col("criterion") == criterion)
        if criterion.endswith("loss") and len(own):
            low, high = points(own["regret"].min()), points(own["regret"].max())  # type: ignore[arg-type]
            parts.append(f"{low if low == high else f'{low} to {high}'} by {name}")
    return f"OOD accuracy given up by the pick of a loss, in percentage points: {', '.join(parts)}."


def _metrics(study: Study) -> RunMetrics:
    found: RunMetrics = {}
    for model, seed in study.runs:
        own = study.selection.filter((pl.col("model") == model) & (pl.col("seed") == seed))
        rows = own.filter(pl.col("criterion").str.ends_with("loss")).to_dicts()
        found[model, seed] = {f"regret_{row['criterion']}": row["regret"] for row in rows}
    return found


def _plot_table(table: pl.DataFrame) -> pl.DataFrame:
    """The table behind ``dvc plots``."""
    names = {key: look.label for key, look in LOSSES.items()}
    return table.sort("model", "seed", "series", "step").select(
        "model",
        "seed",
        pl.format("{}/{}", "model", "seed").alias("run"),
        pl.col("series").replace_strict(names),
        "step",
        "nll_per_token",
    )


SECTION = Section("selection", "Losses, and picking a rung by them", 30, build)
