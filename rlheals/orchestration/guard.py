"""Runs one command so that nothing of it is left when its caller dies, even by ``kill -9``.

The caller starts this file as a program, ``python -I -S guard.py ALIVE PARENT EXTRA LIMIT COMMAND...``, in a session of
its own, and keeps the other end of the socket pair that the descriptor ALIVE belongs to. The guard

- is a "child subreaper" (prctl(2)): whatever the command leaves behind, in whatever session, becomes its child;
- kills every descendant when ALIVE reaches its end or the process PARENT is gone, because then nobody waits for them;
- on SIGTERM, or after LIMIT seconds, sends SIGTERM to every descendant, and kills after `GRACE` seconds those that are
  still there;
- gives what the command left running `LINGER` seconds to end, then ends it the same way: the command is the stage;
- says on ALIVE how the command ended, and ends with its exit code (128 + n for signal n).

The command gets SIGKILL from the kernel should the guard itself be killed. Only the standard library is used and
nothing heavy is imported, so a guard starts in about 30 ms and needs no site-packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

GRACE = 1.0
"""Seconds between asking (SIGTERM) and killing (SIGKILL)."""
SLACK = 0.3
"""Seconds more that a caller gives the guard before it helps."""
LINGER = 0.5
"""Seconds that what a finished command left running has to end by itself."""
MARK = "RLHEALS_GUARDED"
"""Variable in the environment of everything under one guard, different for each guard."""
EXTRA = 3
"""Number under which the command finds the one more descriptor it may be given; shells take no more than one digit."""
CANNOT_START, NOT_FOUND = 126, 127
"""Exit codes for a command that cannot be started, as a shell gives them."""
_PROGRAM = str(Path(__file__).absolute())
_LONGEST_SLEEP = 86400.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_ASKED_TO_STOP = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


def descendants(root: int) -> dict[int, int]:
    """Process group of every process below ``root``, by process id."""
    groups: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - a hundred thousand Path objects are felt here
        if entry.isdigit() and (status := _parent_and_group(int(entry))):
            children.setdefault(status[0], []).append(int(entry))
            groups[int(entry)] = status[1]
    found: dict[int, int] = {}
    pending = list(children.get(root, ()))
    while pending:
        pid = pending.pop()
        found[pid] = groups[pid]
        pending += [child for child in children.get(pid, ()) if child not in found]
    return found


def _parent_and_group(pid: int) -> tuple[int, int] | None:
    """Parent and process group of a process; None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name in parentheses may hold anything, parentheses included.
    fields = text.rpartition(b")")[2].split()
    # A process whose first thread has ended is shown as a zombie as well, but has threads to be killed.
    return None if fields[0] in b"ZX" and int(fields[17]) <= 1 else (int(fields[1]), int(fields[2]))


def kill_below(root: int) -> bool:
    """Send SIGKILL once to every descendant of ``root``; whether there was one.

    Whole groups are signalled: the kernel does that in one step, so a process that forks all the time cannot slip
    through between the listing and the signal.
    """
    found = descendants(root)
    for group in set(found.values()) - {_group_of(root), os.getpgrp()}:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    for pid in found:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return bool(found)


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


def kill_marked(mark: str) -> None:
    """Send SIGKILL to every process whose environment carries this mark: for what outlived a killed guard."""
    wanted = f"{MARK}={mark}".encode()
    for entry in os.listdir("/proc"):  # noqa: PTH208 - as above
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if wanted in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    os.kill(int(entry), signal.SIGKILL)


class Guarded:
    """A command that runs under a guard, as its caller holds it.

    Attributes:
        process: the guard; `returncode` tells how the command ended.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: str,
        environment: Mapping[str, str],
        output: int,
        extra: int | None = None,
        limit: float = math.inf,
        grace: float = GRACE,
    ) -> None:
        """Start ``command``.

        Args:
            command: argument vector; its program is looked for in the environment's PATH.
            cwd: working directory.
            environment: the whole environment of the command.
            output: descriptor that gets its standard output and standard error.
            extra: descriptor that the command gets as number `EXTRA`.
            limit: seconds after which it is ended, whatever its caller is busy with.
            grace: seconds between asking it to end and killing it.

        Raises:
            OSError: the guard cannot be started, for example because ``cwd`` does not exist.
        """
        import subprocess

        self._grace = grace
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}-{id(self)}"
        self._alive, alive = socket.socketpair()
        self._verdict: int | None = None
        arguments = map(str, (alive.fileno(), os.getpid(), -1 if extra is None else extra, limit, grace))
        try:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-I", "-S", _PROGRAM, *arguments, *command],
                cwd=cwd,
                env={**environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(alive.fileno(),) if extra is None else (alive.fileno(), extra),
                start_new_session=True,
            )
        except BaseException:
            self._alive.close()
            raise
        finally:
            alive.close()

    def __enter__(self) -> Guarded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def returncode(self) -> int | None:
        """Exit code of the command, negative for a signal; None while anything of it runs.

        Taken from what the guard said: where SIGCHLD is ignored, which a process inherits from whoever started it,
        the system forgets exit codes and `subprocess` takes every child for a success.
        """
        if self.process.poll() is None:
            return None
        if self._verdict is None:
            with contextlib.suppress(OSError, ValueError):
                self._verdict = int(self._alive.recv(32, socket.MSG_DONTWAIT))
        return self._verdict if self._verdict is not None else self.process.returncode or -signal.SIGKILL

    def terminate(self) -> None:
        """Ask it to end; returns at once. The guard kills after the grace what is still there."""
        self.process.terminate()

    def stop(self) -> int:
        """End it, by asking and after the grace by force, and return its exit code as `returncode` does."""
        try:
            if self.process.poll() is None:
                self.terminate()
                self._wait(self._grace + SLACK)
        finally:
            self.kill()
        code = self.returncode
        return -signal.SIGKILL if code is None else code

    def kill(self) -> None:
        """End it now; when this returns, nothing of it runs (save processes stuck in the kernel)."""
        with contextlib.suppress(OSError):
            self._alive.shutdown(socket.SHUT_WR)
        if not self._wait(0.3):
            # A guard that is slow goes on by itself; only one that cannot (it is suspended) is helped, and killed last.
            for _ in range(50):
                if not kill_below(self.process.pid):
                    self.process.kill()
                    break
                time.sleep(0.01)
            self._wait(0.3)
        if self.returncode is not None and self._verdict is None:
            kill_marked(self._mark)
        self._alive.close()

    def _wait(self, seconds: float) -> bool:
        import subprocess

        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


class _Guard:
    """The program's state: what it watches, and how the command ended."""

    def __init__(self, alive: int, parent: int) -> None:
        os.set_inheritable(alive, False)
        self._lifelines = {alive}
        self.abandoned = False
        self.stopping = False
        self.status: int | None = None
        self._wake, waker = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in (*_ASKED_TO_STOP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        # The pipe tells of the caller's end at once, unless a fork of the caller still holds its other end.
        with contextlib.suppress(OSError):
            self._lifelines.add(os.pidfd_open(parent))
        self.abandoned = os.getppid() != parent
        self._poll = select.poll()
        for descriptor in (self._wake, *self._lifelines):
            self._poll.register(descriptor, select.POLLIN)

    def run(self, command: list[str], extra: int, limit: float, grace: float) -> int:
        """Start the command, see it and all its descendants to their end, and return its exit code as `returncode`."""
        if self.abandoned:
            return -signal.SIGKILL
        child = _start(command, extra)
        self._wait(child, limit, lambda: self.stopping or self.status is not None)
        if not self.stopping and self.status is not None:
            self._wait(child, LINGER, lambda: self.stopping)
        self._ask(child, grace)
        pause = 0.002
        while self._reap(child):
            kill_below(os.getpid())
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return os.waitstatus_to_exitcode(self.status or 0)

    def _ask(self, child: int, grace: float) -> None:
        told: set[int] = set()
        end = time.monotonic() + grace
        while not self.abandoned and self._reap(child) and (left := end - time.monotonic()) > 0:
            for pid in set(descendants(os.getpid())) - told:
                told.add(pid)
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGTERM)
            self._wait(child, min(left, 0.1), lambda: False)

    def _wait(self, child: int, seconds: float, enough: Callable[[], bool]) -> None:
        """Sleep until no descendant is left, the caller is gone, it is ``enough``, or the time is over."""
        end = time.monotonic() + seconds
        while self._reap(child) and not self.abandoned and not enough():
            left = end - time.monotonic()
            if left <= 0:
                return
            for descriptor, _ in self._poll.poll(1000 * min(left, _LONGEST_SLEEP) + 1):
                if descriptor in self._lifelines:
                    self.abandoned = True
                else:
                    self.stopping |= not _ASKED_TO_STOP.isdisjoint(os.read(self._wake, 4096))

    def _reap(self, child: int) -> bool:
        """Collect what has ended; whether any descendant is left."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                if pid == child:
                    self.status = status
        except ChildProcessError:
            return False


def _start(command: list[str], extra: int) -> int:
    """Fork and execute the command in a process group of its own."""
    guard = os.getpid()
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        return child
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        # What is ignored stays so in the new program; a shell that starts the driver in the background ignores some.
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if signal.getsignal(number) is not signal.SIG_DFL:
                signal.signal(number, signal.SIG_DFL)
        if extra >= 0:
            os.set_inheritable(extra, False)
            # Given a number of its own first: a descriptor duplicated onto itself would stay closed to the command.
            os.dup2(os.dup(extra), EXTRA)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == guard:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be started: {error.strerror}.\n")
        sys.stderr.flush()
        os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_START)
    finally:
        os._exit(CANNOT_START)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


def _main(alive: int, parent: int, extra: int, limit: float, grace: float, command: list[str]) -> NoReturn:
    code = _Guard(alive, parent).run(command, extra, limit, grace)
    with contextlib.suppress(OSError):
        os.write(alive, b"%d" % code)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]), sys.argv[6:])
