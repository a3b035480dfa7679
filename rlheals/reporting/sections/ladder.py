"""Accuracy along the ladder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.reporting.figures import ladder_accuracy
from rlheals.reporting.figures.charts import first_tries
from rlheals.reporting.figures.style import CONDITIONS
from rlheals.reporting.sections.core import Content, Figure, RunMetrics, Section
from rlheals.reporting.tables import outcomes
from rlheals.reporting.words import interval, listed, percent, span
from rlheals.stats import minimum_effect_paired, paired_difference, paired_ratio

if TYPE_CHECKING:
    from rlheals.reporting.tables import Choice, Study


def build(study: Study) -> Content:
    """Figure, table of all rungs, and the headline numbers of every run."""
    rows = first_tries(study.summary)
    caption = (
        "Share of hands solved at the first try on the confirm split. SFT_MaxOOD is the rung with the best OOD "
        "accuracy on the select split, SFT_End the last rung."
    )
    hands = int(rows["n"].min())  # type: ignore[arg-type]
    return Content(
        figures={"ladder_accuracy": Figure(ladder_accuracy(study.summary, study.choices), caption)},
        context={
            "runs": [_run_table(rows, choice) for choice in study.choices],
            "labels": [look.label for look in CONDITIONS.values()],
            "hands": hands,
            "effects": [(percent(share, 0), 100 * minimum_effect_paired(hands, share)) for share in (0.1, 0.3)],
        },
        findings=[_finding(rows, study, model) for model in study.params.models],
        tables={"ladder.csv": _plot_table(rows), "probe_summary.parquet": study.summary},
        metrics=_metrics(rows, study),
    )


def _run_table(rows: pl.DataFrame, choice: Choice) -> dict[str, Any]:
    """Accuracy and interval of every rung and condition of one run."""
    own = rows.filter((pl.col("model") == choice.model) & (pl.col("seed") == choice.seed))
    lines = []
    for step in sorted(set(own["checkpoint_step"])):
        cells = {row["condition"]: row for row in own.filter(pl.col("checkpoint_step") == step).to_dicts()}
        found = [cells.get(condition) for condition in CONDITIONS]
        mark = " ".join(name for name, at in (("SFT_MaxOOD", choice.max_ood), ("SFT_End", choice.end)) if at == step)
        shown = [
            (percent(cell["accuracy"]), interval(cell["wilson_low"], cell["wilson_high"])) if cell else ("–", "")
            for cell in found
        ]
        lines.append({"step": step, "mark": mark, "cells": shown})
    return {"model": choice.model, "seed": choice.seed, "lines": lines}


def accuracy(rows: pl.DataFrame, choice: Choice, condition: str, step: int) -> dict[str, Any]:
    """The summary row of one run, condition and rung."""
    return rows.filter(
        (pl.col("model") == choice.model)
        & (pl.col("seed") == choice.seed)
        & (pl.col("condition") == condition)
        & (pl.col("checkpoint_step") == step)
    ).row(0, named=True)


def _finding(rows: pl.DataFrame, study: Study, model: str) -> str:
    choices = [choice for choice in study.choices if choice.model == model]
    peaks, ends = listed(sorted({c.max_ood for c in choices})), listed(sorted({c.end for c in choices}))
    many = len(choices) > 1
    start = f"Model {model} ({len(choices)} seeds)" if many else f"Model {model}"
    parts = []
    for condition in ("ood", "id"):
        at_peak = [accuracy(rows, c, condition, c.max_ood) for c in choices]
        at_end = [accuracy(rows, c, condition, c.end) for c in choices]
        first, last = (span([row["accuracy"] for row in group]) for group in (at_peak, at_end))
        if not many:
            first += f" {interval(at_peak[0]['wilson_low'], at_peak[0]['wilson_high'])}"
            last += f" {interval(at_end[0]['wilson_low'], at_end[0]['wilson_high'])}"
        parts.append(f"{condition.upper()} first-try accuracy is {first} at SFT_MaxOOD and {last} at SFT_End")
    return f"{start}: {parts[0]}; {parts[1]} (SFT_MaxOOD: step {peaks}; SFT_End: step {ends})."


def _metrics(rows: pl.DataFrame, study: Study) -> RunMetrics:
    """Headline numbers of every run."""
    found: RunMetrics = {}
    for choice in study.choices:
        steps = (choice.end, choice.max_ood)
        ood, own_id = (outcomes(study.answers, choice, condition, steps) for condition in ("ood", "id"))
        fall = paired_ratio(ood["first"], ood["second"], null=0.5)
        rise = paired_difference(own_id["first"], own_id["second"])
        found[choice.model, choice.seed] = {
            "max_ood_step": choice.max_ood,
            "end_step": choice.end,
            **{
                f"{condition}_accuracy_{name}": accuracy(rows, choice, condition, step)["accuracy"]
                for condition in ("ood", "id")
                for name, step in (("max_ood", choice.max_ood), ("end", choice.end))
            },
            "ood_share_lost": 1 - fall.estimate if ood["second"].any() else None,
            "ood_half_lost_p": fall.p_value,
            "id_change": rise.estimate,
            "id_change_p": rise.p_value,
        }
    return found


def _plot_table(rows: pl.DataFrame) -> pl.DataFrame:
    """The table behind ``dvc plots``: one row a run, condition and rung."""
    return rows.sort("model", "seed", "condition", "checkpoint_step").select(
        "model",
        "seed",
        pl.format("{}/{}", "model", "seed").alias("run"),
        pl.col("condition").replace_strict({key: look.label for key, look in CONDITIONS.items()}),
        pl.col("checkpoint_step").alias("step"),
        "n",
        "accuracy",
        pl.col("wilson_low").alias("low"),
        pl.col("wilson_high").alias("high"),
        "format_error_rate",
    )


SECTION = Section("ladder", "Accuracy along the ladder", 20, build)
