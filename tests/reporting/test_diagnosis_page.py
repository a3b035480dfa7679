"""The page of ``rlheals diagnose``: one file, offline, true to its tables."""

from __future__ import annotations

import re
from dataclasses import replace

import polars as pl
import pytest

from rlheals.errors import UserError
from rlheals.reporting.diagnosis_page import answer, as_drift, page, write_page
from rlheals.reporting.sections.spectra import context
from tests.browser import draw_offline
from tests.reporting.fabricate_spectra import Picture, make_drift
from tests.reporting.test_site import Page

PAIR = "base → tuned"


def tables(picture=Picture(layers=2), pairs=(PAIR,)):  # noqa: B008
    drift = make_drift(picture, (("", 0),), "", pairs) if pairs[0] != PAIR else renamed(picture)
    return {
        "spectra": drift.spectra,
        "spectra_verdicts": drift.verdicts,
        "gauge": drift.gauge,
        "function_drift": drift.function,
    }


def renamed(picture):
    """Tables of one pair with a name that is not the study's."""
    drift = make_drift(picture, (("", 0),), "", ("base → sft_end",))
    name = pl.lit(PAIR)
    return replace(
        drift,
        spectra=drift.spectra.with_columns(pair=name),
        verdicts=drift.verdicts.with_columns(pair=name),
        gauge=drift.gauge.with_columns(pair=name),
        function=drift.function.with_columns(pair=name),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosis")
    write_page(
        tables(), folder, left_out={"model.norm.weight": "one-dimensional"}, notes=["Prompts were sampled <here>."]
    )
    return folder / "index.html"


def test_the_page_is_one_file_that_names_no_server(written):
    assert [path.name for path in written.parent.iterdir()] == ["index.html"]
    text = written.read_text()
    found = Page(text)
    assert all(address.startswith("#") for address in found.addresses)
    assert "<script" not in text
    assert not re.search(r"(?<!xmlns=\")(?<!xlink=\")https?://(?!www\.w3\.org)", text)
    assert len(found.ids) == len(set(found.ids))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(found.ids)
    assert str(written.parent) not in text


def test_it_says_what_the_tables_say(written):
    text = Page(written.read_text()).text
    said = (
        "14 of 14 matrices changed other than by noise (14 structured); the leading singular vectors turned more than "
    )
    assert said + "noise in 14 matrices" in text
    assert "model.layers.1.down_proj.weight" in text
    assert "model.norm.weight" in text
    assert "one-dimensional" in text
    assert "Prompts were sampled <here>." in text
    for name in ("drift_map", "singular_values", "angle_curves", "gauge_drift", "function_drift"):
        assert f"figure-{name}" in Page(written.read_text()).ids


def test_models_without_a_finding_are_told_so():
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    same = Picture(layers=1, verdicts=dict.fromkeys(modules, "unchanged"))
    assert answer(as_drift(tables(same))) == [
        "base → tuned: nothing that noise of the same norm would not do (7 unchanged of 7 matrices)."
    ]


def test_structure_is_not_told_as_a_large_turn():
    found = tables(Picture(layers=1, turn="less than noise"))
    found["spectra"] = found["spectra"].filter(pl.col("quantity") == "angle_mean")
    del found["gauge"], found["function_drift"]
    text = Page(page(found, follows=["Next: rlheals restore 'a b' <c>"])).text
    assert "the leading singular vectors turned less than noise in 7 matrices" in text
    assert "rotation" not in text.split("Figures")[0]
    assert "7 / 0 / 0" in text
    assert "Next: rlheals restore 'a b' <c>" in text
    assert "What follows" not in page(found)


def test_warnings_and_missing_measures_are_shown_plainly():
    found = tables(Picture(layers=1))
    found["spectra"] = found["spectra"].filter(pl.col("quantity") != "sigma_change")
    found["spectra_verdicts"] = found["spectra_verdicts"].with_columns(
        warning=pl.lit("base matches the random law of its initialiser: singular values from 1 to 2"),
        p_value=pl.lit(None, pl.Float64),
    )
    del found["gauge"], found["function_drift"]
    text = Page(page(found)).text
    # One sentence for all of them, without the numbers of each.
    assert text.count("base matches the random law of its initialiser") == 1
    assert "7 matrices (model.layers.0.q_proj.weight," in text
    assert "singular values from 1 to 2" not in text
    assert "What the function did" not in text


def test_a_model_that_did_not_change_at_all_has_a_page():
    """Only verdicts: nothing was measured, since every tensor has the same bytes."""
    found = tables(Picture(layers=1))
    nothing = {"relative_change": 0.0, "stretch_share": None, "p_value": None, "p_holm": None}
    found["spectra_verdicts"] = found["spectra_verdicts"].with_columns(
        verdict=pl.lit("unchanged"), **{name: pl.lit(value, pl.Float64) for name, value in nothing.items()}
    )
    found["spectra"] = found["spectra"].clear()
    found["gauge"], found["function_drift"] = found["gauge"].clear(), found["function_drift"].clear()
    text = page(found)
    assert "7 unchanged of 7 matrices" in text
    assert "NaN" not in text
    assert "None" not in Page(text).text


def test_several_checkpoints_are_told_one_by_one_and_drawn_as_a_ladder():
    found = Page(page(tables(Picture(layers=1), ("base → sft_max_ood", "base → sft_end"))))
    assert "base → SFT_MaxOOD: 7 of 7" in found.text
    assert "base → SFT_End: 7 of 7" in found.text
    assert {"figure-drift_ladder_angle", "figure-drift_ladder_sigma_change_norm"} <= set(found.ids)
    assert "Along the checkpoints" in found.text


def test_embedding_and_head_stand_side_by_side():
    drift = as_drift(tables(Picture(layers=1)))
    row = drift.spectra.filter(pl.col("quantity") == "angle_mean").head(1)
    names = [f"embedding_head_angle_mean_{when}" for when in ("before", "after")]
    angles = pl.concat([row.with_columns(quantity=pl.lit(name), value=pl.lit(0.5 + i)) for i, name in enumerate(names)])
    found = context(replace(drift, spectra=pl.concat([drift.spectra, angles])))["embeddings"]
    assert [(each["before"], each["after"]) for each in found] == [("28.65°", "85.94°")]


def test_tables_of_another_schema_are_refused():
    found = tables(Picture(layers=1))
    with pytest.raises(UserError, match="not a valid spectra_verdicts table"):
        as_drift(found | {"spectra_verdicts": found["spectra_verdicts"].drop("test")})


def test_same_tables_give_the_same_bytes():
    found = tables(Picture(layers=1))
    found["spectra"] = found["spectra"].filter(pl.col("quantity") == "angle_mean")
    assert page(found) == page(found)


def test_chromium_draws_the_page_without_a_network(written, tmp_path):
    drawn = draw_offline(written, tmp_path / "profile")
    assert drawn.stdout.count('class="marks"') >= 5 or drawn.stdout.count("<svg") >= 5
