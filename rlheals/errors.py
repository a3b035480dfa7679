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
        # Rust writers (safetensors, polars) wrap the system error and keep only its text: "… (os error 28)".
        number = error.errno if isinstance(error, OSError) and error.errno else _system_error_number(str(error))
        if number not in causes:
            raise
        raise UserError(
            f"{path} could not be written because {causes[number]}; nothing was published: "
            "free some space or change permissions and run the same command again."
        ) from error


def _system_error_number(message: str) -> int:
    """The number in a trailing ``(os error N)``; 0 when there is none."""
    found = re.search(r"\(os error (\d+)\)", message)
    return int(found.group(1)) if found else 0
