"""The committed tables of ``mini-confirm``, and what README, research log and corrections say of them."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr, ttest_1samp

from rlheals.publish import verify
from rlheals.reporting import claims, claims_descriptive, claims_restoration, claims_rl, claims_spectra
from rlheals.reporting.equal_norm import at_equal_id, leading, step_curve, steps, trade_off
from rlheals.reporting.premises import WORSE, premise_of
from rlheals.reporting.readings import NOT_TESTED
from rlheals.reporting.registered import FAILS, HOLDS, UNDECIDED, pooled_verdict
from rlheals.reporting.repairs import Repairs
from rlheals.reporting.sections.restoration import breaks_budget
from rlheals.reporting.tables import Choice
from rlheals.training.ppo.manipulation import reward_changes

REPORTS = Path(__file__).parents[2] / "reports"
TABLES = REPORTS / "mini-confirm/tables"
SEEDS = (0, 1, 2)
STARTS = [10, 12, 40, 180, 480]
REWARDED = ("ppo", "reward_only", "reinforce", "grpo")
LATER = (40, 180, 480)
REGISTERED = {
    "ood_peaks_early_and_falls": HOLDS,
    "id_keeps_rising": HOLDS,
    "no_loss_picks_the_peak": HOLDS,
    "rl_heals_moderate": FAILS,
    "rl_cannot_early": FAILS,
    "rl_cannot_late": FAILS,
    "reward_heals_alone": FAILS,
    "kl_makes_half": UNDECIDED,
    "sigma_stable_sft": FAILS,
    "sigma_stable_rl": FAILS,
    "directions_turn_sft": UNDECIDED,
    "directions_turn_rl": UNDECIDED,
    "energy_preserved": FAILS,
    "no_extremes": FAILS,
    "same_profile": FAILS,
    "hidden_states_shift": UNDECIDED,
    "rl_moves_back": FAILS,
    "rotation_is_gauge": FAILS,
    "top_recovers_most": HOLDS,
    "values_recover_nothing": HOLDS,
    "early_beats_late": HOLDS,
    "impose_undoes": UNDECIDED,
    "top_beats_controls": FAILS,
    "early_beats_controls": UNDECIDED,
    "impose_beats_controls": FAILS,
    "better_in_better_out": UNDECIDED,
}
CORRECTED = REGISTERED | {
    "no_loss_picks_the_peak": UNDECIDED,
    "rl_heals_moderate": NOT_TESTED,
    "rl_cannot_early": UNDECIDED,
    "rl_cannot_late": NOT_TESTED,
    "reward_heals_alone": NOT_TESTED,
    "kl_makes_half": NOT_TESTED,
    "sigma_stable_rl": NOT_TESTED,
    "directions_turn_sft": HOLDS,
    "directions_turn_rl": NOT_TESTED,
    "same_profile": NOT_TESTED,
    "hidden_states_shift": HOLDS,
    "rl_moves_back": NOT_TESTED,
    "early_beats_late": UNDECIDED,
    "impose_undoes": NOT_TESTED,
    "top_beats_controls": UNDECIDED,
    "impose_beats_controls": NOT_TESTED,
}


@cache
def table(name):
    path = TABLES / name
    found = pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)
    return found.with_columns(pl.col("control_of").fill_null("")) if name == "cells.csv" else found


def choices():
    picked = table("selection.parquet").filter(pl.col("criterion") == "select_ood_accuracy")
    return [Choice(row["model"], row["seed"], row["checkpoint_step"], 480) for row in picked.to_dicts()]


def final():
    return table("recovery.parquet").filter(pl.col("update") == 24)


def rungs():
    study = SimpleNamespace(
        params=SimpleNamespace(ppo=SimpleNamespace(starts=STARTS)), summary=table("probe_summary.parquet")
    )
    cells = table("cells.csv").with_columns(ood_low=pl.lit(0.0), ood_high=pl.lit(0.0))
    repairs = Repairs(cells, pl.DataFrame())
    return {(c.model, c.seed): claims_restoration.repaired_starts(study, repairs, c) for c in choices()}


@cache
def readings():
    """The corrected reading of every claim, by key."""
    premise = premise_of(table("rl_training.parquet"))

    def of_model(model, seed):
        return premise(model, seed, "ppo", 480)

    found = [
        claims.readings(table("claims.csv"), choices()),
        claims_rl.readings(table("claims_rl.csv"), final(), choices(), STARTS, premise),
        claims_spectra.readings(table("claims_spectra.csv"), of_model),
        claims_restoration.readings(table("claims_restoration.csv"), table("cells.csv"), rungs(), of_model),
        claims_descriptive.readings(
            [
                *claims_descriptive.about_edits(table("cells.csv"), choices()),
                *claims_descriptive.about_rl(final(), choices(), STARTS, premise),
            ]
        ),
    ]
    return {row["claim"]: row for row in pl.concat(found).to_dicts()}


def numbers(key):
    row = readings()[key]
    return [round(100 * row[name], 1) for name in ("estimate", "low", "high")]


def test_registered_verdicts_are_what_they_were():
    found = {}
    for name in ("claims.csv", "claims_rl.csv", "claims_spectra.csv", "claims_restoration.csv"):
        for (claim,), rows in table(name).group_by("claim"):
            assert set(rows["pooled"]) == {pooled_verdict(rows["verdict"].to_list())}
            found[claim] = rows["pooled"][0]
    assert found == REGISTERED
    assert {key: row["registered"] for key, row in readings().items() if row["registered"]} == REGISTERED


def test_corrected_readings_are_those_of_the_log():
    found = {key: row["reading"] for key, row in readings().items()}
    descriptive = {
        "top_recovers_70": UNDECIDED,
        "first_quarter_recovers_70": FAILS,
        "rl_stays_below_peak": UNDECIDED,
        "rl_costs_id": NOT_TESTED,
    }
    assert found == CORRECTED | descriptive


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("ood_peaks_early_and_falls", [79.0, 64.1, 93.9]),
        ("id_keeps_rising", [12.7, 4.0, 21.5]),
        ("no_loss_picks_the_peak", [11.2, -0.8, 23.2]),
        ("top_recovers_most", [79.8, 66.9, 92.6]),
        ("values_recover_nothing", [2.2, -2.1, 6.6]),
        ("early_beats_late", [13.1, 2.8, 23.4]),
        ("early_beats_controls", [1.2, -0.7, 3.1]),
        ("sigma_stable_sft", [34.9, 22.5, 47.2]),
        ("directions_turn_sft", [12.2, 5.9, 18.5]),
        ("hidden_states_shift", [543.0, 337.5, 748.5]),
        ("first_quarter_recovers_70", [32.5, 21.8, 43.1]),
        ("rl_stays_below_peak", [-6.8, -14.8, 1.2]),
        ("rl_heals_moderate", [-3.3, -7.1, 0.4]),
        ("reward_heals_alone", [-20.4, -27.6, -13.2]),
    ],
)
def test_means_over_seeds(key, expected):
    assert numbers(key) == pytest.approx(expected, abs=0.051)


def test_the_interval_of_a_claim_is_students():
    estimates = table("claims_restoration.csv").filter(pl.col("claim") == "early_beats_late")["estimate"]
    low, high = ttest_1samp(estimates, 0.0).confidence_interval()
    row = readings()["early_beats_late"]
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
    assert row["p_holds"] == pytest.approx(4 * ttest_1samp(estimates, 0, alternative="greater").pvalue)
    assert "corrected p-value is 0.064" in row["reason"]


def rates(arm, start, seed):
    rows = table("rl_training.parquet").filter(
        (pl.col("arm") == arm) & (pl.col("checkpoint_step") == start) & (pl.col("seed") == seed)
    )
    return rows.sort("update")["solved_rate"].to_numpy()


def rise(arm, start, seed):
    own = rates(arm, start, seed)
    return own[-5:].mean() - own[:3].mean()


def test_no_rewarded_branch_from_step_40_on_raises_its_own_reward():
    rises = [rise(arm, start, seed) for arm in REWARDED for start in LATER for seed in SEEDS]
    assert len(rises) == 36
    assert sum(value > 0 for value in rises) == 0
    assert np.mean(rises) == pytest.approx(-0.111, abs=5e-4)
    assert max(rises) == pytest.approx(-0.002, abs=5e-4)


def test_what_the_check_of_the_manipulation_says_of_these_branches():
    later = [change for key, change in reward_changes(table("rl_training.parquet")) if key["checkpoint_step"] >= 40]
    assert len(later) == 36
    assert sum(change.solved.falls for change in later) == 28
    assert sum(change.solved.rises for change in later) == 0


def test_nor_its_greedy_id_accuracy():
    rows = final().filter(
        (pl.col("condition") == "id") & pl.col("arm").is_in(REWARDED) & pl.col("checkpoint_step").is_in(LATER)
    )
    assert len(rows) == 36
    assert rows["difference"].max() <= 0
    assert rows["difference"].mean() == pytest.approx(-0.100, abs=5e-4)
    assert len(rows.filter((pl.col("difference") < 0) & (pl.col("p_value") < 0.05))) == 26


def test_from_the_early_starts_the_reward_does_rise():
    counts = {arm: sum(rise(arm, start, seed) > 0 for start in (10, 12) for seed in SEEDS) for arm in REWARDED}
    assert counts == {"ppo": 5, "reward_only": 6, "reinforce": 6, "grpo": 1}


def test_the_premise_of_every_claim_about_rl():
    premise = premise_of(table("rl_training.parquet"))
    void = [premise("tiny", seed, arm, start) for arm in REWARDED for start in LATER for seed in SEEDS]
    assert all(void)
    assert [seed for seed in SEEDS if premise("tiny", seed, "ppo", 10)] == [0]
    assert not any(premise("tiny", seed, "ppo", 12) for seed in SEEDS)
    for key in ("rl_heals_moderate", "rl_cannot_late", "reward_heals_alone", "kl_makes_half"):
        assert WORSE in readings()[key]["reason"]


def test_early_starts_are_read_from_the_branches_that_learned():
    seeds = [0.617 - 0.716, 0.588 - 0.487, 0.657 - 0.0]
    row = readings()["rl_cannot_early"]
    assert row["estimate"] == pytest.approx(np.mean(seeds))
    assert (row["seeds"], row["of"]) == (3, 3)


def test_directions_and_the_step_of_their_norm():
    rows = leading(table("cells.csv"), "tiny")
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert [round(100 * row["ood_gain"], 1) for row in rows] == [3.8, 5.3, 4.6]
    assert [round(100 * row["id_cost"], 1) for row in rows] == [4.2, 6.2, 1.9]
    assert [round(row["share_of_way"], 3) for row in rows] == [0.797, 0.801, 0.797]
    assert rows[0]["at_equal_id"] == pytest.approx(0.039, abs=5e-4)
    assert rows[1]["at_equal_id"] is None
    assert rows[2]["at_equal_id"] == pytest.approx(-0.032, abs=5e-4)
    assert readings()["top_beats_controls"]["reason"].startswith("at equal ID: the step gives 4.6 points more OOD and")


def test_the_curve_of_steps_begins_at_sft_end_and_ends_at_the_base():
    curve = step_curve(table("cells.csv"), "tiny", 0)
    assert curve[0] == (0.0, pytest.approx(0.954), pytest.approx(0.146))
    assert curve[-1][1:] == (pytest.approx(0.726), pytest.approx(0.722))
    norms = [point[0] for point in curve]
    assert norms == sorted(norms)


@pytest.mark.parametrize(
    ("id_edit", "expected"), [(0.95, 0.40 - 0.15), (0.80, 0.40 - 0.40), (0.60, None), (0.99, None)]
)
def test_equal_id_is_read_linearly_between_near_doses(id_edit, expected):
    curve = [(0.0, 1.0 - 0.02, 0.09), (1.0, 0.90, 0.25), (2.0, 0.85, 0.35), (3.0, 0.75, 0.45), (4.0, 0.50, 0.90)]
    expected = None if expected is None else pytest.approx(expected)
    assert at_equal_id(curve, id_edit, 0.40) == expected


def test_an_edit_that_wins_in_both_is_no_trade_off():
    rows = pl.DataFrame({"ood_gain": [-0.02, -0.03], "id_cost": [0.01, 0.02]})
    assert trade_off(rows) == ""
    assert trade_off(rows.with_columns(id_cost=-pl.col("id_cost"))).startswith("at equal ID: the edit gives 2.5 points")
    assert trade_off(rows.clear()) == ""


def test_every_step_is_beside_its_edit():
    rows = steps(table("cells.csv"))
    assert rows["id_cost"].to_list() == pytest.approx((rows["id_edit"] - rows["id_step"]).to_list())
    assert len(rows) == 26


def test_the_best_repair_of_every_seed_breaks_its_budget():
    costs, kept, broken = [], 0, 0
    cells = table("cells.csv").filter(
        (pl.col("target") == "sft_end") & (pl.col("reference") != "rl") & (pl.col("group") != "control")
    )
    for seed in SEEDS:
        own = cells.filter(pl.col("seed") == seed)
        confirm = {row["cell_id"]: row for row in own.filter(pl.col("split") == "confirm").to_dicts()}
        select = [
            row
            for row in own.filter(pl.col("split") == "select").to_dicts()
            if row["cell_id"] in confirm and row["id_difference"] >= -0.05 - 1e-9
        ]
        best = max(select, key=lambda row: (row["ood_accuracy"], -row["change_norm"]))
        costs.append(confirm[best["cell_id"]]["id_difference"])
        kept += len(select)
        broken += sum(breaks_budget(confirm[row["cell_id"]], 0.05) for row in select)
    metrics = json.loads((REPORTS / "mini-confirm/metrics.json").read_text())["tiny"]
    assert costs == [metrics[f"seed{seed}"]["repair_best_id_change"] for seed in SEEDS] == [-0.101, -0.101, -0.054]
    assert (broken, kept) == (10, 26)


def test_the_whole_way_to_the_base_recovers_and_the_base_itself_solves_nothing():
    swaps = table("cells.csv").filter(
        (pl.col("operator") == "swap") & (pl.col("reference") == "base") & (pl.col("split") == "confirm")
    )
    assert swaps.sort("seed")["ood_accuracy"].to_list() == [0.722, 0.619, 0.659]
    assert swaps.sort("seed")["id_accuracy"].to_list() == [0.726, 0.67, 0.761]
    base = table("probe_summary.parquet").filter(pl.col("checkpoint_step") == 0)
    assert base["accuracy"].max() == 0


def test_better_in_better_out_is_a_rank_correlation():
    found = [spearmanr(rows["before"], rows["after"]).statistic for rows in rungs().values()]
    assert found == pytest.approx([0.2, 0.7, 0.9])
    row = readings()["better_in_better_out"]
    assert row["estimate"] == pytest.approx(0.6)
    assert 0.01 < row["p_holds"] < 0.2
    assert "permutation" in row["reason"]


def test_void_claims_of_the_edits_name_what_is_missing():
    for key in ("impose_undoes", "impose_beats_controls"):
        assert readings()[key]["reason"] == "RL gained nothing over SFT_End that could be undone"
        assert np.isnan(readings()[key]["p_holds"])


@pytest.mark.parametrize("name", ["mini", "mini-confirm"])
def test_a_committed_page_is_as_it_was_below_its_correction(name):
    verify(REPORTS / name)
    text = (REPORTS / name / "index.html").read_text(encoding="utf-8")
    start, end = text.index('<aside id="correction"'), text.index("</aside>\n") + len("</aside>\n")
    assert text[:start].endswith("<body>\n")
    assert "30 November 2026" in text[start:end]
    assert "not tested: the RL runs made the trained task worse" in text[start:end]
    made = {
        "mini": "1fc135c2300c34ec90ccb3cbad5bce7d39defffeccbbe69f747e4b186eddfc86",
        "mini-confirm": "131ccfff73f203005dc4477430183e25cb930c6da46eaef936f4aa7854a66f2e",
    }
    assert hashlib.sha256((text[:start] + text[end:]).encode()).hexdigest() == made[name]
