"""Claims fixed before the confirmatory runs, and the rules that decide them from tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import polars as pl

from rlheals.errors import UserError
from rlheals.reporting.readings import Rule, questions, read
from rlheals.reporting.registered import registered_table
from rlheals.reporting.tables import Choice, Study, outcomes
from rlheals.reporting.words import listed, percent
from rlheals.stats import paired_difference, paired_ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

FALL = 0.5
EARLY = 0.25
LOSSES = {"train_id_loss": "train loss", "test_id_loss": "test loss", "ood_loss": "OOD loss"}


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim and the rule that decides it; text that documents may quote.

    Attributes:
        key: short name.
        statement: what is claimed, in one sentence.
        estimand: the number that is estimated, with its unit.
        test: interval and p-value.
        holds_when: condition of the verdict "holds".
        fails_when: condition of the verdict "does not hold"; everything else is "undecided".
        source: where the claim comes from.
    """

    key: str
    statement: str
    estimand: str
    test: str
    holds_when: str
    fails_when: str
    source: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one run says about a claim, before the correction for multiplicity.

    Attributes:
        estimate: value of the estimand.
        low: lower end of its 95 % interval.
        high: upper end.
        p_value: two-sided, uncorrected.
        supports: the estimate lies on the claimed side and all side conditions are met.
        refutes: the condition of "does not hold" is met.
        note: what the numbers are, in words.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    supports: bool
    refutes: bool
    note: str


CLAIMS = (
    Claim(
        key="ood_peaks_early_and_falls",
        statement="OOD accuracy peaks early in SFT and then falls by at least half.",
        estimand="share of the OOD accuracy of SFT_MaxOOD that SFT_End has lost (100 % = all)",
        test="paired ratio of accuracies on the same confirm hands: Bonett-Price interval, and the p-value of the "
        "hypothesis that exactly half was lost",
        holds_when="SFT_MaxOOD lies after step 0 and within the first quarter of the training, more than half of its "
        "accuracy was lost, and the corrected p-value is below 0.05",
        fails_when="SFT_MaxOOD is step 0 or lies later than that, or the 95 % interval of the loss ends below one half",
        source="Jin et al., RL Fine-Tuning Heals OOD Forgetting in SFT (arXiv 2509.12235), the SFT checkpoint figures; "
        "the thresholds are ours",
    ),
    Claim(
        key="id_keeps_rising",
        statement="ID accuracy keeps rising after the OOD peak.",
        estimand="ID accuracy of SFT_End minus ID accuracy of SFT_MaxOOD",
        test="paired difference on the same confirm hands: Newcombe's method 10 interval and exact McNemar",
        holds_when="the difference is positive and the corrected p-value is below 0.05",
        fails_when="the 95 % interval of the difference ends at or below zero",
        source="Jin et al., arXiv 2509.12235, figure of ID accuracy against the SFT step",
    ),
    Claim(
        key="no_loss_picks_the_peak",
        statement="No teacher-forced loss picks SFT_MaxOOD: choosing a rung by train, test or OOD loss costs OOD "
        "accuracy.",
        estimand="smallest regret over the three losses: OOD accuracy of SFT_MaxOOD minus that of the loss's pick",
        test="paired difference on the same confirm hands for each loss; the largest of the three McNemar p-values "
        "(intersection-union test)",
        holds_when="every regret is positive and the corrected p-value is below 0.05",
        fails_when="one of the losses picks SFT_MaxOOD itself, or its regret has a 95 % interval that ends at or below "
        "zero",
        source="Jin et al., arXiv 2509.12235, section on losses",
    ),
)


RULES = {
    "ood_peaks_early_and_falls": Rule(1, FALL, FALL),
    "id_keeps_rising": Rule(),
    "no_loss_picks_the_peak": Rule(),
}
"""Where the mean over seeds must lie; no margin was declared, so only the opposite sign refutes."""


def readings(table: pl.DataFrame, choices: Sequence[Choice]) -> pl.DataFrame:
    """The corrected reading of the table that `evaluate` makes; see `rlheals.reporting.readings`.

    Args:
        table: verdicts of the registered rule.
        choices: SFT_MaxOOD and SFT_End of the same runs.
    """
    asked = [
        replace(question, limit=_late_peak(choices, question.model))
        if question.claim == "ood_peaks_early_and_falls"
        else question
        for question in questions(table, RULES)
    ]
    return read(asked)


def _late_peak(choices: Sequence[Choice], model: str) -> str:
    """The seeds in which SFT_MaxOOD does not come early, in words; empty where there are none."""
    late = [choice.seed for choice in choices if choice.model == model and not is_early(choice)]
    return f"the OOD peak is not an early one in seed{'s' * (len(late) > 1)} {listed(late)}" if late else ""


def is_early(choice: Choice) -> bool:
    """Whether SFT_MaxOOD lies after step 0 and within the first quarter of the training."""
    return 0 < choice.max_ood <= EARLY * choice.end


def evaluate(study: Study) -> pl.DataFrame:
    """Evidence and verdict of every claim in every run.

    Holm's correction runs over all rows of the table (claims x models x seeds).

    Returns:
        Columns claim, model, seed, estimate, low, high, p_value, p_holm, verdict, pooled, note.
    """
    rules = {
        "ood_peaks_early_and_falls": _ood_falls,
        "id_keeps_rising": _id_rises,
        "no_loss_picks_the_peak": _no_loss_picks,
    }
    found = [(claim.key, choice, rules[claim.key](study, choice)) for claim in CLAIMS for choice in study.choices]
    return registered_table(found)


def _ood_falls(study: Study, choice: Choice) -> Evidence:
    pairs = outcomes(study.answers, choice, "ood", (choice.end, choice.max_ood))
    ratio = paired_ratio(pairs["first"], pairs["second"], null=1 - FALL)
    early = is_early(choice)
    end, peak = ratio.counts.first / ratio.counts.n, ratio.counts.second / ratio.counts.n
    note = f"OOD {percent(peak)} at step {choice.max_ood}, {percent(end)} at step {choice.end}"
    if not early:
        note += "; not an early peak"
    if not pairs["second"].any():
        return Evidence(float("nan"), float("nan"), 1.0, 1.0, False, not early, f"{note}; nothing to lose")
    low, high = 1 - ratio.high, 1 - ratio.low
    lost = 1 - ratio.estimate
    return Evidence(lost, low, high, ratio.p_value, early and lost > FALL, not early or high < FALL, note)


def _id_rises(study: Study, choice: Choice) -> Evidence:
    pairs = outcomes(study.answers, choice, "id", (choice.end, choice.max_ood))
    result = paired_difference(pairs["first"], pairs["second"])
    end, peak = result.counts.first / result.counts.n, result.counts.second / result.counts.n
    note = f"ID {percent(peak)} at step {choice.max_ood}, {percent(end)} at step {choice.end}"
    return Evidence(
        result.estimate, result.low, result.high, result.p_value, result.estimate > 0, result.high <= 0, note
    )


def _no_loss_picks(study: Study, choice: Choice) -> Evidence:
    rows = study.selection.filter(
        (pl.col("model") == choice.model) & (pl.col("seed") == choice.seed) & pl.col("criterion").is_in(list(LOSSES))
    ).sort("regret")
    if set(rows["criterion"]) != set(LOSSES):
        raise UserError(
            f"selection.parquet of {choice.model}, seed {choice.seed} does not have one row for each of "
            f"{', '.join(LOSSES)}; run `dvc repro`."
        )
    closest = rows.row(0, named=True)
    all_cost = bool((rows["regret"] > 0).all())
    same = bool((rows["checkpoint_step"] == choice.max_ood).any())
    picks = ", ".join(f"{LOSSES[row['criterion']]} picks step {row['checkpoint_step']}" for row in rows.to_dicts())
    return Evidence(
        estimate=closest["regret"],
        low=closest["regret_low"],
        high=closest["regret_high"],
        p_value=float(rows["p_value"].max()) if all_cost else 1.0,  # type: ignore[arg-type]
        supports=all_cost,
        refutes=same or bool((rows["regret_high"] <= 0).any()),
        note=f"SFT_MaxOOD is step {choice.max_ood}; {picks}",
    )
