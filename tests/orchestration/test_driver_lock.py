"""One driver at a time: refused, waited for, freed by the death of its holder, and told in one sentence."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from rlheals.errors import UserError
from rlheals.orchestration import driver_lock as module
from rlheals.orchestration.driver_lock import LOCK, RECORD, Holder, driver_lock, mend_marks

if TYPE_CHECKING:
    from pathlib import Path

HOLD = """\
import subprocess, sys, time
from pathlib import Path
from rlheals.orchestration.driver_lock import driver_lock

with driver_lock(Path(sys.argv[1])) as lock:
    lock.annotate(flow_run_id="flow-1")
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
    print("holding", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / ".dvc").mkdir()
    return tmp_path


@contextmanager
def other_driver(root):
    """Another process that holds the lock and has a child of its own; killed with that child at the end."""
    command = [sys.executable, "-c", HOLD, str(root)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout.readline() == "holding\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_the_record_says_who_holds_it_and_goes_with_the_lock(root):
    with driver_lock(root) as lock:
        record = json.loads((root / RECORD).read_text())
        assert (record["pid"], record["host"], record["flow_run_id"]) == (os.getpid(), socket.gethostname(), "")
        lock.annotate(flow_run_id="abc")
        assert json.loads((root / RECORD).read_text()) == record | {"flow_run_id": "abc"}
        assert lock.previous() is None
    assert not (root / RECORD).exists()
    with driver_lock(root) as lock:
        assert lock.previous() is None


def test_an_error_frees_the_lock(root):
    with pytest.raises(ZeroDivisionError), driver_lock(root):
        raise ZeroDivisionError
    with driver_lock(root) as lock:
        assert lock.previous() is None


def test_a_second_driver_is_told_who_holds_the_lock(root):
    with other_driver(root) as process:
        with pytest.raises(UserError) as raised, driver_lock(root):
            pass
        message = str(raised.value)
        assert f"pid {process.pid} on {socket.gethostname()}" in message
        assert "since 20" in message
        assert "driver_lock" in message, "the command"
        assert "pass --wait, or stop it" in message
        assert json.loads((root / RECORD).read_text())["pid"] == process.pid, "the refused one leaves the record alone"


def test_the_same_process_cannot_drive_twice(root):
    with driver_lock(root), pytest.raises(UserError, match=f"pid {os.getpid()}"), driver_lock(root):
        pass


def test_waiting_says_so_once_and_ends_with_the_other(root, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    said: list[str] = []
    with other_driver(root) as process:
        timer = threading.Timer(0.5, process.stdin.close)
        timer.start()
        start = time.monotonic()
        with driver_lock(root, wait=True, say=said.append) as lock:
            waited = time.monotonic() - start
            assert lock.previous() is None, "the other one ended in order"
        timer.join()
    assert 0.3 < waited < 10
    assert len(said) == 1
    assert said[0].startswith(f"waiting for another run to end: pid {process.pid} on ")


def test_a_cancelled_run_stops_waiting(root, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    polls = iter([None, None, ZeroDivisionError])

    def check():
        if (error := next(polls)) is not None:
            raise error

    with other_driver(root) as process:
        waiting = driver_lock(root, wait=True, say=lambda _: None, check=check)
        with pytest.raises(ZeroDivisionError), waiting:
            pass
        assert json.loads((root / RECORD).read_text())["pid"] == process.pid
    assert next(polls, "called each time") == "called each time"


def leave_dead(root):
    """The record of a driver that was killed."""
    dead = replace(Holder.this_process(), pid=4_000_000, flow_run_id="flow-1")
    (root / LOCK).parent.mkdir(exist_ok=True)
    (root / RECORD).write_text(json.dumps(vars(dead)))
    return dead


def test_a_dead_run_is_left_for_the_next_driver_by_one_that_only_tidies(root):
    dead = leave_dead(root)
    with driver_lock(root, say=lambda _: None, hand_back=True):
        record = json.loads((root / RECORD).read_text())
        assert (record["pid"], record["flow_run_id"]) == (os.getpid(), "flow-1"), "though it be killed itself"
    with driver_lock(root, say=lambda _: None) as lock:
        assert lock.previous() == dead
        lock.annotate(flow_run_id="flow-2")
    assert not (root / RECORD).exists()
    with driver_lock(root, hand_back=True) as lock:
        assert lock.previous() is None
    assert not (root / RECORD).exists()


@pytest.mark.parametrize(("content", "goes"), [('{"write": {"a": ', True), ("", True), ('{"write": {}}', False)])
def test_marks_of_dvc_that_were_cut_short_go(tmp_path, caplog, content, goes):
    mend_marks(tmp_path)
    (tmp_path / "rwlock").write_text(content)
    mend_marks(tmp_path)
    assert (tmp_path / "rwlock").exists() is not goes
    assert ("was cut short" in caplog.text) is goes


@pytest.mark.fault
def test_a_killed_driver_frees_the_lock_though_its_children_live_on(root):
    said: list[str] = []
    with other_driver(root) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with driver_lock(root, say=said.append) as lock:
            dead = lock.previous()
    assert dead is not None
    assert (dead.pid, dead.flow_run_id) == (process.pid, "flow-1")
    assert len(said) == 1
    assert "ended without tidying up" in said[0]
    with driver_lock(root) as lock:
        assert lock.previous() is None, "told once"


def held_by(root: Path, holder: Holder | None) -> str:
    """What a driver is told while somebody holds the lock with this record."""
    (root / LOCK).parent.mkdir(exist_ok=True)
    with (root / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if holder:
            (root / RECORD).write_text(json.dumps(vars(holder)))
        with pytest.raises(UserError) as raised, driver_lock(root):
            pass
    return str(raised.value)


def test_the_holders_host_is_named(root):
    holder = replace(Holder.this_process(), host="node-7", pid=4_000_000)
    assert "or stop it on node-7." in held_by(root, holder)


def test_a_holder_without_a_record_is_just_starting(root):
    assert "just starting" in held_by(root, None)


def test_a_lock_kept_by_the_child_of_a_dead_driver_is_explained(root):
    gone = replace(Holder.this_process(), pid=4_194_304 + 1)  # above the highest pid Linux gives
    message = held_by(root, gone)
    assert "a run that is gone" in message
    assert "fuser" in message


@pytest.mark.parametrize("content", ["", "[1]", '{"pid": 3}', "\x00"])
def test_a_damaged_record_stops_nobody(root, content):
    (root / LOCK).parent.mkdir()
    (root / RECORD).write_text(content)
    with driver_lock(root) as lock:
        assert lock.previous() is None


def test_a_folder_without_dvc_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no DVC project"), driver_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told(root, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with pytest.raises(UserError, match="its file system has no locks"), driver_lock(root):
        pass
