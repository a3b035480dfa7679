"""The decision rule registered in November 2026, kept as it was frozen: every registered verdict stays computable.

It is asymmetric and takes hands for the unit of replication: "holds" asks every seed for a corrected p-value, "does not
hold" asks one seed for an uncorrected interval. With no effect on average and a standard deviation of 5 points between
seeds it says "does not hold" in 62 % of studies of three seeds and 96 % of ten. What follows from the same tables when
the seed is the unit is in `rlheals.reporting.readings`; both stand side by side in the report.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.stats import holm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.reporting.claims import Evidence
    from rlheals.reporting.tables import Choice

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
ALPHA = 0.05


def verdict(evidence: Evidence, p_corrected: float) -> str:
    """The verdict of one run, given its Holm-corrected p-value."""
    if evidence.refutes:
        return FAILS
    return HOLDS if evidence.supports and p_corrected < ALPHA else UNDECIDED


def pooled_verdict(verdicts: list[str]) -> str:
    """All seeds of a model together: holds when it holds in every seed, fails when it fails in any."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts and set(verdicts) == {HOLDS} else UNDECIDED


def registered_table(found: Sequence[tuple[str, Choice, Evidence]]) -> pl.DataFrame:
    """Rows of (claim, run, evidence) with Holm's correction over all of them, verdicts, and verdicts over the seeds.

    Returns:
        Columns claim, model, seed, estimate, low, high, p_value, p_holm, verdict, pooled, note.
    """
    corrected = holm([evidence.p_value for _, _, evidence in found])
    rows: list[dict[str, Any]] = []
    for (key, choice, evidence), p_holm in zip(found, corrected, strict=True):
        numbers = {k: v for k, v in asdict(evidence).items() if k not in ("supports", "refutes", "note")}
        rows.append(
            {"claim": key, "model": choice.model, "seed": choice.seed, **numbers, "p_holm": p_holm}
            | {"verdict": verdict(evidence, p_holm), "note": evidence.note}
        )
    for row in rows:
        row["pooled"] = pooled_verdict(
            [r["verdict"] for r in rows if (r["claim"], r["model"]) == (row["claim"], row["model"])]
        )
    return pl.DataFrame(rows)
