"""The paper's claims about RL, fixed before the confirmatory run, and the rules that decide them.

They are a family of their own: Holm's correction runs over their tests only, so that adding them leaves the corrected
p-values of the claims about SFT (`rlheals.reporting.claims`) as they were fixed.

Starts are named in multiples of SFT_MaxOOD, which is chosen on the select split. The paper's window, steps 420 to 1200
with SFT_MaxOOD at 140, is 3 to 8.6 of them; rounded outwards, a start is moderate from 2 to 10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log, nan
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from rlheals.errors import UserError
from rlheals.reporting.claims import Claim, Evidence
from rlheals.reporting.readings import Rule, SeedValue, questions, read
from rlheals.reporting.registered import ALPHA, registered_table
from rlheals.reporting.words import interval, percent, points
from rlheals.stats import bootstrap_hands, difference_from_counts, holm, paired_difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rlheals.reporting.branches import Branches
    from rlheals.reporting.tables import Choice, Study
    from rlheals.stats import PairCounts, PairedDifference

MODERATE = (2, 10)
"""A start is moderate between these multiples of SFT_MaxOOD; before them it is early, behind them late."""
TYPICAL = 5
"""The moderate start that counts is the one closest to this multiple, the geometric middle of the paper's window."""
MARGIN = 0.05
"""A gain below this is none worth its price; the paper's own 95 % intervals are about this wide to either side."""
SHARE = 0.5
WITHOUT_KL, WITHOUT_REWARD, BOTH = "reward_only", "kl_only", "ppo"
SOURCE = "Jin et al., RL Fine-Tuning Heals OOD Forgetting in SFT (arXiv 2509.12235)"
_GAIN = "OOD accuracy after the last update of PPO minus OOD accuracy of the start"
_EXACT = "paired difference on the same confirm hands: Newcombe's method 10 interval and exact McNemar"
_CANNOT = (
    "paired difference on the same confirm hands for each such start: Newcombe's method 10 interval; p is the level at "
    "which the interval's upper end reaches the margin, one-sided, the largest over the starts (intersection-union)"
)
_CANNOT_HOLDS = "every such start gains less than 5 percentage points, with a corrected p-value below 0.05"
_CANNOT_FAILS = (
    "a start gains (exact McNemar, corrected over these starts, below 0.05) and the 95 % interval of its gain reaches "
    "5 percentage points"
)

CLAIMS = (
    Claim(
        key="rl_heals_moderate",
        statement="RL from a moderately over-trained checkpoint raises OOD accuracy.",
        estimand=f"{_GAIN}, at the start closest to 5 times the step of SFT_MaxOOD (2 to 10 times allowed)",
        test=_EXACT,
        holds_when="the difference is positive and the corrected p-value is below 0.05",
        fails_when="the 95 % interval of the difference ends at or below zero",
        source=f"{SOURCE}, figure of OOD accuracy against the checkpoint RL starts from",
    ),
    Claim(
        key="rl_cannot_early",
        statement="RL that starts too early does not raise OOD accuracy.",
        estimand=f"{_GAIN}; the largest over the starts before 2 times the step of SFT_MaxOOD",
        test=_CANNOT,
        holds_when=_CANNOT_HOLDS,
        fails_when=_CANNOT_FAILS,
        source=f"{SOURCE}, the same figure; starts and margin are ours",
    ),
    Claim(
        key="rl_cannot_late",
        statement="RL that starts too late does not raise OOD accuracy.",
        estimand=f"{_GAIN}; the largest over the starts behind 10 times the step of SFT_MaxOOD",
        test=_CANNOT,
        holds_when=_CANNOT_HOLDS,
        fails_when=_CANNOT_FAILS,
        source=f"{SOURCE}, the same figure; starts and margin are ours",
    ),
    Claim(
        key="reward_heals_alone",
        statement="The reward heals by itself: PPO without any KL term raises OOD accuracy from a moderate start.",
        estimand="OOD accuracy after the last update without the KL term minus OOD accuracy of the start",
        test=_EXACT,
        holds_when="the difference is positive and the corrected p-value is below 0.05",
        fails_when="the 95 % interval of the difference ends at or below zero",
        source=f"{SOURCE}; the released code has no KL term",
    ),
    Claim(
        key="kl_makes_half",
        statement="At least half of what PPO with a KL term heals from a moderate start is due to the KL term.",
        estimand="share of PPO's OOD gain that is missing without the KL term",
        test="percentile bootstrap over confirm hands for the interval; exact McNemar of PPO with against PPO without "
        "the KL term for the p-value",
        holds_when="PPO with the KL term gains (95 % interval above zero), the share is at least one half, and the "
        "corrected p-value is below 0.05",
        fails_when="PPO with the KL term gains (95 % interval above zero), and the interval of the share ends below "
        "one half",
        source="our question to the paper's account, which gives the effect to the reward",
    ),
)
ARMS = {
    "rl_heals_moderate": (BOTH,),
    "rl_cannot_early": (BOTH,),
    "rl_cannot_late": (BOTH,),
    "reward_heals_alone": (WITHOUT_KL,),
    "kl_makes_half": (BOTH, WITHOUT_KL),
}
"""The arms a claim needs; where params do not declare them the claim is not examined."""

RULES = {
    "rl_heals_moderate": Rule(1, 0.0, MARGIN),
    "rl_cannot_early": Rule(-1, MARGIN, 0.0),
    "rl_cannot_late": Rule(-1, MARGIN, 0.0),
    "reward_heals_alone": Rule(1, 0.0, MARGIN),
    "kl_makes_half": Rule(1, SHARE, SHARE),
}
"""Where the mean over seeds must lie; the margin of a gain is the declared one."""
Premise = Callable[[str, int, str, int], str]
"""For a model, seed, arm and start: why this branch cannot test a claim about RL; empty where it can."""


def readings(
    table: pl.DataFrame, final: pl.DataFrame, choices: Sequence[Choice], starts: Sequence[int], premise: Premise
) -> pl.DataFrame:
    """The corrected reading of the table that `evaluate` makes; see `rlheals.reporting.readings`.

    A seed counts where RL raised its own reward from the start in question; a claim about several starts is read from
    those of them where it did.

    Args:
        table: verdicts of the registered rule.
        final: rows of schema ``recovery`` after the last update.
        choices: SFT_MaxOOD of every run.
        starts: declared starts.
        premise: the check of the manipulation.
    """
    runs = {(choice.model, choice.seed): choice for choice in choices}
    asked = []
    for question in questions(table, RULES):
        values = [
            _seed_value(question.claim, value, runs[question.model, value.seed], starts, final, premise)
            for value in question.values
        ]
        asked.append(replace(question, values=tuple(values)))
    return read(asked)


def _seed_value(
    claim: str, value: SeedValue, choice: Choice, starts: Sequence[int], final: pl.DataFrame, premise: Premise
) -> SeedValue:
    """The estimate of one seed, void where the RL runs it needs did not do what they are for."""
    if value.void and "no start" in value.void:
        return value
    if claim in ("rl_cannot_early", "rl_cannot_late"):
        chosen = early_starts(starts, choice) if claim == "rl_cannot_early" else late_starts(starts, choice)
        return _largest(value, chosen, choice, final, premise)
    start = moderate_start(starts, choice)
    assert start is not None  # the registered rule has an estimate or says "no start"
    failed = [why for arm in ARMS[claim] if (why := premise(choice.model, choice.seed, arm, start))]
    return replace(value, void=failed[0] if failed else value.void)


def _largest(
    value: SeedValue, starts: Sequence[int], choice: Choice, final: pl.DataFrame, premise: Premise
) -> SeedValue:
    """The largest gain over the starts from which RL raised its own reward."""
    failed = {start: why for start in starts if (why := premise(choice.model, choice.seed, BOTH, start))}
    sound = [start for start in starts if start not in failed]
    if not sound:
        return replace(value, void=next(iter(failed.values())))
    rows = [gain_row(final, choice, BOTH, start, "ood") for start in sound]
    best = max(rows, key=lambda row: row["difference"])
    return SeedValue(choice.seed, best["difference"], best["difference_low"], best["difference_high"])


def gain_row(final: pl.DataFrame, choice: Choice, arm: str, start: int, condition: str) -> dict[str, Any]:
    """The row of ``recovery`` of one branch."""
    rows = final.filter(
        (pl.col("model") == choice.model)
        & (pl.col("seed") == choice.seed)
        & (pl.col("arm") == arm)
        & (pl.col("checkpoint_step") == start)
        & (pl.col("condition") == condition)
    )
    return rows.row(0, named=True)


def limits(choice: Choice) -> tuple[int, int]:
    """First and last moderate step."""
    return MODERATE[0] * choice.max_ood, MODERATE[1] * choice.max_ood


def early_starts(starts: Sequence[int], choice: Choice) -> list[int]:
    """Starts before the moderate ones."""
    return [start for start in starts if start < limits(choice)[0]]


def late_starts(starts: Sequence[int], choice: Choice) -> list[int]:
    """Starts behind the moderate ones."""
    return [start for start in starts if start > limits(choice)[1]]


def moderate_start(starts: Sequence[int], choice: Choice) -> int | None:
    """The moderate start that counts; None when none is declared."""
    low, high = limits(choice)
    inside = [start for start in starts if 0 < low <= start <= high]
    return min(inside, key=lambda start: abs(log(start / (TYPICAL * choice.max_ood))), default=None)


def examined(study: Study) -> list[Claim]:
    """The claims whose arms this profile has."""
    return [claim for claim in CLAIMS if set(ARMS[claim.key]) <= set(study.params.ppo.arms)]


def evaluate(study: Study, branches: Branches) -> pl.DataFrame:
    """Evidence and verdict of every examined claim in every run; Holm's correction runs over all rows.

    Returns:
        The columns of `rlheals.reporting.claims.evaluate`.

    Raises:
        UserError: the answers of an RL branch and of its start are not about the same hands.
    """
    rules: dict[str, Callable[[_Gains], Evidence]] = {
        "rl_heals_moderate": lambda gains: _heals(gains, BOTH),
        "rl_cannot_early": lambda gains: _cannot(gains, gains.early, f"before step {gains.limits[0]}"),
        "rl_cannot_late": lambda gains: _cannot(gains, gains.late, f"behind step {gains.limits[1]}"),
        "reward_heals_alone": lambda gains: _heals(gains, WITHOUT_KL),
        "kl_makes_half": _kl_share,
    }
    gains = {choice: _Gains(study, branches, choice) for choice in study.choices}
    found = [(c.key, choice, rules[c.key](gains[choice])) for c in examined(study) for choice in study.choices]
    return registered_table(found)


class _Gains:
    """OOD outcomes of one run before and after RL, by arm and start."""

    def __init__(self, study: Study, branches: Branches, choice: Choice) -> None:
        self.starts = list(study.params.ppo.starts)
        self.last, self.choice = branches.last, choice
        self.limits = limits(choice)
        self._after, self._before = (_ood_first_tries(table, choice) for table in (branches.answers, study.answers))
        self._recovery = branches.final.filter(
            (pl.col("model") == choice.model) & (pl.col("seed") == choice.seed) & (pl.col("condition") == "ood")
        )

    @property
    def early(self) -> list[int]:
        return early_starts(self.starts, self.choice)

    @property
    def late(self) -> list[int]:
        return late_starts(self.starts, self.choice)

    @property
    def moderate(self) -> int | None:
        """The moderate start that counts; None when none is declared."""
        return moderate_start(self.starts, self.choice)

    def outcomes(self, arm: str | None, start: int) -> NDArray[np.bool_]:
        """First-try outcomes of an arm's branch (None: of the start itself), by hand in one order for all."""
        table, cell = (self._before, "") if arm is None else (self._after, f"{arm}/{self.last}")
        rows = table.filter((pl.col("checkpoint_step") == start) & (pl.col("cell_id") == cell)).sort("hand_id")
        hands = self._before.filter(pl.col("checkpoint_step") == start).sort("hand_id")["hand_id"]
        if rows["hand_id"].to_list() != hands.to_list() or hands.is_empty():
            raise UserError(
                f"answers of {self.choice.model}, seed {self.choice.seed}, arm {arm} from step {start} are not about "
                "the hands of the start, so they cannot be paired; run `dvc repro`."
            )
        return rows["solved"].to_numpy()

    def gain(self, arm: str, start: int) -> PairedDifference:
        return paired_difference(self.outcomes(arm, start), self.outcomes(None, start))

    def recovered(self, arm: str, start: int) -> float | None:
        """Share of what SFT lost since SFT_MaxOOD that the arm gives back."""
        rows = self._recovery.filter((pl.col("arm") == arm) & (pl.col("checkpoint_step") == start))
        return rows.row(0, named=True)["recovered"]  # type: ignore[no-any-return]


def _heals(gains: _Gains, arm: str) -> Evidence:
    start = gains.moderate
    if start is None:
        return _no_start(f"between steps {gains.limits[0]} and {gains.limits[1]}")
    result = gains.gain(arm, start)
    counts = result.counts
    note = (
        f"OOD {percent(counts.second / counts.n)} at step {start}, {percent(counts.first / counts.n)} after RL "
        f"({gains.last} updates), {percent(gains.recovered(arm, start), 0)} of what was lost since SFT_MaxOOD"
    )
    return Evidence(
        result.estimate, result.low, result.high, result.p_value, result.estimate > 0, result.high <= 0, note
    )


def _cannot(gains: _Gains, starts: list[int], where: str) -> Evidence:
    """Every one of ``starts`` gains less than the margin."""
    if not starts or not gains.choice.max_ood:
        return _no_start(where)
    results = {start: gains.gain(BOTH, start) for start in starts}
    largest = max(results.values(), key=lambda result: result.estimate)
    gained = holm([result.p_value for result in results.values()])
    refuted = any(
        result.estimate > 0 and p < ALPHA and result.high >= MARGIN
        for result, p in zip(results.values(), gained, strict=True)
    )
    note = "gain " + ", ".join(
        f"{points(r.estimate)} {interval(r.low, r.high)} from step {start}" for start, r in results.items()
    )
    return Evidence(
        estimate=largest.estimate,
        low=largest.low,
        high=largest.high,
        p_value=max(p_above(result.counts, MARGIN) for result in results.values()),
        supports=all(result.estimate < MARGIN for result in results.values()),
        refutes=refuted,
        note=note,
    )


def _kl_share(gains: _Gains) -> Evidence:
    start = gains.moderate
    if start is None:
        return _no_start(f"between steps {gains.limits[0]} and {gains.limits[1]}")
    both, without = gains.gain(BOTH, start), gains.gain(WITHOUT_KL, start)
    note = f"from step {start}: gain {points(both.estimate)} with the KL term, {points(without.estimate)} without"
    if f"{WITHOUT_REWARD}/{gains.last}" in set(gains._after["cell_id"]):
        note += f", {points(gains.gain(WITHOUT_REWARD, start).estimate)} with the KL term alone"
    if both.low <= 0:
        return Evidence(nan, nan, nan, 1.0, False, False, f"{note}; no gain to divide")
    outcomes = [gains.outcomes(arm, start) for arm in (None, BOTH, WITHOUT_KL)]
    low, high = bootstrap_hands(np.stack(outcomes, axis=1), _missing_share, seed=gains.choice.seed)
    p_value = paired_difference(outcomes[1], outcomes[2]).p_value
    share = 1 - without.estimate / both.estimate
    return Evidence(share, low, high, p_value, share >= SHARE, high < SHARE, note)


def _missing_share(outcomes: NDArray[np.float64]) -> float:
    """Share of the gain of the second column over the first that the third does not have; 0 where there is no gain."""
    start, both, without = outcomes.sum(axis=0)
    return float((both - without) / (both - start)) if both > start else 0.0


def p_above(counts: PairCounts, margin: float) -> float:
    """One-sided p-value of "the first is better than the second by ``margin`` or more".

    The level is searched at which the upper end of Newcombe's paired interval just reaches the margin.
    """
    if counts.first / counts.n - counts.second / counts.n >= margin:
        return 1.0
    near, far = 0.0, 1.0
    for _ in range(40):
        level = (near + far) / 2
        inside = 0 < level < 1 and difference_from_counts(counts, level).high < margin
        near, far = (level, far) if inside else (near, level)
    return (1 - near) / 2


def _no_start(where: str) -> Evidence:
    return Evidence(nan, nan, nan, 1.0, False, False, f"no start {where}")


def _ood_first_tries(answers: pl.DataFrame, choice: Choice) -> pl.DataFrame:
    return answers.filter(
        (pl.col("model") == choice.model)
        & (pl.col("seed") == choice.seed)
        & (pl.col("condition") == "ood")
        & (pl.col("split") == "confirm")
        & (pl.col("attempt") == 1)
    ).select("checkpoint_step", "cell_id", "hand_id", "solved")
