"""The report's part on weight edits: figures, tables, sentences and verdicts, from made-up cells."""

from __future__ import annotations

import json
from dataclasses import replace

import polars as pl
import pytest
import vl_convert

from rlheals.errors import UserError
from rlheals.publish import verify
from rlheals.reporting import claims_restoration
from rlheals.reporting.claims import evaluate as evaluate_sft
from rlheals.reporting.claims_restoration import AGAINST, repaired_starts
from rlheals.reporting.figures.repairs import (
    better_in,
    confirmed_first,
    impose,
    impose_rows,
    kind_rows,
    kinds,
    pareto_front,
    tradeoff,
    tradeoff_rows,
)
from rlheals.reporting.figures.restoration import (
    has_layers,
    layer_rows,
    layerwise,
    over_seeds,
    rank_rows,
    rankwise,
    with_controls,
)
from rlheals.reporting.registered import FAILS, HOLDS, UNDECIDED
from rlheals.reporting.repairs import END, Repairs, edit_name, load_repairs, outcomes, unedited
from rlheals.reporting.sections import restoration as section
from rlheals.reporting.tables import Choice, load_study
from rlheals.stages.common import Run
from rlheals.stages.report import report
from rlheals.stats import mcnemar_pairs, paired_difference
from tests.reporting.fabricate import LADDER, make_params, make_project
from tests.reporting.fabricate_restoration import Picture, make_restoration, make_tables
from tests.reporting.test_site import Page

CHOICE = Choice("tiny", 0, 10, 320)
RUNS = {"one": (("tiny", 0),), "seeds": (("tiny", 0), ("tiny", 1)), "models": (("tiny", 0), ("other", 0))}


MADE = {}


def make(picture=None, runs=RUNS["one"], hands=300):
    """Tables of made-up runs, each made once."""
    key = (repr(picture or Picture()), runs, hands)
    if key not in MADE:
        MADE[key] = _make(picture, runs, hands)
    return MADE[key]


def _make(picture, runs, hands):
    tables = [make_tables({"profile": "mini", "model": m, "seed": s}, picture, hands) for m, s in runs]
    return Repairs(*(pl.concat(parts) for parts in zip(*tables, strict=True)))


class Study:
    """As much of a study as the claims need: the ladder's accuracies and the starts of RL."""

    params = make_params()
    choices = (CHOICE,)
    summary = pl.DataFrame(
        [
            {"model": model, "seed": seed, "checkpoint_step": step, "condition": "ood", "split": split, "attempts": 1}
            | {"accuracy": rates[2]}
            for step, rates in LADDER.items()
            for split in ("select", "confirm")
            for model, seed in {run for runs in RUNS.values() for run in runs}
        ]
    )


@pytest.fixture(scope="module", params=list(RUNS))
def repairs(request):
    return make(runs=RUNS[request.param])


def charts(repairs):
    found = set(repairs.cells.select("model", "seed").iter_rows())
    starts = pl.concat(
        [
            repaired_starts(Study, repairs, Choice(model, seed, 10, 320)).with_columns(
                model=pl.lit(model), seed=pl.lit(seed, pl.Int64)
            )
            for model, seed in sorted(found)
        ]
    )
    return {
        "restoration_layers": layerwise(repairs),
        "restoration_ranks": rankwise(repairs),
        "restoration_kinds": kinds(repairs),
        "restoration_impose": impose(repairs),
        "restoration_tradeoff": tradeoff(repairs, 0.05),
        "restoration_starts": better_in(starts),
    }


def verdicts(picture, hands=300):
    table = claims_restoration.evaluate(Study, make(picture, hands=hands))
    return {row["claim"]: row["verdict"] for row in table.to_dicts()}


def test_every_figure_draws_its_words(repairs):
    for name, chart in charts(repairs).items():
        spec = chart.to_dict()
        svg = vl_convert.vegalite_to_svg(spec)
        assert "NaN" not in svg, name
        assert "undefined" not in svg, name
        assert spec["title"]["text"] in svg
        models = set(repairs.cells["model"])
        if len(models) > 1:
            assert all(f"model {model}" in svg for model in models), name


def test_subtitles_say_what_was_screened_and_what_confirmed():
    for name, chart in charts(make()).items():
        subtitle = " ".join(chart.to_dict()["title"]["subtitle"])
        if name != "restoration_starts":
            assert "hollow: screened on select (n = 150)" in subtitle, name
            assert "filled: confirm (n = 300)" in subtitle, name


def test_every_screened_repair_of_sft_end_is_a_point_of_the_trade_off():
    repairs = make()
    rows = tradeoff_rows(repairs)
    edits = repairs.screened.filter((pl.col("target") == END) & (pl.col("reference") != "rl"))
    shown = rows.filter((pl.col("split") == "select") & (pl.col("control_of") == ""))
    assert set(shown["cell_id"]) == set(edits["cell_id"])
    assert "round_trip" not in set(rows["operator"])
    spec = json.dumps(tradeoff(repairs, 0.05).to_dict())
    assert spec.count('"split": "select"') == len(edits)
    assert spec.count('"split": "confirm"') == len(rows.filter(pl.col("split") == "confirm"))
    one = edits.row(0, named=True)
    assert f'"recovery": {json.dumps(one["recovery"])}' in spec


def test_the_front_is_what_nothing_screened_beats():
    repairs = make()
    rows = tradeoff_rows(repairs)
    front = pareto_front(rows)
    assert len(front) > 1
    points = rows.filter((pl.col("split") == "select") & (pl.col("control_of") == "")).select(
        "id_difference", "recovery"
    )
    best = {
        (cost, gain)
        for cost, gain in points.iter_rows()
        if not any((c <= cost and g > gain) or (c < cost and g >= gain) for c, g in points.iter_rows())
    }
    assert {(point["id_difference"], point["recovery"]) for point in front} == best


def test_rows_of_the_figures_are_the_right_cells():
    repairs = make()
    layers, ranks = layer_rows(repairs.edits), rank_rows(repairs.edits)
    assert set(layers["place"]) == {"0", "1", "2", "3", "0-1", "0-2", "all"}
    assert set(ranks["place"]) == {"top 10 %", "top 20 %", "top 40 %", "top 60 %", "all", "last 20 %"}
    assert set(layers["target"]) | set(ranks["target"]) == {END}
    assert set(impose_rows(repairs.edits)["place"]) == {"directions → RL", "directions → SFT_End"}
    assert {"singular values", "weights, 50 % of the way", "left vectors, top 20 %", "directions, q, k, v, o"} <= set(
        kind_rows(repairs.edits)["place"]
    )
    spec = json.dumps(layerwise(repairs).to_dict())
    sorts = [panel["layer"][-1]["encoding"]["x"]["sort"] for panel in json.loads(spec)["vconcat"][0]["hconcat"]]
    assert sorts == [["0", "1", "2", "3"], ["0", "0-1", "0-2", "all"]]


@pytest.mark.parametrize(
    ("norm", "told"),
    [
        (0.2, "50.0 % (ID −4.2)"),
        (0.201, "50.0 % (ID −4.2)"),
        (0.38, "50.0 % (ID −4.2, ×1.90)"),
        (0.1, "50.0 % (ID −4.2, ×0.50)"),
    ],
)
def test_a_control_is_told_with_its_id_cost_and_its_size(norm, told):
    """Turned by the same angles in a random direction, weights change more than by the edit."""
    draw = {"ood_accuracy": 0.5, "id_difference": -0.042, "change_norm": norm}
    assert section._drawn(draw, {"change_norm": 0.2}) == told
    assert section._drawn(draw, {"change_norm": 0.0}) == "50.0 % (ID −4.2)"


def test_controls_stand_where_their_edit_stands():
    repairs = make(Picture(draws=2))
    rows = with_controls(repairs, rank_rows(repairs.edits))
    beside = rows.filter((pl.col("control_of") != "") & (pl.col("place") == "top 20 %"))
    assert sorted(beside["operator"]) == ["interpolate", "noise", "noise", "random_rotation", "random_rotation"]
    assert set(beside["split"]) == {"confirm"}
    assert "round_trip" not in set(rows["operator"])


def test_several_seeds_are_their_mean_between_lowest_and_highest():
    repairs = make(runs=RUNS["seeds"])
    rows = with_controls(repairs, rank_rows(repairs.edits))
    top = rows.filter((pl.col("place") == "top 20 %") & (pl.col("control_of") == "") & (pl.col("split") == "confirm"))
    drawn = over_seeds(rows).filter(
        (pl.col("place") == "top 20 %") & (pl.col("series") == "base") & (pl.col("split") == "confirm")
    )
    assert len(top) == 2
    assert drawn["ood_accuracy"].to_list() == [pytest.approx(top["ood_accuracy"].mean())]
    assert drawn["ood_low"].to_list() == [top["ood_accuracy"].min()]
    assert over_seeds(make().edits.with_columns(place=pl.lit(""), series=pl.lit(""), edit=pl.lit("")))["seed"].len()


def test_confirmed_rows_come_before_screened_ones():
    repairs = make()
    rows = confirmed_first(kind_rows(repairs.edits))
    assert rows["cell_id"].is_unique().all()
    assert set(rows.filter(pl.col("contrast"))["split"]) == {"confirm"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "directions of the base"),
        ({"rank_to": 0.2}, "directions of the base, top 20 %"),
        ({"rank_from": 0.25, "rank_to": 0.5}, "directions of the base, ranks 25 to 50 %"),
        ({"rank_from": 0.8, "rank_to": 0.1}, "directions of the base, top 10 % and last 20 %"),
        ({"layers": "0-2,5"}, "directions of the base, layers 0-2,5"),
        ({"layers": "3"}, "directions of the base, layer 3"),
        ({"layers": "", "modules": "embed_tokens,lm_head"}, "directions of the base, embedding and head"),
        ({"modules": "all,lm_head"}, "directions of the base, with head"),
        ({"modules": "q_proj,k_proj"}, "directions of the base, q, k"),
        ({"operator": "rotate", "dose": 0.25}, "directions, 25 % of the way of the base"),
        ({"operator": "interpolate", "basis": "all", "dose": 0.5}, "weights, 50 % of the way of the base"),
        ({"operator": "noise", "basis": "all", "control_of": "x"}, "noise of the same norm"),
        ({"official": True}, "directions of the base (as released)"),
    ],
)
def test_cells_in_words(changes, words):
    row = {"operator": "directions", "basis": "uv", "reference": "base", "target": END, "layers": "all"}
    row |= {"modules": "all", "rank_from": 0.0, "rank_to": 1.0, "dose": 1.0, "control_of": "", "official": False}
    assert edit_name(row | changes) == words


def test_the_picture_as_made():
    assert verdicts(Picture()) == {
        "top_recovers_most": HOLDS,
        "values_recover_nothing": HOLDS,
        "early_beats_late": HOLDS,
        "impose_undoes": HOLDS,
        "top_beats_controls": HOLDS,
        "early_beats_controls": HOLDS,
        "impose_beats_controls": HOLDS,
        "better_in_better_out": HOLDS,
    }


@pytest.mark.parametrize(
    ("changes", "claim", "verdict"),
    [
        ({"top": 0.3}, "top_recovers_most", FAILS),
        ({"top": 0.53}, "top_recovers_most", UNDECIDED),
        ({"values": 0.4}, "values_recover_nothing", FAILS),
        ({"values": 0.16}, "values_recover_nothing", UNDECIDED),
        ({"early": 0.15, "late": 0.55}, "early_beats_late", FAILS),
        ({"early": 0.5, "late": 0.5}, "early_beats_late", UNDECIDED),
        ({"impose": 0.35}, "impose_undoes", FAILS),
        ({"rl": 0.1, "impose": 0.1}, "impose_undoes", UNDECIDED),
        ({"controls": {"top": {"interpolate": 0.85}}}, "top_beats_controls", FAILS),
        ({"controls": {"top": {"interpolate": 0.75}}}, "top_beats_controls", UNDECIDED),
        ({"controls": {"top": {"noise": 0.85}}}, "top_beats_controls", FAILS),
        ({"controls": {"early": {"random_rotation": 0.7}}}, "early_beats_controls", FAILS),
        ({"controls": {"impose": {"interpolate": 0.02}}}, "impose_beats_controls", FAILS),
        ({"slope": -0.8}, "better_in_better_out", FAILS),
    ],
)
def test_other_pictures_get_other_verdicts(changes, claim, verdict):
    assert verdicts(Picture(**changes))[claim] == verdict


def test_a_strong_control_leaves_the_repair_itself_standing():
    found = verdicts(Picture(controls={"top": {"interpolate": 0.85}}))
    assert found["top_recovers_most"] == HOLDS
    assert found["top_beats_controls"] == FAILS


def test_without_contrasts_everything_but_the_rungs_is_undecided():
    found = verdicts(Picture(contrasts=False))
    assert found.pop("better_in_better_out") == HOLDS
    assert set(found.values()) == {UNDECIDED}


def test_the_numbers_are_those_of_the_answers():
    repairs = make(Picture(draws=3))
    table = {row["claim"]: row for row in claims_restoration.evaluate(Study, repairs).to_dicts()}
    cells = repairs.confirmed.filter(pl.col("contrast")).sort("ood_accuracy")
    top = next(i for i in cells["cell_id"] if i.endswith("_top"))
    edited, end = outcomes(repairs, CHOICE, top), unedited(repairs, CHOICE, END)
    peak = unedited(repairs, CHOICE, "sft_max_ood")
    share = (edited.mean() - end.mean()) / (peak.mean() - end.mean())
    assert table["top_recovers_most"]["estimate"] == pytest.approx(share)
    assert share == pytest.approx(cells.filter(pl.col("cell_id") == top)["recovery"][0])
    controls = repairs.controls.filter((pl.col("control_of") == top) & pl.col("operator").is_in(AGAINST))["cell_id"]
    assert len(controls) == 7
    pairs = [(edited, outcomes(repairs, CHOICE, control)) for control in controls]
    assert table["top_beats_controls"]["p_value"] == pytest.approx(max(mcnemar_pairs(*pair) for pair in pairs))
    smallest = min(paired_difference(*pair).estimate for pair in pairs)
    assert table["top_beats_controls"]["estimate"] == pytest.approx(smallest)
    early, late = (next(i for i in cells["cell_id"] if i.endswith(f"_{key}")) for key in ("early", "late"))
    difference = outcomes(repairs, CHOICE, early).mean() - outcomes(repairs, CHOICE, late).mean()
    assert table["early_beats_late"]["estimate"] == pytest.approx(difference)


def test_repaired_rungs_use_the_other_hands_for_before():
    screened = repaired_starts(Study, make(), CHOICE)
    assert screened["split"].unique().to_list() == ["select"]
    assert screened["step"].to_list() == [5, 10, 40, 160, 320]
    assert screened["before"].to_list() == [LADDER[step][2] for step in screened["step"]]
    confirmed = repaired_starts(Study, make(Picture(confirm_starts=True)), CHOICE)
    assert confirmed["split"].unique().to_list() == ["confirm"]
    assert set(confirmed["n"]) == {300}


def test_unpaired_answers_are_refused():
    repairs = make()
    cell = repairs.confirmed["cell_id"][0]
    gone = (pl.col("cell_id") == cell) & (pl.col("hand_id") == "ood 3")
    with pytest.raises(UserError, match="cannot be paired"):
        outcomes(replace(repairs, answers=repairs.answers.filter(~gone)), CHOICE, cell)
    with pytest.raises(UserError, match="does not have cell nothing"):
        outcomes(repairs, CHOICE, "nothing")


def test_sections_leave_out_what_was_not_run(tmp_path):
    params = make_params()
    make_project(tmp_path, params, hands=40)
    study = load_study(params, tmp_path)
    repairs = make()
    few = repairs.cells.filter((pl.col("layers") == "all") & ~pl.col("target").str.contains("rl|sft_1|sft_4|sft_5"))
    few = few.filter(pl.col("reference") != "rl")
    bare = replace(
        repairs, cells=few.filter(pl.col("operator").is_in(["directions", "noise"]) & (pl.col("basis") != "u"))
    )
    assert not has_layers(bare)
    drawn = set(section.figures(study, bare))
    assert {"restoration_ranks", "restoration_tradeoff"} <= drawn
    assert not drawn & {"restoration_layers", "restoration_impose"}


def test_a_report_with_edits_is_complete(tmp_path):
    params = make_params([0, 1])
    make_project(tmp_path, params, hands=40)
    alone = evaluate_sft(load_study(params, tmp_path))
    make_restoration(tmp_path, params, hands=120)
    assert evaluate_sft(load_study(params, tmp_path)).equals(alone)
    report(Run(params, "", 0, tmp_path))
    out = tmp_path / "reports/mini"
    manifest = verify(out)
    for name in charts(make()):
        assert all(f"figures/{name}.{ending}" in manifest for ending in ("svg", "png", "html")), name
    page = Page((out / "index.html").read_text())
    assert {"restoration", "claims", "figure-restoration_tradeoff"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "Holm's method over the 16 tests" in page.text
    assert "Filled: confirmed on 120 other hands" in page.text
    assert "the best on select as confirmed: seed 0: directions of the base: OOD +75.0 points" in page.text
    cells = pl.read_csv(out / "tables/cells.csv")
    assert len(cells) == len(make(runs=RUNS["seeds"]).cells)
    assert (out / "tables/cells.csv").stat().st_size < 100_000
    assert len(pl.read_csv(out / "tables/claims_restoration.csv")) == 2 * len(claims_restoration.CLAIMS)
    metrics = json.loads((out / "metrics.json").read_text())["tiny"]["seed0"]
    assert metrics["repair_best_recovery"] == pytest.approx(0.91, abs=0.02)


def test_a_report_without_edits_has_no_trace_of_them(tmp_path):
    params = make_params()
    make_project(tmp_path, params, hands=40)
    assert section.build(load_study(params, tmp_path)) is None


def test_the_best_repair_is_chosen_on_select_within_the_budget(tmp_path):
    params = make_params()
    make_project(tmp_path, params, hands=40)
    study = load_study(params, tmp_path)
    repairs = make(Picture(full=0.3, top=0.6))
    best = section._best(study, repairs, "tiny", 0)
    assert best is not None
    # Top 40 % gives more, but costs a quarter of the ID accuracy.
    assert best["cell_id"].endswith("layer0-1")
    assert best["split"] == "confirm"
    sentence = section._sentence(repairs, best, 0.05)
    assert sentence.startswith("directions of the base, layers 0-1: OOD +60.0 points")
    assert "its strongest control" in sentence
    assert "breaks the ID budget" not in sentence


def test_a_best_repair_that_costs_more_on_the_confirm_hands_is_told(tmp_path):
    params = make_params()
    make_project(tmp_path, params, hands=40)
    study = load_study(params, tmp_path)
    repairs = make(Picture(full=0.3, top=0.6))
    best = section._best(study, repairs, "tiny", 0)
    dearer = pl.when((pl.col("split") == "confirm") & (pl.col("cell_id") == best["cell_id"])).then(-0.1)
    cells = repairs.cells.with_columns(id_difference=dearer.otherwise("id_difference"))
    repairs = Repairs(cells, repairs.answers)
    assert section._metrics(study, repairs)["tiny", 0]["repair_best_over_budget"] == 1
    told = "which breaks the ID budget of 5 points, though it kept it on the select hands"
    assert told in section._finding(study, repairs, "tiny")
    flagged = [line["cell_id"] for line in section._runs(study, repairs)[0]["lines"] if line["over_budget"]]
    assert flagged == [best["cell_id"]]


def test_damaged_or_missing_runs_are_refused(tmp_path):
    params = make_params([0, 1])
    make_project(tmp_path, params, hands=12)
    make_restoration(tmp_path, make_params([0]), hands=20)
    with pytest.raises(UserError, match=r"restore/tiny/1 is missing"):
        load_repairs(load_study(params, tmp_path))
    make_restoration(tmp_path, params, hands=20)
    (tmp_path / "data/mini/restore/tiny/0/cells.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="is corrupted"):
        load_repairs(load_study(params, tmp_path))


def test_claims_are_text_and_a_family_of_their_own():
    table = claims_restoration.evaluate(Study, make())
    assert table["claim"].to_list() == [claim.key for claim in claims_restoration.CLAIMS]
    least = table["p_value"].min()
    assert table["p_holm"].min() == pytest.approx(len(claims_restoration.CLAIMS) * least)
    for claim in claims_restoration.CLAIMS:
        for text in (claim.statement, claim.estimand, claim.test, claim.holds_when, claim.fails_when, claim.source):
            assert text.strip() == text != ""
        assert claim.statement.endswith(".")
