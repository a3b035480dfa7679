from __future__ import annotations

from itertools import pairwise
from math import isnan, log1p
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlheals.errors import UserError
from rlheals.evaluation.recovery import (
    arm_and_update,
    cell_id,
    find_window,
    recovery_table,
    recovery_windows,
)
from rlheals.reporting.schemas import SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HANDS = 10
BEFORE = {
    10: [1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
    40: [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
    80: [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
}
AFTER = {
    10: [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    40: [0, 1, 1, 1, 1, 1, 1, 1, 0, 0],
    80: [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
}


def answers(outcomes: Mapping[int, Sequence[int]], cell: str = "", condition: str = "ood") -> pl.DataFrame:
    """First confirm attempts, and a second attempt and a select answer, both solved, that must not count."""
    records = [
        {
            "profile": "mini",
            "model": "tiny",
            "seed": 0,
            "stage": "rl" if cell else "sft",
            "checkpoint_step": step,
            "cell_id": cell,
            "condition": condition,
            "split": split,
            "hand_id": f"hand {place}",
            "attempt": attempt,
            "response": "",
            "verdict": "",
            "reward": 0.0,
            "solved": bool(solved) or attempt == 2 or split == "select",
            "solved_first_try": bool(solved) and attempt == 1,
            "solved_under_training_rule": False,
            "format_error": place == 9,
            "fields_ok": None,
            "tokens": 1,
            "engine": "scripted",
            "sampling": "greedy",
        }
        for step, row in outcomes.items()
        for place, solved in enumerate(row)
        for split, attempt in (("confirm", 1), ("confirm", 2), ("select", 1))
    ]
    return pl.DataFrame(records, schema=SCHEMAS["answers"])


def test_recovery_is_what_the_hands_say() -> None:
    table = recovery_table(answers(AFTER, "ppo/24"), answers(BEFORE), max_ood=10)
    rows = {row["checkpoint_step"]: row for row in table.to_dicts()}
    moderate = rows[40]
    assert (moderate["arm"], moderate["update"], moderate["condition"], moderate["n"]) == ("ppo", 24, "ood", HANDS)
    assert (moderate["before"], moderate["after"], moderate["peak"]) == (0.4, 0.7, 0.8)
    assert (moderate["only_after"], moderate["only_before"]) == (4, 1)
    assert moderate["difference"] == pytest.approx(0.3)
    assert moderate["recovered"] == pytest.approx(0.3 / 0.4)
    assert moderate["p_value"] == pytest.approx(binomtest(4, 5).pvalue)
    assert moderate["difference_low"] < 0.3 < moderate["difference_high"]
    assert moderate["format_error_before"] == moderate["format_error_after"] == 0.1
    assert rows[10]["recovered"] is None, "nothing was lost at SFT_MaxOOD"
    assert rows[80]["difference"] == 0


def test_pairing_is_by_hand_not_by_row_order() -> None:
    expected = recovery_table(answers(AFTER, "ppo/24"), answers(BEFORE), 10)
    shuffled = [
        table.sample(fraction=1.0, shuffle=True, seed=3) for table in (answers(AFTER, "ppo/24"), answers(BEFORE))
    ]
    found = recovery_table(*shuffled, 10)
    assert found.sort("checkpoint_step").equals(expected.sort("checkpoint_step"))


def test_each_arm_update_and_condition_has_a_row() -> None:
    cells = [answers(AFTER, cell, condition) for cell in ("ppo/12", "kl_only/24") for condition in ("id", "ood")]
    before = pl.concat([answers(BEFORE, condition=condition) for condition in ("id", "ood")])
    table = recovery_table(pl.concat(cells), before, 10)
    assert set(table.select("arm", "update", "condition").iter_rows()) == {
        (arm, update, condition) for arm, update in (("ppo", 12), ("kl_only", 24)) for condition in ("id", "ood")
    }
    windows = recovery_windows(pl.concat(cells), before, 10, seed=0)
    assert windows.select("arm", "update").rows() == [("ppo", 12), ("kl_only", 24)]


@pytest.mark.parametrize("function", [lambda a, b: recovery_table(a, b, 10), lambda a, b: recovery_windows(a, b, 5, 0)])
def test_other_hands_are_an_error(function) -> None:
    before = answers(BEFORE)
    missing = before.filter(~((pl.col("checkpoint_step") == 40) & (pl.col("hand_id") == "hand 3")))
    with pytest.raises(UserError, match="rung 40 and the RL branches were not asked the same confirm hands"):
        function(answers(AFTER, "ppo/24"), missing)
    with pytest.raises(UserError, match="asked rung 80 no ood hands"):
        function(answers(AFTER, "ppo/24"), before.filter(pl.col("checkpoint_step") != 80))


def test_starts_with_different_hands_cannot_share_a_window() -> None:
    keep = ~((pl.col("checkpoint_step") == 40) & (pl.col("hand_id") == "hand 3"))
    with pytest.raises(UserError, match="starts 10 and 40 were not asked the same"):
        recovery_windows(answers(AFTER, "ppo/24").filter(keep), answers(BEFORE).filter(keep), 5, 0)


def test_names_of_cells_go_both_ways() -> None:
    assert arm_and_update(cell_id("reward_only", 24)) == ("reward_only", 24)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([-0.2, -0.1, -0.1], None),
        ([0.0, 0.0, 0.0], None),
        ([0.1, 0.2, 0.1], (5, 480)),
        ([0.1, -0.2, 0.3], (None, 480)),
        ([-0.1, 0.2, -0.1], (None, None)),
    ],
)
def test_windows_of_three_starts(gains, expected) -> None:
    found = find_window([5, 40, 480], gains)
    if expected is None:
        assert isnan(found.opens)
        assert isnan(found.closes)
        return
    for value, edge in zip(found, expected, strict=True):
        assert value == edge if edge is not None else 5 < value < 480


@given(
    st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=8),
    st.lists(st.integers(0, 5000), min_size=8, max_size=8, unique=True),
)
def test_window_holds_the_best_start_and_ends_where_the_line_is_zero(gains, drawn) -> None:
    steps = sorted(drawn)[: len(gains)]
    found = find_window(steps, gains)
    best = int(np.argmax(gains))
    if gains[best] <= 0:
        assert isnan(found.opens)
        return
    assert found.opens <= steps[best] + 1e-6
    assert found.closes >= steps[best] - 1e-6
    line = [np.interp(log1p(edge), [log1p(step) for step in steps], gains) for edge in found]
    for edge, height in zip(found, line, strict=True):
        assert edge in (steps[0], steps[-1]) or height == pytest.approx(0, abs=1e-6)
    inside = [gain for step, gain in zip(steps, gains, strict=True) if found.opens + 1e-6 < step < found.closes - 1e-6]
    assert all(gain > 0 for gain in inside)


def many(rates: Mapping[int, tuple[float, float]], hands: int = 400) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Answers of an RL arm and of its starts with given accuracies after and before."""
    luck = np.random.default_rng(5).random(hands)
    after = {step: (luck < high).astype(int).tolist() for step, (high, _) in rates.items()}
    before = {step: (luck[::-1] < low).astype(int).tolist() for step, (_, low) in rates.items()}
    return answers(after, "ppo/24"), answers(before)


def test_window_of_a_clear_effect() -> None:
    tables = many({5: (0.1, 0.3), 40: (0.7, 0.4), 180: (0.5, 0.3), 480: (0.1, 0.3)})
    row = recovery_windows(*tables, 300, seed=1).row(0, named=True)
    assert row["best_step"] == 40
    assert row["best_p_holm"] < 1e-6
    assert 5 < row["opens"] < 40 < 180 < row["closes"] < 480
    assert row["opens_low"] <= row["opens"] <= row["opens_high"]
    assert row["closes_low"] <= row["closes"] <= row["closes_high"]
    assert not row["opens_before_first"]
    assert not row["closes_after_last"]
    assert row["found_share"] == 1
    assert (row["n"], row["starts"], row["resamples"]) == (400, 4, 300)


def test_the_bootstrap_is_that_of_hands() -> None:
    """Against a plain resampling loop over the same tables."""
    rates = {5: (0.36, 0.4), 40: (0.52, 0.4), 480: (0.37, 0.4)}
    after, before = many(rates)
    row = recovery_windows(after, before, 3000, seed=1).row(0, named=True)
    steps = sorted(rates)

    def column(table: pl.DataFrame, step: int) -> np.ndarray:
        own = table.filter(
            (pl.col("checkpoint_step") == step) & (pl.col("split") == "confirm") & (pl.col("attempt") == 1)
        )
        return own.sort("hand_id")["solved"].to_numpy().astype(int)

    changes = np.stack([column(after, step) - column(before, step) for step in steps], axis=1)
    rng = np.random.default_rng(9)
    draws = [changes[rng.integers(400, size=400)].mean(axis=0) for _ in range(3000)]
    edges = np.array([find_window(steps, draw) for draw in draws])
    assert row["found_share"] == pytest.approx(np.mean(~np.isnan(edges[:, 0])), abs=0.03)
    ends = log1p(row["opens_high"]), log1p(row["closes_low"])
    expected = np.log1p([np.nanquantile(edges[:, 0], 0.975), np.nanquantile(edges[:, 1], 0.025)])
    assert ends == pytest.approx(expected, abs=0.15)


def test_no_gain_anywhere_is_no_window() -> None:
    tables = many({5: (0.2, 0.4), 40: (0.3, 0.6)})
    row = recovery_windows(*tables, 50, seed=0).row(0, named=True)
    assert row["opens"] is row["closes"] is row["opens_low"] is None
    assert not row["opens_before_first"]
    assert row["found_share"] == 0


def test_edges_beyond_the_starts_are_said_so() -> None:
    row = recovery_windows(*many({5: (0.6, 0.2), 40: (0.6, 0.2)}), 50, seed=0).row(0, named=True)
    assert row["opens_before_first"]
    assert row["closes_after_last"]
    assert (row["opens"], row["closes"]) == (5, 40)


def test_same_seed_same_window() -> None:
    tables = many({5: (0.45, 0.4), 40: (0.5, 0.4), 480: (0.42, 0.4)})
    first, second, other = (recovery_windows(*tables, 100, seed=seed) for seed in (1, 1, 2))
    assert first.equals(second)
    assert not first.equals(other)


def test_pairs_of_neighbours_share_an_edge_formula() -> None:
    """A line from -a to b crosses zero in the middle of the log scale when a equals b."""
    steps = [7, 31, 127, 511]
    for low, high in pairwise(steps):
        found = find_window([low, high], [-0.25, 0.25])
        assert log1p(found.opens) == pytest.approx((log1p(low) + log1p(high)) / 2)
