"""The corrected reading: each verdict by hand, and how often it is wrong beside the rule registered first."""

from __future__ import annotations

from math import nan

import numpy as np
import polars as pl
import pytest
from scipy.stats import ttest_1samp

from rlheals.reporting.claims import Evidence
from rlheals.reporting.readings import (
    NOT_TESTED,
    ONE_SEED,
    SCHEMA,
    Question,
    Rule,
    SeedValue,
    questions,
    read,
    voided,
)
from rlheals.reporting.registered import FAILS, HOLDS, UNDECIDED, pooled_verdict, verdict

HANDS_ERROR = 0.0158
"""Standard error of a paired difference on 1,000 hands of which a quarter is discordant."""
SEED_SPREAD = 0.05
STUDIES = 600
PLAIN = Rule()


def ask(values, rule=PLAIN, claim="c", **more):
    seeds = tuple(SeedValue(seed, value, value - 0.03, value + 0.03) for seed, value in enumerate(values))
    return Question(claim, "tiny", rule, seeds, **more)


def one(question):
    return read([question]).row(0, named=True)


def registered(estimates):
    """The verdict of the registered rule over these seeds, each with its own interval of hands."""
    found = []
    for value in estimates:
        low, high = value - 1.96 * HANDS_ERROR, value + 1.96 * HANDS_ERROR
        evidence = Evidence(value, low, high, 1.0 if low <= 0 <= high else 0.01, value > 0, high <= 0, "")
        found.append(verdict(evidence, evidence.p_value))
    return pooled_verdict(found)


def simulated(mean, seeds, rule=PLAIN):
    """Shares of verdicts over studies: of the registered rule, and of the corrected one."""
    rng = np.random.default_rng(seeds)
    drawn = mean + rng.normal(0, np.hypot(SEED_SPREAD, HANDS_ERROR), size=(STUDIES, seeds))
    old = [registered(row) for row in drawn.tolist()]
    new = [one(ask(row, rule))["reading"] for row in drawn.tolist()]
    return [{name: found.count(name) / STUDIES for name in (HOLDS, FAILS)} for found in (old, new)]


@pytest.mark.parametrize(("seeds", "expected"), [(3, 0.62), (5, 0.80), (10, 0.96)])
def test_no_effect_is_no_verdict_in_all_but_a_few_studies(seeds, expected):
    old, new = simulated(0.0, seeds)
    assert old[FAILS] == pytest.approx(expected, abs=0.05)
    assert new[FAILS] + new[HOLDS] <= 0.05 + 0.02  # the second is two standard errors of 600 studies
    assert new[HOLDS] <= 0.045


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_an_effect_that_matters_is_seldom_called_none(seeds):
    _, new = simulated(0.05, seeds, Rule(1, 0.0, 0.05))
    assert new[FAILS] <= 0.045


def test_enough_seeds_can_tell_that_there_is_no_effect_that_matters():
    _, new = simulated(0.0, 20, Rule(1, 0.0, 0.05))
    assert new[FAILS] > 0.8
    assert new[HOLDS] <= 0.045


@pytest.mark.parametrize(
    ("values", "rule", "expected"),
    [
        ([0.10, 0.12, 0.11], Rule(), HOLDS),
        ([-0.10, -0.12, -0.11], Rule(), FAILS),
        ([-0.05, 0.02, 0.05], Rule(), UNDECIDED),
        ([0.01, 0.012, 0.008], Rule(1, 0.0, 0.05), HOLDS),  # it is there, however small
        ([-0.001, 0.002, 0.001], Rule(1, 0.0, 0.05), FAILS),  # an effect that matters is excluded
        ([-0.001, 0.002, 0.001], Rule(), UNDECIDED),  # without a margin nothing is excluded
        ([0.02, 0.01, 0.03], Rule(-1, 0.05, 0.0), HOLDS),  # "gains less than 5 points"
        ([0.20, 0.21, 0.19], Rule(-1, 0.05, 0.0), FAILS),
    ],
)
def test_verdicts_over_seeds(values, rule, expected):
    assert one(ask(values, rule))["reading"] == expected


def test_numbers_are_those_of_the_t_test():
    values = [0.05, 0.09, 0.02, 0.11]
    row = one(ask(values))
    low, high = ttest_1samp(values, 0.0).confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert row["p_holds"] == pytest.approx(ttest_1samp(values, 0.0, alternative="greater").pvalue)


def test_holm_corrects_both_sides_over_what_is_tested():
    table = read([ask([0.10, 0.14, 0.07], claim=f"c{i}") for i in range(4)] + [ask([0.1], claim="one")])
    single = one(ask([0.10, 0.14, 0.07]))
    assert table["p_holds"].to_list()[:4] == pytest.approx([4 * single["p_holds"]] * 4)
    refuted = read([ask([-0.10, -0.14, -0.07], claim=f"c{i}") for i in range(4)])
    assert refuted["p_fails"].to_list() == pytest.approx([4 * single["p_holds"]] * 4)
    assert single["reading"] == HOLDS
    assert table["reading"][0] == UNDECIDED
    assert "excludes 0, but the corrected p-value is 0.0" in table["reason"][0]
    assert np.isnan(table["p_holds"][4])


def test_one_seed_shows_its_own_interval_and_no_verdict():
    row = one(ask([0.4]))
    assert (row["reading"], row["low"], row["high"]) == (ONE_SEED, pytest.approx(0.37), pytest.approx(0.43))
    assert "one seed: no verdict over seeds" in row["reason"]


def test_a_failed_premise_is_no_test():
    asked = voided(ask([0.4, 0.4, 0.41]), lambda seed: "the task got worse")
    row = one(asked)
    assert (row["reading"], row["reason"], row["seeds"], row["of"]) == (NOT_TESTED, "the task got worse", 0, 3)
    assert row["estimate"] == pytest.approx(np.mean([0.4, 0.4, 0.41]))


def test_one_sound_seed_of_three_is_no_test_and_two_are():
    few = voided(ask([0.4, 0.4, 0.41]), lambda seed: "worse" if seed else "")
    row = one(few)
    assert (row["reading"], row["reason"]) == (NOT_TESTED, "worse (seeds 1 and 2)")
    assert (row["low"], row["high"]) == (pytest.approx(0.37), pytest.approx(0.43))
    most = voided(ask([0.40, 0.41, 0.9]), lambda seed: "worse" if seed == 2 else "")
    row = one(most)
    assert (row["reading"], row["seeds"]) == (HOLDS, 2)
    assert row["estimate"] == pytest.approx(0.405)
    assert "2 of 3 seeds count, as worse (seed 2)" in row["reason"]


def test_a_limit_keeps_the_verdict_open():
    row = one(ask([0.4, 0.4, 0.41], limit="at equal ID: nobody knows"))
    assert (row["reading"], row["reason"]) == (UNDECIDED, "at equal ID: nobody knows")


def test_a_test_of_its_own_takes_the_place_of_the_t_test():
    row = one(ask([0.4, 0.4, 0.41], p_holds=0.2, remark="by permutation"))
    assert (row["reading"], row["p_holds"]) == (UNDECIDED, 0.2)
    assert row["reason"].endswith("by permutation")


def test_questions_come_from_a_table_and_a_seed_without_an_estimate_is_void():
    rows = [
        {"claim": "c", "model": "tiny", "seed": seed, "estimate": value, "low": 0.0, "high": 0.0}
        | {"note": "no gain to divide", "pooled": UNDECIDED}
        for seed, value in enumerate([0.1, nan])
    ]
    (question,) = questions(pl.DataFrame(rows), {"c": Rule(), "other": Rule()})
    assert [value.void for value in question.values] == ["", "no gain to divide"]
    assert question.registered == UNDECIDED


def test_an_effect_that_matters_on_the_wrong_side_is_refused():
    with pytest.raises(ValueError, match="claimed side"):
        Rule(1, 0.0, -0.1)


def test_an_empty_family_has_the_columns():
    assert read([]).schema == pl.Schema(SCHEMA)
