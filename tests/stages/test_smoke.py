"""The whole pipeline through DVC, as a user runs it, in a copy of the working tree."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from ruamel.yaml import YAML

from rlheals.publish import verify, write_manifest

ROOT = Path(__file__).parents[2]
COPIED = (
    "rlheals",
    "dvc.yaml",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvc/plots",
    ".dvc/page.html",
    ".dvcignore",
    ".gitignore",
)
STAGES = ("dataset", "base", "sft", "probe_sft")
UP_TO_DATE = "Data and pipelines are up to date."


def copy_of_the_tree(target: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, target / name)
    subprocess.run(["git", "init", "-q", str(target)], check=True)
    return target


def environment() -> dict[str, str]:
    # The interpreter's folder first, so that `python` in dvc.yaml is the one that runs the tests.
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}


def call(folder: Path, *command: str, code: int | None = 0) -> str:
    """Standard output and error of a command, with its exit code checked."""
    done = subprocess.run(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert code is None or done.returncode == code, done.stdout
    return done.stdout


def profile(folder: Path, *arguments: str) -> None:
    call(folder, sys.executable, "-m", "rlheals.profile", *arguments)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which the smoke profile has been run to its end."""
    folder = copy_of_the_tree(tmp_path_factory.mktemp("smoke"))
    profile(folder, "smoke")
    call(folder, "dvc", "repro")
    return folder


def test_every_stage_publishes_what_its_manifest_lists(workspace: Path) -> None:
    for stage in (*STAGES, "probe_rl"):
        assert verify(workspace / "data" / "smoke" / stage / "tiny" / "0")
    for start in (5, 20):
        assert verify(workspace / "data" / "smoke" / "ppo" / "tiny" / "0" / "ppo" / str(start))
    assert "index.html" in verify(workspace / "reports" / "smoke")
    ladder = workspace / "data" / "smoke" / "sft" / "tiny" / "0"
    steps = YAML(typ="safe").load((workspace / "params.yaml").read_text())["sft"]["checkpoints"]
    assert {path.name for path in ladder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in steps}


def test_nothing_half_done_is_left(workspace: Path) -> None:
    assert not list(workspace.rglob("*.partial"))
    assert not [path for path in (workspace / "scratch").rglob("*") if path.is_file()]


def test_outputs_are_links_into_the_cache_not_copies(workspace: Path) -> None:
    weights = workspace / "data" / "smoke" / "base" / "tiny" / "0" / "model.safetensors"
    assert weights.stat().st_nlink > 1


def test_the_lock_holds_one_entry_a_stage(workspace: Path) -> None:
    locked = set(YAML(typ="safe").load((workspace / "dvc.lock").read_text())["stages"])
    branches = {f"ppo@smoke-tiny-0-ppo-{start}" for start in (5, 20)}
    assert locked == {
        *(f"{stage}@smoke-tiny-0" for stage in (*STAGES, "probe_rl", "spectra", "restore")),
        *branches,
        "report@smoke",
    }


def test_a_second_run_and_a_return_from_another_profile_do_nothing(workspace: Path) -> None:
    assert UP_TO_DATE in call(workspace, "dvc", "repro")
    profile(workspace, "mini")
    assert UP_TO_DATE not in call(workspace, "dvc", "status")
    profile(workspace, "smoke")
    assert UP_TO_DATE in call(workspace, "dvc", "repro")


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ("sft.learning_rate=2e-3", {"sft@smoke-tiny-0"}),
        ("dataset.rl_prompts=65", {"dataset@smoke-tiny-0"}),
        ("probe_sft.confirm_attempts=3", {"probe_sft@smoke-tiny-0"}),
        ("base.steps=41", {"base@smoke-tiny-0"}),
    ],
)
def test_a_changed_parameter_touches_only_the_stages_that_read_it(
    workspace: Path, change: str, rerun: set[str]
) -> None:
    profile(workspace, "smoke", change)
    status = json.loads(call(workspace, "dvc", "status", "--json"))
    profile(workspace, "smoke")
    assert set(status) == rerun | {"report@smoke"}, "the report prints every parameter"


@pytest.mark.parametrize(
    ("block", "change", "expected"),
    [
        ("sft", {"learning_rat": 1e-3}, "sft.learning_rat is not a known key; did you mean sft.learning_rate?"),
        ("sft", {"checkpoints": [0, 99]}, "checkpoints holds 99, but training has only steps 0 to"),
        ("task", {"target": 999983}, "999983"),
        ("task", {"name": "chess"}, "use one of: general_points"),
        ("inference", {"engine": "telepathy"}, "use one of: transformers"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, block: str, change: dict, expected: str) -> None:
    folder = copy_of_the_tree(tmp_path)
    profile(folder, "smoke")
    yaml = YAML()
    raw = yaml.load(folder / "params.yaml")
    raw[block] |= change
    yaml.dump(raw, folder / "params.yaml")
    told = call(folder, sys.executable, "-m", "rlheals.stages.dataset", "--model", "tiny", "--seed", "0", code=2)
    assert told.startswith("error: ")
    assert expected in told
    assert told.count("\n") == 1
    assert not (folder / "data").exists()


def wait_for(found, seconds: float = 120) -> Path:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for path in found():
            return path
        time.sleep(0.05)
    pytest.fail("the stage never saved its state")


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_stage_goes_on_from_its_state(workspace: Path) -> None:
    """kill -9 of `dvc repro` in the middle of pretraining: nothing is published, and the next run resumes exactly."""
    change = ["smoke", "seeds=[7]", "base.steps=80"]
    profile(workspace, *change)
    target, name = workspace / "data" / "smoke" / "base" / "tiny" / "7", "base@smoke-tiny-7"
    running = subprocess.Popen(
        ["dvc", "repro", name],
        cwd=workspace,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    state = wait_for(lambda: (workspace / "scratch" / "base").glob("*/state-[2-6]0"))
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not target.exists()
    # A record that no run would write shows whether the state was read.
    progress = next(state.parent.glob("state-*")) / "progress.json"
    saved = json.loads(progress.read_text())
    saved["curve"][0]["loss"] = 12345.0
    progress.write_text(json.dumps(saved))
    write_manifest(progress.parent)
    call(workspace, "dvc", "repro", name)
    assert pl.read_parquet(target / "training.parquet")["loss"][0] == 12345.0
    resumed = verify(target)["model.safetensors"]
    shutil.rmtree(target)
    call(workspace, "dvc", "repro", "--force", "--no-run-cache", name)
    assert verify(target)["model.safetensors"] == resumed, "an uninterrupted run gives the same weights"
    profile(workspace, "smoke")
