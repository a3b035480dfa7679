"""The claims page: rules, evidence, verdicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.reporting import claims_restoration, claims_rl, claims_spectra
from rlheals.reporting.branches import load_branches
from rlheals.reporting.claims import CLAIMS, FAILS, HOLDS, evaluate
from rlheals.reporting.drift import load_drift
from rlheals.reporting.repairs import load_repairs
from rlheals.reporting.sections.core import Content, Section
from rlheals.reporting.words import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.reporting.claims import Claim
    from rlheals.reporting.tables import Study

_WORDS = {HOLDS: "holds", FAILS: "does not hold"}


def build(study: Study) -> Content:
    """Verdicts of all claims in all runs: those about SFT, and those about RL, weights and edits where these ran."""
    families: dict[str, tuple[str, Sequence[Claim], pl.DataFrame]] = {
        "claims.csv": ("Supervised fine-tuning", CLAIMS, evaluate(study))
    }
    branches = load_branches(study)
    claims = claims_rl.examined(study)
    if branches is not None and claims:
        families["claims_rl.csv"] = ("Reinforcement learning", claims, claims_rl.evaluate(study, branches))
    drift = load_drift(study)
    if drift is not None:
        table = claims_spectra.evaluate(study, drift)
        families["claims_spectra.csv"] = ("Weights and hidden states", claims_spectra.CLAIMS, table)
    repairs = load_repairs(study)
    if repairs is not None:
        table = claims_restoration.evaluate(study, repairs)
        families["claims_restoration.csv"] = ("Weight edits", claims_restoration.CLAIMS, table)
    return Content(
        context={"families": [_family(*family) for family in families.values()]},
        findings=[
            _finding(claim.statement, table.filter(pl.col("claim") == claim.key))
            for _, claims, table in families.values()
            for claim in claims
        ],
        tables={name: table for name, (_, _, table) in families.items()},
    )


def _family(title: str, claims: Sequence[Claim], table: pl.DataFrame) -> dict[str, Any]:
    """Claims that are corrected together, each with its rows."""
    groups = [(claim, [row for row in table.to_dicts() if row["claim"] == claim.key]) for claim in claims]
    tests = int(table["p_value"].is_not_nan().sum())
    return {"title": title, "groups": groups, "comparisons": tests, "sized": tests < len(table)}


def _finding(statement: str, rows: pl.DataFrame) -> str:
    """One sentence a claim: its verdict for each model, and in how many seeds it holds."""
    parts = []
    for model in rows["model"].unique(maintain_order=True):
        own = rows.filter(pl.col("model") == model)
        where = f" for {model}" if rows["model"].n_unique() > 1 else ""
        parts.append(_WORDS.get(own["pooled"][0], "is undecided") + where + _detail(own))
    return f"Claim “{statement.removesuffix('.')}”: {listed(parts)}."


def _detail(rows: pl.DataFrame) -> str:
    """The numbers of a single run, or how the seeds divide."""
    if len(rows) == 1:
        return f" ({rows['note'][0]})"
    held, failed = (int((rows["verdict"] == verdict).sum()) for verdict in (HOLDS, FAILS))
    if held == len(rows):
        return f" in all {held} seeds"
    return f" ({held} of {len(rows)} seeds hold, {failed} do not, {len(rows) - held - failed} undecided)"


SECTION = Section("claims", "Claims", 10, build)
