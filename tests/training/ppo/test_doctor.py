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
from rlheals.reporting.schemas import SCHEMAS, check
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
    "solved_rate": 0.6,
    "format_error_rate": 0.02,
    "kl_reference": 0.4,
    "kl_old": 0.01,
    "entropy": 0.3,
    "clip_fraction": 0.1,
    "policy_loss": -0.01,
    "value_loss": 0.4,
    "explained_variance": 0.4,
    "grad_norm": 0.7,
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
        changed = {name: value[place] if isinstance(value, list) else value for name, value in series.items()}
        rows.append({**BRANCH, "arm": arm, "update": place + 1, **HEALTHY, **changed})
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
    assert findings["check"].to_list() == [*(each.name for each in CHECKS), "reward_hacking", "finite"]
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
        ({"reward_mean": ramp(-1.0, 3.0)}, "reward_hacking", ERROR, 12),
        ({"policy_loss": one(8, math.nan, 0.1)}, "finite", ERROR, 8),
        ({"grad_norm": one(2, math.inf, 0.1)}, "finite", ERROR, 2),
    ],
)
def test_each_fault_is_found_where_it_is(series: dict[str, Any], name: str, level: str, update: int) -> None:
    results = found(table(**series))
    assert results[name][:2] == (level, update)
    others = set(results) - {name}
    assert others <= {"update_kl", "first_kl"}, "a fault is told once, save that one KL is judged twice"


def test_a_rising_reward_is_fine_when_more_is_solved_and_a_warning_when_more_is_readable() -> None:
    assert found(table(reward_mean=ramp(-1.0, 3.0), solved_rate=ramp(0.3, 0.8))) == {}
    results = found(table(reward_mean=ramp(-1.0, 0.0), format_error_rate=ramp(0.4, 0.02)))
    assert results["reward_hacking"][0] == WARNING


def test_noise_is_no_reward_hacking() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        noisy = table(reward_mean=list(2 + draw.normal(0, 2.5 / math.sqrt(128), UPDATES)))
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
    assert set(found(table("ppo", **bad))) == {"reward_balance_low", "reward_spread", "reward_hacking"}


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
