"""Progress bars with an ETA for anything over a few seconds, and plain log lines where there is no terminal."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts steps; redraws one line on a terminal, or prints a line every ``every`` seconds to a log."""

    def __init__(self, label: str, total: int, unit: str = "step", every: float = 10.0, start: int = 0) -> None:
        self.label, self.total, self.unit, self.every = label, total, unit, every
        self.done = self._first = start
        self._begin = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def update(self, steps: int = 1, note: str = "") -> None:
        """Advance by ``steps`` and show ``note`` (say, the loss) behind the ETA."""
        self.done += steps
        now = time.monotonic()
        if self.done < self.total and now - self._last < (0.2 if self._terminal else self.every):
            return
        self._last = now
        elapsed = now - self._begin
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        left = (self.total - self.done) / rate if rate else 0.0
        line = (
            f"{self.label}: {self.done}/{self.total} {self.unit}s, {100 * self.done / self.total:.0f} %, "
            f"{elapsed:.0f} s, ETA {left:.0f} s {note}"
        ).rstrip()
        end = "\r" if self._terminal and self.done < self.total else "\n"
        print(f"{line:<100}" if self._terminal else line, end=end, file=sys.stderr, flush=True)
