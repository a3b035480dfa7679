from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from rlheals.errors import UserError
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.publish import verify
from rlheals.training.ppo.state import PROGRESS, STATES, Curves
from rlheals.training.ppo.trainer import UPDATES, train_branch
from tests.training.ppo.branches import toy_branch, toy_settings, tree

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.training.ppo.trainer import BranchRun


class Killed(Exception):
    """Stands for a kill."""


class Mortal(TransformersEngine):
    """Dies at a call."""

    calls_left = 0

    def generate(self, token_ids: Any, sampling: Any) -> Any:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise Killed
        return super().generate(token_ids, sampling)


def mortal(calls: int) -> Any:
    def make(model: Any, tokenizer: Any) -> Mortal:
        engine = Mortal(model, tokenizer, batch_size=8)
        engine.calls_left = calls
        return engine

    return make


def without_seconds(curves: Curves) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in curves.training]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[BranchRun, Curves]:
    run = toy_branch(tmp_path_factory.mktemp("whole"))
    return run, train_branch(run)


@pytest.mark.parametrize("calls", [1, 5, 7, 9])
def test_a_broken_off_run_goes_on_to_the_same_bytes(
    calls: int, whole: tuple[BranchRun, Curves], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train_branch(toy_branch(tmp_path, make_engine=mortal(calls)))
    curves = train_branch(toy_branch(tmp_path))
    assert tree(tmp_path / UPDATES) == tree(whole[0].scratch / UPDATES)
    assert without_seconds(curves) == without_seconds(whole[1])
    assert curves.advantages == whole[1].advantages


def test_a_finished_run_is_not_trained_again(whole: tuple[BranchRun, Curves]) -> None:
    again = toy_branch(whole[0].scratch, make_engine=mortal(0))
    assert train_branch(again).training == whole[1].training


def test_one_state_is_kept_and_it_is_complete(whole: tuple[BranchRun, Curves]) -> None:
    (state,) = (whole[0].scratch / STATES).iterdir()
    assert state.name == "state-5"
    assert PROGRESS in verify(state)


def test_a_damaged_state_is_not_used(whole: tuple[BranchRun, Curves], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_branch(toy_branch(tmp_path, make_engine=mortal(8)))
    (state,) = (tmp_path / STATES).glob("state-*")
    (state / "model.safetensors").write_bytes(b"cut")
    curves = train_branch(toy_branch(tmp_path))
    assert tree(tmp_path / UPDATES) == tree(whole[0].scratch / UPDATES)
    assert len(curves.training) == 5


def test_a_state_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_branch(toy_branch(tmp_path, make_engine=mortal(8)))
    before = tree(tmp_path)
    changed = {
        "settings": toy_branch(tmp_path, toy_settings(gamma=0.5)),
        "parent_sha256": toy_branch(tmp_path, identity={"parent_sha256": "1" * 64}),
        "seed": toy_branch(tmp_path),
    }
    changed["seed"] = replace(changed["seed"], rollout=replace(changed["seed"].rollout, seed=6))
    for name, run in changed.items():
        with pytest.raises(UserError, match=f"belongs to a run with another {name} "):
            train_branch(run)
    (state,) = (tmp_path / STATES).glob("state-*")
    progress = json.loads((state / PROGRESS).read_text())
    assert progress["world_size"] == 1
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(scratch: Path) -> list[str]:
        return [sys.executable, "-m", "tests.training.ppo.branches", str(scratch), "12"]

    for name in ("cut", "whole"):
        (tmp_path / name).mkdir()
    process = subprocess.Popen(command(tmp_path / "cut"), env=environment)
    deadline = time.monotonic() + 120
    while not any((tmp_path / "cut" / STATES).glob("state-[3-9]")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut" / UPDATES).exists()
    for name in ("cut", "whole"):
        subprocess.run(command(tmp_path / name), env=environment, check=True)
    assert tree(tmp_path / "cut" / UPDATES) == tree(tmp_path / "whole" / UPDATES)
