from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from rlheals.errors import UserError
from rlheals.spectra import plan as planning
from rlheals.spectra.plan import (
    GPU_SOURCE,
    KNOWN,
    Rates,
    Workload,
    calibrate,
    estimate,
    gpu_rates,
    plan,
    ratio_class,
    work,
    workload_of,
)
from rlheals.spectra.plan_function import FunctionCost, function_cost
from rlheals.spectra.timing import timed
from tests.common import make_folder
from tests.spectra.synthetic import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

UNIT = {"square": 1e-9, "tall": 2e-9}
RATES = Rates("here", UNIT, UNIT, UNIT, gauge=1e-6, digest=1e9, source="by hand")


def test_the_estimate_is_rate_times_work() -> None:
    workload = Workload("two", {(100, 100): 2, (400, 100): 1}, 10**9)
    found = estimate(workload, RATES, checkpoints=3, draws=5)
    one = 2 * 100**3 * 1e-9 + 400 * 100 * 100 * 2e-9
    assert found.matrices == 3
    assert found.factorise == pytest.approx(4 * one)
    assert found.measure == pytest.approx(3 * one)
    assert found.nulls() == pytest.approx(15 * one)
    assert found.read == pytest.approx(4)
    assert found.others() == 0
    assert found.first_run() == pytest.approx(22 * one + 4)
    assert found.first_run(2) == pytest.approx((4 + 3 + 6) * one + 4)
    assert found.first_run(0) == pytest.approx(7 * one + 4)
    assert found.second_run == pytest.approx(4)


@pytest.mark.parametrize(
    ("draws", "gauge", "function"),
    # Gauge takes eight draws at most and function drift five; one draw makes no band.
    [(20, 1 + 8, 5), (6, 1 + 6, 5), (2, 1 + 2, 2), (1, 1, 0), (0, 1, 0)],
)
def test_gauge_and_function_drift_are_counted_with_the_draws_they_take(draws: int, gauge: int, function: int) -> None:
    cost = FunctionCost(texts=7.0, compare=3.0, draw=11.0)
    workload = Workload("one", {(100, 100): 1}, 10**9, gauge_weights=1_000_000, function=cost)
    found = estimate(workload, RATES, checkpoints=2, draws=draws)
    assert found.others() == pytest.approx(2 * gauge * 1.0 + 7 + 2 * 3 + 2 * function * 11)
    assert found.first_run() == pytest.approx((3 + 2 + 2 * draws) * 1e-3 + 3 + found.others())


def test_a_gpu_by_formula_is_told_without_function_drift() -> None:
    workload = Workload("one", {(100, 100): 1}, 10**9, function=FunctionCost(7.0, 3.0, 11.0))
    here, there = plan([workload], RATES, 1, 5)
    assert (here.function, there.function, there.function_draw) == (10.0, None, 0.0)
    assert there.source == GPU_SOURCE
    later = plan([workload], RATES, 1, 5, start_up=3.0)[0]
    assert later.first_run() - here.first_run() == later.second_run - here.second_run == pytest.approx(3.0)
    assert [each.device for each in plan([workload], replace(RATES, on_cpu=False), 1, 5)] == ["here"]


def test_times_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the process waits, as on a busy machine, the clock goes on and the processor's does not."""
    clocks = {"process_time": iter([1.0, 1.5]), "perf_counter": iter([10.0, 99.0])}
    for name, ticks in clocks.items():
        monkeypatch.setattr(f"rlheals.spectra.timing.time.{name}", ticks.__next__)
    assert timed(lambda: "done", "cpu") == ("done", 0.5)
    assert timed(lambda: "done", "cuda") == ("done", 89.0)


def test_known_models_have_their_published_sizes() -> None:
    qwen, llama = KNOWN
    assert sum(qwen.shapes.values()) == 28 * 7
    assert sum(llama.shapes.values()) == 40 * 7
    # Parameters of the published checkpoints outside embeddings, norms and biases, in billions.
    for model, billions in ((qwen, 6.53), (llama, 8.72)):
        found = sum(count * shape[0] * shape[1] for shape, count in model.shapes.items()) / 1e9
        assert found == pytest.approx(billions, abs=0.01)


def test_classes_and_work() -> None:
    assert ratio_class((100, 150)) == "square"
    assert ratio_class((100, 200)) == ratio_class((200, 100)) == "tall"
    assert work((3, 5)) == 45


def test_a_gpu_that_is_not_here_says_so() -> None:
    assert gpu_rates(RATES).source.startswith("not measured:")


def test_the_workload_of_a_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", layers=2, hidden=32, intermediate=48, seed=0, shard_bytes=50_000)
    found = workload_of(folder)
    assert found.shapes == {(32, 32): 4, (16, 32): 4, (48, 32): 4, (32, 48): 2}
    assert found.gauge_weights == 0
    assert workload_of(folder, ["q_proj"], [0]).shapes == {(32, 32): 1}
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert workload_of(folder, gauge=True).gauge_weights == weights
    assert workload_of(folder, ["q_proj"], gauge=True).gauge_weights == 0, "no block is whole"


def test_calibration_measures_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CALIBRATION", {"square": (64, 64), "tall": (128, 32)})
    monkeypatch.setattr(planning, "GAUGE_LAYER", (32, 48, 4, 2))
    rates = calibrate()
    for rate in (rates.factorise, rates.measure, rates.null):
        assert set(rate) == {"square", "tall"}
        assert all(value > 0 for value in rate.values())
    assert rates.gauge > 0
    assert rates.digest > 1e6
    assert rates.source == "measured here just now, in processor time of all threads together"
    assert rates.busy >= 1


def test_function_drift_is_extrapolated_from_one_and_two_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "m", num_hidden_layers=5)
    layers: list[int] = []

    def measured(_: Path, count: int, __: str) -> dict[str, float]:
        layers.append(count)
        return {"texts": 10.0 + count, "compare": 20.0 + 2 * count, "draw": 1.0 * count, "numbers": 100.0 * count}

    monkeypatch.setattr("rlheals.spectra.plan_function._measured", measured)
    monkeypatch.setattr("rlheals.spectra.plan_function._noise_rate", lambda: 0.5)
    found = function_cost(folder)
    assert layers == [1, 2]
    assert (found.texts, found.compare, found.draw) == pytest.approx((15.0, 30.0, 5 + 500 * 0.5))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_function_drift_is_measured_on_the_models_own_architecture(tmp_path: Path, family: str) -> None:
    found = function_cost(make_folder(tmp_path / "m", family))
    assert min(found.texts, found.compare, found.draw) > 0


def test_an_architecture_that_cannot_be_cut_is_told(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", layers=2, hidden=32, intermediate=48, seed=0, shard_bytes=50_000)
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UserError, match="cannot be built with fewer layers"):
        function_cost(folder)
