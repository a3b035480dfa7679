from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rlheals.orchestration.guard import CANNOT_START, GRACE, NOT_FOUND, Guarded, descendants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A child, a grandchild, one in a session of its own, and an orphaned daemon; half of them are deaf to SIGTERM.
FAMILY = """
sleep 300 &
setsid sleep 300 &
sh -c 'trap "" TERM; sleep 300; sleep 300' &
(setsid sh -c 'trap "" TERM; sleep 300; sleep 300' &)
wait
"""
MEMBERS = 7


class Marked:
    """Processes that carry a variable of this test in their environment, wherever they are in the tree."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.environment = {**os.environ, "TEST_MARK": self.name}

    def alive(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"TEST_MARK={self.name}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def wait(self, enough: Callable[[int], bool], seconds: float = 60.0) -> float:
        began = time.monotonic()
        while not enough(len(self.alive())):
            assert time.monotonic() - began < seconds, self.alive()
            time.sleep(0.02)
        return time.monotonic() - began

    def gone(self, seconds: float = 30.0) -> float:
        return self.wait(lambda number: number == 0, seconds)


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().removesuffix("\n")
    return ""


@pytest.fixture
def marked() -> Iterator[Marked]:
    marked = Marked()
    yield marked
    for pid in marked.alive():
        os.kill(pid, signal.SIGKILL)


def start(marked: Marked, *command: str, output: int = 2, grace: float = GRACE) -> Guarded:
    return Guarded(command, cwd="/", environment=marked.environment, output=output, grace=grace)


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", -9), ("kill -SEGV $$", -11), ("exit 255", 255)]
)
def test_ends_as_the_command_does(marked: Marked, script: str, code: int) -> None:
    with start(marked, "sh", "-c", script) as guarded:
        shell = guarded.process.wait(10)
        assert guarded.returncode == code
        assert shell == (code if code >= 0 else 128 - code)
    assert guarded.stop() == code


@pytest.mark.parametrize(("program", "code"), [("no-such-program", NOT_FOUND), ("/etc", CANNOT_START)])
def test_a_command_that_cannot_be_started_says_so(
    marked: Marked, program: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with start(marked, program) as guarded:
        guarded.process.wait(10)
    assert guarded.returncode == code
    assert f"{program} cannot be started: " in capfd.readouterr().err


def test_a_working_directory_that_is_missing_is_refused_and_leaks_nothing() -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with pytest.raises(FileNotFoundError):
        Guarded(["true"], cwd="/no/such/folder", environment={}, output=2)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


CALLER = """
import os, sys, time
from rlheals.orchestration.guard import Guarded
if {ignore}:
    import signal
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
guarded = Guarded(sys.argv[1:], cwd="/", environment=dict(os.environ), output=2)
if {fork} and os.fork() == 0:
    # Holds the other end of the guard's socket, as children of multiprocessing's "fork" do.
    os.environ.clear()
    time.sleep(20)
    os._exit(0)
guarded.process.wait()
print(guarded.returncode)
guarded.stop()
"""


def caller(marked: Marked, script: str, *, fork: bool = False, ignore: bool = False) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CALLER.format(fork=fork, ignore=ignore), "sh", "-c", script],
        env=marked.environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
    )


@pytest.mark.fault
@pytest.mark.parametrize("fork", [False, True])
def test_kill_9_of_the_caller_leaves_nothing(marked: Marked, fork: bool) -> None:
    with caller(marked, FAMILY, fork=fork) as process:
        # The caller, its fork, the guard and the shell are marked too.
        marked.wait(lambda number: number >= MEMBERS + 2 + fork)
        forks = [pid for pid in marked.alive() if pid != process.pid and _parent(pid) == process.pid]
        process.kill()
        process.wait()
    if fork:
        guards = [pid for pid in forks if b"guard.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        others = sorted(set(forks) - set(guards))
        assert marked.wait(lambda number: number == len(others)) < 1.0
        for pid in others:
            os.kill(pid, signal.SIGKILL)
    assert marked.gone() < 1.0


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_the_exit_code_is_known_where_children_are_reaped_by_the_system(marked: Marked) -> None:
    with caller(marked, "exit 5", ignore=True) as process:
        assert process.communicate()[0] == b"5\n"


@pytest.mark.fault
def test_kill_9_of_the_guard_ends_the_command_and_stop_the_rest(marked: Marked) -> None:
    guarded = start(marked, "sh", "-c", FAMILY)
    marked.wait(lambda number: number >= MEMBERS + 1)
    command = min(descendants(guarded.process.pid))
    guarded.process.kill()
    guarded.process.wait()
    with contextlib.suppress(OSError):
        os.waitpid(command, 0)
    time.sleep(0.1)
    assert command not in marked.alive()
    assert guarded.stop() == -signal.SIGKILL
    marked.gone()


@pytest.mark.fault
def test_stop_ends_the_family_after_its_grace(marked: Marked) -> None:
    guarded = start(marked, "sh", "-c", FAMILY)
    marked.wait(lambda number: number >= MEMBERS + 1)
    began = time.monotonic()
    assert guarded.stop() == -signal.SIGTERM
    assert GRACE <= time.monotonic() - began < 60
    assert marked.alive() == []


@pytest.mark.fault
def test_stop_works_although_the_guard_is_suspended(marked: Marked) -> None:
    guarded = start(marked, "sh", "-c", FAMILY)
    marked.wait(lambda number: number >= MEMBERS + 1)
    guarded.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert guarded.stop() != 0
    assert time.monotonic() - began < 60
    assert marked.alive() == []


def test_limit(marked: Marked) -> None:
    with Guarded(["sleep", "300"], cwd="/", environment=marked.environment, output=2, limit=0.3) as guarded:
        guarded.process.wait(60)
        assert guarded.returncode == -signal.SIGTERM


@pytest.mark.parametrize("blocked", [(), (signal.SIGTERM,)])
def test_a_command_may_tidy_up_when_asked_to_stop(
    marked: Marked, tmp_path: Path, blocked: tuple[signal.Signals, ...]
) -> None:
    note = tmp_path / "note"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    tidy = f"trap 'echo tidy > {note}; exit 4' TERM; touch {note}; sleep 300 & wait"
    guarded = start(marked, "sh", "-c", tidy, grace=120)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    while not note.exists():
        time.sleep(0.01)
    began = time.monotonic()
    assert guarded.stop() == 4
    assert time.monotonic() - began < 60, "the rest of the grace was waited for"
    assert note.read_text() == "tidy\n"


def test_each_process_is_asked_to_stop_once(marked: Marked, tmp_path: Path) -> None:
    # Many programs take a second SIGTERM or Ctrl-C as "leave at once, do not tidy up".
    note = tmp_path / "note"
    note.touch()
    guarded = start(
        marked, "sh", "-c", f"trap 'echo asked >> {note}' TERM; echo up > {note}; while :; do sleep 0.1; done"
    )
    while not note.read_text():
        time.sleep(0.01)
    guarded.stop()
    assert note.read_text() == "up\nasked\n"


def test_what_a_finished_command_left_is_given_a_moment_and_then_ended(marked: Marked, tmp_path: Path) -> None:
    note = tmp_path / "note"
    with start(marked, "sh", "-c", f"(sleep 0.1; echo late > {note}) & setsid sleep 300 & exit 3") as guarded:
        assert guarded.process.wait(60) == 3
        assert marked.alive() == []
    assert note.read_text() == "late\n"


@pytest.mark.fault
def test_a_process_that_forks_all_the_time_does_not_get_away(marked: Marked, tmp_path: Path) -> None:
    script = tmp_path / "chain.py"
    script.write_text("import os\nwhile True:\n    if os.fork():\n        os._exit(0)\n")
    chain = f"{sys.executable} -I -S {script} & "
    guarded = start(marked, "sh", "-c", f"{8 * chain} sleep 300")
    time.sleep(0.5)
    began = time.monotonic()
    guarded.kill()
    assert time.monotonic() - began < 60
    assert marked.alive() == []


def test_the_command_starts_with_a_clean_slate(marked: Marked, tmp_path: Path) -> None:
    note = tmp_path / "note"
    script = f"grep -E 'Sig(Blk|Ign)' /proc/self/status > {note}; cat >> {note}"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    quit_before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # as in a shell's background
    try:
        with start(marked, "sh", "-c", script) as guarded:
            assert guarded.process.wait(10) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGQUIT, quit_before)
    masks = {name: int(mask, 16) for name, mask in (line.split() for line in note.read_text().splitlines())}
    # Numbers 32 and 33 are the C library's own, which no program may set.
    assert {name: mask & ~(0b11 << 31) for name, mask in masks.items()} == {"SigBlk:": 0, "SigIgn:": 0}


def test_descriptors_of_the_guard_do_not_reach_the_command(marked: Marked, tmp_path: Path) -> None:
    note = tmp_path / "note"
    with start(marked, "sh", "-c", f"ls /proc/self/fd > {note}") as guarded:
        assert guarded.process.wait(10) == 0
    # 0 to 2 and the one that `ls` has open on the folder.
    assert note.read_text().split() == ["0", "1", "2", "3"]


def test_one_more_descriptor_may_be_given(marked: Marked, tmp_path: Path) -> None:
    numbers = [os.open(tmp_path / str(index), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC) for index in range(12)]
    script = "echo hello >&3; ls /proc/self/fd >&3"
    for index, number in enumerate(numbers):
        with Guarded(["sh", "-c", script], cwd="/", environment=marked.environment, output=2, extra=number) as guarded:
            assert guarded.process.wait(10) == 0
        os.close(number)
        assert (tmp_path / str(index)).read_text().split() == ["hello", "0", "1", "2", "3", "4"]


def test_names_of_processes_may_hold_anything(marked: Marked, tmp_path: Path) -> None:
    program = tmp_path / "a ) b ( 7"
    program.symlink_to("/bin/sleep")
    with start(marked, str(program), "300") as guarded:
        # Between its fork and its exec the command has neither its name nor a group of its own.
        marked.wait(lambda _: program.name in map(name_of, marked.alive()))
        found = descendants(guarded.process.pid)
        assert [name_of(pid) for pid in found] == [program.name]
        assert list(found) == list(found.values())


def test_a_guard_leaves_no_descriptor(marked: Marked) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    for _ in range(5):
        with start(marked, "true") as guarded:
            assert guarded.process.wait(10) == 0
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
