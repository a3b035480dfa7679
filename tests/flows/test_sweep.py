"""`python -m flows.sweep` as a user runs it, against a real Prefect server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest

import flows  # noqa: F401  (sets Prefect's environment before prefect is imported)
from flows import sweep as module
from flows.server import temporary_server
from flows.sweep import slots_for
from flows.terminal import tell
from rlheals.errors import UserError
from tests.orchestration.test_sweep import TRAIN, isolation, make_project, ran, shell, state

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server of its own for the tests here."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        with temporary_server(home / "server.log") as url:
            yield url


@pytest.fixture
def project(tmp_path, monkeypatch, server):
    for name, value in isolation(tmp_path).items():
        monkeypatch.setenv(name, value)
    # Variables for the children: this process imported Prefect long ago.
    monkeypatch.setenv("PREFECT_API_URL", server)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return make_project(tmp_path / "project")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.sweep", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *arguments: str, code: int) -> str:
    """What it prints, with its exit code checked."""
    sweep = start(folder, *arguments)
    printed, _ = sweep.communicate(timeout=240)
    assert sweep.returncode == code, printed
    return printed


def artifact(url: str, key: str) -> str:
    """Data of the newest artifact with this key."""
    import httpx

    reply = httpx.get(f"{url}/artifacts/{key}/latest")
    assert reply.status_code == 200, reply.text
    return str(reply.json()["data"])


@pytest.mark.slow
def test_two_at_a_time_one_fails_and_a_repetition_runs_nothing(project, server):
    # Each waits for the other to have begun, so this ends only if both run at once.
    both = 'while [ "$(wc -l < "$RLHEALS_TEST_RAN")" -lt 2 ]; do sleep 0.1; done\n'
    first, *rest = TRAIN.splitlines(keepends=True)
    (project / "train.sh").write_text("".join([first, both, *rest]))
    before = state(project)
    grid = ("sft.learning_rate=2e-4,4e-4,0.5", "--profile", "smoke", "--name", "lr", "--gpus", "0,1")
    printed = run(project, *grid, "-j", "2", code=1)
    path = project / "reports/sweeps/lr/table.csv"
    assert str(path) in printed
    after = state(project)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before} == {
        "reports/sweeps/lr/table.csv",
        "reports/sweeps/lr/params_metrics_diff.csv",
    }
    table = pl.read_csv(path)
    assert table["verdict"].to_list() == ["Completed", "Completed", "Failed"]
    assert table["accuracy"].to_list() == [2e-4, 4e-4, None]
    assert "train@smoke" in table["message"][2]
    assert "4e-4" in artifact(server, "sweep-lr")
    assert "sft.learning_rate" in artifact(server, "sweep-lr-diff")

    run(project, grid[0].removesuffix(",0.5"), *grid[1:], code=0)
    assert pl.read_csv(path)["verdict"].to_list() == ["Cached", "Cached"]
    assert sorted(ran(project)) == ["0.0002", "0.0004"]


def test_bad_input_is_told_before_anything_runs(project):
    printed = run(project, "sft.learnig_rate=1e-4", code=2)
    assert "did you mean sft.learning_rate" in printed
    assert "Traceback" not in printed
    assert not (project / "scratch/sweeps").exists()


def test_only_what_is_told_before_anything_runs_is_bad_input(project, monkeypatch):
    def refuse(*_):
        raise UserError("reports/sweeps could not be written because the disk is full.")

    monkeypatch.chdir(project)
    monkeypatch.setattr(module, "begin", lambda: print)
    monkeypatch.setattr(module, "_run", lambda *_: [])
    monkeypatch.setattr(module, "comparison", refuse)
    late = module.sweep.fn(["sft.learning_rate=2e-4"])
    assert (late.name, tell(late)) == ("Failed", 1)
    assert "the disk is full" in late.message
    early = module.sweep.fn(["sft.learning_rate=2e-4"], jobs=0)
    assert (early.name, tell(early)) == ("BadInput", 2)
    with module.sweep_lock(project):
        assert module.sweep.fn(["sft.learning_rate=2e-4"]).name == "BadInput"


@pytest.mark.fault
def test_a_signal_stops_the_experiments_at_once(project):
    (project / "train.sh").write_text('echo $$ >> "$RLHEALS_TEST_RAN"\nsleep 300\n')
    sweep = start(project, "sft.learning_rate=2e-4")
    deadline = time.monotonic() + 120
    while not ran(project):
        assert time.monotonic() < deadline, "the stage did not start"
        assert sweep.poll() is None, sweep.stdout.read()
        time.sleep(0.1)
    os.kill(sweep.pid, signal.SIGINT)
    begun = time.monotonic()
    while Path("/proc", ran(project)[0]).exists():
        assert time.monotonic() - begun < 2.5
        time.sleep(0.05)
    printed, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, printed
    assert shell(project, "git", "status", "--porcelain").split() == ["M", "train.sh"]


@pytest.mark.parametrize(
    ("jobs", "gpus", "places", "each"), [(None, "", 1, 0), (3, "", 3, 0), (None, "01", 2, 1), (2, "01234", 2, 2)]
)
def test_gpus_are_shared_out_evenly(jobs, gpus, places, each):
    slots = slots_for(jobs, tuple(gpus))
    assert slots.jobs == slots.cpus == places
    assert len(slots.gpus) // places == each


@pytest.mark.parametrize(("jobs", "gpus"), [(0, ""), (3, "01")])
def test_impossible_numbers_of_jobs_are_told(jobs, gpus):
    with pytest.raises(UserError, match=f"-j {jobs}"):
        slots_for(jobs, tuple(gpus))
