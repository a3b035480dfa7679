"""The claims page: the corrected reading of every claim, and the verdicts as they were registered."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.reporting import claims, claims_descriptive, claims_restoration, claims_rl, claims_spectra
from rlheals.reporting.branches import load_branches
from rlheals.reporting.drift import load_drift
from rlheals.reporting.premises import premise_of, premise_of_model
from rlheals.reporting.readings import NOT_TESTED, ONE_SEED
from rlheals.reporting.registered import UNDECIDED
from rlheals.reporting.repairs import load_repairs
from rlheals.reporting.sections.core import Content, Section
from rlheals.reporting.words import interval, listed, points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlheals.reporting.branches import Branches
    from rlheals.reporting.claims import Claim
    from rlheals.reporting.repairs import Repairs
    from rlheals.reporting.tables import Study

_WORDS = {UNDECIDED: "is undecided", NOT_TESTED: "is not tested", ONE_SEED: "one seed: no verdict over seeds"}


@dataclass(frozen=True, slots=True)
class Family:
    """Claims that are corrected together.

    Attributes:
        file: name of its tables: ``<file>.csv`` and ``<file>_corrected.csv``.
        title: heading.
        claims: the claims, in order.
        table: verdicts of the registered rule; None for claims that were not registered.
        readings: the corrected reading.
        remark: what to know about its tests.
    """

    file: str
    title: str
    claims: Sequence[Claim]
    table: pl.DataFrame | None
    readings: pl.DataFrame
    remark: str = ""


def build(study: Study) -> Content:
    """Verdicts of all claims in all runs: those about SFT, and those about RL, weights and edits where these ran."""
    found = families(study)
    tables = {f"{family.file}.csv": family.table for family in found if family.table is not None}
    corrected = {f"{family.file}_corrected.csv": family.readings for family in found}
    return Content(
        context={"families": [_family(family) for family in found]},
        findings=[
            _finding(claim.statement, family.readings.filter(pl.col("claim") == claim.key))
            for family in found
            for claim in family.claims
        ],
        tables=tables | corrected,
    )


def families(study: Study) -> list[Family]:
    """Every family whose tables are there, the claims that nobody registered last."""
    table = claims.evaluate(study)
    readings = claims.readings(table, study.choices)
    found = [Family("claims", "Supervised fine-tuning", claims.CLAIMS, table, readings)]
    branches, repairs = load_branches(study), load_repairs(study)
    if branches is not None and claims_rl.examined(study):
        found.append(_rl(study, branches))
    drift = load_drift(study)
    if drift is not None:
        table = claims_spectra.evaluate(study, drift)
        readings = claims_spectra.readings(table, premise_of_model(study, branches))
        title = "Weights and hidden states"
        spectra = Family("claims_spectra", title, claims_spectra.CLAIMS, table, readings, claims_spectra.NOT_EXACT)
        found.append(spectra)
    if repairs is not None:
        found.append(_edits(study, branches, repairs))
    descriptive = _descriptive(study, branches, repairs)
    return found if descriptive is None else [*found, descriptive]


def _rl(study: Study, branches: Branches) -> Family:
    table = claims_rl.evaluate(study, branches)
    readings = claims_rl.readings(
        table, branches.final, study.choices, study.params.ppo.starts, premise_of(branches.training)
    )
    return Family("claims_rl", "Reinforcement learning", claims_rl.examined(study), table, readings)


def _edits(study: Study, branches: Branches | None, repairs: Repairs) -> Family:
    table = claims_restoration.evaluate(study, repairs)
    rungs = {
        (choice.model, choice.seed): claims_restoration.repaired_starts(study, repairs, choice)
        for choice in study.choices
    }
    readings = claims_restoration.readings(table, repairs.cells, rungs, premise_of_model(study, branches))
    return Family("claims_restoration", "Weight edits", claims_restoration.CLAIMS, table, readings)


def _descriptive(study: Study, branches: Branches | None, repairs: Repairs | None) -> Family | None:
    asked = claims_descriptive.about_edits(repairs.cells, study.choices) if repairs is not None else []
    if branches is not None and claims_rl.BOTH in study.params.ppo.arms:
        asked += claims_descriptive.about_rl(
            branches.final, study.choices, study.params.ppo.starts, premise_of(branches.training)
        )
    if not asked:
        return None
    keys = {question.claim for question in asked}
    shown = [claim for claim in claims_descriptive.CLAIMS if claim.key in keys]
    table = claims_descriptive.readings(asked)
    return Family("claims_descriptive", "Not registered beforehand (descriptive)", shown, None, table)


def _family(family: Family) -> dict[str, Any]:
    """What the template shows of a family."""
    rows = [] if family.table is None else family.table.to_dicts()
    groups = [(claim, [row for row in rows if row["claim"] == claim.key]) for claim in family.claims]
    tests = 0 if family.table is None else int(family.table["p_value"].is_not_nan().sum())
    statements = {claim.key: claim.statement for claim in family.claims}
    return {
        "title": family.title,
        "registered": family.table is not None,
        "groups": groups,
        "comparisons": tests,
        "sized": tests < len(rows),
        "readings": [row | {"statement": statements[row["claim"]]} for row in family.readings.to_dicts()],
        "remark": family.remark,
    }


def _finding(statement: str, rows: pl.DataFrame) -> str:
    """One sentence a claim: its corrected reading for each model, why, and the registered verdict."""
    parts = []
    for row in rows.to_dicts():
        where = f" for {row['model']}" if len(rows) > 1 else ""
        numbers = f"{points(row['estimate'])} {interval(row['low'], row['high'])}" if isfinite(row["estimate"]) else ""
        verdict = _WORDS.get(row["reading"], row["reading"])
        reason = "" if row["reading"] == ONE_SEED else row["reason"]
        detail = "; ".join(part for part in (reason, numbers) if part)
        was = f"; as registered: {row['registered']}" if row["registered"] else "; not registered beforehand"
        parts.append(f"{verdict}{where} ({detail}{was})")
    return f"Claim “{statement.removesuffix('.')}”: {listed(parts)}."


SECTION = Section("claims", "Claims", 10, build)
