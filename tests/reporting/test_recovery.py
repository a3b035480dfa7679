"""The report's part on RL: figures, tables, sentences and verdicts, from made-up branches."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import vl_convert
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from rlheals.errors import UserError
from rlheals.publish import publish, verify
from rlheals.reporting import claims_rl, figures
from rlheals.reporting.branches import load_branches
from rlheals.reporting.claims import evaluate as evaluate_sft
from rlheals.reporting.premises import WORSE, premise_of
from rlheals.reporting.readings import NOT_TESTED, ONE_SEED
from rlheals.reporting.registered import FAILS, HOLDS, UNDECIDED
from rlheals.reporting.schemas import SCHEMAS, read_table, write_table
from rlheals.reporting.sections import recovery
from rlheals.reporting.tables import load_study
from rlheals.stages.common import Run
from rlheals.stages.report import report
from rlheals.stats import PairCounts, difference_from_counts
from tests.reporting.fabricate import GAINS, make_branches, make_params, make_project
from tests.reporting.test_site import Page

ARMS = ("ppo", "reward_only", "kl_only")
NAMES = {"recovery_curve", "recovery_gain", "rl_losses", "rl_training", "rl_advantages"}
CASES = {
    "one": ([0], ["tiny"], ("ppo",)),
    "seeds": ([0, 1, 2], ["tiny"], ARMS),
    "models": ([0], ["tiny", "other"], ("ppo",)),
}


def study_of(root, seeds=(0,), models=("tiny",), arms=ARMS, gains=GAINS, hands=300):
    params = make_params(list(seeds), list(models), arms=tuple(arms))
    make_project(root, params, hands)
    make_branches(root, params, gains)
    return load_study(params, root)


def verdicts(study):
    table = claims_rl.evaluate(study, load_branches(study))
    return {row["claim"]: row["verdict"] for row in table.to_dicts()}


@pytest.fixture(scope="module", params=list(CASES))
def study(request, tmp_path_factory):
    seeds, models, arms = CASES[request.param]
    return study_of(tmp_path_factory.mktemp("recovery"), seeds, models, arms, hands=120)


def charts(study):
    branches = load_branches(study)
    return {
        "recovery_curve": figures.recovery_curve(branches.final, branches.final_windows, study.summary, study.choices),
        "recovery_gain": figures.recovery_gain(branches.final),
        "rl_losses": figures.rl_losses(branches.losses, branches.last, branches.main),
        "rl_training": figures.rl_training(branches.training),
        "rl_advantages": figures.rl_advantages(
            branches.advantages, branches.training, branches.main, study.params.seeds[0]
        ),
    }


def test_every_figure_draws_its_words(study):
    drawn = charts(study)
    assert set(drawn) == NAMES
    for name, chart in drawn.items():
        spec = chart.to_dict()
        svg = vl_convert.vegalite_to_svg(spec)
        assert "NaN" not in svg, name
        assert "undefined" not in svg, name
        assert spec["title"]["text"] in svg
        if len(study.params.models) > 1:
            assert all(f"model {model}" in svg for model in study.params.models), name


def test_the_curve_shows_every_branch_with_its_interval(study):
    spec = json.dumps(charts(study)["recovery_curve"].to_dict())
    rows = load_branches(study).final.filter(pl.col("condition") == "ood").to_dicts()
    assert len(rows) == len(study.runs) * len(study.params.ppo.arms) * 5
    for row in rows:
        assert f'"value": {json.dumps(row["after"])}' in spec
        assert f'"low": {json.dumps(row["after_low"])}' in spec


def test_only_a_significant_window_is_drawn(study):
    branches = load_branches(study)
    assert (branches.final_windows["best_p_holm"] < 0.05).all()
    noisy = branches.final_windows.with_columns(best_p_holm=pl.lit(0.4))
    drawn, without = (
        json.dumps(figures.recovery_curve(branches.final, w, study.summary, study.choices).to_dict())
        for w in (branches.final_windows, noisy)
    )
    assert "recovery window" in drawn
    assert "recovery window" not in without


def test_a_report_with_branches_is_complete(tmp_path):
    params = make_params([0, 1], arms=ARMS)
    make_project(tmp_path, params, hands=120)
    make_branches(tmp_path, params)
    report(Run(params, "", 0, tmp_path))
    out = tmp_path / "reports/mini"
    manifest = verify(out)
    assert all(f"figures/{name}.{ending}" in manifest for name in NAMES for ending in ("svg", "png", "html"))
    for file, schema in (("recovery", "recovery"), ("rl_training", "rl_training"), ("doctor", "doctor")):
        assert len(read_table(out / f"tables/{file}.parquet", schema))
    page = Page((out / "index.html").read_text())
    assert {"recovery", "claims"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "Reinforcement learning" in page.text
    assert "no answer can be read" in page.text
    assert "object at 0x" not in page.text  # a dictionary's method where its entry was meant
    metrics = json.loads((out / "metrics.json").read_text())["tiny"]["seed0"]
    assert metrics["rl_best_start"] == 40
    rows = pl.read_parquet(out / "tables/recovery.parquet").filter(
        (pl.col("checkpoint_step") == 40)
        & (pl.col("arm") == "ppo")
        & (pl.col("update") == 24)
        & (pl.col("condition") == "ood")
        & (pl.col("seed") == 0)
    )
    assert metrics["rl_ood_gain_best"] == pytest.approx(rows["difference"][0], abs=1e-6)
    assert len(pl.read_csv(out / "tables/claims_rl.csv")) == 10


def test_a_report_without_branches_has_no_trace_of_them(tmp_path):
    params = make_params()
    make_project(tmp_path, params, hands=40)
    report(Run(params, "", 0, tmp_path))
    text = (tmp_path / "reports/mini/index.html").read_text()
    assert 'id="recovery"' not in text
    assert "Reinforcement learning" not in text
    assert load_branches(load_study(params, tmp_path)) is None


def test_claims_about_sft_do_not_depend_on_rl(tmp_path):
    """Two families: a frozen correction stays what it was."""
    params = make_params()
    make_project(tmp_path, params, hands=60)
    alone = evaluate_sft(load_study(params, tmp_path))
    make_branches(tmp_path, params)
    assert evaluate_sft(load_study(params, tmp_path)).equals(alone)


def test_undeclared_and_missing_branches_are_refused(tmp_path):
    params = make_params(arms=ARMS)
    make_project(tmp_path, params, hands=12)
    make_branches(tmp_path, params)
    for arms, arm in ((("ppo",), "kl_only"), ((*ARMS, "grpo"), "grpo")):
        with pytest.raises(UserError, match=f"disagree about arm {arm} from step"):
            load_branches(load_study(make_params(arms=arms), tmp_path))
    (tmp_path / "data/mini/probe_rl/tiny/0/recovery.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="is corrupted"):
        load_branches(load_study(params, tmp_path))


def test_the_expected_picture_holds_and_numbers_are_those_of_the_hands(tmp_path):
    study = study_of(tmp_path, hands=600)
    branches = load_branches(study)
    found = verdicts(study)
    assert found["rl_heals_moderate"] == HOLDS
    assert found["rl_cannot_early"] == HOLDS
    assert found["rl_cannot_late"] == HOLDS
    assert found["kl_makes_half"] == HOLDS

    def solved(table, cell):
        rows = table.filter(
            (pl.col("condition") == "ood")
            & (pl.col("split") == "confirm")
            & (pl.col("checkpoint_step") == 40)
            & (pl.col("cell_id") == cell)
            & (pl.col("attempt") == 1)
        )
        return dict(zip(rows["hand_id"], rows["solved"], strict=True))

    before = solved(study.answers, "")
    after, without = (solved(branches.answers, f"{arm}/24") for arm in ("ppo", "reward_only"))
    won = sum(after[hand] and not before[hand] for hand in before)
    lost = sum(before[hand] and not after[hand] for hand in before)
    table = claims_rl.evaluate(study, branches)
    rows = {row["claim"]: row for row in table.to_dicts()}
    heals = rows["rl_heals_moderate"]
    assert heals["estimate"] == pytest.approx((won - lost) / len(before))
    assert heals["p_value"] == pytest.approx(binomtest(won, won + lost).pvalue)
    share = rows["kl_makes_half"]
    gain = sum(after.values()) - sum(before.values())
    assert share["estimate"] == pytest.approx((sum(after.values()) - sum(without.values())) / gain)
    assert share["low"] < share["estimate"] < share["high"]
    b = sum(after[hand] and not without[hand] for hand in before)
    c = sum(without[hand] and not after[hand] for hand in before)
    assert share["p_value"] == pytest.approx(binomtest(b, b + c).pvalue)
    assert share["p_holm"] >= share["p_value"]
    assert len(table) == 5


def gains(**changes):
    return {arm: GAINS[arm] | changes.get(arm, {}) for arm in GAINS}


@pytest.mark.parametrize(
    ("changes", "claim", "verdict"),
    [
        ({"ppo": {40: -0.4}}, "rl_heals_moderate", FAILS),
        ({"ppo": {40: -0.4}}, "kl_makes_half", UNDECIDED),  # nothing gained, nothing to divide
        ({"ppo": {5: 0.6}}, "rl_cannot_early", FAILS),
        ({"ppo": {5: -0.4, 10: -0.4}}, "rl_cannot_early", HOLDS),
        ({"ppo": {320: 0.3}}, "rl_cannot_late", FAILS),
        ({"reward_only": {40: 0.5}}, "reward_heals_alone", HOLDS),
        ({"reward_only": {40: -0.3}}, "reward_heals_alone", FAILS),
        ({"reward_only": {40: 0.5}}, "kl_makes_half", FAILS),
    ],
)
def test_other_pictures_get_other_verdicts(tmp_path, changes, claim, verdict):
    assert verdicts(study_of(tmp_path, gains=gains(**changes)))[claim] == verdict


def test_few_hands_decide_nothing(tmp_path):
    found = verdicts(study_of(tmp_path, hands=20, gains=gains(ppo={40: 0.1})))
    assert found["rl_cannot_late"] == UNDECIDED, "no gain seen is not a gain excluded"
    assert found["rl_heals_moderate"] == UNDECIDED


def test_only_claims_whose_arms_exist_are_examined(tmp_path):
    study = study_of(tmp_path, arms=("ppo",), hands=40)
    assert [claim.key for claim in claims_rl.examined(study)] == [
        "rl_heals_moderate",
        "rl_cannot_early",
        "rl_cannot_late",
    ]
    assert len(verdicts(study)) == 3
    controls = study_of(tmp_path / "controls", arms=("kl_only",), hands=40)
    assert claims_rl.examined(controls) == []
    assert recovery.build(controls).findings[0].startswith("RL (KL, no reward, 24 updates)")


def test_a_study_without_such_a_start_is_undecided(tmp_path):
    study = study_of(tmp_path, hands=40)
    study.__dict__["choices"] = [choice.__class__("tiny", 0, 160, 320) for choice in study.choices]
    table = claims_rl.evaluate(study, load_branches(study))
    rows = {row["claim"]: row for row in table.to_dicts()}
    assert rows["rl_cannot_late"]["verdict"] == UNDECIDED
    assert rows["rl_cannot_late"]["note"] == "no start behind step 1600"


def test_every_rule_is_complete_text():
    assert set(claims_rl.ARMS) == {claim.key for claim in claims_rl.CLAIMS}
    for claim in claims_rl.CLAIMS:
        assert all([claim.statement, claim.estimand, claim.test, claim.holds_when, claim.fails_when, claim.source])
        assert not claim.estimand.endswith(".")


@given(*[st.integers(0, 60)] * 4)
def test_the_margin_test_inverts_the_interval(both, first, second, neither):
    counts = PairCounts(both, first, second, neither + 1)
    p = claims_rl.p_above(counts, 0.05)
    assert 0 <= p <= 1
    for alpha in (0.025, 0.1):
        high = difference_from_counts(counts, 1 - 2 * alpha).high
        if abs(high - 0.05) > 1e-9:
            assert (p < alpha) == (high < 0.05)


def test_the_margin_test_keeps_its_level():
    """With a true gain at the margin, a gain is excluded at most about as often as the level says."""
    rng = np.random.default_rng(4)
    draws = rng.multinomial(500, [0.3, 0.15, 0.10, 0.45], size=1500)
    # By the test above, p < 0.05 is the same as an upper end of the 90 % interval below the margin, and this is faster.
    rejected = np.mean([difference_from_counts(PairCounts(*map(int, draw)), 0.9).high < 0.05 for draw in draws])
    assert 0.03 < rejected < 0.07


def test_windows_are_told_as_they_are():
    row = dict.fromkeys(SCHEMAS["recovery_window"]) | {"found_share": 0.4, "best_step": 12, "best_difference": 0.01}
    row |= {"best_p_holm": 0.3, "opens_before_first": False, "closes_after_last": True}
    assert recovery._window_sentence(row) == "there is no recovery window: no start gains OOD accuracy"
    row |= {"opens": 20.4, "opens_low": 13.0, "opens_high": 31.0, "closes": 480.0, "closes_low": 90, "closes_high": 480}
    assert "within noise (corrected p 0.3; 40 % of the resamples have a window)" in recovery._window_sentence(row)
    told = recovery._window_sentence(row | {"best_p_holm": 0.001})
    assert "opens at step 20 [13, 31] and closes at or behind the last start, step 480 [90, 480]" in told


def test_quiet_findings_of_the_doctor_stay_in_the_table(tmp_path):
    study = study_of(tmp_path, arms=("ppo",), hands=20)
    branches = load_branches(study)
    shown = recovery._doctor(branches)
    assert [(row["checkpoint_step"], row["update"], row["times"]) for row in shown] == [(5, 3, 2)]
    folder = study.directory("probe_rl", "tiny", 0)
    tables = {path.name: pl.read_parquet(path) for path in folder.glob("*.parquet")}
    with publish(folder) as out:
        for name, table in tables.items():
            table.write_parquet(out / name)
        quiet = branches.doctor.with_columns(level=pl.lit("note"))
        write_table(quiet, "doctor", out / "doctor.parquet")
    again = load_study(study.params, study.root)
    assert recovery.build(again).context["findings"] == []


def readings(study, training=None):
    branches = load_branches(study)
    premise = premise_of(branches.training if training is None else training(branches.training))
    table = claims_rl.evaluate(study, branches)
    found = claims_rl.readings(table, branches.final, study.choices, study.params.ppo.starts, premise)
    return {row["claim"]: row for row in found.to_dicts()}


def falling(training):
    """The same branches with a share of solved hands that falls."""
    return training.with_columns(solved_rate=1 - pl.col("solved_rate"))


def test_seeds_decide_where_rl_raised_its_reward(tmp_path):
    study = study_of(tmp_path, seeds=(0, 1, 2))
    found = readings(study)
    table = claims_rl.evaluate(study, load_branches(study))
    heals = table.filter(pl.col("claim") == "rl_heals_moderate")
    row = found["rl_heals_moderate"]
    assert (row["seeds"], row["of"], row["registered"]) == (3, 3, heals["pooled"][0])
    assert row["estimate"] == pytest.approx(heals["estimate"].mean())
    low, high = ttest_1samp(heals["estimate"], 0.0).confidence_interval()
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
    late = table.filter(pl.col("claim") == "rl_cannot_late")["estimate"]
    assert found["rl_cannot_late"]["estimate"] == pytest.approx(late.mean())


def test_rl_that_made_its_task_worse_tests_nothing(tmp_path):
    study = study_of(tmp_path, seeds=(0, 1, 2), hands=120)
    for row in readings(study, falling).values():
        assert (row["reading"], row["reason"], row["seeds"]) == (NOT_TESTED, WORSE, 0), row["claim"]


def test_a_claim_about_two_arms_needs_both(tmp_path):
    study = study_of(tmp_path, seeds=(0, 1, 2), hands=120)
    bad = pl.col("arm") == "reward_only"
    rate = pl.when(bad).then(1 - pl.col("solved_rate")).otherwise("solved_rate")
    found = readings(study, lambda training: training.with_columns(solved_rate=rate))
    assert found["kl_makes_half"]["reading"] == NOT_TESTED
    assert found["rl_heals_moderate"]["reading"] != NOT_TESTED


def test_one_seed_of_rl_gives_no_verdict(tmp_path):
    found = readings(study_of(tmp_path, hands=120))
    assert {row["reading"] for row in found.values()} == {ONE_SEED}


def test_starts_where_rl_did_not_learn_are_left_out(tmp_path):
    study = study_of(tmp_path, seeds=(0, 1, 2), hands=120)
    branches = load_branches(study)
    late = claims_rl.late_starts(study.params.ppo.starts, study.choices[0])
    bad = pl.col("checkpoint_step") == late[0]
    rate = pl.when(bad).then(1 - pl.col("solved_rate")).otherwise("solved_rate")
    found = readings(study, lambda training: training.with_columns(solved_rate=rate))["rl_cannot_late"]
    rows = branches.final.filter(
        (pl.col("arm") == "ppo") & (pl.col("condition") == "ood") & pl.col("checkpoint_step").is_in(late[1:])
    )
    assert len(late) == 2
    assert found["estimate"] == pytest.approx(rows["difference"].mean())
    assert found["seeds"] == 3
