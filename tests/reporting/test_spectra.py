"""The report's part on weights: figures, tables, sentences and verdicts, from made-up spectra."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import vl_convert
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlheals.errors import UserError
from rlheals.publish import verify
from rlheals.reporting import claims_spectra
from rlheals.reporting.claims import evaluate as evaluate_sft
from rlheals.reporting.drift import (
    BEYOND,
    RL,
    SFT,
    against_noise,
    angles,
    drops_zeros,
    load_drift,
    pair_label,
    with_ladder,
)
from rlheals.reporting.figures.drift_map import drift_ladder, drift_map, ladder_rows
from rlheals.reporting.figures.gauge import function_drift, gauge_drift
from rlheals.reporting.figures.spectra import angle_curves, default_matrices, has_angle_curves, singular_values
from rlheals.reporting.registered import FAILS, HOLDS, UNDECIDED
from rlheals.reporting.schemas import SCHEMAS
from rlheals.reporting.sections import claims as claims_section
from rlheals.reporting.sections import spectra as section
from rlheals.reporting.tables import Choice, load_study
from rlheals.stages.common import Run
from rlheals.stages.report import report
from tests.reporting.fabricate import make_params, make_project
from tests.reporting.fabricate_spectra import PAIRS, Picture, make_drift, make_spectra
from tests.reporting.test_site import Page

RUNS = {
    "one": (("tiny", 0),),
    "seeds": (("tiny", 0), ("tiny", 1)),
    "models": (("tiny", 0), ("other", 0)),
    "diagnose": (("", 0),),
}
CHOICES = [Choice("tiny", 0, 10, 320)]


FIGURES = {
    "singular_values": singular_values,
    "angle_curves": angle_curves,
    "drift_map": drift_map,
    "drift_ladder_angle": lambda drift: drift_ladder(drift, "angle"),
    "drift_ladder_sigma_change_norm": lambda drift: drift_ladder(drift, "sigma_change_norm"),
    "gauge_drift": gauge_drift,
    "function_drift": function_drift,
}
# Drawing takes most of the time here; what differs between several runs and one is shared by all figures.
DRAWN = {
    "one": list(FIGURES),
    "seeds": ["drift_map", "drift_ladder_angle"],
    "models": ["gauge_drift"],
    "diagnose": ["function_drift"],
}


@pytest.mark.parametrize(("runs", "name"), [(runs, name) for runs, names in DRAWN.items() for name in names])
def test_every_figure_draws_its_words(runs, name):
    drift = make_drift(Picture(layers=2 if runs == "one" else 1), RUNS[runs])
    spec = FIGURES[name](drift).to_dict()
    svg = vl_convert.vegalite_to_svg(spec)
    assert "NaN" not in svg
    assert "undefined" not in svg
    assert spec["title"]["text"] in svg
    if runs == "models":
        assert all(f"model {model}" in svg for model in ("tiny", "other"))
    if runs == "diagnose":
        assert "model ;" not in svg
        assert "seed" not in " ".join(spec["title"]["subtitle"])


@pytest.mark.parametrize("name", ["singular_values", "drift_map", "drift_ladder_angle", "gauge_drift"])
def test_figures_do_without_null_bands(name):
    svg = vl_convert.vegalite_to_svg(FIGURES[name](make_drift(Picture(noise=False, layers=1))).to_dict())
    assert "NaN" not in svg
    assert "angle against" not in svg


def test_angles_that_are_zero_by_definition_are_never_shown():
    drift = make_drift()
    rows = angles(drift, "angle")
    assert (rows["k"] < rows["dimension"]).all()
    every = {"ks": pl.col("quantity") == "angle", "full": pl.col("k") == 32}
    full = drift.spectra.filter(every["ks"] & every["full"] & (pl.col("module") == "k_proj"))
    only = replace(drift, spectra=full)
    left = angles(only, "angle").filter(pl.col("side") == "left")
    assert left.is_empty(), "all 32 left vectors of a 32 x 64 matrix span the whole space"
    shown = drops_zeros(angles(only, "angle"))
    assert len(shown)
    assert (shown["value"] > 0).all()
    square = replace(drift, spectra=drift.spectra.filter(every["ks"] & (pl.col("k") == 64)))
    assert not has_angle_curves(square)
    assert "angle_curves" not in section.figures(square)


def test_two_k_spaces_must_meet():
    """48 of 64 dimensions twice share 32, whatever the matrices: those angles say nothing."""
    drift = make_drift()
    rows = drift.spectra.filter((pl.col("quantity") == "angle") & (pl.col("module") == "q_proj") & (pl.col("k") == 16))
    wide = replace(drift, spectra=rows.with_columns(k=pl.lit(40, pl.Int64)))
    assert drops_zeros(angles(wide, "angle"))["index"].min() == 16 or drops_zeros(angles(wide, "angle")).is_empty()
    narrow = drops_zeros(angles(replace(drift, spectra=rows), "angle"))
    assert narrow["index"].min() == 0


def test_the_measured_k_closest_to_a_fifth_is_shown():
    drift = make_drift()
    rows = drift.spectra.filter(pl.col("quantity") == "angle_mean")
    more = pl.concat([rows, rows.filter(pl.col("k") == 16).with_columns(k=pl.lit(13, pl.Int64), value=pl.lit(9.0))])
    found = angles(replace(drift, spectra=more), "angle_mean", [SFT]).filter(pl.col("module") == "q_proj")
    assert set(found["k"]) == {13}
    assert set(found["value"]) == {9.0}


def test_curves_show_the_numbers_of_the_table():
    drift = make_drift()
    spec = json.dumps(singular_values(drift).to_dict())
    rows = drift.spectra.filter(
        (pl.col("quantity") == "sigma_change")
        & pl.col("pair").is_in([SFT, RL])
        & (pl.col("layer") == 0)
        & pl.col("module").is_in(["q_proj", "k_proj", "v_proj"])
    )
    assert len(rows) == 2 * (64 + 32 + 32)
    assert all(f'"value": {json.dumps(value)}' in spec for value in rows["value"])
    shown = json.dumps(angle_curves(drift).to_dict())
    one = angles(drift, "angle", [SFT]).filter(pl.col("layer") == 0)["value"][3]
    assert json.dumps(float(np.degrees(one)))[:12] in shown


def test_default_matrices_are_those_of_the_paper_or_the_first():
    drift = make_drift()
    assert default_matrices(drift) == [(0, "q_proj"), (0, "k_proj"), (0, "v_proj")]
    other = replace(drift, verdicts=drift.verdicts.filter(pl.col("module").is_in(["up_proj", "down_proj"])))
    assert default_matrices(other) == [(0, "up_proj"), (0, "down_proj")]
    head = drift.verdicts.with_columns(layer=pl.lit(-1, pl.Int64), module=pl.lit("lm_head"))
    assert default_matrices(replace(drift, verdicts=head)) == [(-1, "lm_head")]


def test_the_map_marks_verdicts_and_disagreeing_seeds():
    calm, turned = Picture(verdicts={"q_proj": "unchanged"}), Picture()
    drift = make_drift(calm, RUNS["one"])
    spec = json.dumps(drift_map(drift).to_dict(), ensure_ascii=False)
    assert all(f'"mark": "{mark}"' in spec for mark in ("=", "S", "·", "▲"))
    other = make_drift(turned, (("tiny", 1),))
    both = replace(
        drift,
        verdicts=pl.concat([drift.verdicts, other.verdicts]),
        spectra=pl.concat([drift.spectra, other.spectra]),
    )
    assert '"mark": "?"' in json.dumps(drift_map(both).to_dict())


def test_unchanged_matrices_have_no_shade_and_break_nothing():
    drift = make_drift()
    still = drift.verdicts.with_columns(relative_change=pl.lit(0.0), verdict=pl.lit("unchanged"))
    svg = vl_convert.vegalite_to_svg(drift_map(replace(drift, verdicts=still)).to_dict())
    assert "NaN" not in svg


def test_a_long_ladder_of_models_shows_its_last_maps():
    pairs = tuple(f"base → step-{i}" for i in range(9))
    drift = make_drift(runs=RUNS["diagnose"], pairs=PAIRS[:1])
    verdicts = pl.concat([drift.verdicts.with_columns(pair=pl.lit(pair)) for pair in pairs])
    svg = vl_convert.vegalite_to_svg(drift_map(replace(drift, verdicts=verdicts)).to_dict())
    assert [f"step-{i}" in svg for i in range(9)] == [False] * 3 + [True] * 6
    assert replace(drift, verdicts=verdicts).shown == [pairs[0], pairs[-1]]


def test_several_checkpoints_of_a_diagnosis_make_a_ladder():
    pairs = ("base → checkpoint-5", "base → checkpoint-40")
    one = make_drift(Picture(layers=1), RUNS["diagnose"], "", PAIRS[:1])
    renamed = [one.spectra.with_columns(pair=pl.lit(pair)) for pair in pairs]
    verdicts = [one.verdicts.with_columns(pair=pl.lit(pair)) for pair in pairs]
    drift = replace(one, spectra=pl.concat(renamed), verdicts=pl.concat(verdicts), ladder=one.ladder.clear())
    assert set(ladder_rows(with_ladder(drift), "angle")["checkpoint_step"]) == {5, 40}
    text = json.dumps(drift_ladder(with_ladder(drift), "angle").to_dict())
    assert "Along the checkpoints" in text
    assert "SFT" not in text
    assert with_ladder(replace(drift, verdicts=verdicts[0], spectra=renamed[0])).ladder.is_empty()
    study = make_drift(Picture(layers=1))
    assert with_ladder(study) is study


def test_ladder_rows_are_degrees_of_both_sides_after_step_zero():
    drift = make_drift()
    rows = ladder_rows(drift, "angle")
    assert rows["checkpoint_step"].min() == 5
    raw = drift.ladder.filter(
        (pl.col("quantity") == "angle_mean")
        & (pl.col("checkpoint_step") == 320)
        & (pl.col("layer") == 1)
        & (pl.col("module") == "q_proj")
        & (pl.col("k") == 16)
    )
    one = rows.filter((pl.col("checkpoint_step") == 320) & (pl.col("layer") == 1) & (pl.col("module") == "q_proj"))
    assert len(raw) == 2
    assert one["value"][0] == pytest.approx(np.degrees(raw["value"].mean()))


def test_the_distance_of_hidden_states_has_its_band_the_right_way_round():
    drift = make_drift()
    spec = function_drift(drift).to_dict()
    rows = [row for row in json.dumps(spec).split("{") if '"quantity": "cka"' in row]
    assert rows
    for row in rows:
        low, high = (float(re.search(rf'"noise_{end}": ([-\d.e]+)', row)[1]) for end in ("low", "high"))
        assert low == pytest.approx(0.001)
        assert high == pytest.approx(0.009)


def test_sections_leave_out_what_was_not_measured():
    drift = make_drift(Picture(layers=1))
    empty = {name: pl.DataFrame(schema=SCHEMAS[name]) for name in ("gauge", "function_drift", "spectra_ladder")}
    bare = replace(drift, gauge=empty["gauge"], function=empty["function_drift"], ladder=empty["spectra_ladder"])
    assert set(section.figures(bare)) == {"drift_map", "singular_values", "angle_curves"}


def test_a_report_with_spectra_is_complete(tmp_path):
    params = make_params()
    make_project(tmp_path, params, hands=40)
    study = load_study(params, tmp_path)
    assert section.build(study) is None, "the stage has not run"
    alone = claims_section.build(study)
    assert [family["title"] for family in alone.context["families"]] == ["Supervised fine-tuning"]
    make_spectra(tmp_path, params, Picture(layers=2))
    assert evaluate_sft(load_study(params, tmp_path)).equals(alone.tables["claims.csv"])
    report(Run(params, "", 0, tmp_path))
    out = tmp_path / "reports/mini"
    manifest = verify(out)
    for name in FIGURES:
        assert all(f"figures/{name}.{ending}" in manifest for ending in ("svg", "png", "html")), name
    page = Page((out / "index.html").read_text())
    assert {"spectra", "claims", "figure-drift_map"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "SFT_MaxOOD → SFT_End: 14 of 14 matrices changed other than by noise" in page.text
    sft, weights = page.text.split("Weights and hidden states")[:2]
    assert "Holm's method over the 3 tests of this table; intervals are 95 % and uncorrected" in sft
    assert "without a p-value" not in sft
    assert "Holm's method over the 4 tests of this table; their intervals are 95 % and uncorrected" in weights
    assert "the range of the middle 95 % of the measured values" in weights
    table = pl.read_csv(out / "tables/claims_spectra.csv")
    assert len(table) == len(claims_spectra.CLAIMS)
    verdicts = pl.read_csv(out / "tables/spectra_verdicts.csv")
    assert len(verdicts) == 6 * 14
    summary = pl.read_csv(out / "tables/spectra_summary.csv")
    assert {"angle_mean", "sigma_change_norm", "energy_change"} <= set(summary["quantity"])
    assert sum(path.stat().st_size for path in out.glob("tables/*spectra*")) < 500_000
    metrics = json.loads((out / "metrics.json").read_text())["tiny"]["seed0"]
    assert metrics["sft_matrices_turned"] == 14
    assert metrics["rl_matrices_turned"] == 0


def test_damaged_or_missing_runs_are_refused(tmp_path):
    params = make_params([0, 1])
    make_project(tmp_path, params, hands=12)
    make_spectra(tmp_path, make_params([0]), Picture(layers=1))
    with pytest.raises(UserError, match=r"spectra/tiny/1 is missing"):
        load_drift(load_study(params, tmp_path))
    make_spectra(tmp_path, params, Picture(layers=1))
    (tmp_path / "data/mini/spectra/tiny/0/gauge.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="is corrupted"):
        load_drift(load_study(params, tmp_path))


class Study:
    """As much of a study as the claims need."""

    choices = CHOICES


def verdicts(picture):
    table = claims_spectra.evaluate(Study(), make_drift(picture, pairs=(SFT, RL, BEYOND)))
    return {row["claim"]: row["verdict"] for row in table.to_dicts()}


def test_the_picture_as_made():
    assert verdicts(Picture()) == {
        "sigma_stable_sft": HOLDS,
        "sigma_stable_rl": HOLDS,
        "directions_turn_sft": HOLDS,
        "directions_turn_rl": HOLDS,
        "energy_preserved": HOLDS,
        "no_extremes": HOLDS,
        "same_profile": FAILS,  # RL turns ten times less
        "hidden_states_shift": HOLDS,
        "rl_moves_back": HOLDS,
        "rotation_is_gauge": FAILS,
    }


@pytest.mark.parametrize(
    ("changes", "claim", "verdict"),
    [
        ({"sigma": 2.0}, "sigma_stable_sft", FAILS),
        ({"sigma": 2.0}, "sigma_stable_rl", FAILS),
        ({"angle": 0.5}, "directions_turn_sft", FAILS),
        ({"angle": 0.5}, "directions_turn_rl", FAILS),
        ({"rl_angle": 0.1}, "directions_turn_rl", FAILS),
        ({"energy": -0.02}, "energy_preserved", FAILS),
        ({"ends": 8.0}, "no_extremes", FAILS),
        ({"rl_angle": 10.0}, "same_profile", HOLDS),
        ({"shift": 0.5}, "hidden_states_shift", FAILS),
        ({"shift": 1.1}, "hidden_states_shift", UNDECIDED),
        ({"undone": -0.1}, "rl_moves_back", FAILS),
        ({"gauge_share": 0.9}, "rotation_is_gauge", HOLDS),
        ({"gauge_share": 0.505}, "rotation_is_gauge", UNDECIDED),
    ],
)
def test_other_pictures_get_other_verdicts(changes, claim, verdict):
    assert verdicts(Picture(**changes))[claim] == verdict


def test_without_nulls_nothing_is_claimed_against_noise():
    found = verdicts(Picture(noise=False))
    against = (*claims_spectra.AGAINST_NOISE, "hidden_states_shift")
    assert {found[key] for key in against} == {UNDECIDED}
    assert found["energy_preserved"] == HOLDS


def test_without_the_paper_s_pairs_everything_is_undecided():
    drift = make_drift(pairs=("base → rl",))
    table = claims_spectra.evaluate(Study(), drift)
    assert set(table["verdict"]) == {UNDECIDED}


def test_few_matrices_decide_nothing_against_noise():
    drift = make_drift(Picture(layers=1))
    drift = replace(drift, spectra=drift.spectra.filter(pl.col("module").is_in(["q_proj", "k_proj", "v_proj"])))
    table = claims_spectra.evaluate(Study(), drift)
    rows = {row["claim"]: row for row in table.to_dicts()}
    assert rows["sigma_stable_sft"]["verdict"] == UNDECIDED
    assert rows["sigma_stable_sft"]["low"] == -np.inf
    assert rows["sigma_stable_sft"]["p_value"] == pytest.approx(0.25)


def test_the_test_is_the_binomial_one_and_sizes_have_no_part_in_the_correction():
    drift = make_drift()
    rows = against_noise(drift.spectra.filter((pl.col("quantity") == "sigma_change_norm") & (pl.col("pair") == SFT)))
    above = int((rows["ratio"] > 1).sum())
    table = claims_spectra.evaluate(Study(), drift)
    row = table.filter(pl.col("claim") == "sigma_stable_sft").row(0, named=True)
    assert row["p_value"] == pytest.approx(binomtest(above, len(rows)).pvalue)
    assert row["p_holm"] <= 4 * row["p_value"] * (1 + 1e-12)
    assert row["estimate"] == pytest.approx(rows["ratio"].median() - 1)
    sized = table.filter(~pl.col("claim").is_in(list(claims_spectra.AGAINST_NOISE)))
    assert sized["p_value"].is_nan().all()
    assert sized["p_holm"].is_nan().all()
    assert table.columns == list(evaluate_columns())


def evaluate_columns():
    names = "claim model seed estimate low high p_value p_holm verdict note pooled"
    return names.split()


def test_the_sign_test_keeps_its_level_under_noise():
    """Ratios to the middle of a band estimated from 20 draws, as the bands of the stage are."""
    rng = np.random.default_rng(5)
    rejected = 0
    for _ in range(400):
        expected = rng.normal(1, 0.1, size=(28, 20)).mean(axis=1)
        ratios = rng.normal(1, 0.1, size=28) / expected
        above = int((ratios > 1).sum())
        rejected += binomtest(above, 28).pvalue < 0.05
    assert rejected / 400 < 0.08


@given(st.lists(st.floats(-5, 5, allow_nan=False), min_size=1, max_size=40, unique=True))
def test_the_interval_inverts_the_sign_test(values):
    low, high = claims_spectra.sign_interval(np.array(values))
    assert low <= np.median(values) <= high
    for null in (*values, np.median(values)):
        less, more = sum(v < null for v in values), sum(v > null for v in values)
        if less + more == len(values):  # a tie is the boundary itself
            kept = binomtest(more, len(values)).pvalue > 0.05
            assert kept == (low < null < high)
    if len(values) < 6:
        assert (low, high) == (-np.inf, np.inf)


def test_every_rule_is_complete_text():
    assert len({claim.key for claim in claims_spectra.CLAIMS}) == len(claims_spectra.CLAIMS) == 10
    assert set(claims_spectra.AGAINST_NOISE) < {claim.key for claim in claims_spectra.CLAIMS}
    for claim in claims_spectra.CLAIMS:
        assert all([claim.statement, claim.estimand, claim.test, claim.holds_when, claim.fails_when, claim.source])
        assert not claim.estimand.endswith(".")


def test_pairs_are_told_in_the_words_of_the_paper():
    assert pair_label("base → checkpoint-40") == "base → checkpoint-40"
    assert pair_label(RL) == "SFT_End → RL"
