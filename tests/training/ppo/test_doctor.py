from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlheals.errors import UserError
from rlheals.params import Ppo
from rlheals.reporting.schemas import SCHEMAS, check, read_table
from rlheals.training.ppo.checks import CHANGE, CHECKS
from rlheals.training.ppo.doctor import ERROR, OK, WARNING, advantage_shapes, diagnose, histogram, shape
from rlheals.training.ppo.settings import PpoSettings

UPDATES = 12
BRANCH = {"profile": "mini", "model": "tiny", "seed": 0, "checkpoint_step": 40, "arm": "ppo"}
HEALTHY: dict[str, Any] = {
    "episodes": 128,
    "turns": 130,
    "tokens": 4000,
    "reward_mean": 2.0,
    "reward_std": 2.5,
    "solved_rate": [0.5 + 0.03 * update for update in range(12)],
    "format_error_rate": 0.02,
    "kl_reference": 0.4,
    "kl_old": 0.01,
    "entropy": 0.3,
    "clip_fraction": 0.1,
    "policy_loss": -0.01,
    "value_loss": 0.4,
    "explained_variance": 0.4,
    "grad_norm": 0.7,
    "grad_norm_low": 0.4,
    "grad_norm_high": 2.0,
    "grad_norm_limit": 1.0,
    "flat_groups": None,
    "learning_rate": 2e-4,
    "ratio_max_deviation_first": 1e-6,
    "engine_ratio_deviation": 1e-4,
    "advantage_mean": 0.0,
    "advantage_std": 1.0,
    "advantage_skew": -0.4,
    "advantage_kurtosis": -0.5,
    "advantage_positive_share": 0.6,
    "response_tokens_mean": 30.0,
    "seconds_rollout": 0.5,
    "seconds_score": 0.2,
    "seconds_train": 1.0,
}


def table(arm: str = "ppo", **series: Any) -> pl.DataFrame:
    """A healthy run of 12 updates with some columns replaced: by a value, or by a value an update."""
    rows = []
    for place in range(UPDATES):
        columns = {**HEALTHY, **series}
        values = {name: value[place] if isinstance(value, list) else value for name, value in columns.items()}
        rows.append({**BRANCH, "arm": arm, "update": place + 1, **values})
    return check(pl.DataFrame(rows, schema=SCHEMAS["rl_training"]), "rl_training")


def found(training: pl.DataFrame) -> dict[str, tuple[str, int, str]]:
    """(level, update, parameter) of every check that did not pass."""
    bad = diagnose(training).filter(pl.col("level") != OK)
    return {row["check"]: (row["level"], row["update"], row["parameter"]) for row in bad.to_dicts()}


def one(at: int, value: float, otherwise: float) -> list[float]:
    """A value at one update, another at all others."""
    return [value if update == at else otherwise for update in range(1, UPDATES + 1)]


def ramp(first: float, last: float) -> list[float]:
    return [float(value) for value in np.linspace(first, last, UPDATES)]


def test_a_healthy_run_passes_every_check() -> None:
    findings = diagnose(table())
    check(findings, "doctor")
    curve = ["reward_rises", "drop_after_first_step", "reward_hacking"]
    names = [*curve, *(each.name for each in CHECKS), "always_clipped", "gradient_spread", "finite"]
    assert findings["check"].to_list() == names
    assert set(findings["level"]) == {OK}
    assert set(findings["cause"]) == set(findings["parameter"]) == {""}


@pytest.mark.parametrize(
    ("series", "name", "level", "update"),
    [
        ({"ratio_max_deviation_first": one(3, 0.01, 0.0)}, "first_ratio", WARNING, 3),
        ({"ratio_max_deviation_first": one(1, 0.5, 0.0)}, "first_ratio", ERROR, 1),
        ({"engine_ratio_deviation": one(4, 0.5, 0.0)}, "engine_ratio", WARNING, 4),
        ({"engine_ratio_deviation": one(4, 3.0, 0.0)}, "engine_ratio", ERROR, 4),
        ({"kl_old": one(1, 0.3, 0.01)}, "first_kl", ERROR, 1),
        ({"kl_old": [0.0, 0.0, 0.06, *[0.01] * 9]}, "first_kl", WARNING, 3),
        ({"kl_old": one(7, 1.5, 0.01)}, "update_kl", ERROR, 7),
        ({"kl_old": 0.0}, "policy_still", WARNING, 12),
        ({"clip_fraction": one(5, 0.4, 0.1)}, "clip_fraction", WARNING, 5),
        ({"clip_fraction": one(5, 0.7, 0.1)}, "clip_fraction", ERROR, 5),
        ({"explained_variance": ramp(0.5, -0.3)}, "explained_variance", WARNING, 12),
        ({"explained_variance": -2.0}, "explained_variance", ERROR, 12),
        ({"entropy": [0.5, *ramp(0.3, 0.0)[1:]]}, "entropy_collapse", WARNING, 12),
        ({"entropy": [0.5, *[1e-3] * 11]}, "entropy_collapse", ERROR, 12),
        ({"entropy": [0.1, *[2.0] * 11]}, "entropy_growth", ERROR, 12),
        ({"solved_rate": 0.001}, "reward_balance_low", ERROR, 12),
        ({"solved_rate": 0.05}, "reward_balance_low", WARNING, 12),
        ({"solved_rate": 0.99}, "reward_balance_high", WARNING, 12),
        ({"reward_std": one(4, 0.0, 2.0)}, "reward_spread", ERROR, 4),
        ({"advantage_skew": one(9, -3.0, 0.0)}, "advantage_skew", WARNING, 9),
        ({"advantage_kurtosis": one(2, 9.0, 0.0)}, "advantage_kurtosis", WARNING, 2),
        ({"advantage_positive_share": one(6, 0.01, 0.5)}, "advantage_balance", WARNING, 6),
        ({"format_error_rate": ramp(0.99, 0.0)}, "format_start", ERROR, 1),
        ({"format_error_rate": ramp(0.0, 0.9)}, "format_collapse", ERROR, 12),
        ({"format_error_rate": ramp(0.0, 0.2)}, "format_collapse", WARNING, 12),
        ({"reward_mean": ramp(-1.0, 3.0), "solved_rate": 0.6}, "reward_hacking", ERROR, 12),
        ({"policy_loss": one(8, math.nan, 0.1)}, "finite", ERROR, 8),
        ({"grad_norm": one(2, math.inf, 0.1)}, "finite", ERROR, 2),
    ],
)
def test_each_fault_is_found_where_it_is(series: dict[str, Any], name: str, level: str, update: int) -> None:
    results = found(table(**series))
    assert results[name][:2] == (level, update)
    others = set(results) - {name}
    twice = {"update_kl", "first_kl"} | ({"reward_rises"} if "solved_rate" in series or "kl_old" in series else set())
    assert others <= twice, "a fault is told once, save that one KL is judged twice, and a share that does not rise"


def test_a_rising_reward_is_fine_when_more_is_solved_and_a_warning_when_more_is_readable() -> None:
    assert found(table(reward_mean=ramp(-1.0, 3.0), solved_rate=ramp(0.3, 0.8))) == {}
    results = found(table(reward_mean=ramp(-1.0, 0.0), format_error_rate=ramp(0.4, 0.02), solved_rate=0.6))
    assert results["reward_hacking"][0] == WARNING


def test_noise_is_no_reward_hacking() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        noisy = table(solved_rate=0.6, reward_mean=list(2 + draw.normal(0, 2.5 / math.sqrt(128), UPDATES)))
        assert "reward_hacking" not in found(noisy)


def test_every_named_parameter_exists() -> None:
    for each in CHECKS:
        if each.parameter.startswith(CHANGE):
            assert each.parameter.removeprefix(CHANGE) in PpoSettings.model_fields
        elif each.parameter.startswith("ppo."):
            assert each.parameter.removeprefix("ppo.") in Ppo.model_fields
        else:
            assert each.parameter == "model.<name>.dtype"
        assert not each.cause.endswith(".")


def test_an_arm_without_reward_is_not_judged_by_it() -> None:
    bad = {"solved_rate": 0.0, "reward_std": 0.0, "reward_mean": ramp(-3.0, 3.0)}
    assert found(table("kl_only", **bad)) == {}
    assert set(found(table("ppo", **bad))) == {"reward_balance_low", "reward_spread", "reward_hacking", "reward_rises"}


def test_null_columns_are_not_judged() -> None:
    absent = (
        "kl_old",
        "value_loss",
        "explained_variance",
        "ratio_max_deviation_first",
        "engine_ratio_deviation",
        "policy_loss",
    )
    findings = diagnose(table("grpo", **dict.fromkeys(absent)))
    assert not {"first_kl", "update_kl", "policy_still", "explained_variance", "first_ratio", "engine_ratio"} & set(
        findings["check"]
    )
    assert set(findings["level"]) == {OK}


def test_branches_are_judged_apart_and_keep_their_names() -> None:
    both = pl.concat([table("ppo"), table("reward_only", format_error_rate=ramp(0.0, 0.9))])
    findings = diagnose(both.sample(fraction=1.0, shuffle=True, seed=1))
    assert findings.filter(pl.col("level") == ERROR)["arm"].to_list() == ["reward_only"]
    assert set(findings["checkpoint_step"]) == {40}


def test_an_empty_table_is_told() -> None:
    with pytest.raises(UserError, match="rl_training has no rows"):
        diagnose(table().clear())


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=60).filter(lambda values: np.std(values) > 1e-3))
def test_shape_equals_scipy(values: list[float]) -> None:
    result = shape(values)
    assert result.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert result.std == pytest.approx(np.std(values), rel=1e-9)
    assert result.skew == pytest.approx(stats.skew(values), rel=1e-6, abs=1e-6)
    assert result.kurtosis == pytest.approx(stats.kurtosis(values), rel=1e-6, abs=1e-6)
    assert result.positive_share == pytest.approx(np.mean(np.array(values) > 0))


def test_shape_of_equal_values_has_no_nan() -> None:
    assert shape([2.0, 2.0, 2.0]) == (2.0, 0.0, 0.0, 0.0, 1.0)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=80))
def test_histograms_keep_every_value(values: list[float]) -> None:
    rows = histogram(values, 3)
    assert sum(row["count"] for row in rows) == len(values)
    assert {row["update"] for row in rows} == {3}
    assert all(row["bin_left"] < row["bin_right"] for row in rows)


def advantages(values: Any, update: int = 1) -> pl.DataFrame:
    rows = [{**BRANCH, **row} for row in histogram(values, update)]
    return check(pl.DataFrame(rows, schema=SCHEMAS["advantages"]), "advantages")


def test_shapes_from_the_histogram_are_near_those_of_the_values() -> None:
    draw = np.random.default_rng(0)
    values = draw.gamma(3.0, 1.0, 4000) - 3
    row = advantage_shapes(advantages(values)).to_dicts()[0]
    direct = shape(values)
    assert row["n"] == 4000
    for name, tolerance in (("mean", 0.02), ("std", 0.05), ("skew", 0.1), ("kurtosis", 0.3)):
        assert row[name] == pytest.approx(getattr(direct, name), abs=tolerance)


def test_a_gaussian_is_near_a_gaussian_and_two_heaps_are_not() -> None:
    draw = np.random.default_rng(0)
    gaussian = advantage_shapes(advantages(draw.normal(0, 1, 4000))).to_dicts()[0]
    heaps = advantage_shapes(advantages([-1.0] * 50 + [1.0] * 50, update=2)).to_dicts()[0]
    assert gaussian["gaussian_distance"] < 0.05 < 0.3 < heaps["gaussian_distance"]
    assert heaps["entropy"] == pytest.approx(math.log(2))
    assert gaussian["entropy"] > 2.5
    assert heaps["histogram"][0] == heaps["histogram"][-1] == 50


def curve(*shares: float) -> list[float]:
    """A share of solved episodes by update; the last one goes on to the end."""
    return [*shares, *[shares[-1]] * (UPDATES - len(shares))]


WARM: dict[str, Any] = {"learning_rate": [0.0, 0.0, *[2e-4] * 10]}
"""The policy first moves in update 3, so it has played updates 1 to 3 as it was."""


@pytest.mark.parametrize(
    ("shares", "level"),
    [
        (curve(0.84, 0.85, 0.83, 0.87, 0.9, 0.93), OK),
        (curve(0.84, 0.85, 0.83, 0.7, 0.6, 0.55), ERROR),  # at once
        ([*[0.84] * 8, 0.6, 0.6, 0.6, 0.6], ERROR),  # late
        (curve(0.84, 0.85, 0.83, 0.84), WARNING),  # flat
        (curve(0.96, 0.97, 0.96, 0.965), OK),  # nothing left to raise
        (curve(0.96, 0.97, 0.96, 0.8), ERROR),
    ],
)
def test_whether_the_reward_rises_is_judged_first(shares: list[float], level: str) -> None:
    first = diagnose(table(solved_rate=shares, **WARM)).row(0, named=True)
    assert (first["check"], first["level"]) == ("reward_rises", level)
    before, after = np.mean(shares[:3]), np.mean(shares[-5:])
    assert first["value"] == pytest.approx(after - before)
    if level == ERROR:
        assert f"{100 * before:.1f} % of the episodes were solved before the policy moved" in first["cause"]
        assert first["parameter"] == CHANGE + "learning_rate"


def test_thirds_would_miss_a_fall_at_once() -> None:
    """The first third of such a run holds the damage already, so the two thirds look alike."""
    shares = curve(0.92, 0.8)
    assert abs(np.mean(shares[-4:]) - np.mean(shares[:4])) < 2 * math.sqrt(2 * 0.8 * 0.2 / (4 * 128))
    assert found(table(solved_rate=shares))["reward_rises"][0] == ERROR


@pytest.mark.parametrize(("share", "level"), [(0.84, None), (0.78, None), (0.73, WARNING), (0.6, ERROR)])
def test_a_fall_in_the_first_update_that_the_moved_policy_plays(share: float, level: str | None) -> None:
    results = found(table(solved_rate=curve(0.84, 0.84, 0.84, share, 0.95), **WARM))
    assert results.get("drop_after_first_step", (None,))[0] == level
    if level:
        assert results["drop_after_first_step"][1:] == (4, CHANGE + "learning_rate")


def test_gradients_that_are_always_clipped_are_a_note_and_no_fault() -> None:
    results = found(table(grad_norm_low=9.0, grad_norm=15.0, grad_norm_high=24.0))
    assert results == {"always_clipped": ("note", 1, CHANGE + "max_grad_norm")}
    old = found(table(grad_norm_low=None, grad_norm_high=None, grad_norm=15.0))
    assert set(old) == {"always_clipped"}
    assert not found(table(grad_norm_low=None, grad_norm_high=None, grad_norm_limit=None, grad_norm=15.0))


def test_gradients_of_very_different_length_are_told() -> None:
    assert found(table(grad_norm_low=8e-6, grad_norm_high=24.0))["gradient_spread"][0] == WARNING
    assert found(table(grad_norm_low=None, grad_norm_high=None, grad_norm=one(5, 1e-5, 0.7)))["gradient_spread"]


@pytest.mark.parametrize(("flat", "hands", "level"), [(0.72, 4.48, WARNING), (0.0, 16.0, None), (1.0, 0.0, WARNING)])
def test_groups_whose_episodes_agree_teach_nothing(flat: float, hands: float, level: str | None) -> None:
    training = table("grpo", flat_groups=flat)
    row = diagnose(training).filter(pl.col("check") == "groups_without_spread").row(0, named=True)
    assert row["value"] == pytest.approx(hands)  # of 16 groups of eight
    assert found(training).get("groups_without_spread", (None,))[0] == level


def test_tables_of_earlier_versions_are_read(tmp_path: Any) -> None:
    later = ["grad_norm_low", "grad_norm_high", "grad_norm_limit", "flat_groups"]
    table().drop(later).write_parquet(tmp_path / "rl_training.parquet")
    read = read_table(tmp_path / "rl_training.parquet", "rl_training")
    assert read.select(later).null_count().row(0) == (UPDATES,) * 4
    assert found(read) == {}


def test_a_run_of_one_update_is_not_judged_by_its_curve() -> None:
    checks = diagnose(table().head(1))["check"].to_list()
    assert "reward_rises" not in checks
    assert "drop_after_first_step" not in checks
