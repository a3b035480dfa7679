from __future__ import annotations

import base64
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import artifacts
from flows.artifacts import StageProgress, artifact_key, report_page, wait_for_updates
from rlheals.orchestration.job import ProgressLine, Verdict
from rlheals.orchestration.schedule import Row

SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'/>"


class Log:
    """Collects what is logged, formatted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str, *values: Any) -> None:
        self.lines.append(text % values)

    warning = info


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(artifacts, "_log", lambda: log)
    return log


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, log: Log) -> list[SimpleNamespace]:
    """What was made in Prefect, instead of making it."""
    found: list[SimpleNamespace] = []

    def keep(value: Any, **named: Any) -> str:
        found.append(SimpleNamespace(value=value, **named))
        return f"artifact-{len(found)}"

    for name in ("table", "markdown", "progress"):
        monkeypatch.setattr(artifacts, f"create_{name}_artifact", keep)
    monkeypatch.setattr(
        artifacts, "update_progress_artifact", lambda id, progress, **named: keep(progress, id=id, **named)
    )
    return found


def report(folder: Path, *names: str, image: bytes = SVG) -> Path:
    (folder / "figures").mkdir(parents=True)
    for name in names:
        (folder / "figures" / f"{name}.svg").write_bytes(image)
    links = "".join(f'<a href="figures/{name}.html"></a><a href="figures/{name}.svg"></a>' for name in names)
    (folder / "index.html").write_text(links)
    return folder


def test_keys_are_what_prefect_takes() -> None:
    assert artifact_key("stage", "sft@Qwen2.5_7B-0") == "stage-sft-qwen2-5-7b-0"
    assert re.fullmatch(r"[a-z0-9-]+", artifact_key("report", "mini/é@x"))


def test_the_verdicts_are_a_table(made: list[SimpleNamespace]) -> None:
    artifacts.verdict_table(
        [Row("a", Verdict.CACHED), Row("b", Verdict.FAILED, 3.14159, "exit code 1", str(Path.cwd() / "runs/b.log"))]
    )
    (table,) = made
    assert table.key == "verdicts"
    assert table.description == "Verdicts of 2 stages. Logs: runs"
    assert table.value == [
        {"stage": "a", "verdict": "Cached", "seconds": None, "message": ""},
        {"stage": "b", "verdict": "Failed", "seconds": 3.1, "message": "exit code 1"},
    ]
    artifacts.verdict_table([])
    assert len(made) == 1


def test_the_figures_are_inline_in_the_order_of_the_report(tmp_path: Path, made: list[SimpleNamespace]) -> None:
    folder = report(tmp_path / "reports" / "mini", "losses", "accuracy", "gone")
    (folder / "figures" / "gone.svg").unlink()
    artifacts.figures("mini", tmp_path)
    (page,) = made
    assert page.key == "report-mini"
    assert (folder / "index.html").as_uri() in page.value
    images = re.findall(r"!\[(\w+)\]\(data:image/svg\+xml;base64,([^)]+)\)", page.value)
    assert [name for name, _ in images] == ["losses", "accuracy"]
    assert base64.b64decode(images[0][1]) == SVG


def test_a_figure_without_svg_is_shown_as_png(tmp_path: Path) -> None:
    folder = report(tmp_path / "mini", "losses")
    (folder / "figures" / "losses.svg").rename(folder / "figures" / "losses.png")
    assert "![losses](data:image/png;base64," in report_page(folder)


def test_a_report_with_large_figures_stays_within_its_limit(tmp_path: Path) -> None:
    folder = report(tmp_path / "mini", "small", "large", "last")
    (folder / "figures" / "large.svg").write_bytes(b"x" * 5000)
    text = report_page(folder, most_bytes=3000)
    assert len(text.encode()) <= 3000 + 100
    assert text.endswith("Too large to show here: `large`.")
    assert "![last]" in text


def test_without_a_report_there_is_a_line_in_the_log(tmp_path: Path, made: list[SimpleNamespace], log: Log) -> None:
    artifacts.figures("mini", tmp_path)
    assert made == []
    assert log.lines == [f"no figures to show: there is no report at {tmp_path}/reports/mini yet"]


def test_no_error_of_the_server_reaches_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Log) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("all attempts failed")

    for name in ("table", "markdown", "progress"):
        monkeypatch.setattr(artifacts, f"create_{name}_artifact", refuse)
    artifacts.verdict_table([Row("a", Verdict.CACHED)])
    report(tmp_path / "reports" / "mini", "losses")
    artifacts.figures("mini", tmp_path)
    progress = StageProgress("sft")
    for done in range(5):
        progress.update(ProgressLine("sft", 4 + done, 4))
        wait_for_updates()
    assert log.lines == [
        "the table verdicts cannot be shown in Prefect: all attempts failed",
        "the page report-mini cannot be shown in Prefect: all attempts failed",
        "the progress of sft cannot be shown in Prefect: all attempts failed",
    ]


def test_an_unreadable_report_does_not_reach_the_run(tmp_path: Path, log: Log) -> None:
    folder = report(tmp_path / "reports" / "mini", "losses")
    (folder / "index.html").write_bytes(b"\xff\xfe\xfa")
    artifacts.figures("mini", tmp_path)
    assert "cannot be shown" in log.lines[0]


def test_progress_is_one_artifact_that_gets_the_newest_line_when_its_time_has_come(
    made: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "SECONDS_BETWEEN_UPDATES", 3.0)
    progress = StageProgress("sft@m-0")
    begun = time.monotonic()
    progress.update(ProgressLine("sft", 0, 10))
    wait_for_updates()
    for done in (1, 2, 3):
        progress.update(ProgressLine("sft", done, 10))
    assert time.monotonic() - begun < 2.9, "the caller waited"
    assert [item.value for item in made] == [0.0]
    wait_for_updates()
    assert time.monotonic() - begun > 2.9
    assert [item.value for item in made] == [0.0, 30.0]
    assert made[0].key == "stage-sft-m-0"
    assert made[1].id == "artifact-1"
    assert made[1].description == "sft@m-0: sft 3/10 steps"


def test_the_last_line_does_not_wait(made: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "SECONDS_BETWEEN_UPDATES", 600.0)
    progress = StageProgress("sft")
    progress.update(ProgressLine("sft", 0, 2))
    wait_for_updates()
    progress.update(ProgressLine("sft", 1, 2))  # waits, for ten minutes if it had to
    for _ in range(3):
        progress.update(ProgressLine("sft", 2, 2))
        wait_for_updates()
    assert [item.value for item in made] == [0.0, 100.0]


def test_a_server_that_hangs_does_not_keep_the_caller(
    made: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()
    monkeypatch.setattr(artifacts, "create_progress_artifact", lambda *_, **__: asked.set() or answer.wait(30))
    monkeypatch.setattr(artifacts, "SECONDS_BETWEEN_UPDATES", 0.0)
    progress = StageProgress("sft")
    progress.update(ProgressLine("sft", 0, 99))
    assert asked.wait(10)
    begun = time.monotonic()
    for done in range(1, 100):
        progress.update(ProgressLine("sft", done, 99))
    assert time.monotonic() - begun < 5
    answer.set()
    wait_for_updates()
    assert [item.value for item in made] == [100.0], "only the newest line was to be sent after the wait"
