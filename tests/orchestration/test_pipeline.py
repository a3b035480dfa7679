"""The two halves of running a stage, against DVC's own verdict."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from rlheals.errors import UserError
from rlheals.orchestration.job import Verdict
from rlheals.orchestration.pipeline import Pipeline, check_version
from tests.orchestration.fixture import Workspace, environment

if TYPE_CHECKING:
    from pathlib import Path

    from rlheals.orchestration.job import Node

PLAN = ["data", "train", "ppo@1", "ppo@2", "ppo@3", "ppo@4", "report"]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "project")


def run(workspace: Workspace, targets: tuple[str, ...] = (), **options: bool) -> dict[str, Verdict]:
    """One serial run through the two halves; verdict of each stage."""
    pipeline = Pipeline(workspace.folder, **options)
    verdicts = {}
    try:
        for node in pipeline.plan(targets):
            verdict = pipeline.settle(node.name)
            if verdict is None:
                run_command(pipeline, node.name, workspace)
                verdict = Verdict.COMPLETED
            verdicts[node.name] = verdict
    finally:
        pipeline.close()
    return verdicts


def run_command(pipeline: Pipeline, name: str, workspace: Workspace) -> list[str]:
    job = pipeline.begin(name, workspace.folder / "log")
    for command in job.commands:
        subprocess.run(command, cwd=job.cwd, env=environment(**job.environment), check=True, capture_output=True)
    return pipeline.finish(name)


def plan(workspace: Workspace, *targets: str) -> list[Node]:
    pipeline = Pipeline(workspace.folder)
    try:
        return pipeline.plan(targets)
    finally:
        pipeline.close()


def test_the_plan_knows_matrix_items_subpaths_and_folders(workspace: Workspace) -> None:
    nodes = {node.name: node for node in plan(workspace)}
    assert list(nodes) == PLAN
    assert nodes["train"].upstream == ("data",)
    assert nodes["ppo@3"].upstream == ("train",), "a dependency on a path inside an output"
    assert sorted(nodes["report"].upstream) == PLAN[2:6], "a dependency on a folder above outputs"
    assert nodes["ppo@1"].resources.model_dump() == {
        "cpus": 1,
        "gpus": 0,
        "memory_gib": 0,
        "timeout": 60,
        "retries": 0,
    }


def test_a_group_and_a_single_stage_are_targets(workspace: Workspace) -> None:
    assert [node.name for node in plan(workspace, "ppo")] == PLAN[:6]
    assert [node.name for node in plan(workspace, "ppo@2")] == ["data", "train", "ppo@2"]


def test_what_it_leaves_is_up_to_date_for_dvc_and_what_dvc_leaves_for_it(workspace: Workspace) -> None:
    assert set(run(workspace).values()) == {Verdict.COMPLETED}
    assert workspace.ran() == PLAN_NAMES
    assert workspace.status() == {}
    assert "up to date" in workspace.call("dvc", "repro")
    assert set(run(workspace).values()) == {Verdict.CACHED}
    workspace.params(lr=2)
    workspace.call("dvc", "repro")
    workspace.ran()
    assert set(run(workspace).values()) == {Verdict.CACHED}
    assert workspace.ran() == []


PLAN_NAMES = ["data", "train", "ppo@1", "ppo@2", "ppo@3", "ppo@4", "report"]


def test_the_lock_file_is_the_one_dvc_writes(workspace: Workspace, tmp_path: Path) -> None:
    run(workspace)
    other = Workspace(tmp_path / "other")
    other.call("dvc", "repro")
    assert (workspace.folder / "dvc.lock").read_text() == (other.folder / "dvc.lock").read_text()
    assert (workspace.folder / ".gitignore").read_text() == (other.folder / ".gitignore").read_text()


def test_a_parameter_put_back_is_restored_without_a_command(workspace: Workspace) -> None:
    run(workspace)
    workspace.params(lr=2)
    verdicts = run(workspace)
    assert verdicts["data"] is Verdict.CACHED
    assert verdicts["train"] is Verdict.COMPLETED
    workspace.ran()
    workspace.params(lr=1)
    verdicts = run(workspace)
    assert {verdicts[name] for name in PLAN[1:6]} == {Verdict.RESTORED}
    assert workspace.ran() in ([], ["report"]), "outputs outside the cache cannot be restored"
    assert workspace.status() == {}


def test_one_more_item_runs_only_what_is_new(workspace: Workspace) -> None:
    workspace.params(steps=[1, 2])
    run(workspace)
    workspace.ran()
    workspace.params(steps=[1, 2, 3])
    run(workspace)
    assert workspace.ran() == ["train", "ppo@3", "report"]
    assert workspace.status() == {}


def test_single_items_wait_for_each_other_and_are_judged_by_what_lies_there(workspace: Workspace) -> None:
    pipeline = Pipeline(workspace.folder)
    nodes = {node.name: node.upstream for node in pipeline.plan(["ppo@1", "data", "report"], single_item=True)}
    assert list(nodes) == ["data", "ppo@1", "report"]
    assert {name: set(before) for name, before in nodes.items()} == {
        "data": set(),
        "ppo@1": {"data"},
        "report": {"data", "ppo@1"},
    }
    pipeline.close()
    run(workspace)
    workspace.params(lr=2)
    pipeline = Pipeline(workspace.folder)
    pipeline.plan(["report"], single_item=True)
    assert pipeline.settle("report") is Verdict.CACHED, "train is out of date, its outputs are what they were"
    pipeline.close()


def test_pull_without_a_remote_still_uses_the_local_cache(workspace: Workspace) -> None:
    run(workspace)
    workspace.params(lr=2)
    run(workspace)
    workspace.ran()
    workspace.params(lr=1)
    assert run(workspace, ("ppo",), pull=True)["ppo@1"] is Verdict.RESTORED
    assert workspace.ran() == []


def test_force_runs_everything_again(workspace: Workspace) -> None:
    run(workspace)
    assert set(run(workspace, force=True).values()) == {Verdict.COMPLETED}
    assert workspace.status() == {}


def test_an_input_edited_while_the_stage_runs_is_recorded_as_it_was(workspace: Workspace) -> None:
    pipeline = Pipeline(workspace.folder)
    pipeline.plan(["data"])
    pipeline.begin("data", workspace.folder / "log")
    (workspace.folder / "out").mkdir()
    (workspace.folder / "out" / "data").write_text("made from the first input")
    (workspace.folder / "input.txt").write_text("second\n")
    assert pipeline.finish("data") == ["input.txt"]
    pipeline.close()
    assert "input.txt" in str(workspace.status()["data"]), "DVC sees that it is out of date"
    assert run(workspace, ("data",)) == {"data": Verdict.COMPLETED}, "not restored from a wrong record either"
    assert (workspace.folder / "out" / "data").read_text() == "data from second\n"
    (workspace.folder / "input.txt").write_text("first\n")
    workspace.ran()
    run(workspace, ("data",))
    assert workspace.ran() == ["data"], "what was made during the edit is in no cache"


def test_two_running_stages_stay_marked_until_each_ends(workspace: Workspace) -> None:
    pipeline = Pipeline(workspace.folder)
    pipeline.plan(["ppo"])
    for name in ("data", "train"):
        run_command(pipeline, name, workspace)
    for name in ("ppo@1", "ppo@2"):
        pipeline.begin(name, workspace.folder / "log")
    pipeline.abandon("ppo@1")
    told = workspace.call("dvc", "repro", "-s", "-f", "data", code=None)
    assert "out/data" not in told or "busy" not in told, "nothing that runs reads out/data"
    told = workspace.call("dvc", "repro", "-s", "-f", "train", code=None)
    assert "busy" in told, "ppo@2 still reads out/train/2, which ppo@1 shared"
    pipeline.close()
    workspace.call("dvc", "repro", "-s", "-f", "train")


def test_a_missing_output_is_told(workspace: Workspace) -> None:
    pipeline = Pipeline(workspace.folder)
    pipeline.plan(["data"])
    pipeline.begin("data", workspace.folder / "log")
    with pytest.raises(UserError, match="out/data"):
        pipeline.finish("data")
    pipeline.close()
    assert "data" in workspace.status()


def test_a_missing_input_is_told(workspace: Workspace) -> None:
    (workspace.folder / "input.txt").unlink()
    pipeline = Pipeline(workspace.folder)
    pipeline.plan(["data"])
    assert pipeline.settle("data") is None
    with pytest.raises(UserError, match=r"input\.txt"):
        pipeline.begin("data", workspace.folder / "log")
    pipeline.close()


@pytest.mark.parametrize(
    ("change", "target", "expected"),
    [
        ("", "nothing", "nothing"),
        ("stages: [", "", "dvc.yaml"),
        ("stages:\n  a:\n    cmd: echo\n    meta: {gpu: 1}\n", "", "meta.gpu is not usable"),
        ("stages:\n  a:\n    cmd: echo\n    meta: {timeout: -1}\n", "", "meta.timeout is not usable"),
        ("stages:\n  a:\n    cmd: echo ${nowhere}\n", "", "nowhere"),
    ],
)
def test_a_wrong_pipeline_or_target_is_one_sentence(
    workspace: Workspace, change: str, target: str, expected: str
) -> None:
    if change:
        (workspace.folder / "dvc.yaml").write_text(change)
    with pytest.raises(UserError, match=expected):
        plan(workspace, *([target] if target else []))


def test_marks_cut_short_by_a_kill_do_not_stop_the_next_run(workspace: Workspace) -> None:
    run(workspace, ("data",))
    marks = workspace.folder / ".dvc" / "tmp" / "rwlock"
    marks.write_text('{"write": {')
    assert "corrupted" in workspace.call("dvc", "repro", "--force", "data", code=None), "DVC itself refuses"
    assert run(workspace, ("data",), force=True) == {"data": Verdict.COMPLETED}


def test_a_folder_without_dvc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no DVC workspace"):
        Pipeline(tmp_path)


def test_an_untested_release_of_dvc_is_refused() -> None:
    check_version()
    check_version("3.67.9")
    with pytest.raises(UserError, match=r"DVC 3\.68\.0 is installed .*`dvc repro`"):
        check_version("3.68.0")
