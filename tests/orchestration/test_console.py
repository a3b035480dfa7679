from __future__ import annotations

import io
import logging
import re
import sys
import threading
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rlheals.orchestration.console import (
    FRAME_LINES,
    RUNNING,
    WAITING,
    Board,
    RunState,
    duration,
    failures,
    last_line,
    live_table,
)
from rlheals.orchestration.job import Node, ProgressLine, Resources, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def nodes(*names: str) -> list[Node]:
    return [Node(name, names[max(0, index - 1) : index], Resources()) for index, name in enumerate(names)]


def plain(clock: Clock | None = None) -> tuple[Board, io.StringIO]:
    stream = io.StringIO()
    return Board(stream, live=False, clock=clock or Clock()), stream


def drawn(state: RunState, width: int, height: int, now: float = 1000.0) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, height=height, force_terminal=False).print(live_table(state, height, now))
    return stream.getvalue()


def test_a_log_has_dated_lines_for_start_progress_and_end() -> None:
    clock = Clock()
    board, stream = plain(clock)
    with board:
        board.planned(nodes("dataset@m-0", "sft@m-0"))
        board.settled("dataset@m-0", Verdict.CACHED, 0.0, "")
        board.started("sft@m-0", ("1",), "/logs/sft.log")
        clock.now += 31
        board.tick({"sft@m-0": ProgressLine("sft", 120, 480, note="loss 0.3", eta=93.0)})
        clock.now += 9
        board.settled("sft@m-0", Verdict.COMPLETED, 40.0, "")
    lines = stream.getvalue().splitlines()
    told = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert told == [
        "2 stages to look at",
        "dataset@m-0: Cached",
        "sft@m-0: started on GPU 1, log /logs/sft.log",
        "sft@m-0: 120/480 steps, 25 %, 1 min 33 s left, loss 0.3",
        "sft@m-0: Completed in 40 s",
    ]
    assert re.search(r"sft@m-0 +Completed +40 s", stream.getvalue())
    assert "1 Cached, 1 Completed; 40 s" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_log_tells_progress_at_most_every_half_minute() -> None:
    clock = Clock()
    board, stream = plain(clock)
    board.planned(nodes("sft"))
    board.started("sft", (), "")
    for second in range(120):
        clock.now += 1
        board.tick({"sft": ProgressLine("sft", second, 120)})
    assert stream.getvalue().count("/120 steps") == 4


def test_a_failure_is_told_with_its_last_line_and_log(tmp_path: Path) -> None:
    log = tmp_path / "sft.log"
    log.write_bytes(b"step 1\nValueError: \xff no [such] file\n\n  \n")
    board, stream = plain()
    with board:
        board.planned(nodes("sft", "report"))
        board.started("sft", (), str(log))
        board.settled("sft", Verdict.FAILED, 3.0, "exit code 1")
        board.settled("report", Verdict.UPSTREAM_FAILED, 0.0, "it depends on sft")
    end = stream.getvalue().splitlines()[-1]
    assert end == f"sft failed: exit code 1; ValueError: \N{REPLACEMENT CHARACTER} no [such] file; log: {log}"
    # The message of the scheduler may hold them already.
    board.settled("sft", Verdict.FAILED, 3.0, f"exit code 1: {last_line(str(log))}; log: {log}")
    assert failures(board.state) == [f"sft failed: exit code 1: {last_line(str(log))}; log: {log}"]


def test_the_summary_is_printed_once_and_only_after_a_plan() -> None:
    board, stream = plain()
    with board:
        pass
    assert stream.getvalue() == ""
    board, stream = plain()
    with board:
        board.planned(nodes("sft", "report"))
        board.started("sft", (), "")
        board.close()
    assert stream.getvalue().count("1 NotStarted, 1 stopped") == 1


def test_the_live_table_keeps_running_and_failed_stages_when_there_is_no_room() -> None:
    state = RunState(began=1000.0)
    state.plan(nodes(*(f"stage@{index:02d}" for index in range(40))))
    for index in range(30):
        state.settle(f"stage@{index:02d}", Verdict.CACHED, 0.0, "")
    state.settle("stage@05", Verdict.FAILED, 2.0, "exit code 1")
    state.start("stage@33", ("0", "1"), "", 1000.0)
    state.report("stage@33", ProgressLine("sft", 5, 10, note="loss 1.5", eta=60.0), 1000.0)
    text = drawn(state, 100, 12, now=1010.0)
    assert len(text.splitlines()) <= 12
    assert "stage@05" in text
    assert re.search(r"stage@33 +running gpu 0,1 .*50% loss 1.5 +50 s +10 s", text)
    assert "29 Cached, 1 Failed, 1 running, 9 waiting; 33 not shown; 10 s" in text
    assert "stage@00" not in text


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([*Verdict, RUNNING, WAITING]), min_size=1, max_size=30),
    st.integers(0, 40),
    st.integers(20, 200),
)
def test_the_live_table_fits_any_window(states: list[str], height: int, width: int) -> None:
    state = RunState(began=1000.0)
    state.plan(nodes(*(f"stage[{index}]@a-long-name-for-a-model-{index}" for index in range(len(states)))))
    for row, value in zip(state.rows.values(), states, strict=True):
        row.state = value
        row.began = 1000.0
        row.progress = ProgressLine("x", 1, 0, note="n" * 300)
    shown = state.shown(height - FRAME_LINES)
    assert len(shown) == min(len(states), max(height - FRAME_LINES, 0))
    assert len(drawn(state, width, height).splitlines()) <= max(height, FRAME_LINES)
    order = list(state.rows)
    assert [order.index(row.name) for row in shown] == sorted(order.index(row.name) for row in shown)
    urgent = [row for row in state.rows.values() if row.state in (RUNNING, Verdict.FAILED)]
    assert all(row in shown for row in urgent) or all(row in urgent for row in shown)
    assert sum(state.counts().values()) == len(states)


def test_a_live_view_ends_with_the_summary_and_lets_others_write_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    # A log handler made before the view holds the bare stream, as Prefect's does.
    monkeypatch.setattr(sys, "__stderr__", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    logger = logging.getLogger("test_console")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        with Board(stream, live=True) as board:
            board.planned(nodes("sft"))
            assert handler.stream is not stream
            logger.error("a line of somebody else")
            board.started("sft", (), "")
            board.note("a note")
        assert handler.stream is stream
    finally:
        logger.removeHandler(handler)
    text = stream.getvalue()
    assert "a line of somebody else" in text
    assert "a note" in text
    assert text.rstrip().endswith("s")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor was not given back"


def test_any_thread_may_tell_while_the_view_is_drawn() -> None:
    names = [f"stage{index}" for index in range(40)]
    with Board(io.StringIO(), live=True) as board:
        board.planned(nodes(*names))

        def work(own: list[str]) -> None:
            for name in own:
                board.started(name, (), "")
                for step in range(20):
                    board.tick({name: ProgressLine("x", step, 20)})
                board.settled(name, Verdict.COMPLETED, 0.1, "")

        threads = [threading.Thread(target=work, args=(names[index::4],)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert board.state.counts() == {Verdict.COMPLETED: 40}


@given(st.floats(0, 1e6))
def test_durations_are_within_their_rounding(seconds: float) -> None:
    units = {"s": 1.0, "min": 60.0, "h": 3600.0}
    parts = duration(seconds).split()
    value = sum(float(number) * units[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True))
    assert abs(value - seconds) <= (0.051 if seconds < 9.95 else 60 if seconds >= 3599 else 0.51)
