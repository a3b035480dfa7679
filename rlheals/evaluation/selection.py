"""Which rung of the ladder to keep, and how well rules that look only at a loss find it."""

from __future__ import annotations

import polars as pl

from rlheals.errors import UserError
from rlheals.reporting.schemas import SCHEMAS, check
from rlheals.stats import paired_difference

LOSS_CRITERIA = {"ood_loss": "ood", "test_id_loss": "test_id", "train_id_loss": "train_id"}
_RUN = ["profile", "model", "seed"]


def first_try_accuracy(answers: pl.DataFrame, split: str, condition: str = "ood") -> pl.DataFrame:
    """First-try accuracy of every rung on one split and condition: columns checkpoint_step (ascending), accuracy."""
    rows = answers.filter((pl.col("attempt") == 1) & (pl.col("split") == split) & (pl.col("condition") == condition))
    return rows.group_by("checkpoint_step").agg(accuracy=pl.col("solved_first_try").mean()).sort("checkpoint_step")


def choose_rungs(answers: pl.DataFrame) -> dict[str, int]:
    """``max_ood``: the (earliest) rung with the best first-try OOD accuracy on ``select``; ``end``: the last rung.

    Raises:
        UserError: there are no OOD answers on ``select``.
    """
    table = first_try_accuracy(answers, "select")
    if table.is_empty():
        raise UserError("no answers of condition ood on split select, so no rung can be chosen; run probe_sft again.")
    best = table.filter(pl.col("accuracy") == pl.col("accuracy").max())
    return {"max_ood": best["checkpoint_step"][0], "end": table["checkpoint_step"][-1]}


def selection_table(answers: pl.DataFrame, losses: pl.DataFrame) -> pl.DataFrame:
    """What each criterion picks and what the pick costs on ``confirm``, paired on hands with SFT_MaxOOD.

    Args:
        answers: schema ``answers``; first attempts on ``select`` and ``confirm`` at every rung.
        losses: schema ``losses``; every rung's step is among its steps.

    Returns:
        Schema ``selection``: accuracy of SFT_MaxOOD minus accuracy of the pick, with Newcombe's paired interval and
        the exact McNemar p-value. A pick can beat SFT_MaxOOD on ``confirm``, so regret can be negative.

    Raises:
        UserError: a rung has no loss, or the two rungs were not asked the same hands.
    """
    chosen = choose_rungs(answers)
    rungs = first_try_accuracy(answers, "confirm")
    picks = {"select_ood_accuracy": chosen["max_ood"]}
    picks |= {name: _lowest_loss(losses, series, rungs["checkpoint_step"]) for name, series in LOSS_CRITERIA.items()}
    picks["last"] = chosen["end"]
    best = rungs.filter(pl.col("accuracy") == pl.col("accuracy").max())["checkpoint_step"][0]
    accuracy = dict(rungs.iter_rows())
    run = answers.select(_RUN).row(0, named=True)
    records = []
    for criterion, step in picks.items():
        regret = paired_difference(*_paired_outcomes(answers, chosen["max_ood"], step))
        records.append(
            {
                **run,
                "criterion": criterion,
                "checkpoint_step": step,
                "ood_accuracy_confirm": accuracy[step],
                "best_step_confirm": best,
                "regret": regret.estimate,
                "regret_low": regret.low,
                "regret_high": regret.high,
                "p_value": regret.p_value,
                "n": regret.counts.n,
            }
        )
    return check(pl.DataFrame(records, schema=SCHEMAS["selection"]), "selection", "the selection table")


def _lowest_loss(losses: pl.DataFrame, series: str, rungs: pl.Series) -> int:
    """The rung with the lowest loss of a series, the earliest of equals."""
    table = losses.filter((pl.col("series") == series) & pl.col("step").is_in(rungs.implode())).sort(
        "nll_per_token", "step"
    )
    if table["step"].n_unique() != len(rungs):
        raise UserError(f"losses has no {series} value at some rungs of the ladder; run the sft stage again.")
    return int(table["step"][0])


def _paired_outcomes(answers: pl.DataFrame, first: int, second: int) -> tuple[list[bool], list[bool]]:
    """First-try outcomes of two rungs on the ``confirm`` OOD hands, aligned by hand."""
    rows = answers.filter((pl.col("attempt") == 1) & (pl.col("split") == "confirm") & (pl.col("condition") == "ood"))
    sides = [
        rows.filter(pl.col("checkpoint_step") == step).select("hand_id", "solved_first_try").sort("hand_id")
        for step in (first, second)
    ]
    if sides[0]["hand_id"].to_list() != sides[1]["hand_id"].to_list():
        raise UserError(f"rungs {first} and {second} were not asked the same confirm hands; run probe_sft again.")
    return sides[0]["solved_first_try"].to_list(), sides[1]["solved_first_try"].to_list()
