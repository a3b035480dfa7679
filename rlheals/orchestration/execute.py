"""Run one job: its commands, log, progress, time limit and stop, on any machine that sees the same files.

Knows neither DVC nor Prefect. Every command runs under a `guard`, so nothing of a job outlives the process that called
`execute`, however that ended. One loop per job reads the output and watches the clock, so a silent child is stopped on
time and one that floods its output does not block.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import selectors
import shlex
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rlheals.errors import UserError, disk_errors
from rlheals.orchestration.guard import EXTRA, GRACE, SLACK, Guarded
from rlheals.orchestration.job import Job, JobResult, ProgressLine

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import FileIO

PROGRESS_FD, PROGRESS_ID, PROGRESS_FILE = "RLHEALS_PROGRESS_FD", "RLHEALS_PROGRESS_ID", "RLHEALS_PROGRESS_FILE"
"""Variables of the progress protocol; `rlheals.progress` says what they mean."""
_TICK = 0.25
_REPORT_EVERY = 1.0
_CHUNK = 1 << 14
_LONGEST_LINE = 1 << 16
_PROGRESS_TAIL = 1 << 14


LAUNCHED_GRACE = 10.0
"""Seconds a launcher gets to end what it has started on another machine before it is killed."""


class _Registry:
    """The jobs of this process, so that one call ends all of them."""

    def __init__(self) -> None:
        # Re-entrant: `stop_all` is called from signal handlers, which may interrupt the thread that holds it.
        self.lock = threading.RLock()
        self.running: set[Guarded] = set()
        self.stopping = False


_registry = _Registry()


def stop_all(wait: float = 2.0) -> bool:
    """Stop every job that runs in this process; later `execute` calls return at once until `reset_stop`.

    Safe from any thread and from a signal handler, also while a job's own thread is busy in a callback.

    Args:
        wait: seconds to wait for the jobs' processes to be gone; they have `guard.GRACE` before they are killed.

    Returns:
        Whether all of them are gone.
    """
    _registry.stopping = True
    with _registry.lock:
        running = list(_registry.running)
    for guarded in running:
        guarded.terminate()
    end = time.monotonic() + wait
    while any(guarded.process.poll() is None for guarded in running):
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)
    return True


def reset_stop() -> None:
    """Let `execute` run jobs again after `stop_all`."""
    _registry.stopping = False


def execute(
    job: Job,
    *,
    on_line: Callable[[str], None],
    on_progress: Callable[[ProgressLine], None],
    stop: threading.Event | None = None,
) -> JobResult:
    """Run the commands of ``job`` one after the other, up to the first that fails.

    Args:
        job: what to run; its log is appended to, its progress file starts empty.
        on_line: called with every line of output, without its end; standard error is merged into standard output.
        on_progress: called with the newest progress, at most once a second and once at the end.
        stop: ends the job when set; looked at every quarter of a second.

    Returns:
        How it ended. A job that was stopped or ran out of time never has return code 0.

    Raises:
        UserError: the working directory does not exist on this machine, or the log cannot be written.
        Exception: whatever a callback raises; the job is ended first.
    """
    if _registry.stopping or (stop is not None and stop.is_set()):
        return JobResult(-signal.SIGTERM, 0.0, stopped=True)
    if not Path(job.cwd).is_dir():
        raise UserError(
            f"{job.name}: its working directory {job.cwd} does not exist on {socket.gethostname()}: stages run only "
            "where the repository is found under the same path; share it with that machine."
        )
    log = Path(job.log)
    with disk_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        progress = os.open(job.progress, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        with log.open("ab", buffering=0) as file:
            return _Attempt(job, file, progress, on_line, on_progress, stop).run()
    finally:
        os.close(progress)


def read_progress(path: Path | str) -> ProgressLine | None:
    """The newest complete and valid line of a progress file; None when there is none (yet).

    Lines that are half written or not of the protocol are passed over.
    """
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _PROGRESS_TAIL))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    return next((line for text in reversed(lines) if (line := _parse_progress(text))), None)


def _parse_progress(text: bytes) -> ProgressLine | None:
    try:
        record = json.loads(text)
        line = ProgressLine(**{field: record[field] for field in ProgressLine.__dataclass_fields__ if field in record})
    except (ValueError, TypeError, RecursionError):
        return None
    words = all(isinstance(word, str) for word in (line.label, line.unit, line.note))
    counts = all(type(count) is int and count >= 0 for count in (line.done, line.total))
    eta = line.eta is None or (type(line.eta) in (int, float) and math.isfinite(line.eta) and line.eta >= 0)
    return line if words and counts and eta else None


def clear_outputs(job: Job) -> None:
    """Remove what a failed attempt at ``job`` left: its outputs, files or folders; links are removed, not followed.

    Raises:
        UserError: an output is the working directory or holds it, or cannot be removed.
    """
    for output in map(Path, job.outputs):
        itself = output.parent.resolve() / output.name if output.name != ".." else output.resolve()
        if Path(job.cwd).resolve().is_relative_to(itself):
            raise UserError(f"{job.name}: the output {output} holds the repository; declare a path below it.")
        try:
            if output.is_dir() and not output.is_symlink():
                shutil.rmtree(output)
            else:
                output.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{job.name}: {output} of the failed attempt cannot be removed ({error.strerror}); "
                "remove it and run the same command again."
            ) from error


class _Attempt:
    """One attempt at a job, over all its commands."""

    def __init__(
        self,
        job: Job,
        log: FileIO,
        progress: int,
        on_line: Callable[[str], None],
        on_progress: Callable[[ProgressLine], None],
        stop: threading.Event | None,
    ) -> None:
        self._job, self._log, self._progress, self._stop = job, log, progress, stop
        self._on_line, self._on_progress = on_line, on_progress
        self._environment = _environment(job, progress)
        self._began = self._reported = time.monotonic()
        self._newest: ProgressLine | None = None
        self._force_at: float | None = None
        self._forced = False
        self._last_line = ""
        self._stopped = self._timed_out = False
        self._grace = LAUNCHED_GRACE if job.launcher else GRACE

    def run(self) -> JobResult:
        """Run the commands up to the first that fails."""
        code = 0
        for command in self._job.commands:
            code = self._command((*self._job.launcher, *command))
            if code or self._ending:
                break
        self._report()
        if self._ending and code == 0:
            code = -signal.SIGTERM
        seconds = time.monotonic() - self._began
        return JobResult(code, seconds, self._timed_out, self._stopped, self._last_line)

    @property
    def _ending(self) -> bool:
        return self._timed_out or self._stopped

    def _command(self, command: tuple[str, ...]) -> int:
        self._write(f"$ {shlex.join(command)}\n")
        guarded, output = self._start(command)
        with selectors.DefaultSelector() as selector:
            try:
                selector.register(output, selectors.EVENT_READ)
                self._watch(guarded, output, selector)
                return guarded.stop()
            except BaseException:
                guarded.stop()
                raise
            finally:
                os.close(output)
                with _registry.lock:
                    _registry.running.discard(guarded)

    def _start(self, command: tuple[str, ...]) -> tuple[Guarded, int]:
        """The guarded command and the descriptor its output is read from, without blocking."""
        output, theirs = os.pipe()
        os.set_blocking(output, False)
        extra = None if self._job.launcher else self._progress
        # The guard knows the limit too, for a callback may be busy when the time is over.
        limit = math.inf if self._job.timeout is None else self._began + self._job.timeout - time.monotonic()
        try:
            # Under the lock, so that `stop_all` either sees the job or is seen by it.
            with _registry.lock:
                guarded = Guarded(
                    command,
                    cwd=self._job.cwd,
                    environment=self._environment,
                    output=theirs,
                    extra=extra,
                    limit=limit,
                    grace=self._grace,
                )
                _registry.running.add(guarded)
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(theirs)
        return guarded, output

    def _watch(self, guarded: Guarded, output: int, selector: selectors.BaseSelector) -> None:
        """Pass its output on until it has ended; end it when it is time."""
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
        rest = ""
        while True:
            gone = guarded.process.poll() is not None
            ready = bool(selector.select(0 if gone else self._pause()))
            chunk = os.read(output, _CHUNK) if ready else b""
            *lines, rest = (rest + decoder.decode(chunk, final=ready and not chunk)).split("\n")
            if len(rest) > _LONGEST_LINE:
                lines, rest = [*lines, rest], ""
            self._emit(lines, guarded)
            self._look(guarded)
            # A process that got away from the guard may hold the pipe open: its end is not waited for.
            if (ready and not chunk) or (gone and not ready):
                break
        self._emit([rest] if rest else [], guarded)

    def _pause(self) -> float:
        """Seconds the loop may sleep."""
        times = [self._force_at] if self._force_at is not None else []
        if self._job.timeout is not None and not self._ending:
            times.append(self._began + self._job.timeout)
        return max(0.0, min([_TICK, *(at - time.monotonic() for at in times)]))

    def _look(self, guarded: Guarded) -> None:
        """Stop the job if its time is over or somebody wants it; report its progress if that is due."""
        now = time.monotonic()
        if not self._ending:
            if _registry.stopping or (self._stop is not None and self._stop.is_set()):
                self._end(guarded, "stopped because the run is ending", stopped=True)
            elif self._job.timeout is not None and now - self._began >= self._job.timeout:
                self._end(guarded, f"stopped at its time limit of {self._job.timeout:g} s", timed_out=True)
        elif self._force_at is not None and now >= self._force_at:
            self._force_at, self._forced = None, True
            guarded.kill()
        if now - self._reported >= _REPORT_EVERY:
            self._report()

    def _end(self, guarded: Guarded, why: str, *, stopped: bool = False, timed_out: bool = False) -> None:
        self._stopped, self._timed_out = stopped, timed_out
        self._force_at = time.monotonic() + self._grace + SLACK
        guarded.terminate()
        message = f"{self._job.name} {why}"
        self._write(f"{message}\n")
        self._on_line(message)

    def _emit(self, lines: list[str], guarded: Guarded) -> None:
        if not lines:
            return
        self._write("".join(f"{line}\n" for line in lines))
        self._last_line = next((text for line in reversed(lines) if (text := line.strip())), self._last_line)
        for line in lines:
            # A slow callback must not keep the clock from being looked at, nor the job from ending.
            if self._forced:
                return
            self._on_line(line.replace("\0", "\N{REPLACEMENT CHARACTER}"))
            self._look(guarded)

    def _report(self) -> None:
        self._reported = time.monotonic()
        newest = read_progress(self._job.progress)
        if newest is not None and newest != self._newest:
            self._newest = newest
            self._on_progress(newest)

    def _write(self, text: str) -> None:
        with disk_errors(Path(self._job.log)):
            rest = text.encode(errors="replace")
            while rest:
                rest = rest[self._log.write(rest) :]


def _environment(job: Job, progress: int) -> dict[str, str]:
    """The whole environment of a job's commands."""
    protocol = {PROGRESS_FD, PROGRESS_ID, PROGRESS_FILE}
    # Without it Python holds lines back when its output is a pipe, and those of a killed stage are lost.
    ours = {"PYTHONUNBUFFERED": "1"} | {name: text for name, text in os.environ.items() if name not in protocol}
    if job.launcher:
        ours[PROGRESS_FILE] = job.progress
    else:
        status = os.fstat(progress)
        ours |= {PROGRESS_FD: str(EXTRA), PROGRESS_ID: f"{status.st_dev}:{status.st_ino}"}
    return ours | job.environment
