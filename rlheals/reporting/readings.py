"""What a claim's numbers say when the seed is the unit of replication: the corrected reading, and the rule from now on.

A claim is about the recipe, so what counts is its estimate in each seed, and the interval is that of their mean:

- **holds**: the 95 % interval over seeds lies wholly on the claimed side of the claim's boundary, and the one-sided
  p-value, corrected with Holm's method over the family, is below 0.05;
- **does not hold**: the interval excludes every effect that would matter, and the p-value of that test (an equivalence
  test where the claim declares a margin), corrected likewise, is below 0.05. A claim without a margin is refuted by the
  opposite sign only;
- **not tested**: a premise of the claim, or the check that the manipulation did what it is for, fails;
- with one seed there is no verdict over seeds, and else the claim is **undecided**.

The rule that was registered first is in `rlheals.reporting.registered`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite, isnan, nan
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from rlheals.reporting.registered import ALPHA, FAILS, HOLDS, UNDECIDED
from rlheals.reporting.words import listed, p_value
from rlheals.stats import SeedMean, holm, seed_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

NOT_TESTED, ONE_SEED = "not tested", "one seed"
SCHEMA: dict[str, type[pl.DataType]] = {
    "claim": pl.String,
    "model": pl.String,
    "seeds": pl.Int64,  # that count; the others failed a premise
    "of": pl.Int64,
    "estimate": pl.Float64,  # mean over the seeds that count; over all of them where the claim is not tested
    "low": pl.Float64,  # over seeds; of the seed's own hands or matrices where there is one seed
    "high": pl.Float64,
    "p_holds": pl.Float64,  # one-sided, Holm over the family; NaN where nothing was tested
    "p_fails": pl.Float64,
    "reading": pl.String,
    "reason": pl.String,
    "registered": pl.String,  # the verdict of the rule registered first; "" for a claim that was not registered
}


@dataclass(frozen=True, slots=True)
class Rule:
    """Where the mean over seeds must lie.

    Attributes:
        sign: 1 where the claim says that the estimate is above ``holds_at``, -1 where below.
        holds_at: boundary of "holds".
        fails_at: the smallest effect that matters, on the claimed side of ``holds_at``: the claim is refuted by an
            interval that lies wholly short of it. Equal to ``holds_at`` where no margin was declared.
    """

    sign: Literal[1, -1] = 1
    holds_at: float = 0.0
    fails_at: float = 0.0

    def __post_init__(self) -> None:
        """Raise `ValueError` unless the effect that matters lies on the claimed side."""
        if self.sign * (self.fails_at - self.holds_at) < 0:
            raise ValueError("the effect that matters lies on the claimed side of the boundary")


@dataclass(frozen=True, slots=True)
class SeedValue:
    """One seed's estimate with its own interval.

    Attributes:
        seed: the seed.
        estimate: value of the estimand; NaN where it could not be computed.
        low: lower end of the seed's own 95 % interval.
        high: upper end.
        void: why the seed cannot count: the premise that failed; empty where none did.
    """

    seed: int
    estimate: float
    low: float
    high: float
    void: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """A claim put to the seeds of one model.

    Attributes:
        claim: its key.
        model: the model.
        rule: where the mean must lie.
        values: one a seed.
        registered: verdict of the registered rule over the seeds.
        limit: why it can be no more than undecided; empty where it can.
        remark: what to know about the test; empty for the t test over seeds.
        p_holds: p-value of "holds" from a test of its own; None for the t test over seeds.
    """

    claim: str
    model: str
    rule: Rule
    values: tuple[SeedValue, ...]
    registered: str = ""
    limit: str = ""
    remark: str = ""
    p_holds: float | None = None

    @property
    def counted(self) -> list[SeedValue]:
        """Seeds whose premises hold."""
        return [value for value in self.values if not value.void and isfinite(value.estimate)]

    @property
    def tested(self) -> bool:
        """Whether at least two seeds count, so that there is something to test."""
        return len(self.counted) > 1

    @property
    def mean(self) -> SeedMean:
        """Mean over the seeds that count."""
        return seed_mean([value.estimate for value in self.counted])

    def p_values(self) -> tuple[float, float]:
        """Uncorrected one-sided p-values of "holds" and "does not hold"."""
        mean, rule = self.mean, self.rule
        if rule.sign > 0:
            holds, fails = mean.p_above(rule.holds_at), mean.p_below(rule.fails_at)
        else:
            holds, fails = mean.p_below(rule.holds_at), mean.p_above(rule.fails_at)
        return (holds if self.p_holds is None else self.p_holds), fails


def questions(table: pl.DataFrame, rules: Mapping[str, Rule]) -> list[Question]:
    """One question a claim and model from a table of the registered rule; a seed without an estimate is void.

    Args:
        table: what `rlheals.reporting.registered.registered_table` makes.
        rules: by claim; claims without a rule are left out.
    """
    found = []
    for (claim, model), rows in table.group_by("claim", "model", maintain_order=True):
        if str(claim) in rules:
            values = tuple(_value(row) for row in rows.to_dicts())
            found.append(Question(str(claim), str(model), rules[str(claim)], values, rows["pooled"][0]))
    return found


def _value(row: dict[str, Any]) -> SeedValue:
    numbers = row["seed"], row["estimate"], row["low"], row["high"]
    return SeedValue(*numbers, void="" if isfinite(row["estimate"]) else row["note"])


def voided(question: Question, why: Callable[[int], str]) -> Question:
    """The question with every seed void whose premise fails; ``why`` names it for a seed, "" where it holds."""
    return replace(question, values=tuple(replace(v, void=why(v.seed) or v.void) for v in question.values))


def read(asked: Sequence[Question]) -> pl.DataFrame:
    """The corrected reading of a family of questions.

    Holm's method corrects over the questions that are tested, once for "holds" and once for "does not hold".

    Returns:
        Columns `SCHEMA`, one row a question.
    """
    tested = [question for question in asked if question.tested]
    raw = [question.p_values() for question in tested]
    sides = [holm([pair[side] for pair in raw]) for side in (0, 1)]
    corrected = {id(q): (h, f) for q, h, f in zip(tested, *sides, strict=True)}
    return pl.DataFrame([_row(q, *corrected.get(id(q), (nan, nan))) for q in asked], schema=SCHEMA)


def _row(question: Question, p_holds: float, p_fails: float) -> dict[str, Any]:
    reading, reason = _decide(question, p_holds, p_fails)
    counted = question.counted
    mean = question.mean if counted else seed_mean([v.estimate for v in question.values if isfinite(v.estimate)])
    low, high = (counted[0].low, counted[0].high) if len(counted) == 1 else (mean.low, mean.high)
    return {
        "claim": question.claim,
        "model": question.model,
        "seeds": len(counted),
        "of": len(question.values),
        "estimate": mean.estimate,
        "low": low,
        "high": high,
        "p_holds": p_holds,
        "p_fails": p_fails,
        "reading": reading,
        "reason": reason,
        "registered": question.registered,
    }


def _decide(question: Question, p_holds: float, p_fails: float) -> tuple[str, str]:
    """The reading, and why."""
    counted, of = len(question.counted), len(question.values)
    void = _void(question)
    if not counted or (counted == 1 and of > 1):
        return NOT_TESTED, void
    if of == 1:
        return ONE_SEED, "one seed: no verdict over seeds; the interval is that of this seed alone"
    if question.limit:
        return UNDECIDED, question.limit
    reading, reason = _compare(question, p_holds, p_fails)
    counts = f"{counted} of {of} seeds count, as {void}" if void else ""
    return reading, "; ".join(part for part in (reason, question.remark, counts) if part)


def _compare(question: Question, p_holds: float, p_fails: float) -> tuple[str, str]:
    mean, rule = question.mean, question.rule
    near = mean.low if rule.sign > 0 else mean.high  # the end that decides "holds"
    far = mean.high if rule.sign > 0 else mean.low
    side = "above" if rule.sign > 0 else "below"
    beyond, short = rule.sign * (near - rule.holds_at) > 0, rule.sign * (far - rule.fails_at) < 0
    if beyond and p_holds < ALPHA:
        return HOLDS, f"the interval over seeds lies {side} {_number(rule.holds_at)}"
    if short and p_fails < ALPHA:
        other = "below" if rule.sign > 0 else "above"
        return FAILS, f"the interval over seeds lies {other} {_number(rule.fails_at)}"
    if beyond or short:
        boundary, p = (rule.holds_at, p_holds) if beyond else (rule.fails_at, p_fails)
        excluded = f"the interval over seeds excludes {_number(boundary)}"
        return UNDECIDED, f"{excluded}, but the corrected p-value is {p_value(p)}"
    return UNDECIDED, f"the interval over seeds reaches over {_number(rule.holds_at)}"


def _void(question: Question) -> str:
    """The premises that failed, each with its seeds; empty where none did."""
    reasons: dict[str, list[int]] = {}
    for value in question.values:
        if value.void or isnan(value.estimate):
            reasons.setdefault(value.void or "there is no estimate", []).append(value.seed)
    if len(reasons) == 1 and len(next(iter(reasons.values()))) == len(question.values):
        return next(iter(reasons))
    return "; ".join(f"{reason} (seed{'s' * (len(seeds) > 1)} {listed(seeds)})" for reason, seeds in reasons.items())


def _number(boundary: float) -> str:
    return f"{100 * boundary:g}".replace("-", "−") + " %" * (boundary != 0)
