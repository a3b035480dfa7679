"""What a run of the graph looks like to a person: a live table on a terminal, dated lines anywhere else.

`RunState` is plain data that knows no terminal. `Board` listens to the scheduler (it is a
`rlheals.orchestration.schedule.Listener`), keeps that state and shows it; its methods may be called from any thread.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlheals.orchestration.job import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from rich.console import RenderableType

    from rlheals.orchestration.job import Node, ProgressLine

WAITING, RUNNING, STOPPED = "waiting", "running", "stopped"
SECONDS_BETWEEN_LINES = 30.0
"""In a log, a stage's progress is told this often."""
FRAME_LINES = 5
"""Lines of the live table that are no stages: its head with blank lines and rule, and the counts."""
STYLES = {
    Verdict.CACHED: "dim",
    Verdict.RESTORED: "cyan",
    Verdict.COMPLETED: "green",
    Verdict.FAILED: "bold red",
    Verdict.UPSTREAM_FAILED: "yellow",
    Verdict.NOT_STARTED: "yellow",
    RUNNING: "bold",
    STOPPED: "yellow",
    WAITING: "dim",
}


@dataclass
class StageLine:
    """One stage of the run.

    Attributes:
        name: the stage's address.
        state: ``waiting``, ``running``, the verdict, or ``stopped`` where the run ended before one.
        began: clock reading at its start; None for a stage that never ran.
        seconds: wall time, once settled.
        progress: newest line of the progress protocol.
        progress_at: clock reading when that line came.
        gpus: GPUs it holds while it runs.
        log: path of its log file; empty if it never ran.
        message: why it ended so, one line; may be empty.
    """

    name: str
    state: str = WAITING
    began: float | None = None
    seconds: float | None = None
    progress: ProgressLine | None = None
    progress_at: float = 0.0
    gpus: tuple[str, ...] = ()
    log: str = ""
    message: str = ""

    def eta(self, now: float) -> float | None:
        """Seconds left at clock reading ``now`` as the stage last estimated them; None where it did not."""
        if self.progress is None or self.progress.eta is None:
            return None
        return max(0.0, self.progress.eta - (now - self.progress_at))

    def elapsed(self, now: float) -> float | None:
        """Wall seconds, so far or in all; None for a stage that never ran."""
        if self.state == RUNNING and self.began is not None:
            return now - self.began
        return self.seconds


@dataclass
class RunState:
    """The state of a run; rows stand in the order of the plan."""

    rows: dict[str, StageLine] = field(default_factory=dict)
    began: float = 0.0

    def plan(self, nodes: Sequence[Node]) -> None:
        """Take up the stages of the plan, all waiting."""
        self.rows = {node.name: StageLine(node.name) for node in nodes}

    def start(self, name: str, gpus: tuple[str, ...], log: str, now: float) -> StageLine:
        """A stage starts."""
        row = self.row(name)
        row.state, row.gpus, row.log, row.began = RUNNING, gpus, log, now
        return row

    def settle(self, name: str, verdict: Verdict, seconds: float, message: str) -> StageLine:
        """A stage has its verdict."""
        row = self.row(name)
        row.state, row.seconds, row.message = verdict, seconds, " ".join(message.split())
        return row

    def report(self, name: str, line: ProgressLine, now: float) -> StageLine:
        """A running stage has told how far it is."""
        row = self.row(name)
        if row.progress != line:
            row.progress, row.progress_at = line, now
        return row

    def end(self, now: float) -> None:
        """The run is over: what still ran was stopped, what still waited never started."""
        for row in self.rows.values():
            if row.state == RUNNING:
                row.state, row.seconds = STOPPED, row.elapsed(now)
            elif row.state == WAITING:
                row.state = Verdict.NOT_STARTED

    def row(self, name: str) -> StageLine:
        """The row of a stage; made if the plan did not name it."""
        return self.rows.setdefault(name, StageLine(name))

    def counts(self) -> dict[str, int]:
        """How many rows are in each state, those that occur, verdicts first."""
        found = Counter(row.state for row in self.rows.values())
        return {state: found[state] for state in (*Verdict, STOPPED, RUNNING, WAITING) if found[state]}

    def shown(self, limit: int) -> list[StageLine]:
        """At most ``limit`` rows in the order of the plan; running and failed ones are kept longest."""
        rank = {Verdict.FAILED: 0, RUNNING: 0, WAITING: 1, Verdict.COMPLETED: 2}
        places = sorted(enumerate(self.rows.values()), key=lambda item: (rank.get(item[1].state, 3), item[0]))
        return [row for _, row in sorted(places[: max(limit, 0)], key=lambda item: item[0])]


class Board:
    """Listener of the scheduler that shows the run on ``stream``; use it as a context manager.

    Args:
        stream: where to; standard output by default.
        live: draw a live table; by default only where ``stream`` is a terminal.
        clock: seconds, monotonic.
    """

    def __init__(
        self, stream: TextIO | None = None, live: bool | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.state = RunState()
        self._clock = clock
        self._lock = threading.RLock()
        self._stream = stream or sys.stdout
        terminal = self._stream.isatty() if live is None else live
        # Without a terminal there is no width to keep to, and a cut stage name is of no use in a log.
        self._screen = Console(file=self._stream, force_terminal=terminal, width=None if terminal else 200)
        self._is_live = terminal
        self._told: dict[str, float] = {}
        self._opened = ExitStack()
        self._closed = False

    def __enter__(self) -> Self:
        self.state.began = self._clock()
        if self._is_live:
            live = Live(get_renderable=self._draw, console=self._screen, refresh_per_second=4, transient=True)
            self._opened.enter_context(live)
            self._opened.enter_context(_loggers_above_the_table())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def rows(self) -> dict[str, StageLine]:
        """The stages of the plan; empty before `planned`."""
        return self.state.rows

    def planned(self, nodes: Sequence[Node]) -> None:
        """The graph is known."""
        with self._lock:
            self.state.plan(nodes)
        self._line(f"{len(nodes)} stages to look at")

    def started(self, name: str, gpus: Sequence[str], log: str) -> None:
        """A stage starts on these GPUs and writes to ``log``."""
        with self._lock:
            self.state.start(name, tuple(gpus), log, self._clock())
            self._told[name] = self._clock()
        where = f" on GPU {', '.join(gpus)}" if gpus else ""
        self._line(f"{name}: started{where}, log {log}")

    def settled(self, name: str, verdict: Verdict, seconds: float, message: str = "") -> None:
        """A stage has its verdict after ``seconds`` of wall time."""
        with self._lock:
            row = self.state.settle(name, verdict, seconds, message)
        took = "" if row.began is None else f" in {duration(seconds)}"
        self._line(f"{name}: {verdict}{took}" + (f" ({row.message})" if row.message else ""))

    def tick(self, progress: Mapping[str, ProgressLine]) -> None:
        """The newest progress of the stages that run; cheap, to be called about once a second."""
        now = self._clock()
        for name, line in progress.items():
            with self._lock:
                row = self.state.report(name, line, now)
                due = now - self._told.get(name, self.state.began) >= SECONDS_BETWEEN_LINES
                if due:
                    self._told[name] = now
            if due:
                self._line(f"{name}: {progress_words(row, now)}")

    def note(self, text: str) -> None:
        """Anything a person should know now; stays on the screen."""
        with self._lock:
            self._screen.print(Text(text if self._is_live else f"{_time_of_day()} {text}"), soft_wrap=True)

    def close(self) -> None:
        """End the live view and print the summary, once; nothing is printed where nothing was planned."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._opened.close()  # outside the lock: the thread that draws takes it too
        if self.state.rows:
            self.state.end(self._clock())
            self._screen.print(summary(self.state, self._clock()))
            for line in failures(self.state):
                self._screen.print(Text(line), soft_wrap=True)

    def _line(self, text: str) -> None:
        if not self._is_live:
            self.note(text)

    def _draw(self) -> RenderableType:
        with self._lock:
            return live_table(self.state, self._screen.height, self._clock())


def live_table(state: RunState, height: int, now: float) -> RenderableType:
    """The rows that fit into ``height`` lines, and one line of counts under them."""
    rows = state.shown(height - FRAME_LINES)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("stage", no_wrap=True, ratio=3)
    table.add_column("state", no_wrap=True, min_width=9)
    table.add_column("progress", no_wrap=True, ratio=4)
    table.add_column("left", justify="right", no_wrap=True, min_width=8)
    table.add_column("time", justify="right", no_wrap=True, min_width=8)
    for row in rows:
        left, spent = row.eta(now) if row.state == RUNNING else None, row.elapsed(now)
        table.add_row(
            Text(row.name, style=STYLES[row.state], overflow="ellipsis"),
            Text(_state_words(row), style=STYLES[row.state]),
            _bar(row),
            "" if left is None else duration(left),
            "" if not spent else duration(spent),
        )
    hidden = len(state.rows) - len(rows)
    words = count_words(state) + (f"; {hidden} not shown" if hidden else "")
    return Group(table, Text(f"{words}; {duration(now - state.began)}", no_wrap=True, overflow="ellipsis"))


def summary(state: RunState, now: float) -> RenderableType:
    """The table at the end: every stage, its verdict and its wall time."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for row in state.rows.values():
        spent = None if row.began is None else row.elapsed(now)
        table.add_row(Text(row.name), Text(row.state, style=STYLES[row.state]), duration(spent) if spent else "")
    return Group(table, Text(f"{count_words(state)}; {duration(now - state.began)}"))


def failures(state: RunState) -> list[str]:
    """For each failed stage its message, the last line it printed and where its log is."""
    lines = []
    for row in state.rows.values():
        if row.state != Verdict.FAILED:
            continue
        parts = [row.message] if row.message else []
        # The message of an attempt that ended by itself holds both already.
        if (last := last_line(row.log)) and last not in row.message:
            parts.append(last)
        if row.log and row.log not in row.message:
            parts.append(f"log: {row.log}")
        lines.append(f"{row.name} failed: {'; '.join(parts)}")
    return lines


def last_line(log: str) -> str:
    """The last line of a log file that is not blank; empty where there is none."""
    try:
        with Path(log).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 16384))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def progress_words(row: StageLine, now: float) -> str:
    """How far a running stage is, in words.

    >>> from rlheals.orchestration.job import ProgressLine
    >>> progress_words(StageLine("sft", progress=ProgressLine("sft", 120, 480, note="loss 0.31", eta=61)), 0.0)
    '120/480 steps, 25 %, 1 min 01 s left, loss 0.31'
    """
    line = row.progress
    if line is None:
        return "running"
    left = row.eta(now)
    parts = [
        f"{line.done}/{line.total} {line.unit}s, {line.fraction:.0%}".replace("%", " %")
        if line.total
        else f"{line.done} {line.unit}s",
        "" if left is None else f"{duration(left)} left",
        line.note,
    ]
    return ", ".join(part for part in parts if part)


def count_words(state: RunState) -> str:
    """How many stages are in each state.

    >>> count_words(RunState({"a": StageLine("a"), "b": StageLine("b", state=Verdict.CACHED), "c": StageLine("c")}))
    '1 Cached, 2 waiting'
    """
    return ", ".join(f"{count} {state}" for state, count in state.counts().items())


def duration(seconds: float) -> str:
    """Wall time for people.

    >>> [duration(value) for value in (0.04, 9.94, 59.7, 61, 7384)]
    ['0.0 s', '9.9 s', '1 min 00 s', '1 min 01 s', '2 h 03 min']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _state_words(row: StageLine) -> str:
    gpus = f" gpu {','.join(row.gpus)}" if row.gpus and row.state == RUNNING else ""
    return f"{row.state}{gpus}"


def _bar(row: StageLine) -> RenderableType:
    line = row.progress
    if row.state != RUNNING:
        return Text(row.message, style=STYLES[row.state], overflow="ellipsis")
    if line is None or not line.total:
        return Text("" if line is None else f"{line.done} {line.unit}s {line.note}".rstrip(), overflow="ellipsis")
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
    grid.add_row(ProgressBar(total=line.total, completed=line.done), f"{line.fraction:4.0%}", Text(line.note))
    return grid


def _time_of_day() -> str:
    return datetime.now().astimezone().strftime("%H:%M:%S")


@contextmanager
def _loggers_above_the_table() -> Iterator[None]:
    """Log handlers made before the live view hold the bare terminal; while it is drawn they write above it.

    Prefect's handler prints through a rich console of its own, which holds the stream a second time.
    """
    swapped: list[tuple[object, str, object]] = []
    bare = {id(sys.__stdout__): sys.stdout, id(sys.__stderr__): sys.stderr}
    for handler in _stream_handlers():
        for owner, attribute in ((handler, "stream"), (getattr(handler, "console", None), "file")):
            old = getattr(owner, attribute, None)
            if owner is not None and id(old) in bare:
                swapped.append((owner, attribute, old))
                setattr(owner, attribute, bare[id(old)])
    try:
        yield
    finally:
        for owner, attribute, old in swapped:
            setattr(owner, attribute, old)


def _stream_handlers() -> list[logging.Handler]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    found = [handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers]
    return [handler for handler in found if isinstance(handler, logging.StreamHandler)]
