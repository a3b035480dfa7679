"""What further attempts bring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from rlheals.reporting.figures import retries, retry_table
from rlheals.reporting.figures.style import CHOICES, CONDITIONS
from rlheals.reporting.sections.core import Content, Figure, RunMetrics, Section
from rlheals.reporting.words import percent
from rlheals.stats import wilson

if TYPE_CHECKING:
    from rlheals.reporting.tables import Study

NEGLIGIBLE = 0.05
"""A share of first failures solved later below this is told as "about 0"."""


def build(study: Study) -> Content | None:
    """First try against all attempts at the chosen rungs; None when only one attempt was allowed."""
    table = retry_table(study.summary, study.choices)
    chart = retries(study.summary, study.choices)
    if chart is None:
        return None
    caption = (
        "Accuracy of the first answer and of the whole game, in which a wrong answer is told and may be revised. The "
        "numbers on the right pool the seeds."
    )
    finding = _finding(table)
    return Content(
        figures={"retries": Figure(chart, caption)},
        context={"finding": finding, "rows": table.to_dicts(), "rungs": CHOICES, "conditions": CONDITIONS},
        findings=[finding],
        tables={"retries.csv": table},
        metrics=_metrics(table),
    )


def _finding(table: pl.DataFrame) -> str:
    """How many first failures a later attempt solved, said plainly when it is about none."""
    parts, upper = [], 0.0
    for rung, name in CHOICES.items():
        pooled = table.filter(pl.col("rung") == rung)
        later, failed = int(pooled["solved_later"].sum()), int(pooled["failed_first"].sum())
        low, high = wilson(later, failed)
        upper = max(upper, high)
        parts.append(
            f"{percent(later / failed)} [{100 * low:.1f}, {100 * high:.1f}] of {failed} at {name}"
            if failed
            else f"no first failures at {name}"
        )
    most = int(table["attempts"].max())  # type: ignore[arg-type]
    shares = f"solved within {most} attempts after a failed first one: {'; '.join(parts)}"
    if upper < NEGLIGIBLE:
        return (
            f"Retries bring about nothing: a hand failed at the first try is practically never solved later "
            f"({shares}, all conditions together). Accuracy within {most} attempts is first-try accuracy."
        )
    return f"Hands {shares} (all conditions together)."


def _metrics(table: pl.DataFrame) -> RunMetrics:
    found: RunMetrics = {}
    for row in table.filter(pl.col("condition") == "ood").to_dicts():
        own = found.setdefault((row["model"], row["seed"]), {})
        own[f"ood_solved_later_{row['rung']}"] = row["later_rate"]
    return found


SECTION = Section("retries", "Retries", 50, build)
