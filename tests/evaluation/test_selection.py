from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
import pytest
from scipy.stats import binomtest

from rlheals.errors import UserError
from rlheals.evaluation.selection import choose_rungs, selection_table
from rlheals.reporting.schemas import SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUN = {"profile": "mini", "model": "tiny", "seed": 0}


def answers(outcomes: Mapping[tuple[str, int], Sequence[int]], condition: str = "ood") -> pl.DataFrame:
    """First attempts with the given outcomes by (split, step), and a second, solved attempt that must not count."""
    records = [
        {
            **RUN,
            "stage": "sft",
            "checkpoint_step": step,
            "cell_id": "",
            "condition": condition,
            "split": split,
            "hand_id": f"hand {place}",
            "attempt": attempt,
            "response": "",
            "verdict": "",
            "reward": 0.0,
            "solved": bool(solved) or attempt == 2,
            "solved_first_try": bool(solved) and attempt == 1,
            "solved_under_training_rule": False,
            "format_error": False,
            "fields_ok": None,
            "tokens": 1,
            "engine": "scripted",
            "sampling": "greedy",
        }
        for (split, step), row in outcomes.items()
        for place, solved in enumerate(row)
        for attempt in (1, 2)
    ]
    return pl.DataFrame(records, schema=SCHEMAS["answers"])


def losses(**series: Mapping[int, float]) -> pl.DataFrame:
    records = [
        {**RUN, "series": name, "step": step, "tokens": 9, "nll_per_token": value}
        for name, values in series.items()
        for step, value in values.items()
    ]
    return pl.DataFrame(records, schema=SCHEMAS["losses"])


SELECT = {
    ("select", 0): [0, 0, 0, 0],
    ("select", 5): [1, 1, 0, 0],
    ("select", 10): [0, 1, 1, 0],
    ("select", 20): [1, 0, 0, 0],
}
CONFIRM = {
    ("confirm", 0): [0] * 10,
    ("confirm", 5): [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    ("confirm", 10): [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    ("confirm", 20): [0, 0, 0, 0, 1, 0, 0, 1, 0, 0],
}
LOSSES = {
    "ood": {0: 3.0, 3: 0.01, 5: 0.5, 10: 0.5, 20: 0.9},  # step 3 is no rung
    "test_id": {0: 3.0, 5: 0.5, 10: 0.4, 20: 0.3},
    "train_id": {0: 0.1, 5: 0.5, 10: 0.4, 20: 0.3},
}


def test_the_earliest_of_equal_rungs_is_chosen_on_select_only() -> None:
    assert choose_rungs(answers(SELECT | CONFIRM)) == {"max_ood": 5, "end": 20}


def test_other_conditions_do_not_choose() -> None:
    table = pl.concat([answers(SELECT), answers({("select", 0): [1, 1, 1, 1]}, condition="id")])
    assert choose_rungs(table)["max_ood"] == 5


def test_no_ood_answers_is_an_error() -> None:
    with pytest.raises(UserError, match="no answers of condition ood on split select"):
        choose_rungs(answers(CONFIRM))


def test_every_criterion_and_its_regret() -> None:
    table = selection_table(answers(SELECT | CONFIRM), losses(**LOSSES))
    assert dict(table.select("criterion", "checkpoint_step").iter_rows()) == {
        "select_ood_accuracy": 5,
        "ood_loss": 5,
        "test_id_loss": 20,
        "train_id_loss": 0,
        "last": 20,
    }
    assert set(table["best_step_confirm"]) == {10}
    rows = {row["criterion"]: row for row in table.rows(named=True)}
    assert rows["select_ood_accuracy"]["regret"] == 0.0
    assert rows["select_ood_accuracy"]["p_value"] == 1.0
    last = rows["last"]
    assert last["ood_accuracy_confirm"] == pytest.approx(0.2)
    assert last["regret"] == pytest.approx(0.6 - 0.2)
    assert last["regret_low"] < last["regret"] < last["regret_high"]
    # rung 5 alone solves hands 0 1 2 3 5, rung 20 alone hand 7
    assert last["p_value"] == pytest.approx(binomtest(5, 6).pvalue)
    assert last["n"] == 10


def test_pairing_is_by_hand_not_by_row_order() -> None:
    expected = selection_table(answers(SELECT | CONFIRM), losses(**LOSSES))
    shuffled = answers(SELECT | CONFIRM).sample(fraction=1.0, shuffle=True, seed=1)
    assert selection_table(shuffled, losses(**LOSSES)).equals(expected)


def test_a_rung_without_a_loss_is_an_error() -> None:
    missing = {**LOSSES, "test_id": {0: 3.0, 5: 0.5, 20: 0.3}}
    with pytest.raises(UserError, match="no test_id value at some rungs"):
        selection_table(answers(SELECT | CONFIRM), losses(**missing))


def test_rungs_asked_other_hands_are_an_error() -> None:
    table = answers(SELECT | CONFIRM).filter(~((pl.col("checkpoint_step") == 20) & (pl.col("hand_id") == "hand 9")))
    with pytest.raises(UserError, match="were not asked the same confirm hands"):
        selection_table(table, losses(**LOSSES))
