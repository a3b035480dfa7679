"""`probe_sft`, `probe_rl`, `restore` and `ppo` on vLLM; what runs is in `tests.stages.vllm_program`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.stages.vllm_program", str(tmp_path_factory.mktemp("vllm"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", ["probe_sft", "probe_rl", "restore"])
def test_a_stage_gives_the_same_answers_on_vllm(found: dict[str, Any], stage: str) -> None:
    assert found[stage]["same"]
    assert found[stage]["count"] > 40
    assert found[stage]["engines"] == ["vllm"]


def test_a_grid_whose_engine_dies_is_started_again_and_then_goes_on_at_its_cell(found: dict[str, Any]) -> None:
    """The first death is survived; the second ends the stage, and all cells of both engines come out the same."""
    assert (
        "died twice, the second time of: a worker was killed. What a stage had finished is kept" in found["died twice"]
    )
    assert found["kept"] > 10
    assert not found["published"]
    assert found["went on"]


def test_rollouts_by_vllm_are_on_policy(found: dict[str, Any]) -> None:
    """The engine's log-probabilities are the trainer's own, in the first update and after one."""
    ppo = found["ppo"]
    assert len(ppo["engine"]) == 2
    assert max(ppo["engine"]) < 1e-3
    assert max(ppo["first"]) < 1e-3
    assert ppo["doctor"]["engine_ratio"] == ppo["doctor"]["first_ratio"] == "ok"
