"""Temporary files and folders that one run at a time may write.

The lock is one of the system on the file or folder itself: it ends with the process, so a killed run leaves nothing to
tidy up, and no lock file lies about.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rlheals.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_TRIES = 100  # some network file systems give a file another number each time it is looked at


def claim(path: Path, place: Path, *, folder: bool = False) -> int:
    """Make ``path`` where there is none, open it and lock it; the lock is held until the descriptor is closed.

    Where the file system has no locks it is opened all the same.

    Args:
        path: the temporary file or folder; what it holds is left as it is.
        place: what it is to become, for the message.
        folder: it is a folder.

    Raises:
        UserError: another run holds it.
    """
    for _ in range(_TRIES - 1):
        descriptor = _locked(path, place, folder)
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # the run before removed or renamed it after it was opened here
    return _locked(path, place, folder)


@contextmanager
def claimed(path: Path, place: Path, *, folder: bool = False) -> Iterator[None]:
    """`claim` for as long as the body runs; also what became of ``path`` by a rename is let go of then."""
    descriptor = claim(path, place, folder=folder)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process that lives on would keep the lock
        os.close(descriptor)


def _locked(path: Path, place: Path, folder: bool) -> int:
    descriptor = _opened(path, folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another run is writing {place}; wait for it to end or choose another place.") from None
    except OSError:
        pass  # no locks here
    return descriptor


def _opened(path: Path, folder: bool) -> int:
    if not folder:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    while True:
        path.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another run removed it in between
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
