"""The one exception type that reaches a user."""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where (file, key, tensor), and what to do.

    Entry points print the message after ``error:`` on standard error and exit with ``EXIT_BAD_INPUT``; no
    traceback is shown because the message must be enough to act on.
    """


_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the size limit",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
}
_PLACE = {
    errno.ENOENT: "no file or folder can be made there",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file is in the way",
    errno.EISDIR: "it is a folder",
    errno.EPERM: "the file system does not allow it",
    errno.EINVAL: "the file system does not take such a name",
    errno.ENAMETOOLONG: "a name is too long",
    errno.ELOOP: "its links go round in a circle",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write (disk full, quota, file-size limit, read-only, no such place) into a `UserError`.

    Errors about the place, which reading raises as well, count only where they are about ``path``, a folder above it
    or the hidden files beside it that become it.

    Raises:
        UserError: when the body raises one of those ``OSError``s; other errors pass through unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = system_error_number(error)
        if number in _SPACE:
            raise UserError(
                f"{path} could not be written because {_SPACE[number]}; nothing was published: "
                "free some space or change permissions and run the same command again."
            ) from error
        if number in _PLACE and isinstance(error, OSError) and _is_about(error, path):
            raise UserError(f"{path} cannot be written because {_PLACE[number]}; name another place.") from error
        raise


def _is_about(error: OSError, path: Path) -> bool:
    """Whether a system error is about writing ``path`` and not about something that was read meanwhile."""
    whole = path.absolute()
    for name in (error.filename, error.filename2):
        if isinstance(name, (str, bytes)):
            failed = Path(os.fsdecode(name)).absolute()
            beside = failed.parent == whole.parent and failed.name.startswith(f".{path.name}")
            if failed == whole or failed in whole.parents or beside:
                return True
    return False


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line of what a library says of its error, or the name of its type when it says nothing."""
    return str(error).strip().split("\n")[0][:longest] or type(error).__name__


def system_error_number(error: Exception) -> int:
    """The ``errno`` behind an error; 0 when there is none.

    Some writers keep only the text of the system's error: Rust ones (safetensors, polars) end it in ``(os error 28)``,
    and ``shutil.copytree`` collects one ``[Errno 28] …`` a file. Torch's says that a write failed, but not why; the
    disk is full in practice.
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno
    text = str(error)
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", text)
    if found:
        return int(found[1] or found[2])
    return errno.ENOSPC if "PytorchStreamWriter failed" in text or "unexpected pos" in text else 0
