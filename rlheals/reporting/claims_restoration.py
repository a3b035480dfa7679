"""The paper's claims about weight edits, fixed before the confirmatory run, and the rules that decide them.

They are a family of their own: Holm's correction runs over their tests only, so that adding them leaves the corrected
p-values of the other families as they were fixed.

A repair that gives OOD accuracy back says nothing about directions as long as any step back of that size does the same.
So each repair is claimed twice: that it works, and that it works better than each of its controls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import nan, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy.stats import norm, spearmanr

from rlheals.reporting.claims import Claim, Evidence
from rlheals.reporting.equal_norm import steps, trade_off
from rlheals.reporting.readings import Question, Rule, SeedValue, questions, read, voided
from rlheals.reporting.registered import registered_table
from rlheals.reporting.repairs import BASE, CONTROLS, END, PEAK, RL, layers_of, of_run, outcomes, unedited
from rlheals.reporting.words import interval, listed, percent, points
from rlheals.stats import paired_difference, permutation_p_value, rank_correlation
from rlheals.stats.shares import share_of_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from rlheals.reporting.repairs import Repairs
    from rlheals.reporting.tables import Choice, Study
    from rlheals.stats import PairedDifference
    from rlheals.stats.shares import Share

TOP = 0.2
"""The leading directions: a fifth of the rank, as in the paper's abstract."""
MOST, NOTHING = 0.5, 0.1
"""Most of the lost accuracy is half of it or more, and nothing is less than a tenth; the paper's are 70 to 80 %, 0."""
SOURCE = "Jin et al., RL Fine-Tuning Heals OOD Forgetting in SFT (arXiv 2509.12235)"
AGAINST = ("random_rotation", "noise", "interpolate")
"""The controls that a repair must beat."""
_EXACT = "paired difference on the same confirm hands: Newcombe's method 10 interval and exact McNemar"
_SHARE = "share from three outcomes on the same confirm hands: Fieller's interval, and the p-value that inverts it"
_POSITIVE = "the difference is positive and the corrected p-value is below 0.05"
_NEGATIVE = "the 95 % interval of the difference ends at or below zero"
_RECOVERED = (
    "share of the lost OOD accuracy that is there again: (edited - SFT_End) / (SFT_MaxOOD - SFT_End), with {} of the "
    "base put into SFT_End"
)


@dataclass(frozen=True, slots=True)
class Repair:
    """A pre-registered edit that a claim is about.

    Attributes:
        words: it, in a sentence.
        heals: whether it should raise OOD accuracy; else it should lower it.
    """

    words: str
    heals: bool = True


REPAIRS = {
    "top": Repair("putting the base's top 20 % of directions back into SFT_End"),
    "early": Repair("putting the base's directions back into the first quarter of SFT_End's layers"),
    "impose": Repair("imposing SFT_End's directions on RL", heals=False),
}
"""The edits that are held against their controls."""


def _control_claim(repair: str) -> Claim:
    edit = REPAIRS[repair]
    verb = "raises" if edit.heals else "lowers"
    first, second = ("edited", "control") if edit.heals else ("control", "edited")
    return Claim(
        key=f"{repair}_beats_controls",
        statement=f"It is the directions: {edit.words} {verb} OOD accuracy more than any of its controls.",
        estimand=f"OOD accuracy {first} minus {second}, the smallest over the controls: Gaussian noise of the same "
        "norm in every matrix, a plain step of the same norm in every matrix back in weight space, and a random "
        "rotation, of the same norm where all directions are put back, else of the same angles and larger",
        test=f"{_EXACT}; the largest p over all controls and their draws (intersection-union)",
        holds_when="the difference to every control is positive and the corrected p-value is below 0.05",
        fails_when="the 95 % interval of the difference to a control ends at or below zero",
        source="our question to the paper, which has no control",
    )


CLAIMS = (
    Claim(
        key="top_recovers_most",
        statement="The base's top 20 % of directions recover most of the OOD accuracy that SFT lost.",
        estimand=_RECOVERED.format("the leading fifth of the directions"),
        test=f"{_SHARE} at one half",
        holds_when="the share is above one half and the corrected p-value is below 0.05",
        fails_when="the 95 % interval of the share ends below one half",
        source=f"{SOURCE}, abstract and figure of rank-wise restoration; one half is ours",
    ),
    Claim(
        key="values_recover_nothing",
        statement="Singular values alone recover nothing.",
        estimand=_RECOVERED.format("all singular values"),
        test=f"{_SHARE} at a tenth, one-sided",
        holds_when="the 95 % interval of the share ends below a tenth and the corrected p-value is below 0.05",
        fails_when="the 95 % interval of the share begins at or above a tenth",
        source=f"{SOURCE}, figure of value restoration; the margin is ours",
    ),
    Claim(
        key="early_beats_late",
        statement="Restoring directions in the first quarter of layers recovers more than in the last quarter.",
        estimand="OOD accuracy with the base's directions in the first quarter of SFT_End's layers minus that with "
        "them in the last quarter",
        test=_EXACT,
        holds_when=_POSITIVE,
        fails_when=_NEGATIVE,
        source=f"{SOURCE}, figure of layer-wise restoration",
    ),
    Claim(
        key="impose_undoes",
        statement="Imposing SFT_End's directions on RL undoes RL's gain.",
        estimand="share of RL's OOD gain over SFT_End that is lost: (RL - edited) / (RL - SFT_End)",
        test="Fieller's interval of the share; exact McNemar of RL against the edited RL for the p-value",
        holds_when="RL gained over SFT_End (95 % interval above zero), the share is at least one half, and the "
        "corrected p-value is below 0.05",
        fails_when="RL gained over SFT_End (95 % interval above zero), and the interval of the share ends below one "
        "half",
        source=f"{SOURCE}, figure of imposed directions; one half is ours",
    ),
    *(_control_claim(repair) for repair in REPAIRS),
    Claim(
        key="better_in_better_out",
        statement="Better in, better out: the better the checkpoint, the better it is after the repair.",
        estimand="slope over the rungs that RL starts from: OOD accuracy with the base's top 20 % of directions put "
        "back, against OOD accuracy before, measured on the hands of the other split",
        test="least-squares slope; normal interval from the binomial errors of the edited rungs, taken as independent, "
        "which is too wide rather than too narrow for rungs that answer the same hands; on the confirm hands where "
        "all rungs were confirmed, else on the select hands",
        holds_when="the slope is positive and the corrected p-value is below 0.05",
        fails_when="the 95 % interval of the slope ends at or below zero",
        source=f"{SOURCE}, discussion of where RL and repairs can start",
    ),
)

RULES = {
    "top_recovers_most": Rule(1, MOST, MOST),
    "values_recover_nothing": Rule(-1, NOTHING, NOTHING),
    "early_beats_late": Rule(),
    "impose_undoes": Rule(1, MOST, MOST),
    **{f"{repair}_beats_controls": Rule() for repair in REPAIRS},
    "better_in_better_out": Rule(),
}
"""Where the mean over seeds must lie; no margins beyond the registered boundaries were declared."""


def readings(
    table: pl.DataFrame,
    cells: pl.DataFrame,
    rungs: Mapping[tuple[str, int], pl.DataFrame],
    premise: Callable[[str, int], str],
) -> pl.DataFrame:
    """The corrected reading of the table that `evaluate` makes; see `rlheals.reporting.readings`.

    Args:
        table: verdicts of the registered rule.
        cells: schema ``cells``, or the published part of it.
        rungs: what `repaired_starts` gives, by model and seed.
        premise: for a model and seed, why its RL run cannot stand for RL; empty where it can.
    """
    asked = []
    for question in questions(table, RULES):
        if question.claim.startswith("impose_"):
            question = voided(question, partial(premise, question.model))
            question = voided(question, partial(_no_gain, table, question.model))
        elif question.claim.endswith("_beats_controls"):
            question = replace(question, limit=_unequal(cells, question))
        elif question.claim == "better_in_better_out":
            question = _ranked(question, rungs)
        asked.append(question)
    return read(asked)


def _no_gain(table: pl.DataFrame, model: str, seed: int) -> str:
    """Why an edit can undo nothing in this seed, in words; empty where RL gained over SFT_End."""
    row = of_run(table, model, seed).filter(pl.col("claim") == "impose_undoes")
    return "" if np.isfinite(row["estimate"][0]) else "RL gained nothing over SFT_End that could be undone"


def _unequal(cells: pl.DataFrame, question: Question) -> str:
    """Why a repair and the plain step of its norm cannot be told apart; empty where one wins in ID and OOD."""
    repair = question.claim.removesuffix("_beats_controls")
    found = [
        (seed.seed, cell)
        for seed in question.values
        if (cell := find_contrast(of_run(cells, question.model, seed.seed), repair)) is not None
    ]
    own = pl.DataFrame(found, schema={"seed": pl.Int64, "cell_id": pl.String}, orient="row")
    rows = steps(cells.filter(pl.col("model") == question.model))
    return trade_off(rows.join(own, on=["seed", "cell_id"], how="semi"))


def _ranked(question: Question, rungs: Mapping[tuple[str, int], pl.DataFrame]) -> Question:
    """Rank correlation over the rungs of each seed, and a permutation test of rungs within seeds.

    The registered slope knows the errors of hands only; what differs between rungs of equal accuracy is not in it.
    """
    tables = {v.seed: rungs[question.model, v.seed] for v in question.values if not v.void}
    pairs = {seed: (rows["before"].to_numpy(), rows["after"].to_numpy()) for seed, rows in tables.items()}
    values = tuple(
        SeedValue(v.seed, rank_correlation(*pairs[v.seed]), nan, nan) if v.seed in pairs else v for v in question.values
    )
    remark = "rank correlations, and a permutation of the rungs within each seed"
    return replace(question, values=values, p_holds=permutation_p_value(list(pairs.values())), remark=remark)


def evaluate(study: Study, repairs: Repairs) -> pl.DataFrame:
    """Evidence and verdict of every claim in every run; Holm's correction runs over all rows.

    Returns:
        The columns of `rlheals.reporting.claims.evaluate`.

    Raises:
        UserError: answers of cells are not about the same hands.
    """
    rules: dict[str, Callable[[_Cells], Evidence]] = {
        "top_recovers_most": _top,
        "values_recover_nothing": _values,
        "early_beats_late": _early_late,
        "impose_undoes": _impose,
        "better_in_better_out": lambda cells: _better(study, cells),
    }
    for repair in REPAIRS:
        rules[f"{repair}_beats_controls"] = _against(repair)
    runs = {choice: _Cells(repairs, choice) for choice in study.choices}
    found = [(claim.key, choice, rules[claim.key](runs[choice])) for claim in CLAIMS for choice in study.choices]
    return registered_table(found)


def find_contrast(cells: pl.DataFrame, name: str) -> str | None:
    """``cell_id`` of one run's contrast by the name of `REPAIRS`, ``values`` or ``late``; None where it was not run."""
    contrasts = cells.filter((pl.col("split") == "confirm") & pl.col("contrast") & (pl.col("control_of") == ""))
    operator = "values" if name == "values" else "directions"
    models = (END, RL) if name == "impose" else (BASE, END)
    rows = [
        row
        for row in contrasts.to_dicts()
        if row["operator"] == operator
        and (row["reference"], row["target"]) == models
        and row["rank_from"] == 0
        and abs(row["rank_to"] - (TOP if name == "top" else 1.0)) < 1e-9
        and bool(layers_of(row["layers"])) == (name in ("early", "late"))
    ]
    rows.sort(key=lambda row: layers_of(row["layers"]), reverse=name == "late")
    same_block = name in ("early", "late") and len(rows) < 2
    return None if not rows or same_block else str(rows[0]["cell_id"])


class _Cells:
    """The confirmed contrasts of one run, and OOD outcomes by cell."""

    def __init__(self, repairs: Repairs, choice: Choice) -> None:
        self.repairs, self.choice = repairs, choice
        self.own = of_run(repairs.cells, choice.model, choice.seed)

    def find(self, name: str) -> str | None:
        """``cell_id`` of a contrast by the name of `REPAIRS`, ``values`` or ``late``; None where it was not run."""
        return find_contrast(self.own, name)

    def controls(self, name: str, operator: str) -> list[str]:
        """``cell_id`` of every draw of a control of a contrast."""
        rows = self.own.filter(
            (pl.col("split") == "confirm")
            & (pl.col("control_of") == self.find(name))
            & (pl.col("operator") == operator)
        )
        return rows["cell_id"].to_list()

    def outcomes(self, cell_id: str) -> NDArray[np.bool_]:
        return outcomes(self.repairs, self.choice, cell_id)

    def unedited(self, name: str) -> NDArray[np.bool_]:
        return unedited(self.repairs, self.choice, name)

    def recovered(self, cell_id: str) -> Share:
        """How much of what SFT lost an edit of SFT_End gives back."""
        return share_of_loss(self.outcomes(cell_id), self.unedited(END), self.unedited(PEAK))


def _top(cells: _Cells) -> Evidence:
    cell = cells.find("top")
    if cell is None:
        return _nothing("the edit was not confirmed")
    share = cells.recovered(cell)
    if share.lost <= 0 or np.isnan(share.low):
        return _nothing("SFT lost nothing that could be divided")
    p_value = share.p_value(MOST)
    return Evidence(
        share.estimate, share.low, share.high, p_value, share.estimate > MOST, share.high < MOST, _note(cells, cell)
    )


def _values(cells: _Cells) -> Evidence:
    cell = cells.find("values")
    if cell is None:
        return _nothing("the edit was not confirmed")
    share = cells.recovered(cell)
    if share.lost <= 0 or np.isnan(share.low):
        return _nothing("SFT lost nothing that could be divided")
    p_value = share.p_value(NOTHING, "less")
    supports, refutes = share.high < NOTHING, share.low >= NOTHING
    return Evidence(share.estimate, share.low, share.high, p_value, supports, refutes, _note(cells, cell))


def _early_late(cells: _Cells) -> Evidence:
    early, late = cells.find("early"), cells.find("late")
    if early is None or late is None:
        return _nothing("the two quarters were not confirmed")
    result = paired_difference(cells.outcomes(early), cells.outcomes(late))
    shares = [cells.recovered(cell).estimate for cell in (early, late)]
    layers = [cells.own.filter(pl.col("cell_id") == cell)["layers"][0] for cell in (early, late)]
    note = (
        f"layers {layers[0]}: OOD {percent(_first(result))}, {percent(shares[0], 0)} of the loss; "
        f"layers {layers[1]}: {percent(_second(result))}, {percent(shares[1], 0)}"
    )
    return _difference(result, note)


def _impose(cells: _Cells) -> Evidence:
    cell = cells.find("impose")
    if cell is None:
        return _nothing("the edit was not confirmed")
    rl, end, edited = cells.unedited(RL), cells.unedited(END), cells.outcomes(cell)
    gain, loss = paired_difference(rl, end), paired_difference(rl, edited)
    note = f"OOD {percent(_second(gain))} in SFT_End, {percent(_first(gain))} after RL, {percent(_second(loss))} edited"
    if gain.low <= 0:
        return _nothing(f"{note}; no gain to undo")
    share = share_of_loss(edited, rl, end)
    low, high = (nan, nan) if np.isnan(share.low) else (share.low, share.high)
    supports, refutes = share.estimate >= MOST, high < MOST
    return Evidence(share.estimate, low, high, loss.p_value, supports, refutes, note)


def _against(repair: str) -> Callable[[_Cells], Evidence]:
    """The rule of "this repair does more than any of its controls"."""

    def rule(cells: _Cells) -> Evidence:
        cell = cells.find(repair)
        draws = {control: [] if cell is None else cells.controls(repair, control) for control in AGAINST}
        missing = [CONTROLS[control] for control, found in draws.items() if not found]
        if cell is None or missing:
            return _nothing("the edit was not confirmed" if cell is None else f"not controlled by {listed(missing)}")
        edited = cells.outcomes(cell)
        others = {control: [cells.outcomes(draw) for draw in found] for control, found in draws.items()}
        pairs = [(edited, other) for found in others.values() for other in found]
        sides = pairs if REPAIRS[repair].heals else [(second, first) for first, second in pairs]
        results = [paired_difference(first, second) for first, second in sides]
        closest = min(results, key=lambda result: result.estimate)
        parts = [
            f"{CONTROLS[control]} {' and '.join(percent(float(draw.mean())) for draw in found)}"
            for control, found in others.items()
        ]
        return Evidence(
            estimate=closest.estimate,
            low=closest.low,
            high=closest.high,
            p_value=max(result.p_value for result in results),
            supports=all(result.estimate > 0 for result in results),
            refutes=any(result.high <= 0 for result in results),
            note=f"OOD {percent(float(edited.mean()))} edited; {', '.join(parts)}",
        )

    return rule


def _better(study: Study, cells: _Cells) -> Evidence:
    rows = repaired_starts(study, cells.repairs, cells.choice)
    if len(rows) < 3 or rows["before"].n_unique() < 2:
        return _nothing("fewer than three different rungs were repaired")
    x, y = rows["before"].to_numpy(), rows["after"].to_numpy()
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    n = rows["n"].to_numpy()
    p = (y * n + 1) / (n + 2)  # a rung that solves every hand is not without error
    slope, error = float(weights @ y), sqrt(float(weights**2 @ (p * (1 - p) / n)))
    half = float(norm.ppf(0.975)) * error
    order = float(spearmanr(x, y).statistic) if rows["after"].n_unique() > 1 else nan
    pairs = ", ".join(
        f"step {row['step']} {percent(row['before'], 0)} to {percent(row['after'], 0)}" for row in rows.to_dicts()
    )
    note = f"{rows['split'][0]} hands: {pairs}; rank correlation {order:.2f}"
    p_value = float(2 * norm.sf(abs(slope) / error))
    return Evidence(slope, slope - half, slope + half, p_value, slope > 0, slope + half <= 0, note)


def repaired_starts(study: Study, repairs: Repairs, choice: Choice) -> pl.DataFrame:
    """Every rung that RL starts from with the base's leading directions put back.

    Returns:
        Columns step, split, n, before (OOD accuracy on the hands of the other split), after, after_low, after_high; by
        step. The split is ``confirm`` where all rungs were confirmed, else ``select``.
    """
    targets = {f"sft_{step}": step for step in study.params.ppo.starts}
    if choice.end in targets.values():
        targets[END] = choice.end  # the same weights, edited under this name
    rows = of_run(repairs.edits, choice.model, choice.seed).filter(
        (pl.col("operator") == "directions")
        & (pl.col("basis") == "uv")
        & (pl.col("reference") == BASE)
        & (pl.col("layers") == "all")
        & (pl.col("modules") == "all")
        & (pl.col("rank_from") == 0)
        & ((pl.col("rank_to") - TOP).abs() < 1e-9)
        & pl.col("target").is_in(list(targets))
    )
    by_split = rows.partition_by("split", as_dict=True)
    select, confirm = (by_split.get((name,), rows.clear()) for name in ("select", "confirm"))
    chosen = confirm if set(confirm["target"]) == set(rows["target"]) else select
    other = "select" if chosen is confirm else "confirm"
    ladder = of_run(study.summary, choice.model, choice.seed).filter(
        (pl.col("split") == other) & (pl.col("attempts") == 1) & (pl.col("condition") == "ood")
    )
    known = dict(ladder.select("checkpoint_step", "accuracy").iter_rows())
    found: list[dict[str, Any]] = [
        {"step": targets[row["target"]], "split": row["split"], "n": row["n"]}
        | {"before": known[targets[row["target"]]], "after": row["ood_accuracy"]}
        | {"after_low": row["ood_low"], "after_high": row["ood_high"]}
        for row in chosen.to_dicts()
    ]
    schema = {"step": pl.Int64, "split": pl.String, "n": pl.Int64} | dict.fromkeys(
        ("before", "after", "after_low", "after_high"), pl.Float64
    )
    return pl.DataFrame(found, schema=schema).unique("step").sort("step")


def _difference(result: PairedDifference, note: str) -> Evidence:
    positive, gone = result.estimate > 0, result.high <= 0
    return Evidence(result.estimate, result.low, result.high, result.p_value, positive, gone, note)


def _note(cells: _Cells, cell_id: str) -> str:
    """Accuracies behind a share, with the change of ID accuracy, which a repair may cost."""
    accuracy = {name: float(cells.unedited(name).mean()) for name in (PEAK, END)}
    row = cells.own.filter((pl.col("cell_id") == cell_id) & (pl.col("split") == "confirm")).row(0, named=True)
    return (
        f"OOD {percent(accuracy[PEAK])} in SFT_MaxOOD, {percent(accuracy[END])} in SFT_End, "
        f"{percent(row['ood_accuracy'])} edited; ID {points(row['id_difference'])} points "
        f"{interval(row['id_difference_low'], row['id_difference_high'])}"
    )


def _first(result: PairedDifference) -> float:
    return result.counts.first / result.counts.n


def _second(result: PairedDifference) -> float:
    return result.counts.second / result.counts.n


def _nothing(note: str) -> Evidence:
    return Evidence(nan, nan, nan, 1.0, False, False, note)
