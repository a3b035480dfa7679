"""The claims page: rules, evidence, verdicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.reporting import claims_rl
from rlheals.reporting.branches import load_branches
from rlheals.reporting.claims import CLAIMS, FAILS, HOLDS, evaluate
from rlheals.reporting.sections.core import Content, Section
from rlheals.reporting.words import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.reporting.claims import Claim
    from rlheals.reporting.tables import Study

_WORDS = {HOLDS: "holds", FAILS: "does not hold"}


def build(study: Study) -> Content:
    """Verdicts of all claims in all runs: those about SFT, and those about RL where it has run."""
    families: list[tuple[str, Sequence[Claim], pl.DataFrame]] = [("Supervised fine-tuning", CLAIMS, evaluate(study))]
    branches = load_branches(study)
    claims = claims_rl.examined(study)
    if branches is not None and claims:
        families.append(("Reinforcement learning", claims, claims_rl.evaluate(study, branches)))
    return Content(
        context={"families": [_family(*family) for family in families]},
        findings=[
            _finding(claim.statement, table.filter(pl.col("claim") == claim.key))
            for _, claims, table in families
            for claim in claims
        ],
        tables=dict(zip(("claims.csv", "claims_rl.csv"), (table for _, _, table in families), strict=False)),
    )


def _family(title: str, claims: Sequence[Claim], table: pl.DataFrame) -> dict[str, Any]:
    """Claims that are corrected together, each with its rows."""
    groups = [(claim, [row for row in table.to_dicts() if row["claim"] == claim.key]) for claim in claims]
    return {"title": title, "groups": groups, "comparisons": len(table)}


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
