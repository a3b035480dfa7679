"""Claims: rules as data, evidence against independent arithmetic, and all three verdicts."""

from __future__ import annotations

import polars as pl
import pytest
from scipy.stats import binomtest, ttest_1samp

from rlheals.errors import UserError
from rlheals.reporting.claims import CLAIMS, Evidence, evaluate, readings
from rlheals.reporting.registered import FAILS, HOLDS, UNDECIDED, pooled_verdict, verdict
from rlheals.reporting.tables import load_study
from tests.reporting.fabricate import LADDER, make_params, make_project

FLAT = {step: (rates[0], rates[1], min(rates[2], 0.9) if step <= 10 else 0.88, 0.8) for step, rates in LADDER.items()}
LATE = LADDER | {10: (0.8, 0.7, 0.5, 0.5), 160: (0.9, 0.5, 0.9, 0.9), 320: (0.9, 0.4, 0.1, 0.1)}
FALLING_ID = {step: (1 - step / 1000 if step else 0.0, *rates[1:]) for step, rates in LADDER.items()}


def study_of(root, seeds=(0,), hands=200, ladder=LADDER):
    params = make_params(list(seeds))
    make_project(root, params, hands, ladder)
    return load_study(params, root)


def verdicts(study):
    return {row["claim"]: row["verdict"] for row in evaluate(study).to_dicts()}


def test_forgetting_holds_and_numbers_are_those_of_the_hands(tmp_path):
    study = study_of(tmp_path, hands=500)
    table = evaluate(study)
    assert verdicts(study) == dict.fromkeys((claim.key for claim in CLAIMS), HOLDS)

    def solved(condition, step):
        rows = study.answers.filter(
            (pl.col("condition") == condition)
            & (pl.col("split") == "confirm")
            & (pl.col("checkpoint_step") == step)
            & (pl.col("attempt") == 1)
        )
        return dict(zip(rows["hand_id"], rows["solved"], strict=True))

    fall = table.row(0, named=True)
    peak, end = solved("ood", 10), solved("ood", 320)
    assert fall["estimate"] == pytest.approx(1 - sum(end.values()) / sum(peak.values()))
    rise = table.row(1, named=True)
    peak, end = solved("id", 10), solved("id", 320)
    gained = sum(end[hand] and not peak[hand] for hand in peak)
    lost = sum(peak[hand] and not end[hand] for hand in peak)
    assert rise["estimate"] == pytest.approx((gained - lost) / len(peak))
    assert rise["p_value"] == pytest.approx(binomtest(gained, gained + lost).pvalue)


def test_no_fall_and_no_regret_do_not_hold(tmp_path):
    found = verdicts(study_of(tmp_path, ladder=FLAT))
    assert found["ood_peaks_early_and_falls"] == FAILS


def test_a_late_peak_is_not_an_early_one(tmp_path):
    study = study_of(tmp_path, ladder=LATE)
    row = evaluate(study).row(0, named=True)
    assert row["estimate"] > 0.5
    assert row["verdict"] == FAILS
    assert "not an early peak" in row["note"]


def test_falling_id_accuracy_does_not_keep_rising(tmp_path):
    found = verdicts(study_of(tmp_path, ladder=FALLING_ID))
    assert found["id_keeps_rising"] == FAILS


def test_few_hands_leave_small_effects_undecided(tmp_path):
    ladder = LADDER | {320: (0.88, 0.5, 0.05, 0.05)}
    found = verdicts(study_of(tmp_path, hands=16, ladder=ladder))
    assert found["id_keeps_rising"] == UNDECIDED


def test_dead_model_is_decided_without_dividing_by_zero(tmp_path):
    dead = dict.fromkeys(LADDER, (0.0, 0.0, 0.0, 0.0))
    table = evaluate(study_of(tmp_path, hands=12, ladder=dead))
    assert HOLDS not in set(table["verdict"])
    assert table.row(0, named=True)["p_value"] == 1.0


def test_a_loss_that_picks_the_peak_refutes_the_claim(tmp_path):
    study = study_of(tmp_path)
    right = pl.col("criterion") == "ood_loss"
    study.__dict__["selection"] = study.selection.with_columns(
        checkpoint_step=pl.when(right).then(10).otherwise("checkpoint_step"),
        regret=pl.when(right).then(0.0).otherwise("regret"),
    )
    assert verdicts(study)["no_loss_picks_the_peak"] == FAILS


def test_selection_table_must_name_every_loss(tmp_path):
    study = study_of(tmp_path, hands=12)
    study.__dict__["selection"] = study.selection.filter(pl.col("criterion") != "ood_loss")
    with pytest.raises(UserError, match="does not have one row for each"):
        evaluate(study)


def test_holm_runs_over_all_claims_and_seeds(tmp_path):
    table = evaluate(study_of(tmp_path, seeds=(0, 1, 2), hands=60))
    assert len(table) == 9
    largest = table.sort("p_value", descending=True).row(0, named=True)
    smallest = table.sort("p_value").row(0, named=True)
    assert largest["p_holm"] == pytest.approx(max(largest["p_value"], table["p_holm"].max()))
    assert smallest["p_holm"] == pytest.approx(min(1.0, 9 * smallest["p_value"]))


@pytest.mark.parametrize(
    ("supports", "refutes", "p", "expected"),
    [
        (True, False, 0.01, HOLDS),
        (True, False, 0.2, UNDECIDED),
        (False, False, 0.001, UNDECIDED),
        (False, True, 0.001, FAILS),
        (True, True, 0.001, FAILS),
    ],
)
def test_verdict_rule(supports, refutes, p, expected):
    assert verdict(Evidence(0.1, 0.0, 0.2, p, supports, refutes, ""), p) == expected


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, UNDECIDED], UNDECIDED),
        ([HOLDS, FAILS], FAILS),
        ([UNDECIDED, FAILS], FAILS),
        ([], UNDECIDED),
    ],
)
def test_pooled_rule(seeds, expected):
    assert pooled_verdict(seeds) == expected


def test_every_rule_is_complete_text():
    for claim in CLAIMS:
        assert all([claim.statement, claim.estimand, claim.test, claim.holds_when, claim.fails_when, claim.source])


def reading_of(root, claim, **more):
    study = study_of(root, seeds=(0, 1, 2), **more)
    table = evaluate(study)
    rows = readings(table, study.choices).filter(pl.col("claim") == claim)
    return rows.row(0, named=True), table.filter(pl.col("claim") == claim)


def test_the_corrected_reading_is_about_the_mean_over_seeds(tmp_path):
    row, table = reading_of(tmp_path, "ood_peaks_early_and_falls", hands=500)
    low, high = ttest_1samp(table["estimate"], 0.0).confidence_interval()
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
    assert (row["reading"], row["registered"], row["seeds"]) == (HOLDS, HOLDS, 3)


def test_a_late_peak_leaves_the_reading_open(tmp_path):
    row, table = reading_of(tmp_path, "ood_peaks_early_and_falls", ladder=LATE)
    assert (row["reading"], row["registered"]) == (UNDECIDED, FAILS)
    late = table.filter(pl.col("note").str.contains("not an early peak"))["seed"].to_list()
    assert len(late) == 2
    assert row["reason"] == f"the OOD peak is not an early one in seeds {late[0]} and {late[1]}"
    assert row["low"] > 0.5
