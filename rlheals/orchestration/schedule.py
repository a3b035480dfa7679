"""Which stage runs when: the loop between DVC's verdicts and whatever executes commands."""

from __future__ import annotations

import queue
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from rlheals.errors import UserError
from rlheals.orchestration.execute import read_progress
from rlheals.orchestration.job import Job, JobResult, Node, ProgressLine, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from rlheals.orchestration.slots import Slots

POLL_SECONDS = 0.25


class Stages(Protocol):
    """What the loop needs of `rlheals.orchestration.pipeline.Pipeline`."""

    def settle(self, name: str) -> Verdict | None: ...  # noqa: D102
    def begin(self, name: str, log: Path) -> Job: ...  # noqa: D102
    def finish(self, name: str) -> list[str]: ...  # noqa: D102
    def abandon(self, name: str) -> None: ...  # noqa: D102


class Backend(Protocol):
    """Where commands run and how verdicts are shown."""

    def submit(self, node: Node, job: Job, done: Callable[[str], None]) -> None:
        """Start the job without waiting; ``done`` is called with the stage's name, from any thread, when it ended."""

    def result(self, name: str) -> JobResult:
        """How the job ended, after its last attempt."""

    def settled(self, node: Node, verdict: Verdict, message: str) -> None:
        """Show the verdict of a stage; of one that was submitted, too, once DVC has recorded it."""

    def stop(self) -> None:
        """Stop all that runs, at once."""

    def check(self) -> None:
        """Raise to end the run, for example because it was cancelled elsewhere; called every `POLL_SECONDS`."""


class Listener(Protocol):
    """Who watches: the terminal."""

    def started(self, name: str, gpus: tuple[str, ...], log: str) -> None: ...  # noqa: D102
    def settled(self, name: str, verdict: Verdict, seconds: float, message: str) -> None: ...  # noqa: D102
    def tick(self, progress: dict[str, ProgressLine]) -> None: ...  # noqa: D102
    def note(self, text: str) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Row:
    """One stage in the table of a run.

    Attributes:
        name: the stage.
        verdict: what became of it.
        seconds: wall time from its submission to its being recorded; 0 when nothing ran.
        command_seconds: wall time of its command alone, in the last attempt.
        message: why, where there is something to say.
        log: path of its log, empty when nothing ran.
    """

    name: str
    verdict: Verdict
    seconds: float = 0.0
    message: str = ""
    log: str = ""
    command_seconds: float = 0.0


@dataclass
class Schedule:
    """One run of a plan.

    Attributes:
        stages: DVC's half; called from this thread only.
        nodes: the plan, every stage after its upstream.
        backend: where commands run.
        slots: what may run at once.
        logs: folder for the log of each stage.
        listeners: who is told.
        keep_going: after a failure, go on with what does not depend on it; otherwise start nothing more.
        launchers: prefix of a stage's commands, where it has one.
        limited_here: whether stages are stopped here at their time limit; not where a cluster does it.
    """

    stages: Stages
    nodes: Sequence[Node]
    backend: Backend
    slots: Slots
    logs: Path
    listeners: Sequence[Listener] = ()
    keep_going: bool = True
    launchers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limited_here: bool = True
    rows: dict[str, Row] = field(default_factory=dict)
    _jobs: dict[str, tuple[Job, float]] = field(default_factory=dict)
    _must_run: set[str] = field(default_factory=set)
    _done: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)

    def run(self) -> list[Row]:
        """Run the plan to its end; rows in the order of the plan.

        Stages that fail are rows, not exceptions. Whatever ends it early (Ctrl-C, a cancel, an error of ours) stops
        what runs and frees DVC's locks first. Call ``slots.check`` before: a plan that needs more than there is would
        wait for ever.
        """
        try:
            while len(self.rows) < len(self.nodes):
                if not self._advance():
                    self._wait()
        except BaseException:
            self.backend.stop()
            # What had ended by then is worth recording; nothing may keep the rest from being freed.
            with suppress(Exception):
                self._drain()
            for name in list(self._jobs):
                with suppress(Exception):
                    self.stages.abandon(name)
            raise
        return [self.rows[node.name] for node in self.nodes]

    def _advance(self) -> bool:
        """Settle or start whatever can be; whether anything was."""
        moved = False
        for node in self.nodes:
            # Record what has ended before starting more: a crash then loses as little as possible.
            moved |= self._drain()
            if (
                node.name not in self.rows
                and node.name not in self._jobs
                and all(up in self.rows for up in node.upstream)
            ):
                moved |= self._visit(node)
        return moved

    def _visit(self, node: Node) -> bool:
        failed = [up for up in node.upstream if not self.rows[up].verdict.good]
        if failed:
            stopped = all(self.rows[up].verdict is Verdict.NOT_STARTED for up in failed)
            verdict = Verdict.NOT_STARTED if stopped else Verdict.UPSTREAM_FAILED
            self._settle(node, verdict, f"it depends on {', '.join(failed)}")
            return True
        try:
            if node.name not in self._must_run:
                verdict_now = self.stages.settle(node.name)
                if verdict_now is not None:
                    self._settle(node, verdict_now)
                    return True
                self._must_run.add(node.name)
            if self._stopping():
                self._settle(node, Verdict.NOT_STARTED, "an earlier stage failed and --fail-fast was given")
                return True
            return self._start(node)
        except Exception as error:
            self.slots.give_back(node.name)
            self._settle(node, Verdict.FAILED, _sentence(error))
            return True

    def _start(self, node: Node) -> bool:
        gpus = self.slots.take(node.name, node.resources)
        if gpus is None:
            return False
        job = self.stages.begin(node.name, self.logs / f"{node.name}.log")
        job = job.launched_by(self.launchers.get(node.name, ()), limited_here=self.limited_here)
        job = job.on_gpus(gpus) if self.slots.hands_out_gpus else job
        self._jobs[node.name] = (job, time.monotonic())
        for listener in self.listeners:
            listener.started(node.name, gpus, job.log)
        self.backend.submit(node, job, self._done.put)
        return True

    def _drain(self, wait: float = 0.0) -> bool:
        """Record every stage that has ended since the last call, waiting up to ``wait`` seconds for the first."""
        drained = False
        while True:
            try:
                name = self._done.get(block=wait > 0 and not drained, timeout=wait or None)
            except queue.Empty:
                return drained
            self._record(name)
            drained = True

    def _record(self, name: str) -> None:
        node = next(node for node in self.nodes if node.name == name)
        job, _ = self._jobs[name]
        result = self.backend.result(name)
        verdict, message = Verdict.FAILED, failure_sentence(node, job, result)
        try:
            if result.returncode == 0 and not result.timed_out and not result.stopped:
                edited = self.stages.finish(name)
                verdict, message = Verdict.COMPLETED, ""
                if edited:
                    message = f"{', '.join(edited)} changed while it ran, so it is out of date and runs again next time"
            else:
                self.stages.abandon(name)
        except Exception as error:
            message = _sentence(error)
        self.slots.give_back(name)
        self._settle(node, verdict, message, result.seconds)

    def _settle(self, node: Node, verdict: Verdict, message: str = "", command_seconds: float = 0.0) -> None:
        job, begun = self._jobs.pop(node.name, (None, 0.0))
        seconds = time.monotonic() - begun if job else 0.0
        self.rows[node.name] = Row(node.name, verdict, seconds, message, job.log if job else "", command_seconds)
        self.backend.settled(node, verdict, message)
        for listener in self.listeners:
            listener.settled(node.name, verdict, seconds, message)

    def _stopping(self) -> bool:
        return not self.keep_going and any(row.verdict is Verdict.FAILED for row in self.rows.values())

    def _wait(self) -> None:
        """Wait a moment for a stage to end; show progress meanwhile."""
        found = {name: read_progress(job.progress) for name, (job, _) in self._jobs.items()}
        for listener in self.listeners:
            listener.tick({name: line for name, line in found.items() if line is not None})
        self._drain(POLL_SECONDS)
        self.backend.check()


def _sentence(error: Exception) -> str:
    """What a stage's row says of an error: ours as they are, others (a file system, a library) with their kind."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def failure_sentence(node: Node, job: Job, result: JobResult) -> str:
    """Why an attempt failed, in words."""
    if result.stopped:
        return "stopped"
    if result.timed_out:
        return f"stopped after {node.resources.timeout:g} s, its time limit (meta.timeout); log: {job.log}"
    how = f"signal {-result.returncode}" if result.returncode < 0 else f"exit code {result.returncode}"
    last = f": {result.last_line}" if result.last_line else ""
    return f"{how}{last}; log: {job.log}"
