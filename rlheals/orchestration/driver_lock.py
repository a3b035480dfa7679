"""One driver at a time: a file lock that the kernel frees when its holder dies, and a record of who holds it."""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import logging
import os
import shlex
import socket
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rlheals.errors import UserError, disk_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOCK = Path(".dvc/tmp/rlheals-driver.lock")
RECORD = LOCK.with_suffix(".json")
POLL_SECONDS = 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The run that holds the lock, or held it when it died.

    Attributes:
        pid: process id on ``host``.
        host: host name.
        user: login name.
        since: local time with its offset, ISO 8601.
        command: the command line.
        flow_run_id: id of its Prefect flow run; until it has one, that of a dead run whose record it found, or empty.
    """

    pid: int
    host: str
    user: str
    since: str
    command: str
    flow_run_id: str = ""

    @classmethod
    def this_process(cls) -> Holder:
        """The record of the process that calls."""
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), _user(), since, shlex.join(sys.orig_argv))

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} (user {self.user}), since {self.since}: {self.command}"

    @property
    def here(self) -> bool:
        """Whether it runs, or ran, on this host."""
        return self.host == socket.gethostname()


class DriverLock:
    """The lock while it is held, as `driver_lock` yields it."""

    def __init__(self, root: Path, previous: Holder | None) -> None:
        self._record = root / RECORD
        self._previous = previous
        # Killed before it is annotated, this run must not be the one that loses sight of the dead one.
        self._holder = replace(Holder.this_process(), flow_run_id=previous.flow_run_id if previous else "")
        self._write(self._holder)

    def previous(self) -> Holder | None:
        """The run that died with the lock in hand (killed, or its machine went down); None after an orderly end."""
        return self._previous

    def annotate(self, *, flow_run_id: str) -> None:
        """Add the id of this run's Prefect flow run to the record."""
        self._holder = replace(self._holder, flow_run_id=flow_run_id)
        self._write(self._holder)

    def end(self, *, hand_back: bool) -> None:
        """Remove the record, or put that of the dead run back."""
        if hand_back and self._previous is not None:
            self._write(self._previous)
        else:
            self._record.unlink(missing_ok=True)

    def _write(self, holder: Holder) -> None:
        partial = self._record.with_suffix(".partial")
        with disk_errors(self._record):
            partial.write_text(json.dumps(asdict(holder), indent=1) + "\n")
            partial.replace(self._record)


@contextmanager
def driver_lock(
    root: Path,
    wait: bool = False,
    say: Callable[[str], None] = print,
    *,
    check: Callable[[], None] | None = None,
    hand_back: bool = False,
) -> Iterator[DriverLock]:
    """Hold the project's driver lock: DVC's own locks are not made for two processes that drive one workspace.

    The lock is ``flock`` on `LOCK`, so a killed holder frees it. On NFS, Linux carries it to the server and it holds
    between hosts; on a mount with ``nolock`` or ``local_lock=flock`` it holds on one host only.

    Args:
        root: project folder, the one with ``.dvc`` in it.
        wait: wait for another holder to end instead of raising.
        say: receives a sentence for the user: who is waited for, and which dead run left its record.
        check: called every `POLL_SECONDS` while waiting; what it raises ends the wait, for example because the run was
            cancelled.
        hand_back: leave the record of a dead run for the next holder, who can do something about its flow run.

    Raises:
        UserError: another run holds the lock (named with its pid, host, start and command) and ``wait`` is false,
            ``root`` is no DVC project, or the file system has no locks.
    """
    root = root.resolve()
    descriptor = _open(root)
    try:
        _acquire(descriptor, root, wait, say, check)
        previous = _read(root)
        if previous is not None:
            say(f"an earlier run ended without tidying up: {previous}; its lock is free, so it is taken as dead.")
        lock = DriverLock(root, previous)
        try:
            yield lock
        finally:
            # Before the lock is free: a record that is found later means a holder that died.
            lock.end(hand_back=hand_back)
    finally:
        os.close(descriptor)


def _open(root: Path) -> int:
    """A descriptor on the lock file; children do not inherit it, so none of them keeps the lock of a dead driver."""
    if not (root / ".dvc").is_dir():
        raise UserError(f"{root} is no DVC project (it has no folder .dvc); run the command in the project's folder.")
    with disk_errors(root / LOCK):
        (root / LOCK).parent.mkdir(exist_ok=True)
        return os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def mend_marks(tmp_dir: Path) -> None:
    """Remove DVC's file of marks when a killed process has left it cut short: DVC would refuse every command.

    It is written under DVC's lock of the workspace. Hold that, or know that no DVC runs there.

    Args:
        tmp_dir: the workspace's ``.dvc/tmp``.
    """
    marks = tmp_dir / "rwlock"
    try:
        json.loads(marks.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError:
        logger.warning("%s was cut short by a process that was killed; it was removed.", marks)
        marks.unlink()


def _acquire(
    descriptor: int, root: Path, wait: bool, say: Callable[[str], None], check: Callable[[], None] | None
) -> None:
    waited_for: Holder | None = None
    told = False
    while not _try_lock(descriptor, root):
        holder = _read(root)
        if not wait:
            raise UserError(_refusal(root, holder))
        if not told or holder not in (None, waited_for):
            say(f"waiting for another run to end: {holder or 'it is just starting'}.")
            told, waited_for = True, holder
        if check is not None:
            check()
        time.sleep(POLL_SECONDS)


def _try_lock(descriptor: int, root: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise UserError(
            f"{root / LOCK} cannot be locked because its file system has no locks ({error.strerror}); "
            "mount it with locks (Lustre: -o flock) or keep the project on another file system."
        ) from error
    return True


def _refusal(root: Path, holder: Holder | None) -> str:
    if holder is None:
        return f"another run holds {root} and is just starting; wait for it or pass --wait."
    if holder.here and not Path(f"/proc/{holder.pid}").exists():
        return (
            f"a run that is gone ({holder}) left a process that still holds {root}; "
            f"`fuser {root / LOCK}` names it: stop it and run the same command again."
        )
    place = "" if holder.here else f" on {holder.host}"
    return f"another run holds {root}: {holder}; wait for it, pass --wait, or stop it{place}."


def _read(root: Path) -> Holder | None:
    """The record; None when there is none or it is not one of ours."""
    try:
        return Holder(**json.loads((root / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
