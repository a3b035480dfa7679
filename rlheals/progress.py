"""Progress bars with an ETA for anything over a few seconds, and plain log lines where there is no terminal.

Whoever started the process may ask for the same figures as JSON lines, the progress protocol: one object a line with
``label``, ``done``, ``total``, ``unit``, ``note`` and ``eta`` (seconds left or null), appended to the descriptor that
``RLHEALS_PROGRESS_FD`` numbers, or to the file that ``RLHEALS_PROGRESS_FILE`` names. With ``RLHEALS_PROGRESS_ID``
(device:inode) the descriptor is used only if it is still that file: numbers are used again by processes in between.
"""

from __future__ import annotations

import json
import os
import sys
import time

_LINES_EVERY = 0.5
_LONGEST_TEXT = 200


class Progress:
    """Counts steps; redraws one line on a terminal, or prints a line every ``every`` seconds to a log.

    Follows the progress protocol too where the environment asks for it: a line for the start, at most two a second,
    and one when the last step is done. Trouble with that ends the reporting, never the work.
    """

    def __init__(self, label: str, total: int, unit: str = "step", every: float = 10.0, start: int = 0) -> None:
        self.label, self.total, self.unit, self.every = label, total, unit, every
        self.done = self._first = start
        self._begin = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._lines = _Lines()
        self._lines.write(self, self._begin, "", None)

    def update(self, steps: int = 1, note: str = "") -> None:
        """Advance by ``steps`` and show ``note`` (say, the loss) behind the ETA."""
        self.done += steps
        now = time.monotonic()
        elapsed = now - self._begin
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        left = (self.total - self.done) / rate if rate else 0.0
        self._lines.write(self, now, note, max(left, 0.0) if rate else None)
        if self.done < self.total and now - self._last < (0.2 if self._terminal else self.every):
            return
        self._last = now
        line = (
            f"{self.label}: {self.done}/{self.total} {self.unit}s, {100 * self.done / max(self.total, 1):.0f} %, "
            f"{elapsed:.0f} s, ETA {left:.0f} s {note}"
        ).rstrip()
        end = "\r" if self._terminal and self.done < self.total else "\n"
        print(f"{line:<100}" if self._terminal else line, end=end, file=sys.stderr, flush=True)


class _Lines:
    """Writes the lines of the protocol to wherever the environment says, or nowhere."""

    def __init__(self) -> None:
        self._descriptor, self._path = _target()
        self._next = 0.0
        self._finished = False

    def write(self, progress: Progress, now: float, note: str, eta: float | None) -> None:
        """Append a line if one is due; the first call and the one that reaches the total always are."""
        if self._descriptor is None and self._path is None:
            return
        last = progress.done >= progress.total and not self._finished
        if now < self._next and not last:
            return
        self._next, self._finished = now + _LINES_EVERY, self._finished or last
        record = {
            "label": progress.label[:_LONGEST_TEXT],
            "done": progress.done,
            "total": progress.total,
            "unit": progress.unit[:_LONGEST_TEXT],
            "note": note[:_LONGEST_TEXT],
            "eta": None if eta is None else round(eta, 1),
        }
        try:
            self._append(f"{json.dumps(record)}\n".encode())
        except (OSError, ValueError):
            self._descriptor = self._path = None

    def _append(self, line: bytes) -> None:
        """Append in one call, so that lines of several writers do not mix."""
        if self._path is None:
            os.write(self._descriptor or 0, line)
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def _target() -> tuple[int | None, str | None]:
    """Descriptor or path to write to; both None where nobody asked, or what was asked for is not there."""
    number = os.environ.get("RLHEALS_PROGRESS_FD")
    if number is None:
        return None, os.environ.get("RLHEALS_PROGRESS_FILE")
    try:
        status = os.fstat(int(number))
    except (OSError, ValueError, OverflowError):
        return None, None
    same = os.environ.get("RLHEALS_PROGRESS_ID", "") in ("", f"{status.st_dev}:{status.st_ino}")
    return (int(number), None) if same else (None, None)
