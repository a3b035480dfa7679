"""vLLM over several processes, in earnest on GPUs, here on CPU workers; and on one GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rlheals.stages.base import base
from rlheals.stages.common import Run
from rlheals.stages.dataset import dataset
from rlheals.stages.sft import sft
from tests.stages.test_probe_rl import params

ROOT = Path(__file__).parents[2]
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def told(*command: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    program = [sys.executable, *command]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.slow
def test_weights_reach_the_workers_of_a_model_that_is_spread(tmp_path: Path) -> None:
    found = told("-m", "tests.inference.vllm_several", "tensor_parallel", str(tmp_path))
    assert found["started"] < 1e-4
    assert found["swapped"] < 1e-4
    assert found["differ"] == 0
    assert found["logprobs"] < 1e-4
    assert found["scores"] > 50
    left = list(Path("/dev/shm").glob("rlheals-weights-*")) if Path("/dev/shm").is_dir() else []
    assert left == []


@pytest.mark.slow
def test_a_training_of_two_processes_has_an_engine_in_each(tmp_path: Path) -> None:
    run = Run(params(), "tiny", 0, tmp_path)
    for stage in (dataset, base, sft):
        stage(run)
    found = told(*LAUNCHER, "-m", "tests.inference.vllm_several", "ranks", str(tmp_path))
    assert found["episodes"] == [8, 8]
    assert max(found["engine"]) < 1e-3


@pytest.mark.gpu
def test_weights_are_swapped_on_a_gpu(tmp_path: Path) -> None:
    """Log-probabilities only: on a GPU, tokens that nearly tie may differ."""
    found = told("-m", "tests.inference.vllm_several", "gpu", str(tmp_path))
    assert found["started"] < 2e-4
    assert found["swapped"] < 2e-4
