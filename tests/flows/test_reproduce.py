"""`python -m flows.reproduce` as a user runs it, against DVC's own verdict and a real Prefect server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil
import pytest
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import flows  # noqa: F401  (sets Prefect's environment before prefect is imported)
from flows.server import temporary_server
from rlheals.orchestration.job import Verdict
from tests.orchestration.fixture import Workspace, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ROOT = __file__.rsplit("/tests/", 1)[0]
FAN = ("ppo@1", "ppo@2", "ppo@3", "ppo@4")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server of its own for all tests here."""
    home = tmp_path_factory.mktemp("prefect")
    before = os.environ.get("PREFECT_HOME")
    os.environ["PREFECT_HOME"] = str(home)
    with temporary_server(home / "server.log") as url:
        yield url
    os.environ.pop("PREFECT_HOME")
    if before is not None:
        os.environ["PREFECT_HOME"] = before


class Driver:
    """Calls the flow in a workspace."""

    def __init__(self, workspace: Workspace, url: str | None, home: Path) -> None:
        self.workspace, self.folder = workspace, workspace.folder
        self.environment = environment(PYTHONPATH=ROOT, PREFECT_HOME=str(home))
        if url:
            self.environment["PREFECT_API_URL"] = url

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.reproduce", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        """What it prints, with its exit code checked."""
        driver = self.start(*arguments)
        printed, _ = driver.communicate(timeout=240)
        assert driver.returncode == code, printed
        return printed

    def waiting_for(self, name: str, *arguments: str) -> tuple[subprocess.Popen[str], psutil.Process]:
        """A driver in which stage ``name`` is running, and the stage's process."""
        driver = self.start(*arguments)
        file = self.folder / f"{name}.pid"
        until(file.exists, "the stage started", seconds=120)
        time.sleep(0.1)
        return driver, psutil.Process(int(file.read_text()))


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> float:
    """Wait for a condition; the seconds it took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - begun


def gone(*pids: int) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def recorded(lock: Path) -> set[str]:
    """Stages a ``dvc.lock`` holds; none while it is missing or being written."""
    try:
        content = YAML(typ="safe").load(lock)
    except (FileNotFoundError, YAMLError):
        return set()
    return set((content or {}).get("stages", {}))


@pytest.fixture
def driver(tmp_path: Path, server: str) -> Driver:
    return Driver(Workspace(tmp_path / "project"), server, tmp_path / "home")


def verdicts(printed: str) -> dict[str, str]:
    """Verdict of each stage in the closing table."""
    rows = [line.split() for line in printed.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) >= 2 and row[1] in set(Verdict) and not row[0].isdigit()}


@contextmanager
def client(url: str) -> Iterator[Any]:
    from prefect import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as found:
        yield found


def test_the_flow_and_dvc_repro_leave_each_other_nothing_to_do(driver: Driver) -> None:
    printed = driver.run("-j", "2")
    assert set(verdicts(printed).values()) == {"Completed"}
    assert "| INFO" not in printed, "Prefect's log is for its server"
    assert driver.workspace.status() == {}
    assert "Data and pipelines are up to date." in driver.workspace.call("dvc", "repro")
    assert set(verdicts(driver.run()).values()) == {"Cached"}
    driver.workspace.params(lr=2)
    driver.workspace.call("dvc", "repro")
    driver.workspace.ran()
    assert set(verdicts(driver.run()).values()) == {"Cached"}
    driver.workspace.params(lr=1)
    found = verdicts(driver.run())
    assert {found[name] for name in ("train", *FAN)} == {"Restored"}
    assert set(driver.workspace.ran()) <= {"report"}
    assert driver.workspace.status() == {}


def test_states_names_edges_and_artifacts_are_those_of_the_graph(driver: Driver, server: str) -> None:
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter

    driver.workspace.params(steps=[1, 2], retries=1)
    driver.workspace.call("dvc", "repro", "train")
    driver.workspace.behave(**{"ppo@1": {"failures": 2}})
    assert verdicts(driver.run(code=1)) == {
        "data": "Cached",
        "train": "Cached",
        "ppo@1": "Failed",
        "ppo@2": "Completed",
        "report": "UpstreamFailed",
    }
    with client(server) as api:
        run = max(api.read_flow_runs(), key=lambda run: run.created)
        tasks = {
            task.name: task
            for task in api.read_task_runs(
                flow_run_filter=FlowRunFilter(id={"any_": [run.id]}), task_run_filter=TaskRunFilter()
            )
        }
        artifacts = {artifact.key: artifact for artifact in api.read_artifacts() if artifact.flow_run_id == run.id}
    assert {name: task.state.name for name, task in tasks.items()} == {
        "data": "Cached",
        "train": "Cached",
        "ppo@1": "Failed",
        "ppo@2": "Completed",
        "report": "UpstreamFailed",
    }
    assert tasks["ppo@1"].run_count == 2
    waits = {str(source.id) for source in tasks["report"].task_inputs["wait_for"]}
    assert waits == {str(tasks["ppo@1"].id), str(tasks["ppo@2"].id)}
    assert run.state.is_failed()
    assert run.state.message == "2 Cached, 1 Completed, 1 Failed, 1 UpstreamFailed"
    assert '"UpstreamFailed"' in str(artifacts["verdicts"].data)


def test_a_failing_stage_is_tried_again_and_then_fails_only_its_dependants(driver: Driver) -> None:
    driver.workspace.params(retries=1)
    driver.workspace.behave(**{"ppo@2": {"failures": 9}, "ppo@3": {"failures": 1}})
    printed = driver.run("-j", "2", code=1)
    found = verdicts(printed)
    assert found["ppo@2"] == "Failed"
    assert found["report"] == "UpstreamFailed"
    assert {found[name] for name in ("ppo@1", "ppo@3", "ppo@4")} == {"Completed"}
    ran = driver.workspace.ran()
    assert (ran.count("ppo@2"), ran.count("ppo@3"), ran.count("report")) == (2, 2, 0)
    assert "it failed on purpose" in printed
    driver.workspace.behave()
    driver.run()
    assert driver.workspace.ran() == ["ppo@2", "report"]


def test_bad_input_is_not_tried_again_and_fail_fast_starts_nothing_more(driver: Driver) -> None:
    driver.workspace.params(retries=3)
    driver.workspace.behave(**{"ppo@1": {"failures": 9, "code": 2}})
    found = verdicts(driver.run("-j", "1", "--fail-fast", code=1))
    assert driver.workspace.ran() == ["data", "train", "ppo@1"]
    assert {found[name] for name in FAN[1:]} == {"NotStarted"}


def test_a_silent_stage_is_stopped_at_its_time_limit(driver: Driver) -> None:
    driver.workspace.params(timeout=2)
    driver.workspace.behave(train={"sleep": 600, "loud": False, "child": True})
    begun = time.monotonic()
    printed = driver.run(code=1)
    assert time.monotonic() - begun < 60
    assert "2 s, its time limit" in printed
    child = int((driver.folder / "child.pid").read_text())
    until(lambda: gone(child), "its child in a session of its own ended, too")


def test_gpus_are_handed_out_one_stage_each(driver: Driver) -> None:
    driver.workspace.params(gpus=1)
    driver.workspace.behave(**{name: {"sleep": 1} for name in FAN})
    told = driver.run("-j", "4", "--gpus", "none", code=2)
    assert "reserves 1 GPU(s) and 0 can be used here" in told
    driver.run("-j", "4", "--gpus", "5,7")
    folder = max((driver.folder / "scratch" / "runs").glob("2*"))
    used = [(folder / f"{name}.log").read_text().split("on GPU ")[1].split()[0] for name in FAN]
    assert sorted(used) == ["5", "5", "7", "7"]


def test_a_launcher_starts_every_command_with_the_stage_s_resources(driver: Driver) -> None:
    driver.workspace.params(gpus=2, steps=[1])
    launcher = driver.folder / "launcher.sh"
    launcher.write_text('#!/bin/sh\necho "launched with $1" >> launched.log\nshift\nexec "$@"\n')
    launcher.chmod(0o755)
    driver.run("--launcher", f"{launcher} {{name}}:gpus={{gpus}}:cpus={{cpus}}")
    launched = (driver.folder / "launched.log").read_text().split()
    # An option about GPUs is left out where none are asked for; here it is one word with the rest, so it stays.
    assert "ppo@1:gpus=2:cpus=1" in launched
    assert driver.workspace.status() == {}
    newest = max((driver.folder / "scratch" / "runs").glob("*/verdicts.json"))
    rows = {row["name"]: row["verdict"] for row in json.loads(newest.read_text())}
    assert rows == dict.fromkeys(["data", "train", "ppo@1", "report"], "Completed")


def test_missing_outputs_are_pulled_instead_of_computed(driver: Driver, tmp_path: Path) -> None:
    driver.workspace.call("dvc", "remote", "add", "-d", "store", str(tmp_path / "store"))
    driver.run()
    driver.workspace.call("dvc", "push", "--run-cache")
    for name in ("out", ".dvc/cache"):
        shutil.rmtree(driver.folder / name)
    driver.workspace.ran()
    found = verdicts(driver.run("--pull"))
    assert driver.workspace.ran() == []
    assert set(found.values()) == {"Restored", "Cached"}
    assert driver.workspace.status() == {}


def test_an_input_edited_while_a_stage_runs_is_noticed(driver: Driver) -> None:
    driver.workspace.behave(data={"sleep": 2})
    running, _ = driver.waiting_for("data", "data")
    (driver.folder / "input.txt").write_text("second\n")
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    assert "input.txt changed while it ran" in printed
    driver.workspace.behave()
    driver.workspace.ran()
    driver.run("data")
    assert driver.workspace.ran() == ["data"]
    assert (driver.folder / "out" / "data").read_text() == "data from second\n"


@pytest.mark.fault
@pytest.mark.slow
def test_after_kill_9_nothing_is_left_and_only_what_was_not_recorded_runs_again(tmp_path: Path) -> None:
    """With a temporary server, which must not outlive the driver either."""
    driver = Driver(Workspace(tmp_path / "project"), None, tmp_path / "home")
    driver.workspace.behave(**{"ppo@2": {"sleep": 600, "child": True}})
    running, stage = driver.waiting_for("ppo@2", "-j", "2")
    # DVC does not say in which order it takes the stages of a group, so the last to be recorded is not known.
    others = {name for name in FAN if name != "ppo@2"}
    until(lambda: others <= recorded(driver.folder / "dvc.lock"), "the others were recorded", seconds=120)
    family = [child.pid for child in psutil.Process(running.pid).children(recursive=True)]
    family.append(int((driver.folder / "child.pid").read_text()))
    assert stage.pid in family
    running.kill()
    running.communicate()
    until(lambda: gone(*family), "no orphan is left, the server included")
    driver.workspace.ran()
    driver.workspace.behave()
    found = verdicts(driver.run("-j", "2"))
    assert driver.workspace.ran() == ["ppo@2", "report"]
    assert {found[name] for name in ("data", "train", "ppo@1", "ppo@3", "ppo@4")} == {"Cached"}
    assert driver.workspace.status() == {}


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_children(driver: Driver, number: signal.Signals) -> None:
    driver.workspace.behave(train={"sleep": 600, "child": True})
    running, stage = driver.waiting_for("train")
    child = int((driver.folder / "child.pid").read_text())
    running.send_signal(number)
    until(lambda: gone(stage.pid, child), "the stage and its child ended")
    running.communicate(timeout=60)
    assert running.returncode not in (0, 1, 2)
    driver.workspace.behave()
    driver.run()
    assert driver.workspace.status() == {}


@pytest.mark.fault
def test_cancelling_in_the_user_interface_stops_the_children(driver: Driver, server: str) -> None:
    from prefect.states import Cancelling

    driver.workspace.behave(train={"sleep": 600, "child": True})
    running, stage = driver.waiting_for("train")
    with client(server) as api:
        run = max(api.read_flow_runs(), key=lambda run: run.created)
        api.set_flow_run_state(run.id, Cancelling())  # what the button does
        until(lambda: gone(stage.pid), "the stage ended")
        printed, _ = running.communicate(timeout=60)
        assert running.returncode == 130, printed
        assert api.read_flow_run(UUID(str(run.id))).state.is_cancelled()


@pytest.mark.fault
@pytest.mark.slow
def test_a_second_driver_says_who_is_at_work_or_waits(driver: Driver) -> None:
    driver.workspace.behave(train={"sleep": 8})
    running, _ = driver.waiting_for("train")
    told = driver.run(code=2)
    assert f"pid {running.pid}" in told
    assert "--wait" in told
    waiting = driver.start("--wait")
    printed, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, printed
    assert set(verdicts(printed).values()) == {"Cached"}, "it began after the first had ended"
    running.communicate()
    assert running.returncode == 0


@pytest.mark.fault
def test_the_run_of_a_killed_driver_is_marked_as_crashed(driver: Driver, server: str) -> None:
    driver.workspace.behave(train={"sleep": 600})
    running, _ = driver.waiting_for("train")
    with client(server) as api:
        run = max(api.read_flow_runs(), key=lambda run: run.created)
        running.kill()
        running.communicate()
        assert api.read_flow_run(run.id).state.is_running()
        driver.workspace.behave()
        driver.run()
        assert api.read_flow_run(run.id).state.is_crashed()


def test_single_item_runs_the_target_alone(driver: Driver) -> None:
    driver.run()
    driver.workspace.params(lr=2)
    driver.workspace.ran()
    assert verdicts(driver.run("report", "--single-item", "--force")) == {"report": "Completed"}
    assert driver.workspace.ran() == ["report"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "nowhere"),
        (["nowhere", "--profile", "smoke"], "nowhere"),
        (["-j", "0"], "-j 0 leaves nothing to run with"),
        (["--profile", "mimi"], "did you mean mini?"),
        (["--launcher", "srun {gpu}"], "gpu"),
        (["--address", "auto"], "give --runner ray with it"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(driver: Driver, arguments: list[str], expected: str) -> None:
    before = (driver.folder / "params.yaml").read_text()
    told = driver.run(*arguments, code=2)
    last = told.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert expected in last
    assert "Traceback" not in told
    assert (driver.folder / "params.yaml").read_text() == before
    assert not (driver.folder / "out").exists()
