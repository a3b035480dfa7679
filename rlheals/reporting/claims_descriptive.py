"""Claims of the paper that nobody registered here and that the tables can answer all the same.

They were written down after the tables had been seen. So they describe these runs, have a family of their own, and take
nothing from the corrected p-values of the claims that were registered.
"""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING

import polars as pl

from rlheals.reporting.claims import Claim
from rlheals.reporting.claims_restoration import find_contrast
from rlheals.reporting.claims_rl import BOTH, gain_row, moderate_start
from rlheals.reporting.readings import Question, Rule, SeedValue, read
from rlheals.reporting.repairs import of_run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rlheals.reporting.claims_rl import Premise
    from rlheals.reporting.tables import Choice

PAPER = 0.7
"""Lower end of the 70 to 80 % of OOD accuracy that the paper's abstract says are recovered."""
DRAFT = "Jin et al., RL Is Neither a Panacea Nor a Mirage (arXiv 2508.16546), abstract"
SOURCE = "Jin et al., RL Fine-Tuning Heals OOD Forgetting in SFT (arXiv 2509.12235)"
_TEST = "t interval over seeds of the per-seed estimates; none of it was registered beforehand"
_SHARE = "share of the lost OOD accuracy that is there again, with {} put back"


def _share_claim(key: str, statement: str, what: str) -> Claim:
    return Claim(
        key=key,
        statement=statement,
        estimand=_SHARE.format(what),
        test=_TEST,
        holds_when="the interval over seeds lies above 70 %",
        fails_when="the interval over seeds lies below 70 %",
        source=DRAFT,
    )


CLAIMS = (
    _share_claim(
        "top_recovers_70",
        "The base's top 20 % of directions recover at least 70 % of the OOD accuracy that SFT lost.",
        "the leading fifth of the base's directions",
    ),
    _share_claim(
        "first_quarter_recovers_70",
        "The base's directions in the first 25 % of layers recover at least 70 % of the OOD accuracy that SFT lost.",
        "the base's directions in the first quarter of SFT_End's layers",
    ),
    Claim(
        key="rl_stays_below_peak",
        statement="RL does not surpass the early OOD peak of SFT.",
        estimand="OOD accuracy after the last update of PPO minus that of SFT_MaxOOD; the largest over the starts",
        test=_TEST,
        holds_when="the interval over seeds lies below zero",
        fails_when="the interval over seeds lies above zero",
        source=f"{SOURCE}, figure of OOD accuracy against the checkpoint RL starts from",
    ),
    Claim(
        key="rl_costs_id",
        statement="RL from a moderately over-trained checkpoint costs ID accuracy.",
        estimand="ID accuracy after the last update of PPO minus that of the start",
        test=_TEST,
        holds_when="the interval over seeds lies below zero",
        fails_when="the interval over seeds lies above zero",
        source=f"{SOURCE}, figure of ID accuracy against the checkpoint RL starts from",
    ),
)
RULES = {
    "top_recovers_70": Rule(1, PAPER, PAPER),
    "first_quarter_recovers_70": Rule(1, PAPER, PAPER),
    "rl_stays_below_peak": Rule(-1),
    "rl_costs_id": Rule(-1),
}


def about_edits(cells: pl.DataFrame, choices: Sequence[Choice]) -> list[Question]:
    """The claims about weight edits, from schema ``cells`` or the published part of it."""
    return [
        *_asked("top_recovers_70", choices, lambda choice: _recovered(cells, choice, "top")),
        *_asked("first_quarter_recovers_70", choices, lambda choice: _recovered(cells, choice, "early")),
    ]


def about_rl(final: pl.DataFrame, choices: Sequence[Choice], starts: Sequence[int], premise: Premise) -> list[Question]:
    """The claims about RL, from the rows of schema ``recovery`` after the last update; arguments as in `claims_rl`."""
    return [
        *_asked("rl_stays_below_peak", choices, lambda choice: _over_peak(final, choice, starts, premise)),
        *_asked("rl_costs_id", choices, lambda choice: _id_change(final, choice, starts, premise)),
    ]


def readings(asked: Sequence[Question]) -> pl.DataFrame:
    """Readings of these questions, corrected over them alone; see `rlheals.reporting.readings`."""
    return read(asked)


def _asked(claim: str, choices: Sequence[Choice], value: Callable[[Choice], SeedValue]) -> list[Question]:
    models = dict.fromkeys(choice.model for choice in choices)
    return [
        Question(claim, model, RULES[claim], tuple(value(choice) for choice in choices if choice.model == model))
        for model in models
    ]


def _recovered(cells: pl.DataFrame, choice: Choice, name: str) -> SeedValue:
    own = of_run(cells, choice.model, choice.seed)
    cell = find_contrast(own, name)
    rows = own.filter((pl.col("cell_id") == cell) & (pl.col("split") == "confirm"))
    share = rows["recovery"][0] if len(rows) else None
    if share is None:
        return SeedValue(choice.seed, nan, nan, nan, "the edit was not confirmed, or nothing was lost")
    return SeedValue(choice.seed, share, nan, nan)


def _over_peak(final: pl.DataFrame, choice: Choice, starts: Sequence[int], premise: Premise) -> SeedValue:
    failed = {start: why for start in starts if (why := premise(choice.model, choice.seed, BOTH, start))}
    rows = [gain_row(final, choice, BOTH, start, "ood") for start in starts if start not in failed]
    if not rows:
        return SeedValue(choice.seed, nan, nan, nan, next(iter(failed.values()), "no start"))
    return SeedValue(choice.seed, max(row["after"] - row["peak"] for row in rows), nan, nan)


def _id_change(final: pl.DataFrame, choice: Choice, starts: Sequence[int], premise: Premise) -> SeedValue:
    start = moderate_start(starts, choice)
    if start is None:
        return SeedValue(choice.seed, nan, nan, nan, "no moderate start")
    row = gain_row(final, choice, BOTH, start, "id")
    void = premise(choice.model, choice.seed, BOTH, start)
    return SeedValue(choice.seed, row["difference"], row["difference_low"], row["difference_high"], void)
