from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlheals.orchestration.execute import read_progress
from rlheals.orchestration.job import ProgressLine
from rlheals.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "x.progress.jsonl"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    monkeypatch.setenv("RLHEALS_PROGRESS_FD", str(descriptor))
    yield path
    os.close(descriptor)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_lines_without_a_terminal(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("sft", 40, every=10)
    for _ in range(4):
        clock[0] += 6
        progress.update(10, "loss 1.5")
    assert capsys.readouterr().err.splitlines() == [
        "sft: 20/40 steps, 50 %, 12 s, ETA 12 s loss 1.5",
        "sft: 40/40 steps, 100 %, 24 s, ETA 0 s loss 1.5",
    ]


def test_a_resumed_count_estimates_from_its_own_steps(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("sft", 40, start=20, every=5)
    clock[0] += 10
    progress.update(10)
    assert capsys.readouterr().err == "sft: 30/40 steps, 75 %, 10 s, ETA 10 s\n"


def test_json_lines_start_at_once_come_twice_a_second_and_end(clock: list[float], file: Path) -> None:
    progress = Progress("probe", 100, unit="prompt", start=10)
    assert records(file) == [{"label": "probe", "done": 10, "total": 100, "unit": "prompt", "note": "", "eta": None}]
    for _ in range(90):
        clock[0] += 0.125
        progress.update(note="x" * 500)
    lines = records(file)
    assert [line["done"] for line in lines[:4]] == [10, 14, 18, 22]
    assert lines[1]["eta"] == pytest.approx(86 * 0.125, abs=0.06)
    assert lines[-1] == {"label": "probe", "done": 100, "total": 100, "unit": "prompt", "note": "x" * 200, "eta": 0.0}
    assert len(lines) == 1 + 90 // 4 + 1
    # What the executor makes of it.
    assert read_progress(file) == ProgressLine("probe", 100, 100, "prompt", "x" * 200, 0.0)


def test_a_total_that_was_too_low_is_still_throttled(clock: list[float], file: Path) -> None:
    progress = Progress("x", 1)
    for _ in range(50):
        clock[0] += 0.01
        progress.update()
    assert len(records(file)) <= 3


def test_a_total_of_nothing(file: Path) -> None:
    Progress("x", 0).update(0)
    assert all(record["done"] == record["total"] == 0 for record in records(file))
    assert read_progress(file) is not None


@pytest.mark.parametrize("value", ["", "x", "-1", "99999", str(2**70)])
def test_a_bad_descriptor_is_ignored(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RLHEALS_PROGRESS_FD", value)
    Progress("x", 1).update()


def test_a_descriptor_closed_on_the_way_ends_the_reporting_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setenv("RLHEALS_PROGRESS_FD", str(writer))
    progress = Progress("x", 2)
    os.close(reader)
    progress.update()
    progress.update()
    os.close(writer)
    assert progress.done == 2


def test_a_descriptor_that_is_another_file_by_now_is_not_written_to(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = file.stat()
    monkeypatch.setenv("RLHEALS_PROGRESS_ID", f"{status.st_dev}:{status.st_ino}")
    Progress("x", 1)
    assert len(records(file)) == 1
    other = tmp_path / "other"
    other.touch()
    status = other.stat()
    monkeypatch.setenv("RLHEALS_PROGRESS_ID", f"{status.st_dev}:{status.st_ino}")
    Progress("x", 1)
    assert len(records(file)) == 1


def test_a_named_file_is_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"label": "before"}\n')
    monkeypatch.setenv("RLHEALS_PROGRESS_FILE", str(path))
    Progress("x", 1).update()
    assert [record["label"] for record in records(path)] == ["before", "x", "x"]


@pytest.mark.parametrize("name", ["no/such/folder/x", "", "nul\\0l"])
def test_a_file_that_cannot_be_written_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHEALS_PROGRESS_FILE", name)
    Progress("x", 1).update()


def test_nothing_is_written_where_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Progress("x", 1).update()
    assert list(tmp_path.iterdir()) == []


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys, rlheals.progress; print([name for name in ('pydantic', 'torch', 'numpy') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert out.stdout == "[]\n"
