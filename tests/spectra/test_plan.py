from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from rlheals.spectra.plan import KNOWN, Rates, Workload, calibrate, estimate, gpu_rates, ratio_class, work, workload_of
from tests.spectra.synthetic import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

UNIT = {"square": 1e-9, "tall": 2e-9}
RATES = Rates("here", UNIT, UNIT, UNIT, digest=1e9, source="by hand")


def test_the_estimate_is_rate_times_work() -> None:
    workload = Workload("two", {(100, 100): 2, (400, 100): 1}, 10**9)
    found = estimate(workload, RATES, checkpoints=3, nulls=5)
    one = 2 * 100**3 * 1e-9 + 400 * 100 * 100 * 2e-9
    assert found.matrices == 3
    assert found.factorise == pytest.approx(4 * one)
    assert found.measure == pytest.approx(3 * one)
    assert found.nulls == pytest.approx(15 * one)
    assert found.read == pytest.approx(4)
    assert found.first_run == pytest.approx(22 * one + 4)
    assert found.second_run == pytest.approx(4)


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
    assert gpu_rates(1e9).source.startswith("not measured:")


def test_the_workload_of_a_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", layers=2, hidden=32, intermediate=48, seed=0, shard_bytes=50_000)
    found = workload_of(folder)
    assert found.shapes == {(32, 32): 4, (16, 32): 4, (48, 32): 4, (32, 48): 2}
    assert workload_of(folder, ["q_proj"], [0]).shapes == {(32, 32): 1}


def test_calibration_measures_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlheals.spectra.plan.CALIBRATION", {"square": (64, 64), "tall": (128, 32)})
    rates = calibrate()
    for rate in (rates.factorise, rates.measure, rates.null):
        assert set(rate) == {"square", "tall"}
        assert all(value > 0 for value in rate.values())
    assert rates.digest > 1e6
    assert rates.source == "measured here just now"
