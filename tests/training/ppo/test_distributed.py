from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from rlheals.training.ppo.state import STATES
from rlheals.training.ppo.trainer import UPDATES
from tests.training.ppo.branches import tree

if TYPE_CHECKING:
    from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}


def two_ranks(scratch: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    """A run in two processes through torchrun (gloo)."""
    scratch.mkdir(exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program = ["-m", "tests.training.ppo.branches", str(scratch), *map(str, arguments)]
    return subprocess.run(
        [*launcher, *program], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def results(scratch: Path, done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What both ranks wrote."""
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((scratch / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    scratch = tmp_path_factory.mktemp("pair")
    return scratch, results(scratch, two_ranks(scratch, 3))


def test_both_ranks_end_with_the_same_weights_and_curves(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = pair[1]
    assert first["digest"] == second["digest"]
    for one, other in zip(first["training"], second["training"], strict=True):
        same = {"solved_rate", "kl_old", "policy_loss", "value_loss", "advantage_std", "turns", "learning_rate"}
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
    assert [row["episodes"] for row in first["training"]] == [16, 16, 16]
    assert first["training"][1]["ratio_max_deviation_first"] < 1e-4


@pytest.mark.slow
def test_a_resumed_pair_ends_where_an_uninterrupted_one_does(
    pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    scratch = tmp_path / "cut"
    assert two_ranks(scratch, 3, 2).returncode != 0
    assert not (scratch / UPDATES).exists()
    again = results(scratch, two_ranks(scratch, 3))
    assert again[0]["digest"] == pair[1][0]["digest"]
    assert tree(scratch / UPDATES) == tree(pair[0] / UPDATES)


def test_another_number_of_processes_is_refused(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    before = tree(pair[0] / STATES)
    command = [sys.executable, "-m", "tests.training.ppo.branches", str(pair[0]), "3"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "was written by 2 processes and cannot go on with 1" in done.stderr
    assert tree(pair[0] / STATES) == before
