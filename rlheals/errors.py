"""The one exception type that reaches a user."""

from __future__ import annotations

import errno
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where (file, key, tensor), and what to do.

    Entry points print the message after ``error:`` on standard error and exit with ``EXIT_BAD_INPUT``; no
    traceback is shown because the message must be enough to act on.
    """


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write (disk full, quota, file-size limit, read-only) into a `UserError` naming ``path``.

    Raises:
        UserError: when the body raises one of those ``OSError``s; other errors pass through unchanged.
    """
    causes = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file would exceed the size limit",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission is denied",
    }
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = system_error_number(error)
        if number not in causes:
            raise
        raise UserError(
            f"{path} could not be written because {causes[number]}; nothing was published: "
            "free some space or change permissions and run the same command again."
        ) from error


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
