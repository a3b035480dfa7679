"""Figures compile, show the numbers of their tables, and keep their labels apart."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise

import polars as pl
import pytest
import vl_convert
from hypothesis import given
from hypothesis import strategies as st

from rlheals.reporting import figures
from rlheals.reporting.figures.curves import step_axis
from rlheals.reporting.figures.style import spread
from rlheals.reporting.tables import load_study
from tests.reporting.fabricate import REPOSITORY, make_params, make_project

CASES = {"one": ([0], ["tiny"]), "seeds": ([0, 1, 2], ["tiny"]), "models": ([0], ["tiny", "other"])}


@pytest.fixture(scope="module", params=list(CASES))
def study(request, tmp_path_factory):
    params = make_params(*CASES[request.param])
    root = tmp_path_factory.mktemp("figures")
    make_project(root, params, hands=40)
    return load_study(params, root)


def charts(study):
    return {
        "ladder_accuracy": figures.ladder_accuracy(study.summary, study.choices),
        "losses": figures.losses(study.losses, study.choices),
        "format_errors": figures.format_errors(study.summary, study.choices),
        "regret": figures.regret(study.selection),
        "shortcut": figures.shortcut(study.summary, study.choices),
        "retries": figures.retries(study.summary, study.choices),
        "base_training": figures.base_training(study.table("base", "training.parquet", "training")),
    }


def test_every_figure_draws_its_words(study):
    for name, chart in charts(study).items():
        svg = vl_convert.vegalite_to_svg(chart.to_dict())
        assert "NaN" not in svg, name
        assert "undefined" not in svg, name
        spec = json.dumps(chart.to_dict())
        assert chart.to_dict()["title"]["text"] in svg
        if name in ("ladder_accuracy", "losses"):
            assert "SFT_MaxOOD (step" in svg
            assert "SFT_End (step 320)" in svg
        if len(study.params.models) > 1:
            assert all(f"model {model}" in svg for model in study.params.models), name
        assert "http" not in spec.replace(chart.to_dict()["$schema"], "")


def test_ladder_shows_every_rung_and_its_interval(study):
    spec = json.dumps(figures.ladder_accuracy(study.summary, study.choices).to_dict())
    confirm = study.summary.filter((pl.col("split") == "confirm") & (pl.col("attempts") == 1))
    for row in confirm.to_dicts():
        assert f'"value": {json.dumps(row["accuracy"])}' in spec
        if len(study.params.seeds) == 1:
            assert f'"low": {json.dumps(row["wilson_low"])}' in spec


def test_retries_need_a_second_attempt(study):
    once = study.summary.filter(pl.col("attempts") == 1)
    assert figures.retries(once, study.choices) is None
    table = figures.retry_table(study.summary, study.choices)
    assert len(table) == 8 * len(study.runs)
    assert (table["failed_first"] == table["n"] - table["solved_first"]).all()
    stored = study.summary.filter(pl.col("attempts") > 1)["solved_later_given_first_failed"].drop_nulls()
    assert sorted(table["later_rate"].drop_nulls()) == pytest.approx(sorted(stored))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0.01, 1))
def test_spread_labels_keep_order_and_distance(positions, gap):
    moved = spread(positions, gap)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    gaps = [moved[b] - moved[a] for a, b in pairwise(order)]
    assert all(distance >= gap - 1e-9 for distance in gaps)
    assert min(spread(positions, gap, floor=0.0)) >= 0


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_step_axis_has_a_tick_for_the_ends(steps):
    axis = step_axis(steps)
    assert axis.last == max([*steps, 1]) or max(steps) == 0
    assert axis.pixel(0) == 0
    assert axis.pixel(axis.last) == pytest.approx(axis.width)
    assert len(axis.ticks) <= 24


@pytest.mark.parametrize("name", ["ladder", "losses"])
def test_dvc_templates_compile_with_an_old_vega_lite(name):
    """DVC's own page and its editor extension draw with Vega-Lite 5; 5.8 is the oldest at hand."""
    text = (REPOSITORY / f".dvc/plots/{name}.json").read_text()
    row = {"rev": "HEAD", "run": "tiny/0", "condition": "OOD", "series": "OOD", "step": 5, "low": 0.1, "high": 0.3}
    rows = [row | {"value": 0.2, "step": step} for step in (0, 5, 10)]
    filled = text.replace('"<DVC_METRIC_DATA>"', json.dumps(rows)).replace("<DVC_METRIC_X>", "step")
    filled = filled.replace("<DVC_METRIC_Y>", "value").replace("<DVC_METRIC_TITLE>", "A title")
    spec = json.loads(filled)
    assert spec["$schema"].endswith("v5.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = vl_convert.vegalite_to_svg(spec, vl_version="5.8")
    assert "A title" in svg
    assert "HEAD" in svg
    assert "OOD" in svg
