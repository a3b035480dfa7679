"""What a run leaves in Prefect's user interface: verdicts, figures, other tables, and the progress of each stage.

An artifact is a courtesy. Whatever goes wrong while one is made (no report yet, no server, a full database) becomes a
line in the log and never the failure of a run.
"""

from __future__ import annotations

import base64
import contextvars
import re
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import MissingContextError
from prefect.logging import get_logger, get_run_logger

from rlheals.orchestration.console import duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rlheals.orchestration.job import ProgressLine
    from rlheals.orchestration.schedule import Row

MOST_BYTES = 1_500_000
"""One artifact is one row of Prefect's database, loaded whole by the page that shows it."""
SECONDS_BETWEEN_UPDATES = 2.0
_SENDER = "stage-progress"


def artifact_key(*parts: str) -> str:
    """A key Prefect takes: lower-case letters, digits and dashes.

    >>> artifact_key("stage", "probe_sft@mini-tiny-0")
    'stage-probe-sft-mini-tiny-0'
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def publish_table(rows: Sequence[Mapping[str, Any]], key: str, description: str) -> None:
    """A table artifact of the current run; nothing for no rows."""
    with _never_fatal(f"the table {key}"):
        if rows:
            create_table_artifact([dict(row) for row in rows], key=artifact_key(key), description=description)


def publish_markdown(text: str, key: str, description: str) -> None:
    """A markdown artifact of the current run; nothing for an empty text."""
    with _never_fatal(f"the page {key}"):
        if text:
            create_markdown_artifact(text, key=artifact_key(key), description=description)


def verdict_table(rows: Sequence[Row], key: str = "verdicts") -> None:
    """Table artifact: each stage with DVC's verdict, its seconds and why; where the logs are stands above it."""
    table = [
        {
            "stage": row.name,
            "verdict": str(row.verdict),
            "seconds": round(row.seconds, 1) if row.log else None,
            "message": row.message,
        }
        for row in rows
    ]
    # A column for them would not fit, and the pages take NAME@MODEL.log for an address to write to.
    folders = sorted({str(Path(row.log).parent).removeprefix(f"{Path.cwd()}/") for row in rows if row.log})
    logs = f" Logs: {', '.join(folders)}" if folders else ""
    publish_table(table, key, f"Verdicts of {len(table)} stages.{logs}")


def figures(profile: str, root: Path, key: str = "report") -> None:
    """Markdown artifact: the figures of ``reports/<profile>`` inline, and where the whole report is."""
    with _never_fatal(f"the figures of {profile}"):
        publish_markdown(report_page(root / "reports" / profile), f"{key}-{profile}", f"Figures of {profile}.")


def report_page(report: Path, most_bytes: int = MOST_BYTES) -> str:
    """Markdown with the figures of a report in its own order, as many as fit; empty where there is no report.

    SVG is a fifth of the size of PNG here and sharp at any width, so it is preferred.

    Args:
        report: folder of the report.
        most_bytes: limit for the whole text.
    """
    index = report / "index.html"
    if not index.is_file():
        _log().info("no figures to show: there is no report at %s yet", report)
        return ""
    # No link: a browser refuses to go from a page of a server to a file, without a word.
    place = f"`{index.resolve().as_uri()}` on {socket.gethostname()}"
    lines = [f"Every figure, table and claim of the profile **{report.name}**: {place}\n"]
    size, left_out = len(lines[0].encode()), []
    for name in _figure_names(index):
        image = _image(report / "figures" / name)
        if size + len(image) > most_bytes:
            left_out.append(f"`{name}`")
        elif image:
            lines.append(image)
            size += len(image)
    if left_out:
        lines.append(f"Too large to show here: {', '.join(left_out)}.")
    return "\n".join(lines)


class StageProgress:
    """The progress artifact of the task run that makes this object.

    `update` returns at once: a server that hangs must not keep the caller from watching its child. A thread of its own
    sends the newest line, at most every `SECONDS_BETWEEN_UPDATES`; a line that completes the count does not wait.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._context = contextvars.copy_context()
        self._changed = threading.Condition()
        self._newest: ProgressLine | None = None
        self._waiting: ProgressLine | None = None
        self._sending: threading.Thread | None = None
        self._artifact: Any = None
        self._sent_at = float("-inf")
        self._broken = False

    def update(self, line: ProgressLine) -> None:
        """Show ``line``, or a newer one if that comes before it is sent."""
        with self._changed:
            if self._broken or line == self._newest:
                return
            self._newest = self._waiting = line
            self._changed.notify()
            if self._sending is None:
                # A copy, because the thread before may not have left its own quite yet.
                run = self._context.copy().run
                self._sending = threading.Thread(target=run, args=(self._send,), name=_SENDER, daemon=True)
                self._sending.start()

    def _send(self) -> None:
        while True:
            with self._changed:
                if self._waiting is None or self._broken:
                    self._sending = None
                    return
                self._changed.wait_for(self._is_complete, self._sent_at + SECONDS_BETWEEN_UPDATES - time.monotonic())
                line, self._waiting = self._waiting, None
                self._sent_at = time.monotonic()
            with _never_fatal(f"the progress of {self._name}") as outcome:
                self._show(line)
            self._broken = bool(outcome)

    def _is_complete(self) -> bool:
        """Whether nothing newer can come than what waits to be sent."""
        line = self._waiting
        return line is not None and bool(line.total) and line.done >= line.total

    def _show(self, line: ProgressLine) -> None:
        percent, words = round(100 * line.fraction, 1), progress_sentence(self._name, line)
        if self._artifact is None:
            self._artifact = create_progress_artifact(percent, key=artifact_key("stage", self._name), description=words)
        else:
            update_progress_artifact(self._artifact, progress=percent, description=words)


def wait_for_updates(seconds: float = 5.0) -> None:
    """Wait until the progress this process took is with the server."""
    for thread in threading.enumerate():
        if thread.name == _SENDER:
            thread.join(seconds)


def progress_sentence(name: str, line: ProgressLine) -> str:
    """How far a stage is.

    >>> from rlheals.orchestration.job import ProgressLine
    >>> progress_sentence("sft@mini-tiny-0", ProgressLine("sft", 120, 480, note="loss 0.31", eta=61.0))
    'sft@mini-tiny-0: sft 120/480 steps, loss 0.31, 1 min 01 s left'
    """
    count = f"{line.done}/{line.total} {line.unit}s" if line.total else f"{line.done} {line.unit}s"
    left = f"{duration(line.eta)} left" if line.eta else ""
    return f"{name}: " + ", ".join(part for part in (f"{line.label} {count}", line.note, left) if part)


@contextmanager
def _never_fatal(what: str) -> Iterator[list[Exception]]:
    """Log an error of the body instead of raising it; it is then in the list given."""
    outcome: list[Exception] = []
    try:
        yield outcome
    except Exception as error:
        outcome.append(error)
        _log().warning("%s cannot be shown in Prefect: %s", what, str(error) or type(error).__name__)


def _log() -> Any:
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger(__name__)


def _figure_names(index: Path) -> list[str]:
    """Names of the figures in the order of the report's page."""
    return list(dict.fromkeys(re.findall(r'"figures/([\w-]+)\.\w+"', index.read_text(encoding="utf-8"))))


def _image(stem: Path) -> str:
    """Markdown of a figure as a data URI; empty where it was not drawn."""
    for suffix, kind in ((".svg", "svg+xml"), (".png", "png")):
        path = stem.with_suffix(suffix)
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            return f"![{stem.name}](data:image/{kind};base64,{data})\n"
    return ""
