from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlheals.errors import UserError
from rlheals.inference import Capabilities
from rlheals.models.checkpoint import load_model, save_model
from rlheals.models.tiny import tiny_tokenizer
from rlheals.publish import publish, sha256_file, verify
from rlheals.reporting.schemas import read_table
from rlheals.stages.common import Run
from rlheals.stages.dataset import write
from rlheals.stages.ppo import BRANCH, parent_of, ppo
from rlheals.tasks import DatasetSizes, make_task
from tests.common import make_model, make_params

if TYPE_CHECKING:
    from rlheals.params import Params

ROOT = Path(__file__).parents[2]
SMALL = [
    "sft.checkpoints=[0,5,20]",
    "ppo.starts=[5]",
    "spectra.rl_start=5",
    "ppo.arms=[ppo,reward_only]",
    "ppo.updates=2",
    "ppo.episodes=8",
    "ppo.checkpoints=[1,2]",
    "compute.threads=1",
    "compute.device=cpu",
]


@pytest.fixture(scope="module")
def params() -> Params:
    # Random weights write nothing readable.
    change = "ppo.change={minibatch: 4, micro_batch: 4, critic_warmup_updates: 0, least_readable: 0.0}"
    return make_params(*SMALL, change)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    """Outputs of dataset, base and sft, with random weights."""
    root = tmp_path_factory.mktemp("project")
    task = make_task(params.task_spec)
    run = Run(params, "tiny", 0, root)
    with publish(run.output("dataset")) as directory:
        write(task.build("compact", DatasetSizes(64, 64, 10, 10, 10), 0), directory)
    tokenizer = tiny_tokenizer(task.vocabulary(), **task.special_words())
    for stage, folders in (("base", {"": 1}), ("sft", {"checkpoint-5": 2})):
        with publish(run.output(stage)) as directory:
            for name, seed in folders.items():
                model = make_model("words", tokenizer, seed, max_position_embeddings=320)
                save_model(model, tokenizer, directory / name)
    return root


@pytest.fixture
def branch(finished: Path, tmp_path: Path, params: Params) -> Run:
    shutil.copytree(finished, tmp_path / "project")
    return Run(params, "tiny", 0, tmp_path / "project", start=5, arm="ppo")


def test_a_branch_is_published_with_its_parent(branch: Run) -> None:
    ppo(branch)
    folder = branch.branch("ppo", 5)
    assert {"update-1/model.safetensors", "update-2/tokenizer.json", BRANCH} <= set(verify(folder))
    assert not list((branch.root / "scratch" / "ppo").iterdir())
    rows = read_table(folder / "rl_training.parquet", "rl_training")
    assert rows["update"].to_list() == [1, 2]
    assert rows["arm"].unique().to_list() == ["ppo"]
    assert read_table(folder / "advantages.parquet", "advantages")["count"].sum() == 16
    read_table(folder / "doctor.parquet", "doctor")
    parent = branch.output("sft") / "checkpoint-5"
    told = json.loads((folder / BRANCH).read_text())
    assert told["parent_sha256"] == sha256_file(parent / "model.safetensors")
    assert told["settings"]["minibatch"] == 4
    ends = [load_model(path).state_dict() for path in (parent, folder / "update-1", folder / "update-2")]
    for earlier, later in pairwise(ends):
        assert any(not torch.equal(earlier[name], later[name]) for name in earlier)


def test_reward_only_needs_no_reference(branch: Run) -> None:
    shutil.rmtree(branch.output("base"))
    ppo(replace(branch, arm="reward_only"))
    rows = read_table(branch.branch("reward_only", 5) / "rl_training.parquet", "rl_training")
    assert rows["kl_reference"].null_count() == len(rows)


def test_a_start_below_the_format_threshold_publishes_nothing(branch: Run) -> None:
    demanding = branch.params.ppo.model_copy(update={"change": {**branch.params.ppo.change, "least_readable": 0.005}})
    branch = replace(branch, params=branch.params.model_copy(update={"ppo": demanding}))
    with pytest.raises(UserError, match=r"ppo@5 writes 0\.0 % readable answers, below the format threshold"):
        ppo(branch)
    assert not branch.branch("ppo", 5).exists()


def test_a_missing_parent_is_named(branch: Run) -> None:
    with pytest.raises(UserError, match="checkpoint-20, the parent of this branch, does not exist"):
        parent_of(replace(branch, start=20))
    (branch.output("sft") / "manifest.json").unlink()
    with pytest.raises(UserError, match="was never completed; run the stage"):
        ppo(branch)


def test_an_altered_parent_is_refused(branch: Run) -> None:
    weights = branch.output("sft") / "checkpoint-5" / "model.safetensors"
    state = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in state.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"checkpoint-5.model.safetensors is missing or corrupted"):
        ppo(branch)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("ppo.episodes=6", "does not divide into minibatches of 4"),
        ("ppo.change={kl_limt: 1.0}", "did you mean ppo.change.kl_limit"),
    ],
)
def test_bad_params_are_one_sentence(override: str, sentence: str, branch: Run) -> None:
    change = [] if override.startswith("ppo.change") else ["ppo.change={minibatch: 4, micro_batch: 4}"]
    with pytest.raises(UserError, match=sentence):
        ppo(replace(branch, params=make_params(*SMALL, *change, override)))


def test_an_undeclared_branch_ends_with_exit_code_2(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    command = [sys.executable, "-m", "rlheals.stages.ppo", "--model", "tiny", "--seed", "0"]
    done = subprocess.run(
        [*command, "--checkpoint-step", "7", "--arm", "ppo"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --checkpoint-step 7 is not in ppo.starts")


def test_an_engine_whose_weights_cannot_change_does_not_play(
    finished: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = SimpleNamespace(capabilities=Capabilities(swap=False, logprobs=True, seeds=True))
    monkeypatch.setattr("rlheals.inference.make_engine", lambda *_, **__: fixed)
    address = params.inference.model_copy(update={"engine": "http://localhost:8000/v1"})
    run = Run(params.model_copy(update={"inference": address}), "tiny", 0, finished, start=5, arm="reward_only")
    with pytest.raises(UserError, match=r"http://localhost:8000/v1, whose weights cannot be changed"):
        ppo(run)
    assert not run.branch("reward_only", 5).exists()
